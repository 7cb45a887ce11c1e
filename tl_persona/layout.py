"""The fixed text that a chat template writes around contents, and how renderings are read with it.

A rendering that has markers in the place of some contents shows what the template makes of the others: all that stands
between the fixed text. Nothing is searched for, and nothing is guessed from the contents. Learning a layout from a
tokenizer and rendering with it are `templates`' work, and what was read is judged in `reading`.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count, islice, product
from typing import NamedTuple

from tl_persona.errors import PromptError

FOLD_SEPARATOR = "\n\n"
"""What stands between system prompt and question where both share the user turn."""

CharRange = tuple[int, int]
"""A half-open range of characters."""

ADVICE = "leave think blocks and template tags out of the text, or use a template that leaves contents as they are"
"""What to do about a text that a template does not leave alone."""

_SYLLABLES = tuple(map("".join, product("bdfgklmnprstv", "aeiou")))


def absent_word(texts: Iterable[str], first: str = "K") -> str:
    """A word of letters that stands in none of the texts.

    Args:
        texts: Texts that must not contain it.
        first: Its first letter, a capital other than X. It occurs nowhere else in the word, so that no word can stand
            across the border between a text and the word itself.
    """
    # Letters only, and no letter twice in a row: no template has a reason to trim, escape, split or squeeze them.
    texts = tuple(texts)
    usual = f"{first}zbadeX"
    if not any(usual in text for text in texts):
        return usual
    for length in count(2):
        taken = {found[1] for text in texts for found in re.finditer(f"{first}z(?=([a-z]{{{2 * length}}})X)", text)}
        tried = islice(product(_SYLLABLES, repeat=length), len(taken) + 1)
        word = next((word for word in map("".join, tried) if word not in taken), None)
        if word is not None:
            return f"{first}z{word}X"
    raise AssertionError("there are more words than a text can hold")


class Markers(NamedTuple):
    """Contents to put in the place of real ones, one for each role, all of which begin with `stem`."""

    stem: str
    contents: tuple[str, ...]


def draw_markers(roles: Sequence[str], texts: Iterable[str]) -> Markers:
    """Markers that none of the texts contains, not even their common beginning."""
    stem = absent_word(texts, "Q")
    digits = str.maketrans("0123456789", "abcdefghij")
    # The capitals after role and index keep one marker from being part of another.
    return Markers(stem, tuple(f"{stem}{role}{str(index).translate(digits)}XvzK" for index, role in enumerate(roles)))


@dataclass(frozen=True)
class ChatLayout:
    """What a chat template writes around the contents of messages with certain roles.

    Contents are the system prompt, where there is one, and the text of every turn, in order.

    Attributes:
        roles: The role of each content.
        order: The contents by their place in the text: some templates move the system prompt to the last user turn.
        segments: The fixed text before, between and after the contents, by place.
        folded: True where the template takes no system message, so that the system prompt was put in front of the
            first user turn. A template that folds by itself takes one.
    """

    roles: tuple[str, ...]
    order: tuple[int, ...]
    segments: tuple[str, ...]
    folded: bool

    def messages(self, contents: Sequence[str]) -> list[dict[str, str]]:
        """The contents as messages."""
        return as_messages(self.roles, contents, folded=self.folded)

    def every_second(self, contents: Sequence[str], first: int, marks: Markers) -> list[str]:
        """The contents at the places `first`, `first + 2` and so on, and markers at those between."""
        shown = list(marks.contents)
        for index in self.order[first::2]:
            shown[index] = contents[index]
        return shown

    def read(self, text: str, shown: Sequence[str], marks: Markers) -> dict[int, str]:
        """What a template made of the contents that are no markers.

        Args:
            text: The rendering of `shown`.
            shown: Contents and markers, no two contents side by side in the text, so that there is one way to read it.
            marks: The markers, drawn so that neither contents nor fixed text contain one.

        Returns:
            What stands in the place of each content, by its index.

        Raises:
            PromptError: The rendering is not the fixed text, the markers, and something between.
        """
        real = [index for index in self.order if shown[index] != marks.contents[index]]
        gaps = ["(.*?)" if index in real else marks.contents[index] for index in self.order]
        found = re.fullmatch(_joined([re.escape(segment) for segment in self.segments], gaps), text, re.DOTALL)
        if found is None or text.count(marks.stem) != len(shown) - len(real):
            raise PromptError(f"what the chat template writes around a content changes with the text or time: {ADVICE}")
        return dict(zip(real, found.groups(), strict=True))

    def joined(self, kept: Sequence[str]) -> str:
        """The fixed text with what was kept of each content between."""
        return _joined(self.segments, [kept[index] for index in self.order])

    def ranges(self, kept: Sequence[str]) -> tuple[CharRange, ...]:
        """Where in `joined` each content lies."""
        ranges, position = {}, 0
        for segment, index in zip(self.segments[:-1], self.order, strict=True):
            start = position + len(segment)
            position = start + len(kept[index])
            ranges[index] = (start, position)
        return tuple(ranges[index] for index in range(len(self.roles)))

    def beside(self, index: int) -> tuple[str, str]:
        """The fixed text in front of a content and behind it."""
        place = self.order.index(index)
        return self.segments[place], self.segments[place + 1]


def as_messages(roles: Sequence[str], contents: Sequence[str], *, folded: bool) -> list[dict[str, str]]:
    """Contents as messages; folded, the first two share the user turn."""
    if folded:
        roles, contents = roles[1:], (contents[0] + FOLD_SEPARATOR + contents[1], *contents[2:])
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


def _joined(segments: Sequence[str], gaps: Sequence[str]) -> str:
    return "".join(piece for pair in zip(segments, (*gaps, ""), strict=True) for piece in pair)
