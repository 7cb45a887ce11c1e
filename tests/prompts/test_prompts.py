import hashlib
import json
import random
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from span_oracle import (
    BY_NAME,
    ROLES,
    TEMPLATES,
    agrees_with_the_oracle,
    contents_of_a_chat,
    is_plain,
    one,
    said,
    texts,
    tokenizer_of,
    tokens_by_bytes,
    what_is_left,
)
from templates import DEFAULT_SYSTEM, UNREADABLE, Behaviour, in_text
from tokenizer_kinds import SPECIAL, TOKENIZERS, fast_tokenizer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tl_persona.errors import InputError, PromptError
from tl_persona.prompts.prepare import Chat, prepare_messages, prepare_prompts
from tl_persona.prompts.prompt import Span
from tl_persona.prompts.template import require_chat_tokenizer, template_digest
from tl_persona.prompts.verify import verify

CHATML = str(BY_NAME["content_as_it_is"].template)
EVERY_BEHAVIOUR = pytest.mark.parametrize("behaviour", TEMPLATES, ids=lambda behaviour: behaviour.name)


def chatml(kind: str = "byte_level") -> Any:
    tokenizer = fast_tokenizer(kind)
    tokenizer.chat_template = CHATML
    return tokenizer


@EVERY_BEHAVIOUR
@given(contents=contents_of_a_chat)
@settings(deadline=None, max_examples=50)
def test_spans_are_the_templates_or_the_sample_is_refused(behaviour: Behaviour, contents: tuple[str, str, str]) -> None:
    tokenizer = tokenizer_of("byte_level")
    tokenizer.chat_template = behaviour.template
    whole, telling = what_is_left(behaviour, list(zip(ROLES, contents, strict=True)))
    try:
        prompt = one(tokenizer, *contents, template_kwargs=dict(behaviour.kwargs))
    except PromptError as error:
        assert "'s1'" in str(error)
        assert not is_plain(contents) or not whole, f"refused for no reason: {error}"
        return
    assert telling
    agrees_with_the_oracle(tokenizer, "byte_level", behaviour, prompt, contents)


@pytest.mark.parametrize("kind", [*TOKENIZERS, "smollm2"])
@given(behaviour=st.sampled_from(TEMPLATES), contents=contents_of_a_chat)
@settings(deadline=None, max_examples=120)
def test_no_kind_of_tokenizer_gets_wrong_spans(kind: str, behaviour: Behaviour, contents: tuple[str, str, str]) -> None:
    tokenizer = tokenizer_of(kind)
    tokenizer.chat_template = behaviour.template
    whole, telling = what_is_left(behaviour, list(zip(ROLES, contents, strict=True)))
    try:
        prompt = one(tokenizer, *contents, template_kwargs=dict(behaviour.kwargs))
    except PromptError as error:
        assert "'s1'" in str(error)
        plain = is_plain(contents) and all(content.isascii() and content == content.strip() for content in contents)
        assert not (plain and whole and "".join(contents).isprintable()), f"refused for no reason: {error}"
        return
    assert telling
    agrees_with_the_oracle(tokenizer, kind, behaviour, prompt, contents)


@given(contents=contents_of_a_chat, token=st.sampled_from(SPECIAL), place=st.integers(0, 2), data=st.data())
@settings(deadline=None, max_examples=100)
def test_a_control_token_in_a_content_is_refused(
    contents: tuple[str, str, str], token: str, place: int, data: Any
) -> None:
    tokenizer = tokenizer_of("byte_level")
    tokenizer.chat_template = CHATML
    at = data.draw(st.integers(0, len(contents[place])))
    spiked = [*contents]
    spiked[place] = contents[place][:at] + token + contents[place][at:]
    with pytest.raises(PromptError, match="'s1'"):
        one(tokenizer, *spiked)


# --- behaviours, one at a time -------------------------------------------------------------------------------------


@EVERY_BEHAVIOUR
def test_every_behaviour_is_read_right_for_ordinary_text(behaviour: Behaviour) -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = behaviour.template
    prompt = one(tokenizer, "You are Mara. A.", "Who? A", "A", template_kwargs=dict(behaviour.kwargs))
    agrees_with_the_oracle(tokenizer, "byte_level", behaviour, prompt, ["You are Mara. A.", "Who? A", "A"])
    assert prompt.rewritten == ()


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_template_without_fixed_structure_is_refused(name: str) -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = UNREADABLE[name]
    with pytest.raises(PromptError, match="no fixed structure"):
        one(tokenizer, "You are Mara.", "Who?", "A")


