"""How objects, texts and progress are shown: in a notebook as HTML, in the terminal through rich.

- A card: how an object introduces itself, in a title, some facts, and a part below them. Everything is text until it is
  drawn, and escaped then.
- A text in its tokens, each with a style and a word on it, which whoever shows something decides: a mask, a projection.
  Characters that a terminal would not show, or would obey, are spelled out.
- A progress bar for long work: on standard error, and silent where that is not a terminal.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

_BOX = "border:1px solid #c9c9c9;border-radius:6px;padding:.5em .8em;display:inline-block;max-width:100%"
_LABEL = "text-align:left;color:#555;font-weight:normal;padding:0 1em 0 0;vertical-align:top"


@runtime_checkable
class Drawable(Protocol):
    """What may stand below the facts: HTML for notebooks, and something that a rich console can print."""

    def _repr_html_(self) -> str: ...


@dataclass(frozen=True)
class Card:
    """An object in a few facts.

    Attributes:
        title: What it is.
        facts: What is worth knowing, by name.
        below: Shown under the facts; None for nothing.

    Example:
        >>> Card("a vector", {"norm": "<1>"})._repr_html_().count("&lt;1&gt;")
        1
    """

    title: str
    facts: Mapping[str, str]
    below: Drawable | None = None

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th scope='row' style='{_LABEL}'>{escape(name)}</th>"
            f"<td style='text-align:left'>{escape(fact)}</td></tr>"
            for name, fact in self.facts.items()
        )
        below = "" if self.below is None else self.below._repr_html_()
        return f"<div style='{_BOX}'><strong>{escape(self.title)}</strong><table>{rows}</table>{below}</div>"

    def __rich__(self) -> "Group":
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        for name, fact in self.facts.items():
            table.add_row(Text(name, "dim"), Text(fact))
        parts: list[Any] = [Text(self.title, "bold"), table]
        if self.below is not None:
            parts.append(self.below if hasattr(self.below, "__rich__") else Text(str(self.below)))
        return Group(*parts)


class Shown(ABC):
    """An object with a card: notebooks and rich consoles show it, `repr` stays what it is."""

    @abstractmethod
    def _card(self) -> Card: ...

    def _repr_html_(self) -> str:
        return self._card()._repr_html_()

    def __rich__(self) -> Card:
        return self._card()


Advance = Callable[[int], None]
"""Tells the bar how many more tokens are done."""


@contextmanager
def token_progress(
    description: str, total_tokens: int, *, computed: int | None = None, show: bool = True
) -> Iterator[Advance]:
    """A bar that counts tokens, with their rate, the time left, and how many of them need not be computed.

    Args:
        description: What is running.
        total_tokens: When the bar is full: the tokens of all texts, as a caller counts them.
        computed: How many of them the plan computes, each shared beginning once; None where nothing is shared.
        show: False keeps it silent on a terminal too.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class TokenRate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.0f} tokens/s" if speed else "")

    console = Console(stderr=True)
    if not (show and console.is_terminal):  # a bar that is switched off writes an empty line in older releases of rich
        yield lambda tokens: None
        return
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
        TextColumn(cache_hits(total_tokens, computed), style="green"),
        TokenRate(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task(description, total=total_tokens)
        yield lambda tokens: bar.advance(task, tokens)


def cache_hits(total_tokens: int, computed: int | None) -> str:
    """The share of tokens that need not be computed because another text begins with them; empty where there is none.

    Example:
        >>> cache_hits(1000, 150), cache_hits(1000, 1000), cache_hits(1000, None)
        ('85% shared', '', '')
    """
    shared = 0.0 if computed is None or not total_tokens else 1 - computed / total_tokens
    return f"{shared:.0%} shared" if shared >= 0.005 else ""


class Piece(NamedTuple):
    """Some characters of a text.

    Attributes:
        text: The characters.
        rich: Their style in the terminal.
        css: Their style in HTML.
        tip: Shown where the mouse rests on them, and read by screen readers; empty for none.
    """

    text: str
    rich: str = ""
    css: str = ""
    tip: str = ""


class TokenView(NamedTuple):
    """Pieces one after another.

    Example:
        >>> view = TokenView((Piece("By ", css="color:red"), Piece("<sea>")))
        >>> str(view.__rich__())
        'By <sea>'
        >>> "&lt;sea&gt;" in view._repr_html_()
        True
    """

    pieces: tuple[Piece, ...]

    def __rich__(self) -> "Text":
        from rich.text import Text

        text = Text()
        for piece in self.pieces:
            text.append(visible(piece.text), piece.rich)
        return text

    def _repr_html_(self) -> str:
        spans = "".join(
            f"<span style='{escape(piece.css)}' title='{escape(piece.tip)}'>{escape(visible(piece.text))}</span>"
            if piece.css or piece.tip
            else escape(visible(piece.text))
            for piece in self.pieces
        )
        return (
            "<div style='white-space:pre-wrap;font-family:ui-monospace,monospace;line-height:1.7;text-align:left;"
            f"color:#1b1b1b;background:#fff;padding:.3em'>{spans}</div>"
        )


def token_texts(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[str, str]]:
    """For each token the characters that no token has, right before it, and the characters it adds.

    Tokens that are pieces of one character, an emoji say, all have that character as their range: the first adds it.

    Example:
        >>> token_texts("a  b", [(0, 1), (3, 4), (3, 4)])
        [('', 'a'), ('  ', 'b'), ('', '')]
    """
    found, reached = [], 0
    for start, end in offsets:
        gap = text[reached:start] if end > start else ""
        piece = text[max(start, reached) : end]
        reached = max(reached, end)
        found.append((gap, piece))
    return found


def visible(piece: str) -> str:
    """White space that would not be seen, made visible."""
    return piece.replace("\n", "↵\n").replace("\t", "→")
