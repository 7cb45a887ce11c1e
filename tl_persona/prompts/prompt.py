"""A rendered chat, and what is known for certain of it: its tokens, the spans of its contents, and how they were found.

Plain records.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from jaxtyping import Bool, Int
from torch import Tensor

from tl_persona.prompts.template import CharRange


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
    return Change.TRIMMED if "".join(kept.split()) == "".join(content.split()) else Change.CUT


@dataclass(frozen=True)
class ContentProof:
    """One content of a chat, as it stands in the rendering.

    Attributes:
        name: `template`, `question`, `response`, `message 2` and the like for an earlier turn, or `reasoning` for a
            block of reasoning that does not count as answer.
        char_range: Where it stands, a half-open range of characters.
        change: Whether the template kept it, changed white space at its ends or beside the tags of its reasoning, or
            cut more than that (a think block, say). What is left was seen in renderings with markers in the place of
            the contents beside it.
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
        template_digest: `prompts.template.template_digest` of the template in use.
    """

    contents: tuple[ContentProof, ...]
    written: tuple[str, ...]
    folded: bool
    template_digest: str

    @property
    def exact(self) -> bool:
        """True where the template cut no content: it kept all of them, white space at their ends aside."""
        return all(content.change is not Change.CUT for content in self.contents)

    def changes(self, name: str) -> tuple[Change, ...]:
        """What the template did to the content of this name, if there is one."""
        return tuple(content.change for content in self.contents if content.name == name)

    @property
    def rewritten(self) -> tuple[str, ...]:
        """The names of the contents that the template trimmed or cut."""
        return tuple(content.name for content in self.contents if content.change is not Change.KEPT)


class Span(NamedTuple):
    """A half-open range, in characters of the rendered prompt and in tokens."""

    char_start: int
    char_end: int
    token_start: int
    token_end: int


class PromptSpans(NamedTuple):
    """Where persona (`template`), question and answer (`response`) of a chat lie."""

    template: Span
    question: Span
    response: Span


NO_SPAN = Span(0, 0, 0, 0)
"""The span of a system prompt that is not there."""


@dataclass(frozen=True)
class Prompt:
    """One rendered and tokenized chat with its spans.

    Attributes:
        sample_id: The id of the sample it was made from.
        question: The text of the last user turn as given.
        prompt_text: The rendered chat.
        spans: Where system prompt, question and answer lie.
        offset_mapping: For each token its half-open character range in `prompt_text`.
        input_ids: Token ids, shape (pos,).
        is_special: True at control tokens, shape (pos,): the tokenizer's special tokens, and those it was given without
            marking them special that the template itself writes, such as DeepSeek's role tokens.
        proof: How the spans were found, and what the template made of the contents.
    """

    sample_id: str
    question: str
    prompt_text: str
    spans: PromptSpans
    offset_mapping: list[tuple[int, int]]
    input_ids: Int[Tensor, "pos"]
    is_special: Bool[Tensor, "pos"]
    proof: SpanProof

    @property
    def folded(self) -> bool:
        """True where the template takes no system message, so that the first user turn has the system prompt too."""
        return self.proof.folded

    @property
    def rewritten(self) -> tuple[str, ...]:
        """The contents that the template trimmed or cut: `template`, `question`, `response`, `message 2` and so on."""
        return self.proof.rewritten