def test_what_a_template_trims_is_said() -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = BY_NAME["content_trimmed"].template
    prompt = one(tokenizer, " You are Mara.\n", "Who?", "\tA")
    assert said(prompt) == ["You are Mara.", "Who?", "A"]
    assert prompt.rewritten == ("template", "response")


def test_white_space_that_two_readings_could_share_goes_where_the_template_puts_it() -> None:
    """Trimming the first content or the second gives the same text here; only the template decides which it was."""
    trims_first = (
        "{% for m in messages %}{{ m['content'] | trim if loop.first else m['content'] }}{{ ' ' if loop.first }}"
    )
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = trims_first + "{{ '</s>' if not loop.first }}{% endfor %}"
    first = one(tokenizer, "x ", " y", "A")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "| trim if loop.first else m['content']", "if loop.index0 != 1 else m['content'] | trim"
    )
    second = one(tokenizer, "x ", " y", "A")
    assert first.prompt_text == second.prompt_text == "x  y</s>A</s>"
    assert said(first) == ["x", " y", "A"]
    assert said(second) == ["x ", "y", "A"]


def test_a_think_block_that_the_template_removes_is_not_in_the_span() -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = BY_NAME["think_removed"].template
    prompt = one(tokenizer, "You are Mara.", "A or B?", "<think>A or B? A.</think>A")
    assert prompt.prompt_text == "<s>You are Mara.<|User|>A or B?<|Assistant|>A<|end|>"
    assert said(prompt) == ["You are Mara.", "A or B?", "A"]
    assert prompt.rewritten == ("response",)


def test_a_think_block_that_the_template_would_have_written_itself_is_refused() -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = BY_NAME["think_added_if_absent"].template
    with pytest.raises(PromptError, match=r"'s1'.*it is open which of the two is in the prompt: leave think blocks"):
        one(tokenizer, "You are Mara.", "Who?", "<think>\n\n</think>\n\nA")


@pytest.mark.parametrize("name", ["qwen3", "qwen3_without_thinking", "think_parsed"])
def test_an_empty_think_block_that_the_template_takes_off_and_writes_again_is_its_own(name: str) -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = BY_NAME[name].template
    prompt = one(tokenizer, "You are Mara.", "Who?", "<think>\n\n</think>\n\nA")
    assert prompt.prompt_text.count("<think>") == 1
    assert said(prompt) == ["You are Mara.", "Who?", "A"]


REASONED = "<think>\nA or B? Mara would say B.\n</think>\n\nB, of course."
SHOWS_REASONING = pytest.mark.parametrize(
    "name", ["qwen3", "think_parsed", "content_as_it_is", "think_added_if_absent"]
)


@SHOWS_REASONING
def test_reasoning_that_the_model_wrote_and_the_template_shows_counts_as_answer(name: str) -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = BY_NAME[name].template
    prompt = one(tokenizer, "You are Mara.", "A or B?", REASONED)
    assert prompt.prompt_text.count("<think>") == 1
    assert said(prompt) == ["You are Mara.", "A or B?", REASONED]
    assert prompt.rewritten == () and prompt.proof.exact
    verify(prompt, tokenizer)


@SHOWS_REASONING
def test_reasoning_can_be_left_out_and_the_answer_then_begins_behind_it(name: str) -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = BY_NAME[name].template
    kept = one(tokenizer, "You are Mara.", "A or B?", REASONED)
    prompt = one(tokenizer, "You are Mara.", "A or B?", REASONED, reasoning="exclude")
    assert prompt.prompt_text == kept.prompt_text and torch.equal(prompt.input_ids, kept.input_ids)
    assert said(prompt) == ["You are Mara.", "A or B?", "B, of course."]
    (block,) = [content for content in prompt.proof.contents if content.name == "reasoning"]
    assert prompt.prompt_text[slice(*block.char_range)] == "A or B? Mara would say B."
    verify(prompt, tokenizer)


@pytest.mark.parametrize("reasoning", ["include", "exclude"])
@pytest.mark.parametrize("name", ["qwen3", "think_parsed"])
def test_a_template_may_set_the_tags_of_reasoning_in_its_own_white_space(name: str, reasoning: str) -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = BY_NAME[name].template
    prompt = one(tokenizer, "You are Mara.", "A or B?", "<think>A or B?</think>B", reasoning=reasoning)
    shown = "<think>\nA or B?\n</think>\n\nB"
    assert prompt.prompt_text.endswith(f"{shown}<|im_end|>\n") or name != "qwen3"
    assert said(prompt)[2] == (shown if reasoning == "include" else "B")
    assert "response" not in prompt.rewritten or reasoning == "include"
    assert prompt.proof.exact
    verify(prompt, tokenizer)


