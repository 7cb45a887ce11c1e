"""Shows in the terminal what will run: prompts, with what each strategy selects in colour, and what a plan costs.

Colour tells the span, reverse video the selection; long stretches that are not selected are elided. Characters that a
terminal would not show, or would obey, are spelled out.
"""

import unicodedata
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from tl_persona.errors import MaskError
from tl_persona.models.facts import ModelFacts
from tl_persona.plan.plan import Plan
from tl_persona.prompts.inputs import MaskedPrompts
from tl_persona.prompts.masks import MaskStrategy, build_mask
from tl_persona.prompts.prompt import Change, ContentProof, Prompt

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
            skipped, reached = 0, start
        text.append(_visible(prompt.prompt_text[reached:start]))  # no token's: dropped, or composed with what is before
        reached = max(reached, start)
        # Tokens that are pieces of one character, an emoji say, all have that character as their range.
        piece = prompt.prompt_text[max(start, reached) : end]
        if piece:
            last_piece, reached = len(text), end
            text.append(_visible(piece), _style(prompt, index))
        if selected[index]:
            text.stylize(_SELECTED_STYLE, last_piece)
    return text.append(_visible(prompt.prompt_text[reached:]))


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
    return "".join(map(_visible_character, piece))


def _visible_character(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character == "\t":
        return "→"
    if character < " ":
        return chr(0x2400 + ord(character))  # Unicode's pictures of control characters
    if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp"):
        return f"⟨{ord(character):04X}⟩"
    return character


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
    out.rule(Text(_in_one_line(title)))
    out.print(legend())
    for strategy, prompt, mask in _pick(masked, strategies, prompts):
        total = len(masked.prompts_of(strategy))
        _print_mask(out, strategy, prompt, mask, f"sample {_in_one_line(prompt.sample_id)} (of {total}): ", elide=True)


def print_prompt(
    prompt: Prompt,
    strategies: Sequence[MaskStrategy],
    *,
    title: str,
    console: Console,
    elide: bool,
    refusals: bool,
) -> None:
    """Prints one prompt under several strategies, its spans, and what the chat template wrote and changed.

    Args:
        prompt: A rendered chat.
        strategies: Which masks to show.
        title: Printed above.
        console: Where to print.
        elide: False shows every token.
        refusals: True prints why a strategy selects nothing, and goes on.

    Raises:
        MaskError: A strategy selects nothing, unless `refusals`.
    """
    console.rule(Text(_in_one_line(title)))
    console.print(legend())
    for strategy in strategies:
        try:
            mask = build_mask(prompt, strategy)
        except MaskError as error:
            if not refusals:
                raise
            console.print(Text(f"\n{strategy}", "bold").append(f"  {error}", "not bold red"))
        else:
            _print_mask(console, strategy, prompt, mask, "", elide=elide)
    console.print()
    console.print(_span_table(prompt))
    console.print()
    console.print(_template_table(prompt))


def _print_mask(
    console: Console, strategy: MaskStrategy, prompt: Prompt, mask: Bool[Tensor, "pos"], note: str, *, elide: bool
) -> None:
    count = f"  {note}{int(mask.sum())} of {len(prompt.input_ids)} tokens"
    console.print(Text(f"\n{strategy}", "bold").append(count, "not bold"))
    text = masked_text(prompt, mask, elide=elide)
    text.rstrip()
    console.print(text)


_CHANGES = {
    Change.KEPT: "as given",
    Change.TRIMMED: "white space at the ends stripped",
    Change.CUT: "cut by the template",
}


def _span_table(prompt: Prompt) -> Table:
    """The spans, one a row."""
    table = Table("text", box=None, pad_edge=False)
    for title in ("characters", "tokens"):
        table.add_column(title, justify="right")
    for title in ("first token", "last token", "in the prompt"):
        table.add_column(title, overflow="fold")
    for content in prompt.proof.contents:
        if content.name not in _SPOKEN:
            continue
        span = getattr(prompt.spans, content.name)
        first, last = (
            _in_one_line(prompt.prompt_text[slice(*prompt.offset_mapping[index])])
            for index in (span.token_start, span.token_end - 1)
        )
        table.add_row(
            Text(_SPOKEN[content.name], _SPAN_STYLES[content.name]),
            f"{span.char_start}-{span.char_end}",
            f"{span.token_start}-{span.token_end}",
            Text(first),
            Text(last),
            Text(_told(content)),
        )
    return table


def _told(content: ContentProof) -> str:
    told = _CHANGES[content.change]
    return f"{told}; one token each: {', '.join(content.added_tokens)}" if content.added_tokens else told


def _template_table(prompt: Prompt) -> Table:
    """What the template did, and what it wrote around the contents."""
    proof = prompt.proof
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    special = int(prompt.is_special.sum())
    table.add_row("tokens", f"{len(prompt.input_ids)}, {special} of them special")
    table.add_row("template", f"digest {proof.template_digest}")
    exact = "the prompt is what the template writes and the texts, character for character"
    table.add_row(
        "proof", exact if proof.exact else "the template cut a text: what is left of it was seen between markers"
    )
    if proof.folded:
        table.add_row("system prompt", "put before the question: the template takes no system message")
    names = [content.name for content in sorted(proof.contents, key=lambda content: content.char_range)]
    places = [f"before the {_SPOKEN.get(name, name)}" for name in names] + ["at the end"]
    for place, written in zip(places, proof.written, strict=True):
        table.add_row(f"written {place}", Text(_in_one_line(written) if written else "(nothing)", _SPECIAL_STYLE))
    return table


def _in_one_line(text: str) -> str:
    return _visible(text).replace("\n", "")


def _pick(
    masked: MaskedPrompts, strategies: Sequence[MaskStrategy], prompts: int
) -> Iterator[tuple[MaskStrategy, Prompt, Bool[Tensor, "pos"]]]:
    for strategy in strategies:
        for index, prompt in enumerate(masked.prompts_of(strategy)[:prompts]):
            yield strategy, prompt, masked.mask_of(strategy, index)


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
