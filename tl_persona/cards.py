"""How an object introduces itself in a notebook and in a rich console: a title, some facts, and a part below them.

What the facts are is the object's own business. Everything is text until it is drawn, and escaped then.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from rich.console import Group

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