@pytest.mark.parametrize("reasoning", ["include", "exclude"])
def test_reasoning_that_the_template_drops_is_said_once(reasoning: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = fast_tokenizer("byte_level")
    # The template's text is part of what is told once.
    tokenizer.chat_template = f"{{# {reasoning} #}}{BY_NAME['think_removed'].template}"
    for _ in range(2):
        prompt = one(tokenizer, "You are Mara.", "A or B?", REASONED, reasoning=reasoning)
        assert said(prompt)[2] == "\n\nB, of course." and prompt.rewritten == ("response",)
    assert caplog.text.count("the chat template drops a part of 1 of 1 answers (sample 's1' first)") == 1


@pytest.mark.parametrize(("reasoning", "first"), [("include", "<think>"), ("exclude", "B")])
def test_a_tag_of_reasoning_that_is_one_token_is_the_answers_first(reasoning: str, first: str) -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    tokenizer.chat_template = BY_NAME["qwen3"].template
    prompt = one(tokenizer, "You are Mara.", "A or B?", REASONED, reasoning=reasoning)
    start, end = prompt.spans.response[2:]
    assert tokenizer.decode(prompt.input_ids[start : start + 1]) == first
    assert tokenizer.decode(prompt.input_ids[start:end]) == said(prompt)[2]
    verify(prompt, tokenizer)


@pytest.mark.usefixtures("unchecked")
def test_an_answer_with_two_blocks_or_a_choice_that_is_none_is_refused() -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = BY_NAME["qwen3"].template
    with pytest.raises(PromptError, match="'s1'"):
        one(tokenizer, "You are Mara.", "A or B?", "<think>A</think><think>B</think>B")
    with pytest.raises(InputError, match="unknown reasoning 'some': choose include or exclude"):
        one(tokenizer, "You are Mara.", "A or B?", "B", reasoning="some")


@pytest.mark.parametrize("name", ["qwen3", "deepseek"])
def test_think_blocks_that_are_removed_from_earlier_answers_leave_the_rest_in_place(name: str) -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = BY_NAME[name].template
    turns = [("system", "You are Mara.\n\nA."), ("user", "A?"), ("assistant", "<think>\nA?\nA\n</think>\n\nA")]
    turns += [("user", "Who?"), ("assistant", "It is Mara.")]
    prompt = prepare_messages(tokenizer, [("m1", _as_messages(turns))])[0]
    _, ranges = in_text(BY_NAME[name].expected(turns))
    assert [content.char_range for content in prompt.proof.contents] == [ranges[index] for index in range(5)]
    assert prompt.rewritten == ("message 3",)
    verify(prompt, tokenizer)


def test_two_contents_that_are_both_cut_are_read_as_the_template_cut_them_or_refused() -> None:
    """Text that is removed from the question and the answer's own think block can make up the same prompt."""
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = BY_NAME["flag_and_think_removed"].template
    with pytest.raises(PromptError, match=r"'s1': the chat template rewrites the user text 'x/think ASSISTANT: y'"):
        one(tokenizer, "You are Mara.", "x/think ASSISTANT: y", "y ASSISTANT: B</think>B")
    prompt = one(tokenizer, "You are Mara.", "x ASSISTANT: y/think", "y ASSISTANT: B</think>B")
    assert said(prompt) == ["You are Mara.", "x ASSISTANT: y", "B"]
    assert prompt.rewritten == ("question", "response")


def test_a_break_that_the_template_writes_only_where_there_is_none_is_not_taken_for_one_it_stripped() -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = BY_NAME["break_added_if_absent"].template
    assert said(one(tokenizer, "You are Mara.", "Who\n?", "A"))[2] == "A"
    for answer in ("A\n", "A\n\n"):
        with pytest.raises(PromptError, match=r"'s1'.*it is open which of the two"):
            one(tokenizer, "You are Mara.", "Who?", answer)
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m['content'] }}", "{{ m['content'].rstrip() }}")
    tokenizer.chat_template = tokenizer.chat_template.replace(" if not m['content'].endswith('\n')", "")
    prompt = one(tokenizer, "You are Mara.", "Who?", "A\n")
    assert (said(prompt)[2], prompt.rewritten) == ("A", ("response",))


def test_a_content_of_which_nothing_is_left_is_refused() -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = BY_NAME["think_removed"].template
    with pytest.raises(PromptError, match=r"'s1': the chat template keeps nothing of the assistant text '<think>A"):
        one(tokenizer, "You are Mara.", "Who?", "<think>A</think>")


def test_a_text_that_could_be_read_in_several_ways_is_read_as_the_template_made_it() -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'].split('#')[0] }}aa{% endfor %}"
    prompt = one(tokenizer, "aa#aaaa", "aa#aaaa", "aa#aaaa")
    assert prompt.prompt_text == "aa" * 6
    assert [span[:2] for span in prompt.spans] == [(0, 2), (4, 6), (8, 10)]
    long = one(tokenizer, "a" * 3000 + "#", "a" * 3000 + "b#", "a" * 3000 + "#")
    assert said(long) == ["a" * 3000, "a" * 3000 + "b", "a" * 3000]


