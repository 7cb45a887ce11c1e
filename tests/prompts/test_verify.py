"""`verify` takes what the package prepares, and nothing in which a field was changed."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from span_oracle import BY_NAME, TEMPLATES, one
from templates import Behaviour
from tokenizer_kinds import fast_tokenizer

from tl_persona import MaskStrategy, QAPair, prepare_inputs
from tl_persona.errors import PromptError
from tl_persona.prompts.alignment import TokenAligner
from tl_persona.prompts.prompt import Change, Prompt, Span
from tl_persona.prompts.verify import verify


def chatml() -> Any:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = BY_NAME["content_as_it_is"].template
    return tokenizer


def _moved(prompt: Prompt, name: str, **change: int) -> Prompt:
    return replace(prompt, spans=prompt.spans._replace(**{name: getattr(prompt.spans, name)._replace(**change)}))


def test_verify_takes_what_prepare_returns_and_nothing_moved() -> None:
    tokenizer = chatml()
    prompt = one(tokenizer, "You are Mara.", "Who is it?", "It is Mara.")
    verify(prompt)
    for name, span in prompt.spans._asdict().items():
        outwards = {"char_start": -1, "char_end": 1}
        for field, step in [*outwards.items(), *((field, step) for field in Span._fields[2:] for step in (-1, 1))]:
            with pytest.raises(PromptError, match="'s1'"):
                verify(_moved(prompt, name, **{field: getattr(span, field) + step}))


def test_verify_finds_what_does_not_fit() -> None:
    tokenizer = chatml()
    prompt = one(tokenizer, "You are Mara.", "Who is it?", "It is Mara.")
    with pytest.raises(PromptError, match="one length"):
        verify(replace(prompt, input_ids=prompt.input_ids[1:], is_special=prompt.is_special[1:]))
    with pytest.raises(PromptError, match="one length"):
        verify(replace(prompt, offset_mapping=prompt.offset_mapping[1:]))
    with pytest.raises(PromptError, match="control token"):
        verify(replace(prompt, is_special=torch.ones_like(prompt.is_special)))
    with pytest.raises(PromptError, match="is empty or leaves the prompt"):
        verify(replace(prompt, spans=prompt.spans._replace(response=Span(0, 0, 0, 0))))
    with pytest.raises(PromptError, match="begins before"):
        spans = prompt.spans
        verify(replace(prompt, spans=spans._replace(question=spans.response, response=spans.question)))
    other = prompt.input_ids.clone()
    other[prompt.spans.response.token_start] = other[prompt.spans.question.token_start]
    verify(replace(prompt, input_ids=other))
    with pytest.raises(PromptError, match="decode to"):
        verify(replace(prompt, input_ids=other), tokenizer)


def test_verify_finds_a_control_token_at_the_edge_of_the_claimed_text() -> None:
    prompt = one(chatml(), "You are Mara.", "Who?", "A")
    inside = replace(prompt, is_special=prompt.is_special.clone())
    inside.is_special[prompt.spans.response.token_start] = True
    with pytest.raises(PromptError, match="holds a control token"):
        verify(inside)


@pytest.mark.parametrize("strategy", list(MaskStrategy))
def test_verify_takes_every_strategys_mask_and_no_other(strategy: MaskStrategy) -> None:
    pair = QAPair("q1", "explicit", "frq", "individual", "Who is it?", "It is Mara.")
    (prepared,) = prepare_inputs(chatml(), "You are Mara.", [pair], strategy)
    assert prepared.mask_strategy is strategy
    verify(prepared, chatml())
    for index in range(len(prepared.token_mask)):
        other = prepared.token_mask.clone()
        other[index] = ~other[index]
        with pytest.raises(PromptError, match=f"'q1': its mask does not select what {strategy} says"):
            verify(replace(prepared, token_mask=other))


@pytest.mark.parametrize(
    ("text", "tokens", "holds"),
    [
        ("\u00e9A", "\u00a9 A", True),
        ("\u00e9A", "\u00a9 z A", False),
        ("x\u00e9A", "x \u00a9 A", False),
        ("A\u00e9", "A \u00c3", True),
        ("A\u00e9", "A z \u00c3", False),
        ("A\u00e9x", "A \u00c3 x", False),
        ("\u00e9A\u00e9", "\u00a9 A \u00c3", True),
        ("\u00e9A\u00e9", "\u00a9 B \u00c3", False),
    ],
)
def test_pieces_of_a_character_across_the_border_excuse_no_other_text(text: str, tokens: str, holds: bool) -> None:
    """The first and the last token, by their offsets, have a letter of the content and bytes of the one beside it."""
    tokenizer = chatml()
    ids = np.array(tokenizer.convert_tokens_to_ids(tokens.split()))
    start = text.index("A")
    offsets = np.array([(start, start + 1)] * len(ids))
    offsets[0, 0], offsets[-1, 1] = 0, len(text)
    aligner, span = TokenAligner(tokenizer), Span(start, start + 1, 0, len(ids))
    assert "\ufffd" in tokenizer.decode(ids)
    if holds:
        aligner.check_decoding(text, span, ids, offsets)
    else:
        with pytest.raises(PromptError, match="is 'A', but its tokens decode to"):
            aligner.check_decoding(text, span, ids, offsets)


def test_verify_finds_a_text_that_is_not_what_the_template_wrote() -> None:
    prompt = one(chatml(), "You are Mara.", "Who is it?", "It is Mara.")
    changed = prompt.prompt_text.replace("user", "USER")
    with pytest.raises(PromptError, match="something else than what the template wrote"):
        verify(replace(prompt, prompt_text=changed))
    with pytest.raises(PromptError, match="which is not the question"):
        verify(replace(prompt, question="Who was it?"))


def test_verify_finds_a_span_that_covers_less_than_the_content() -> None:
    """Characters and tokens agree with each other there, but not with where the template put the answer."""
    prompt = one(chatml(), "You are Mara.", "Who?", "A. B. C.")
    answer = prompt.spans.response
    end = prompt.offset_mapping[answer.token_end - 2][1]
    shorter = Span(answer.char_start, end, answer.token_start, answer.token_end - 1)
    with pytest.raises(PromptError, match=r"response span .* is not where the template put it"):
        verify(replace(prompt, spans=prompt.spans._replace(response=shorter)))


# --- what a prompt says of its proof ---------------------------------------------------------------------------------

WRITTEN_WHERE_ORDINARY = {
    "content_as_it_is": (
        "<|im_start|>system\n",
        "<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    "system_refused": ("<s><start_of_turn>user\n", "\n\n", "<end_of_turn>\n<start_of_turn>model\n"),
    "think_added": (
        "<|im_start|>system\n",
        "<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "mistral": ("<s>[INST] ", "\n\n", "[/INST] "),
    "mistral_at_the_end": ("<s>[INST] ", "\n\n", "[/INST] "),
}


@pytest.mark.parametrize("name", WRITTEN_WHERE_ORDINARY)
def test_the_proof_has_what_the_template_wrote_itself(name: str) -> None:
    tokenizer = chatml()
    tokenizer.chat_template = BY_NAME[name].template
    proof = one(tokenizer, "You are Mara.", "Who?", "A").proof
    assert proof.written[:3] == WRITTEN_WHERE_ORDINARY[name]
    assert proof.exact and proof.rewritten == ()
    assert [content.name for content in proof.contents] == ["template", "question", "response"]


@pytest.mark.parametrize("behaviour", TEMPLATES, ids=lambda behaviour: behaviour.name)
def test_what_was_written_and_what_was_kept_make_up_the_prompt(behaviour: Behaviour) -> None:
    tokenizer = chatml()
    tokenizer.chat_template = behaviour.template
    prompt = one(tokenizer, "You are Mara. A.", "Who? A", "A", template_kwargs=dict(behaviour.kwargs))
    kept = [prompt.prompt_text[slice(*content.char_range)] for content in prompt.proof.contents]
    assert kept == ["You are Mara. A.", "Who? A", "A"]
    before, between, behind, last = prompt.proof.written
    assert before + kept[0] + between + kept[1] + behind + kept[2] + last == prompt.prompt_text


def test_the_proof_tells_kept_from_trimmed_from_cut() -> None:
    tokenizer = chatml()
    tokenizer.chat_template = BY_NAME["deepseek"].template.replace(
        "messages[0]['content']", "messages[0]['content'] | trim"
    )
    prompt = one(tokenizer, " You are Mara.", "Who?", "<think>Hm.</think>A")
    assert [content.change for content in prompt.proof.contents] == [Change.TRIMMED, Change.KEPT, Change.CUT]
    assert not prompt.proof.exact
    assert prompt.rewritten == prompt.proof.rewritten == ("template", "response")


def test_the_proof_names_added_tokens_that_stand_in_a_content() -> None:
    """They are not marked special, so they are text to the tokenizer, and yet the model has one token for each."""
    tokenizer = chatml()
    tokenizer.add_tokens(["    "])  # some tokenizers add runs of white space: nothing to tell of
    prompt = one(tokenizer, "You are Mara.", "Who <tool_response>?", "<think>    A</think>, <think>B</think>")
    named = [content.added_tokens for content in prompt.proof.contents]
    assert named == [(), ("<tool_response>",), ("<think>", "</think>")]
