"""The fixed text that a chat template writes around contents, and how a rendering is read with it.

A rendering must be the fixed segments with the trimmed contents in the gaps, character for character. Where a template
cuts a content (a think block, say), what it kept is accepted only if exactly one reading of the rendering exists.
Everything else is refused. Learning a layout from a tokenizer is `templates`' work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tl_persona.errors import PromptError

FOLD_SEPARATOR = "\n\n"
"""What stands between system prompt and question where both share the user turn."""

CharRange = tuple[int, int]
"""A half-open range of characters."""

_ADVICE = "simplify the text (think blocks, template tags), or use a template that leaves it as it is"


class Trim(NamedTuple):
    """The characters a template strips from each end of a content; None stands for all white space."""

    leading: str | None
    trailing: str | None

    def apply(self, content: str) -> str:
        """What is left of a content."""
        return content.lstrip(self.leading).rstrip(self.trailing)


@dataclass(frozen=True)
class ChatLayout:
    """What a chat template writes around the contents of messages with certain roles.

    Contents are the system prompt, where there is one, and the text of every turn, in order.

    Attributes:
        roles: The role of each content.
        order: The contents by their place in the text: some templates move the system prompt to the last user turn.
        segments: The fixed text before, between and after the contents, by place.
        trims: What is stripped from each content.
        folded: True where the template takes no system message, so that the system prompt was put in front of the
            first user turn. A template that folds by itself takes one.
    """

    roles: tuple[str, ...]
    order: tuple[int, ...]
    segments: tuple[str, ...]
    trims: tuple[Trim, ...]
    folded: bool

    def messages(self, contents: Sequence[str]) -> list[dict[str, str]]:
        """The contents as messages."""
        return as_messages(self.roles, contents, folded=self.folded)

    def locate(self, contents: Sequence[str], text: str) -> tuple[CharRange, ...]:
        """Where each content lies in `text`, the rendering of these contents.

        Raises:
            PromptError: No reading of the rendering fits the contents, or more than one does.
        """
        placed = [contents[index] for index in self.order]
        trims = [self.trims[index] for index in self.order]
        kept = [trim.apply(content) for trim, content in zip(trims, placed, strict=True)]
        if _joined(self.segments, kept) == text:
            return self._by_content(_ranges(self.segments, kept))
        readings = _Readings(self.segments, trims, placed, text).find()
        if len(readings) != 1:
            raise PromptError(
                f"the chat template changes the contents and {'more than one' if readings else 'no'} reading of the "
                f"rendering fits them: {_ADVICE}"
            )
        for (start, end), content, expected in zip(readings[0], placed, kept, strict=True):
            if text[start:end] != expected and _may_be_whole(text, start, end, content):
                raise PromptError(
                    "what the chat template writes around a content is what that content has there too, so it is open "
                    f"whether the template cut it: {_ADVICE}"
                )
        return self._by_content(readings[0])

    def _by_content(self, ranges: Sequence[CharRange]) -> tuple[CharRange, ...]:
        return tuple(char_range for _, char_range in sorted(zip(self.order, ranges, strict=True)))


def as_messages(roles: Sequence[str], contents: Sequence[str], *, folded: bool) -> list[dict[str, str]]:
    """Contents as messages; folded, the first two share the user turn."""
    if folded:
        roles, contents = roles[1:], (contents[0] + FOLD_SEPARATOR + contents[1], *contents[2:])
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


def _joined(segments: Sequence[str], kept: Sequence[str]) -> str:
    return "".join(piece for pair in zip(segments, (*kept, ""), strict=True) for piece in pair)


def _ranges(segments: Sequence[str], kept: Sequence[str]) -> tuple[CharRange, ...]:
    ranges, position = [], 0
    for segment, content in zip(segments[:-1], kept, strict=True):
        start = position + len(segment)
        position = start + len(content)
        ranges.append((start, position))
    return tuple(ranges)


def _may_be_whole(text: str, start: int, end: int, content: str) -> bool:
    """True where the text around a kept part is just what the content has before or after that part."""
    kept = text[start:end]
    place = content.find(kept)
    while place >= 0:
        before, after = content[:place], content[place + len(kept) :]
        if (before.strip() and text.endswith(before, 0, start)) or (after.strip() and text.startswith(after, end)):
            return True
        place = content.find(kept, place + 1)
    return False


class _Readings:
    """Every way, at most two, to read a rendering as segments around contiguous pieces of the contents, by place."""

    _LOOKS = 20_000  # far more than a text of pages needs; keeps a hostile one from taking minutes

    def __init__(self, segments: Sequence[str], trims: Sequence[Trim], contents: Sequence[str], text: str) -> None:
        self._segments = segments
        self._trims = trims
        self._contents = contents
        self._text = text
        self._end = len(text) - len(segments[-1])
        self._looks = 0
        self._found: list[tuple[CharRange, ...]] = []

    def find(self) -> list[tuple[CharRange, ...]]:
        head, tail = self._segments[0], self._segments[-1]
        if self._text.startswith(head) and self._text.endswith(tail) and len(head) <= self._end:
            self._extend((), len(head))
        return self._found

    def _extend(self, done: tuple[CharRange, ...], start: int) -> None:
        """Adds the readings that begin with the ranges `done`, the next content starting at `start`."""
        index = len(done)
        content, trim = self._contents[index], self._trims[index]
        last = index == len(self._contents) - 1
        following = self._segments[index + 1]
        end = self._end if last else self._text.find(following, start, self._end)
        while end >= 0 and len(self._found) < 2:
            self._looks += 1
            if self._looks > self._LOOKS:
                raise PromptError(f"the chat template changes the contents in too many possible ways: {_ADVICE}")
            piece = self._text[start:end]
            if piece not in content:
                return  # nor is any longer one
            if piece and trim.apply(piece) == piece:
                reading = (*done, (start, end))
                if last:
                    self._found.append(reading)
                else:
                    self._extend(reading, end + len(following))
            if last:
                return
            end = self._text.find(following, end + 1, self._end)