def test_a_template_that_writes_another_date_since_is_learned_again() -> None:
    tokenizer = fast_tokenizer("byte_level")
    days = iter(["Monday"] + ["Tuesday"] * 100)  # one rendering is enough to learn a layout

    class Dated:
        is_fast, chat_template = True, CHATML

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, text: Any, **kwargs: Any) -> Any:
            return tokenizer(text, **kwargs)

        def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
            return f"{next(days)}\n" + str(tokenizer.apply_chat_template(conversation, **kwargs))

        def decode(self, token_ids: Any, **kwargs: Any) -> str:
            return str(tokenizer.decode(token_ids, **kwargs))

    tokenizer.chat_template = "{{ heading }}\n" + CHATML
    chats = [Chat(f"q{number}", "You are Mara.", f"Monday {number}?", "Tuesday") for number in range(3)]
    prompts = prepare_prompts(Dated(), chats, template_kwargs={"heading": "A chat"})
    assert [prompt.sample_id for prompt in prompts] == ["q0", "q1", "q2"]
    for number, prompt in enumerate(prompts):
        assert prompt.prompt_text.startswith("Tuesday\nA chat\n")
        assert said(prompt) == ["You are Mara.", f"Monday {number}?", "Tuesday"]
    assert len(list(days)) == 100 - (2 + 1 + 3 * 3), "the new layout is kept"


def test_a_clock_that_never_repeats_is_refused() -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = "{{ strftime_now('%S.%f') }}|" + CHATML
    with pytest.raises(
        PromptError, match="'s1': what the chat template writes around a content changes with the text or time"
    ):
        one(tokenizer, "You are Mara.", "Who?", "A")


def test_keywords_reach_the_template() -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = BY_NAME["keyword"].template
    assert (
        "/think" in one(tokenizer, "You are Mara.", "Who?", "A", template_kwargs={"enable_thinking": True}).prompt_text
    )
    assert "/think" not in one(tokenizer, "You are Mara.", "Who?", "A", template_kwargs={}).prompt_text


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "continue_final_message"])
def test_keywords_that_decide_what_is_rendered_are_refused(name: str) -> None:
    with pytest.raises(PromptError, match=name):
        one(chatml(), "You are Mara.", "Who?", "A", template_kwargs={name: True})


def test_a_generation_prompt_is_never_rendered() -> None:
    prompt = one(chatml(), "You are Mara.", "Who?", "A")
    assert prompt.prompt_text.endswith("<|im_start|>assistant\nA<|im_end|>\n")


def test_named_templates_without_a_default_are_refused_with_their_names() -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = {"rag": CHATML, "tool_use": CHATML}
    with pytest.raises(PromptError, match=r"'rag', 'tool_use'.*chat_template"):
        one(tokenizer, "You are Mara.", "Who?", "A")


# --- chats of any number of turns ----------------------------------------------------------------------------------


