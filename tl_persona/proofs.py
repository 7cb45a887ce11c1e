"""What is known for certain of one rendered chat: how its contents were found and what the template made of them.

Plain records. Finding is `layout`'s and `spans`' work, checking a prompt again `verification`'s.
"""

from dataclasses import dataclass
from enum import StrEnum

from tl_persona.layout import CharRange


class Change(StrEnum):
    """What a chat template did to a content."""

    KEPT = "kept"
    TRIMMED = "trimmed"
    CUT = "cut"


def change_of(content: str, kept: str) -> Change:
    """What was done to a content of which `kept` is left.

    Example:
        >>> [str(change_of("a b ", kept)) for kept in ("a b ", "a b", "b")]
        ['kept', 'trimmed', 'cut']
    """
    if kept == content:
        return Change.KEPT
    return Change.TRIMMED if kept.strip() == content.strip() else Change.CUT


@dataclass(frozen=True)
class ContentProof:
    """One content of a chat, as it stands in the rendering.

    Attributes:
        name: `template`, `question`, `response`, or `message 2` and the like for an earlier turn.
        char_range: Where it stands, a half-open range of characters.
        change: Whether the template kept it, stripped white space from its ends, or cut more than that (a think block,
            say). What is left was seen in renderings with markers in the place of the contents beside it.
        added_tokens: Entries that were added to the vocabulary, are not marked special, are not written by the
            template, and stand in the content: `<think>` with some. The model reads such a text as one token.
    """

    name: str
    char_range: CharRange
    change: Change
    added_tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class SpanProof:
    """How the contents of one rendered chat were found.

    Attributes:
        contents: The contents in the order of the messages.
        written: What the template wrote itself, before, between and after the contents, in the order of the text:
            role names, default system prompts, dates, think blocks.
        folded: True where the template takes no system message, so that the system prompt was put in front of the
            first user turn.
        template_digest: `templates.template_digest` of the template in use.
    """

    contents: tuple[ContentProof, ...]
    written: tuple[str, ...]
    folded: bool
    template_digest: str

    @property
    def exact(self) -> bool:
        """True where the template cut no content: it kept all of them, white space at their ends aside."""
        return all(content.change is not Change.CUT for content in self.contents)

    @property
    def rewritten(self) -> tuple[str, ...]:
        """The names of the contents that the template trimmed or cut."""
        return tuple(content.name for content in self.contents if content.change is not Change.KEPT)
