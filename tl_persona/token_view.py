"""A text in its tokens, each with a style and a word on it: in the terminal through rich, in a notebook as HTML.

Which token gets which style is decided by whoever shows something: a mask, a projection.
"""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.text import Text


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