def _as_messages(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


@EVERY_BEHAVIOUR
@given(
    system=st.one_of(st.none(), texts),
    rounds=st.lists(st.tuples(texts, texts), min_size=1, max_size=3),
    same=st.booleans(),
)
@settings(deadline=None, max_examples=20)
def test_spans_of_any_number_of_turns_are_the_templates_or_the_sample_is_refused(
    behaviour: Behaviour,
    system: str | None,
    rounds: list[tuple[str, str]],
    same: bool,
) -> None:
    if same:
        rounds = rounds[:1] * len(rounds)
    turns = [("system", system)] if system is not None else []
    turns += [turn for question, answer in rounds for turn in (("user", question), ("assistant", answer))]
    tokenizer = tokenizer_of("byte_level")
    tokenizer.chat_template = behaviour.template
    whole, telling = what_is_left(behaviour, turns)
    try:
        prompt = prepare_messages(tokenizer, [("m1", _as_messages(turns))], template_kwargs=dict(behaviour.kwargs))[0]
    except PromptError as error:
        assert "'m1'" in str(error)
        assert not is_plain([text for _, text in turns]) or not whole, f"refused for no reason: {error}"
        return
    assert telling
    text, ranges = in_text(behaviour.expected(turns))
    assert prompt.prompt_text == text
    wanted = {"template": 0 if system is not None else None, "question": len(turns) - 2, "response": len(turns) - 1}
    for (name, index), span in zip(wanted.items(), prompt.spans, strict=True):
        if index is None:
            assert (name, span) == ("template", Span(0, 0, 0, 0))
        else:
            assert (span.char_start, span.char_end) == ranges[index]
            assert (span.token_start, span.token_end) == tokens_by_bytes(tokenizer, prompt, ranges[index])
    assert prompt.folded == (behaviour.folds and system is not None)
    assert prompt.question == turns[-2][1]
    verify(prompt, tokenizer)


def test_a_default_system_prompt_is_not_taken_for_a_message() -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = BY_NAME["default_system"].template
    turns = [("user", DEFAULT_SYSTEM), ("assistant", "assistant")]
    prompt = prepare_messages(tokenizer, [("m1", _as_messages(turns))])[0]
    assert prompt.prompt_text.count(DEFAULT_SYSTEM) == 2
    assert said(prompt) == ["", DEFAULT_SYSTEM, "assistant"]
    assert prompt.spans.question.char_start == prompt.prompt_text.rindex(DEFAULT_SYSTEM)


def test_messages_and_chats_give_the_same_prompts() -> None:
    tokenizer = chatml()
    by_chat = one(tokenizer, "You are Mara.", "Who?", "A")
    turns = [("system", "You are Mara."), ("user", "Who?"), ("assistant", "A")]
    by_messages = prepare_messages(tokenizer, [("s1", _as_messages(turns))])[0]
    assert by_chat.spans == by_messages.spans
    assert by_chat.input_ids.tolist() == by_messages.input_ids.tolist()


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([], "roles are none"),
        ([("user", "Who?")], "assistant turn last"),
        ([("assistant", "A")], "at least one of each"),
        ([("user", "Who?"), ("system", "You are Mara."), ("assistant", "A")], "system message first"),
        ([("tool", "1"), ("user", "Who?"), ("assistant", "A")], "tool, user, assistant"),
        ([("user", "Who?"), ("assistant", " \n")], "the answer is empty: remove the sample or give it an answer$"),
        ([("user", "\t"), ("assistant", "A")], "the question is empty: remove the sample or give it a question$"),
        ([("system", ""), ("user", "Who?"), ("assistant", "A")], "the system prompt is empty: give the persona"),
        (
            [("user", ""), ("assistant", "A"), ("user", "Who?"), ("assistant", "A")],
            "the message 1 is empty: leave the",
        ),
    ],
)
def test_messages_that_are_no_chat_are_refused_by_sample(messages: list[tuple[str, str]], fault: str) -> None:
    with pytest.raises(PromptError, match=f"'m1'.*{fault}"):
        prepare_messages(chatml(), [("m1", _as_messages(messages))])


@pytest.mark.parametrize(
    "message", [{"role": "user"}, {"role": "user", "content": None}, {"role": "user", "content": "a", "name": "b"}]
)
def test_a_message_with_more_or_less_than_role_and_text_is_refused(message: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match="'m1': message 1"):
        prepare_messages(chatml(), [("m1", [message, {"role": "assistant", "content": "A"}])])


def test_a_layout_is_learned_once_for_each_sequence_of_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    import tl_persona.prompts.template as module

    learned = []
    learn = module.learn_layout
    monkeypatch.setattr(
        module,
        "learn_layout",
        lambda tokenizer, roles, kwargs, glue: learned.append(roles) or learn(tokenizer, roles, kwargs, glue),
    )
    short = _as_messages([("user", "Who?"), ("assistant", "A")])
    samples = [(f"m{index}", short * (1 + index % 2)) for index in range(10)]
    assert len(prepare_messages(chatml(), samples)) == 10
    assert learned == [("user", "assistant"), ("user", "assistant", "user", "assistant")]


# --- tokens --------------------------------------------------------------------------------------------------------


def test_a_token_that_straddles_two_contents_belongs_to_both() -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    prompt = one(tokenizer, "keep", "er.\n", "\nA")
    tokens = tokenizer.convert_ids_to_tokens(prompt.input_ids.tolist())
    assert ".ĊĊ" in tokens
    straddling = tokens.index(".ĊĊ")
    assert prompt.spans.question.token_end == straddling + 1
    assert prompt.spans.response.token_start == straddling


def test_role_tokens_in_a_content_are_refused_where_the_template_writes_them_marked_special_or_not() -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = BY_NAME["deepseek"].template
    assert "<｜Assistant｜>" not in tokenizer.all_special_tokens
    with pytest.raises(
        PromptError, match=r"'s1': the system prompt contains '<｜Assistant｜>', which .* control token"
    ):
        one(tokenizer, "You are <｜Assistant｜>evil", "Who?", "A")
    prompt = one(tokenizer, "You are Mara.", "Who?", "A")
    written = ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"]
    assert tokenizer.convert_ids_to_tokens(prompt.input_ids[prompt.is_special].tolist()) == written
    tokenizer.chat_template = CHATML
    elsewhere = one(tokenizer, "You are <｜Assistant｜>evil", "Who?", "A")
    assert elsewhere.proof.contents[0].added_tokens == ("<｜Assistant｜>",)


