"""Shows token masks in the terminal: what each strategy selects, in colour.

Colour tells the span, reverse video the selection; long stretches that are not selected are elided.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool
from rich.console import Console
from rich.text import Text
from torch import Tensor

from tl_persona.masks import MaskStrategy
from tl_persona.models import ModelFacts
from tl_persona.plan import Plan
from tl_persona.prepared import MaskedPrompts
from tl_persona.prompts import Prompt

_SPAN_STYLES = {"template": "cyan", "question": "yellow", "response": "green"}
_SPOKEN = {"template": "persona", "question": "question", "response": "answer"}
_SPECIAL_STYLE = "dim"
_SELECTED_STYLE = "bold reverse"
_CONTEXT = 6  # tokens kept on both sides of a selection and at both ends of a prompt


def legend() -> Text:
    """What the colours mean."""
    text = Text("legend: ")
    for name, style in _SPAN_STYLES.items():
        text.append(_SPOKEN[name], style).append("  ")
    return text.append("special token", _SPECIAL_STYLE).append("  ").append("selected", _SELECTED_STYLE)


def masked_text(prompt: Prompt, mask: Bool[Tensor, "pos"], *, elide: bool = True) -> Text:
    """The prompt's text with its spans coloured and the selected tokens in reverse video.

    Args:
        prompt: A rendered chat.
        mask: True where a token is selected.
        elide: False shows every token.
    """
    selected = mask.tolist()
    shown = _shown(selected) if elide else [True] * len(selected)
    text, skipped, reached, last_piece = Text(), 0, 0, 0
    for index, (start, end) in enumerate(prompt.offset_mapping):
        if not shown[index]:
            skipped += 1
            continue
        if skipped:
            text.append(f" … {skipped} tokens … ", "dim italic")
            skipped = 0
        # Tokens that are pieces of one character, an emoji say, all have that character as their range.
        piece = prompt.prompt_text[max(start, reached) : end]
        if piece:
            last_piece, reached = len(text), end
            text.append(_visible(piece), _style(prompt, index))
        if selected[index]:
            text.stylize(_SELECTED_STYLE, last_piece)
    return text


def _shown(selected: list[bool]) -> list[bool]:
    near = [False] * len(selected)
    for index in [0, len(selected) - 1, *(i for i, flag in enumerate(selected) if flag)]:
        for neighbour in range(max(0, index - _CONTEXT), min(len(near), index + _CONTEXT + 1)):
            near[neighbour] = True
    return near


def _style(prompt: Prompt, index: int) -> str:
    for name, span in zip(prompt.spans._fields, prompt.spans, strict=True):
        if span.token_start <= index < span.token_end:
            return _SPAN_STYLES[name]
    return _SPECIAL_STYLE if bool(prompt.is_special[index]) else ""


def _visible(piece: str) -> str:
    return piece.replace("\n", "↵\n").replace("\t", "→")


def print_masks(
    masked: MaskedPrompts,
    strategies: Sequence[MaskStrategy],
    *,
    title: str,
    console: Console | None = None,
    prompts: int = 1,
) -> None:
    """Prints, for every strategy, the first prompts with the tokens it selects.

    Args:
        masked: Prompts and masks.
        strategies: Which strategies to show.
        title: Printed above.
        console: Where to print; None is standard output.
        prompts: How many prompts a strategy.
    """
    out = console or Console(highlight=False)
    out.rule(Text(title))
    out.print(legend())
    for strategy, prompt, mask in _pick(masked, strategies, prompts):
        total = len(masked.prompts_of(strategy))
        out.print(
            Text(f"\n{strategy}", "bold").append(
                f"  sample {prompt.sample_id} (of {total}): {int(mask.sum())} of {len(prompt.input_ids)} tokens",
                "not bold",
            )
        )
        out.print(masked_text(prompt, mask))


def print_plan(plan: Plan, facts: ModelFacts, n_hooks: int, *, console: Console | None = None) -> None:
    """Prints what a plan is predicted to cost: tokens given, computed and padded, and the largest pass's activations.

    Args:
        plan: From the backend that will run it; a shortcut that turns out not to be exact there costs more.
        facts: Of the model.
        n_hooks: How many hooks are read.
        console: Where to print; None is standard output.
    """
    itemsize = getattr(torch, facts.dtype).itemsize
    megabytes = plan.peak_bytes(n_hooks, facts.d_model, itemsize) / 1e6
    (console or Console(highlight=False, markup=False)).print(
        f"plan: {plan.tokens:,} tokens, of which {plan.tokens_distinct:,} are computed and "
        f"{plan.tokens_run - plan.tokens_distinct:,} are padding, in {len(plan.passes)} passes ({plan.sharing} "
        f"prefixes); activations of the largest pass: {megabytes:,.0f} MB"
    )


def _pick(
    masked: MaskedPrompts, strategies: Sequence[MaskStrategy], prompts: int
) -> Iterator[tuple[MaskStrategy, Prompt, Bool[Tensor, "pos"]]]:
    for strategy in strategies:
        for index, prompt in enumerate(masked.prompts_of(strategy)[:prompts]):
            yield strategy, prompt, masked.mask_of(strategy, index)
