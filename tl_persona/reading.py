"""Renders chats and finds what the template made of each content.

Of every chat two more renderings are made, each with markers in the place of every second content, so that what is
kept of the others stands between known text. Markers are drawn for each chat, so that none of its texts contains one.
All kept parts together must be the real rendering, character for character. A part that is less than its content must
be a piece of it that cannot be larger. Everything else is refused.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from tl_persona.errors import PromptError
from tl_persona.layout import ADVICE, CharRange, ChatLayout, Markers, absent_word, draw_markers
from tl_persona.templates import ChatTokenizer, learn_layout, render

_PLACES = 1000
"""More often no ordinary text repeats its own end; keeps a hostile one from taking minutes."""


class Rendering(NamedTuple):
    """A rendered chat, and where each content stands in it."""

    layout: ChatLayout
    text: str
    ranges: tuple[CharRange, ...]


class ChatReader:
    """Renders chats, learning the template's layout once for each sequence of roles.

    Args:
        tokenizer: From `require_chat_tokenizer`.
        kwargs: Passed to the template.
    """

    def __init__(self, tokenizer: ChatTokenizer, kwargs: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._kwargs = kwargs
        self._layouts: dict[tuple[str, ...], ChatLayout] = {}

    def read(self, roles: tuple[str, ...], contents: Sequence[str]) -> Rendering:
        """The rendering of one chat.

        Raises:
            PromptError: The template takes no such chat, or where the contents lie cannot be told for certain.
        """
        if roles not in self._layouts:
            self._layouts[roles] = learn_layout(self._tokenizer, roles, self._kwargs)
        try:
            return self._read(self._layouts[roles], contents)
        except PromptError:
            # A template that writes the date or time has another layout after midnight.
            layout = learn_layout(self._tokenizer, roles, self._kwargs)
            if layout == self._layouts[roles]:
                raise
            self._layouts[roles] = layout
        return self._read(layout, contents)

    def _read(self, layout: ChatLayout, contents: Sequence[str]) -> Rendering:
        text = self._render(layout, contents)
        marks = draw_markers(layout.roles, (text, *contents, *layout.segments))
        found: dict[int, str] = {}
        for first in (0, 1):
            found |= self._kept(layout, layout.every_second(contents, first, marks), marks)
        kept = [found[index] for index in range(len(contents))]
        if layout.joined(kept) != text:
            raise PromptError(f"what the chat template makes of one content depends on another: {ADVICE}")
        for index, content in enumerate(contents):
            if kept[index] != content:
                self._refuse_unless_cut(layout, index, content, kept[index])
        return Rendering(layout, text, layout.ranges(kept))

    def _render(self, layout: ChatLayout, contents: Sequence[str]) -> str:
        return render(self._tokenizer, layout.messages(contents), self._kwargs)

    def _kept(self, layout: ChatLayout, shown: Sequence[str], marks: Markers) -> dict[int, str]:
        return layout.read(self._render(layout, shown), shown, marks)

    def _refuse_unless_cut(self, layout: ChatLayout, index: int, content: str, kept: str) -> None:
        """Refuses a changed content unless the template cut it, and wrote what stands beside it itself."""
        what = f"the {layout.roles[index]} text {_short(content)}"
        if not kept:
            raise PromptError(f"the chat template keeps nothing of {what}: {ADVICE}")
        if kept not in content:
            raise PromptError(f"the chat template rewrites {what} as {_short(kept)}: {ADVICE}")
        before, behind = layout.beside(index)
        in_front = _most(len(before), lambda n: before[-n:] + kept in content)
        after = _most(len(behind), lambda n: kept + behind[:n] in content)
        sides = ((before[len(before) - in_front :], ""), ("", behind[:after]))
        if not all(self._writes_itself(layout, index, content, kept, *shared) for shared in sides if any(shared)):
            raise PromptError(
                f"what the chat template writes beside its part of {what} is what that text has there too, so it is "
                f"open which of the two is in the prompt: {ADVICE}"
            )

    def _writes_itself(self, layout: ChatLayout, index: int, content: str, kept: str, before: str, behind: str) -> bool:
        """Whether the template itself writes `before` or `behind` beside a kept part, as the content does too."""

        def is_kept(changed: str) -> str | None:
            marks = draw_markers(layout.roles, (changed, *layout.segments))
            shown = list(marks.contents)
            shown[index] = changed
            try:
                return self._kept(layout, shown, marks)[index]
            except PromptError:
                return None

        piece, offset = before + kept + behind, 0 if before else len(kept)
        if is_kept(_inserted(content, piece, offset, before + behind)) == kept:
            return True  # the content's own is cut, however much of it there is
        # Or the template writes it where nothing is cut, and goes on to where the content has something else there.
        other = absent_word((content, *layout.segments))
        return is_kept(piece) == piece and is_kept(_inserted(content, piece, offset and len(piece), other)) is not None


def _most(limit: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that holds, where all smaller ones from 1 on do; 0 if none does."""
    return bisect_left(range(1, limit + 1), True, key=lambda number: not holds(number))


def _inserted(content: str, piece: str, offset: int, text: str) -> str:
    """A content with a text put in at an offset of `piece`, wherever that stands."""
    places = [content.find(piece)]
    while (place := content.find(piece, places[-1] + 1)) >= 0:
        places.append(place)
        if len(places) > _PLACES:
            raise PromptError(f"{_short(piece)} stands in one text too often to tell which the template kept: {ADVICE}")
    cuts = [0, *(place + offset for place in places), len(content)]
    return text.join(content[start:end] for start, end in pairwise(cuts))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:40]} ... {text[-15:]}")