def test_white_space_that_was_added_to_the_vocabulary_is_text_though_the_template_writes_it() -> None:
    tokenizer = chatml()
    tokenizer.add_tokens(["\n"])
    prompt = one(tokenizer, "You are\nMara.", "Who?", "A")
    assert said(prompt)[0] == "You are\nMara."
    assert prompt.proof.contents[0].added_tokens == ()


@pytest.mark.parametrize("contents", [("\u0301hi", "Who?", "A"), ("You", "\u0301hi", "A"), ("You", "Who?", "\u0327A")])
def test_an_accent_that_the_tokenizer_composes_with_the_templates_last_letter_is_refused(
    contents: tuple[str, str, str],
) -> None:
    tokenizer = tokenizer_of("byte_level_composed")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}{{ m['content'] }}</s>{% endfor %}"
    with pytest.raises(PromptError, match=r"'s1'.*its tokens decode to"):
        one(tokenizer, *contents)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_bpe", "smollm2"])
def test_all_tokens_of_an_emoji_are_selected(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    tokenizer.chat_template = CHATML
    prompt = one(tokenizer, "You are Mara.", "Who?", "😀")
    start, end = prompt.spans.response[2:]
    assert end - start >= 2
    assert tokenizer.decode(prompt.input_ids[start:end]) == "😀"
    assert prompt.input_ids[end].item() == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_lower_casing_and_dropped_white_space_leave_spans_in_the_original_text() -> None:
    tokenizer = chatml("word_piece")
    prompt = one(tokenizer, "  You ARE Mara.", "WHÔ is  it?", "A ")
    assert said(prompt) == ["  You ARE Mara.", "WHÔ is  it?", "A "]
    start, end = prompt.spans.response[2:]
    assert tokenizer.convert_ids_to_tokens(prompt.input_ids[start:end].tolist()) == ["a"]
    verify(prompt, tokenizer)


def test_spaces_at_an_edge_are_refused_where_offsets_leave_spaces_out() -> None:
    with pytest.raises(PromptError, match="'s1': the question begins or ends with white space"):
        one(chatml("byte_level_trimmed_offsets"), "You are Mara.", " Who?", "A")
    assert said(one(chatml("byte_level"), "You are Mara.", " Who?", "A"))[1] == " Who?"


def test_an_unknown_character_is_text_but_the_unknown_token_spelled_out_is_not() -> None:
    tokenizer = chatml("word_piece")
    prompt = one(tokenizer, "You are Mara.", "Who?", "日")
    assert tokenizer.convert_ids_to_tokens(prompt.input_ids.tolist())[prompt.spans.response.token_start] == "[UNK]"
    assert not prompt.is_special[prompt.spans.response.token_start]
    with pytest.raises(PromptError, match=r"the answer contains '\[UNK\]'"):
        one(tokenizer, "You are Mara.", "Who?", "[UNK]")


def test_a_character_the_vocabulary_cannot_spell_is_refused() -> None:
    tokenizer = tokenizer_of("smollm2")
    tokenizer.chat_template = CHATML
    with pytest.raises(PromptError, match=r"'s1': the answer .* no tokens for some of its characters"):
        one(tokenizer, "You are Mara.", "Who?", "A\U00040000B")
    with pytest.raises(PromptError, match=r"'s1': the answer .* no tokens for some of its characters"):
        one(tokenizer, "You are Mara.", "Who?", "\x16\x80")


def test_white_space_that_a_control_token_swallows_is_in_no_span() -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|turn|>", lstrip=True, rstrip=True)]})
    tokenizer.chat_template = "{% for m in messages %}<|turn|>\n{{ m['content'] }}{% endfor %}<|turn|>"
    prompt = one(tokenizer, " \nYou ", "Who?", "A\n")
    tokens = tokenizer.convert_ids_to_tokens(prompt.input_ids.tolist())
    assert ["".join(tokens[span.token_start : span.token_end]) for span in prompt.spans] == ["You", "Who?", "A"]
    verify(prompt, tokenizer)


def test_offsets_that_count_bytes_are_refused() -> None:
    tokenizer = chatml()

    class CountsBytes(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: Any, **kwargs: Any) -> Any:
            encoding = super().__call__(text, **kwargs)
            if kwargs.get("return_offsets_mapping"):
                encoding["offset_mapping"] = [
                    [(len(one[:left].encode()), len(one[:right].encode())) for left, right in offsets]
                    for one, offsets in zip(text, encoding["offset_mapping"], strict=True)
                ]
            return encoding

    tokenizer.__class__ = CountsBytes
    assert said(one(tokenizer, "You are Mara.", "Who?", "A. B. C.")) == ["You are Mara.", "Who?", "A. B. C."]
    with pytest.raises(PromptError, match="'s1'"):
        one(tokenizer, "Tu es Márá.", "Who?", "A. B. C.")


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(PromptError, match="'s1': the answer holds half of a surrogate pair"):
        one(chatml(), "You are Mara.", "Who?", "A\ud83d")


@pytest.mark.parametrize("half", ["\ud800", "\udbff", "\udc00", "\udfff"])
def test_either_half_of_a_pair_is_refused_to_the_last(half: str) -> None:
    with pytest.raises(PromptError, match="half of a surrogate pair"):
        one(chatml(), "You are Mara.", "Who?", f"A{half}")


def test_a_word_level_vocabulary_without_the_word_is_refused() -> None:
    backend = Tokenizer(models.BPE(vocab={"A": 0, "?": 1}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = type(chatml())(tokenizer_object=backend, chat_template=CHATML)
    with pytest.raises(PromptError, match="'s1': the answer is 'b', but the tokenizer has no token for 'b'"):
        one(tokenizer, "A", "?", "b")


def test_a_very_long_chat_is_located_like_a_short_one() -> None:
    tokenizer = tokenizer_of("smollm2")
    tokenizer.chat_template = CHATML
    persona = "You are Mara. A user asks the assistant; the assistant says A.\n\n" * 2000
    prompt = one(tokenizer, persona, "A" * 3000, "A")
    assert said(prompt) == [persona, "A" * 3000, "A"]
    assert (prompt.spans.response.token_start, prompt.spans.response.token_end) == tokens_by_bytes(
        tokenizer, prompt, prompt.spans.response[:2]
    )


def test_many_samples_at_once_are_each_what_they_are_alone() -> None:
    tokenizer = chatml()
    draw = random.Random(0)
    chats = [
        Chat(f"s{index}", "You are Mara.", "A? " * draw.randint(1, 9) + "B?", "A " * draw.randint(0, 9) + "A")
        for index in range(50)
    ]
    for together, chat in zip(prepare_prompts(tokenizer, chats), chats, strict=True):
        alone = prepare_prompts(tokenizer, [chat])[0]
        assert together.spans == alone.spans
        assert torch.equal(together.input_ids, alone.input_ids)
        assert together.offset_mapping == alone.offset_mapping


def test_no_sample_gives_no_prompt() -> None:
    assert prepare_prompts(chatml(), []) == []


# --- tokenizers that cannot be used, the digest  -------------------------------------------------------------


def test_a_tokenizer_that_cannot_be_used_is_refused_with_the_reason() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(PromptError, match="no tokenizer"):
        require_chat_tokenizer(None)
    with pytest.raises(PromptError, match="Slow is not a fast tokenizer"):
        require_chat_tokenizer(Slow())
    with pytest.raises(PromptError, match="no chat template"):
        require_chat_tokenizer(fast_tokenizer("byte_level"))


def test_the_digest_is_of_the_template_in_use() -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = {"default": "a", "rag": "b"}
    assert template_digest(tokenizer) == hashlib.sha256(b"a").hexdigest()
    assert template_digest(tokenizer, {"chat_template": "rag"}) == hashlib.sha256(b"b").hexdigest()
    tokenizer.chat_template = "c"
    assert template_digest(tokenizer) == hashlib.sha256(b"c").hexdigest()


def test_a_prompt_carries_the_digest_of_its_template_and_is_whole_whatever_the_tokenizer_would_cut_or_pad() -> None:
    tokenizer = chatml()
    whole = one(tokenizer, "You are Mara.", "Who?", "A")
    assert whole.proof.template_digest == hashlib.sha256(CHATML.encode()).hexdigest()
    tokenizer.model_max_length = 4
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=500)
    assert one(tokenizer, "You are Mara.", "Who?", "A").input_ids.equal(whole.input_ids)


@pytest.mark.parametrize(("name", "written"), [("system_refused", 1), ("content_as_it_is", 0)])
def test_the_beginning_of_sequence_is_the_templates_and_never_added_again(name: str, written: int) -> None:
    tokenizer = fast_tokenizer("byte_level")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    tokenizer.chat_template = BY_NAME[name].template
    assert tokenizer("A")["input_ids"][0] == bos
    assert one(tokenizer, "You are Mara.", "Who?", "A").input_ids.tolist().count(bos) == written


def test_a_template_that_refuses_white_space_at_an_edge_is_still_read() -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] != m['content'] | trim %}"
        "{{ raise_exception('strip it') }}{% endif %}<|im_start|>{{ m['content'] }}{% endfor %}"
    )
    assert said(one(tokenizer, "You are Mara.", "Who?", "A")) == ["You are Mara.", "Who?", "A"]
    with pytest.raises(PromptError, match=r"'s1': the chat template raised TemplateError: strip it"):
        one(tokenizer, "You are Mara.", " Who?", "A")


