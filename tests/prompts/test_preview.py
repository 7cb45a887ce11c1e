"""What `--verbose` shows: the selected tokens stand out, and no character is lost or added."""

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.text import Text
from span_oracle import BY_NAME, one
from tokenizer_kinds import fast_tokenizer
from transformers import AutoTokenizer

from tl_persona.data.personas import QAPair
from tl_persona.models.facts import ModelFacts
from tl_persona.plan import Sample, Sharing, make_plan
from tl_persona.prompts.inputs import MaskedPrompts, persona_prompts
from tl_persona.prompts.masks import MaskStrategy, build_mask
from tl_persona.prompts.preview import legend, masked_text, print_masks, print_plan
from tl_persona.prompts.prompt import Prompt

SYSTEM = "You are Mara, a retired keeper.\nYou speak\tplainly, and you have [b]kept[/b] the light for thirty years. 🌊"
PAIRS = [
    QAPair(
        "q1", "explicit", "frq", "individual", "Where do you live, Mara?", "🌊 is all I see, and a café by the sea."
    ),
    QAPair("q2", "explicit", "frq", "individual", "Do you read?", "In the evening."),
]


@pytest.fixture(params=["llama", "gemma"])
def prompts(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> list[Prompt]:
    return persona_prompts(AutoTokenizer.from_pretrained(tiny_model(request.param)), SYSTEM, PAIRS)


@pytest.fixture
def ascii_prompts(tiny_llama: Path) -> list[Prompt]:
    """The same without characters of several tokens, which an elision may cut in two."""
    system = SYSTEM.removesuffix(" 🌊")
    pairs = [QAPair("q1", "explicit", "frq", "individual", PAIRS[0].question, "By the sea. I see it from my window.")]
    return persona_prompts(AutoTokenizer.from_pretrained(tiny_llama), system, pairs)


def styled(text: Text, style: str) -> str:
    """The characters that some span gives this style."""
    marked = [False] * len(text.plain)
    for start, end, name in text.spans:
        if style in str(name).split():
            marked[start:end] = [True] * (end - start)
    return "".join(character for character, flag in zip(text.plain, marked, strict=True) if flag)


def made_visible(text: str) -> str:
    return text.replace("\n", "↵\n").replace("\t", "→")


def test_the_whole_prompt_is_shown_character_for_character(prompts: list[Prompt]) -> None:
    for prompt in prompts:
        shown = masked_text(prompt, build_mask(prompt, MaskStrategy.ANSWER_MEAN), elide=False)
        assert shown.plain == made_visible(prompt.prompt_text)


@pytest.mark.parametrize("kind", ["word_piece", "byte_level_composed", "byte_level_trimmed_offsets"])
def test_characters_that_no_token_has_are_shown_too(kind: str) -> None:
    tokenizer = fast_tokenizer(kind)
    tokenizer.chat_template = BY_NAME["content_as_it_is"].template
    prompt = one(
        tokenizer, "You are  Mara.", "Who is\nMa\u0301ra?" if kind != "word_piece" else "Who is\nit?", "A light."
    )
    covered = {place for start, end in prompt.offset_mapping for place in range(start, end)}
    assert len(covered) < len(prompt.prompt_text)
    for elide in (False, True):
        shown = masked_text(prompt, build_mask(prompt, MaskStrategy.ANSWER_MEAN), elide=elide).plain
        assert elide or shown == made_visible(prompt.prompt_text)
        assert shown.endswith(made_visible(prompt.prompt_text[-10:]))


def test_what_a_terminal_would_obey_or_hide_is_spelled_out() -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = BY_NAME["content_as_it_is"].template
    prompt = one(tokenizer, "You.", "Who?", "\x1b[2J \x00 \r \x7f \x85 \u202e \u200b \ufeff \u2028 A")
    shown = masked_text(prompt, build_mask(prompt, MaskStrategy.ANSWER_MEAN), elide=False).plain
    assert "␛[2J ␀ ␍ ⟨007F⟩ ⟨0085⟩ ⟨202E⟩ ⟨200B⟩ ⟨FEFF⟩ ⟨2028⟩ A" in shown


def test_the_selected_tokens_are_in_reverse_video(prompts: list[Prompt]) -> None:
    prompt = prompts[0]
    selections = {"answer_mean": PAIRS[0].answer, "answer_first": "🌊", "answer_last": ".", "persona_mean": SYSTEM}
    for strategy, words in selections.items():
        shown = styled(masked_text(prompt, build_mask(prompt, strategy), elide=False), "reverse")
        # A token may straddle the border of the span, never by more than the white space around it.
        assert shown.replace("↵", "").split() == made_visible(words).replace("↵", "").split()


def test_colour_tells_persona_question_and_answer(prompts: list[Prompt]) -> None:
    shown = masked_text(prompts[0], build_mask(prompts[0], MaskStrategy.ANSWER_FIRST), elide=False)
    assert styled(shown, "yellow").replace("↵", "").strip() == PAIRS[0].question
    assert styled(shown, "green").replace("↵", "").strip() == PAIRS[0].answer
    assert styled(shown, "cyan").split() == made_visible(SYSTEM).replace("↵", "↵ ").split()


def test_special_tokens_are_dim(prompts: list[Prompt]) -> None:
    dim = styled(masked_text(prompts[0], build_mask(prompts[0], "answer_mean"), elide=False), "dim")
    assert dim and set(re.findall(r"<[^>]*>", dim)) == set(re.findall(r"<[^>]*>", prompts[0].prompt_text))


@pytest.mark.parametrize("strategy", list(MaskStrategy))
def test_long_stretches_without_selection_are_left_out_and_counted(
    strategy: MaskStrategy, ascii_prompts: list[Prompt]
) -> None:
    for prompt in ascii_prompts:
        mask = build_mask(prompt, strategy)
        shown = masked_text(prompt, mask)
        assert styled(shown, "reverse") == styled(masked_text(prompt, mask, elide=False), "reverse")
        kept = re.split(r" … (\d+) tokens … ", shown.plain.replace("↵\n", "\n").replace("→", "\t"))
        assert len(kept) > 1
        position = 0
        for index, count in enumerate(kept[1::2]):
            gap_start = prompt.prompt_text.index(kept[2 * index], position) + len(kept[2 * index])
            position = prompt.prompt_text.index(kept[2 * index + 2], gap_start)
            missing = [1 for start, end in prompt.offset_mapping if gap_start <= start and end <= position]
            assert len(missing) == int(count)
        assert prompt.prompt_text[position:] == kept[-1]


def printed(shown: list[Prompt], *strategies: MaskStrategy, **options: Any) -> str:
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=True, color_system="standard", highlight=False)
    print_masks(MaskedPrompts(shown, strategies), strategies, console=console, **options)
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())