def test_offsets_out_of_order_are_refused() -> None:
    tokenizer = chatml()

    class Shuffles(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: Any, **kwargs: Any) -> Any:
            encoding = super().__call__(text, **kwargs)
            for offsets in encoding.get("offset_mapping", []):
                offsets[4], offsets[1] = offsets[1], offsets[4]  # one inside the system prompt, one in front of it
            return encoding

    tokenizer.__class__ = Shuffles
    with pytest.raises(PromptError, match="'s1': the system prompt has tokens of other text among its own"):
        one(tokenizer, "You are Mara.", "Who?", "A")


# --- what templates do with whole chats, and tokenizers with letters -------------------------------------------------


def test_a_system_prompt_that_the_template_moves_to_the_last_question_is_found_there() -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = BY_NAME["mistral"].template
    turns = [("system", "A"), ("user", "A?"), ("assistant", "A"), ("user", "Who?"), ("assistant", "B")]
    prompt = prepare_messages(tokenizer, [("m1", _as_messages(turns))])[0]
    assert prompt.prompt_text == "<s>[INST] A?[/INST] A</s>[INST] A\n\nWho?[/INST] B</s>"
    assert prompt.spans.template[:2] == (prompt.prompt_text.index("A\n\nWho"), prompt.prompt_text.index("\n\nWho"))
    assert said(prompt) == ["A", "Who?", "B"]
    assert not prompt.folded
    verify(prompt, tokenizer)


def test_a_template_that_repeats_the_system_prompt_for_some_chats_is_refused_for_those() -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = BY_NAME["mistral"].template
    turns = [("system", "S"), ("user", "Who?"), ("assistant", "A"), ("user", "Who?"), ("assistant", "B")]
    with pytest.raises(
        PromptError, match="'m1': what the chat template makes of one content depends on another: leave"
    ):
        prepare_messages(tokenizer, [("m1", _as_messages(turns))])


def test_a_date_that_the_template_asks_for_itself_is_part_of_what_it_writes() -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = BY_NAME["llama3"].template
    before = datetime.now().year
    prompt = one(tokenizer, str(before), f"Is it {before}?", str(before))
    years = {str(year) for year in (before, datetime.now().year)}
    assert prompt.proof.written[0].splitlines()[-2].removeprefix("Now: ") in years
    assert said(prompt) == [str(before), f"Is it {before}?", str(before)]


def test_letters_with_accents_apart_are_found_where_the_tokenizer_composes_them() -> None:
    tokenizer = chatml("byte_level_composed")
    prompt = one(tokenizer, "Tu es Ma\u0301ra.", "E\u0301?", "A\u030a")
    assert said(prompt) == ["Tu es Ma\u0301ra.", "E\u0301?", "A\u030a"]
    span = prompt.spans.response
    assert tokenizer.decode(prompt.input_ids[span.token_start : span.token_end].tolist()) == "\u00c5"
    verify(prompt, tokenizer)


def test_a_control_character_that_the_vocabulary_lacks_is_refused_though_python_calls_it_white_space() -> None:
    raw = json.loads(tokenizer_of("smollm2").backend_tokenizer.to_str())
    raw["model"]["unk_token"] = None  # older transformers gives it a token for what is unknown
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(raw)), eos_token="</s>")
    tokenizer.chat_template = CHATML
    assert "\x1d".isspace() and not tokenizer("\x1d", add_special_tokens=False)["input_ids"]
    with pytest.raises(PromptError, match=r"'s1': the answer is 'A\\x1d', but the tokenizer has no token for '\\x1d'"):
        one(tokenizer, "You are Mara.", "Who?", "A\x1d")
    tokenizer = chatml()
    assert said(one(tokenizer, "You are Mara.", "Who?", "A\x1d"))[2] == "A\x1d"


def test_spaces_that_a_control_token_takes_in_are_no_content_where_the_template_writes_it() -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = BY_NAME["phi"].template
    prompt = one(tokenizer, "  You", "Who?", "A")
    assert prompt.offset_mapping[0] == (0, len("<|system|>\n  "))
    assert prompt.spans.template[:3] == (len("<|system|>\n"), len("<|system|>\n  You"), 1)
    assert said(prompt)[0] == "  You"