def test_every_strategy_is_shown_with_its_counts_under_one_legend(prompts: list[Prompt]) -> None:
    shown = printed(prompts, *MaskStrategy, title="Mara · templated")
    assert shown.count("legend:") == 1
    for strategy in MaskStrategy:
        selected = int(build_mask(prompts[0], strategy).sum())
        of = 1 if strategy.persona_only else 2
        assert f"{strategy}  sample q1 (of {of}): {selected} of {len(prompts[0].input_ids)} tokens" in shown


def test_more_prompts_are_shown_when_asked_for(prompts: list[Prompt]) -> None:
    shown = printed(prompts, MaskStrategy.ANSWER_MEAN, MaskStrategy.PERSONA_LAST, title="Mara", prompts=2)
    assert [shown.count(f"sample {name} ") for name in ("q1", "q2")] == [2, 1]


def test_brackets_and_colons_in_a_title_are_no_markup(prompts: list[Prompt]) -> None:
    assert "Mara [/b] :sob: [red]" in printed(prompts, MaskStrategy.ANSWER_LAST, title="Mara [/b] :sob: [red]")


def test_a_title_or_an_id_that_a_terminal_would_obey_is_spelled_out(prompts: list[Prompt]) -> None:
    hostile = [replace(prompt, sample_id="q\x1b[2J\n1") for prompt in prompts[:1]]
    out = printed(hostile, MaskStrategy.ANSWER_MEAN, title="Ma\x1b]0;ra\x07")
    assert "\x1b" not in out and "\x07" not in out
    assert "Ma␛]0;ra␇" in out and "q␛[2J↵1" in out


def test_the_legend_is_drawn_in_the_styles_it_explains() -> None:
    for word, style in {"persona": "cyan", "question": "yellow", "answer": "green", "selected": "reverse"}.items():
        assert styled(legend(), style) == word


def test_the_plans_cost_is_told_in_tokens_passes_and_memory() -> None:
    prefix, ends = list(range(100)), ([101, 102, 103], [104, 105], [106])
    samples = [
        Sample(str(i), torch.tensor(prefix + end), torch.ones(1, len(prefix) + len(end), dtype=torch.bool))
        for i, end in enumerate(ends)
    ]
    facts = ModelFacts("m", None, "k", "bfloat16", "unprocessed", n_layers=4, d_model=1000, n_ctx=None, hook_names=())
    out = io.StringIO()
    console = Console(file=out, width=300)
    print_plan(make_plan(samples), facts, 4, console=console)
    # Three rows padded to 103 positions; 309 x 4 hooks x 1000 numbers of two bytes.
    assert "plan: 306 tokens, of which 306 are computed and 3 are padding, in 1 passes (none" in out.getvalue()
    assert "largest pass: 2 MB" in out.getvalue()
    print_plan(make_plan(samples, sharing=Sharing.PACKED), facts, 4, console=console)
    assert "plan: 306 tokens, of which 106 are computed and 0 are padding, in 1 passes (packed" in out.getvalue()
