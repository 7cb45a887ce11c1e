"""Renders chats with a tokenizer's own template and proves where persona, question and answer lie.

Spans come from the template's structure, not from a search for the texts. The chat is rendered once with
unique markers in place of its contents, which gives the fixed segments between them; the real rendering must
be exactly those segments with the real contents in the gaps. Where a template trims or rewrites a content,
the kept part is accepted only if it is a contiguous piece of the content and only one reading of the rendering
exists. Everything else is refused: a span is never guessed.

Building masks from spans is `masks`' work; the texts themselves come from `samples`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_persona.errors import PromptError


class ChatTokenizer(Protocol):
    """The part of a fast Hugging Face tokenizer that this package uses."""

    chat_template: Any
    is_fast: bool

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...
    def __call__(self, text: Any, **kwargs: Any) -> Any: ...
    def decode(self, token_ids: Any, **kwargs: Any) -> str: ...


class Span(NamedTuple):
    """A half-open range, in characters of the rendered prompt and in tokens."""

    char_start: int
    char_end: int
    token_start: int
    token_end: int


class PromptSpans(NamedTuple):
    """Where the three contents of a chat lie: persona (`template`), question, answer (`response`)."""

    template: Span
    question: Span
    response: Span


@dataclass(frozen=True)
class Prompt:
    """One rendered and tokenized chat with its spans.

    Attributes:
        sample_id: The id of the sample it was made from.
        question: The user's text as given.
        prompt_text: The rendered chat.
        spans: Where persona, question and answer lie.
        offset_mapping: For each token its half-open character range in `prompt_text`.
        input_ids: Token ids, shape (pos,).
        is_special: True at the tokenizer's special tokens, shape (pos,).
        folded: True where the template has no system role, so that the persona is part of the user turn.
        rewritten: The contents (`template`, `question`, `response`) that the template trimmed or cut.
    """

    sample_id: str
    question: str
    prompt_text: str
    spans: PromptSpans
    offset_mapping: list[tuple[int, int]]
    input_ids: Int[Tensor, "pos"]
    is_special: Bool[Tensor, "pos"]
    folded: bool
    rewritten: tuple[str, ...]


class Chat(NamedTuple):
    """The three contents of one chat, and the id of the sample they belong to."""

    sample_id: str
    system: str
    user: str
    assistant: str


@dataclass(frozen=True)
class ChatLayout:
    """The fixed text of a chat template around the three contents.

    Attributes:
        segments: The text before the persona, between the contents, and after the answer.
        folded: True where the persona is put in front of the question inside the user turn.
        template_kwargs: What is passed to the template beside the messages.
    """

    segments: tuple[str, str, str, str]
    folded: bool
    template_kwargs: Mapping[str, Any]

    def messages(self, system: str, user: str, assistant: str) -> list[dict[str, str]]:
        """The chat as messages, the persona folded into the user turn where the template needs that."""
        if self.folded:
            return [
                {"role": "user", "content": system + FOLD_SEPARATOR + user},
                {"role": "assistant", "content": assistant},
            ]
        return [
            {"role": "system", "content": system},
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant},
        ]


FOLD_SEPARATOR = "\n\n"
"""What stands between persona and question where both share the user turn."""

# Letters only: no template, trimming rule or pre-tokenizer has a reason to change them.
_MARKERS = ("QzvXpersonaXvzQ", "QzvXquestionXvzQ", "QzvXanswerXvzQ")
_CONTENT_NAMES = PromptSpans._fields


def require_chat_tokenizer(tokenizer: Any) -> ChatTokenizer:
    """Returns the tokenizer if it can be used.

    Raises:
        PromptError: It is missing, is not a fast tokenizer (no character offsets), or has no chat template.
    """
    if tokenizer is None:
        raise PromptError("the model has no tokenizer: pass one, or load the model with tl_persona.load_model")
    if not getattr(tokenizer, "is_fast", False):
        raise PromptError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, so it gives no character offsets: "
            "load it with AutoTokenizer.from_pretrained(..., use_fast=True)"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(
            "the tokenizer has no chat template (a base model?): use a chat model, or set tokenizer.chat_template"
        )
    checked: ChatTokenizer = tokenizer
    return checked


def chat_layout(tokenizer: ChatTokenizer, template_kwargs: Mapping[str, Any] | None = None) -> ChatLayout:
    """Learns the fixed segments of the tokenizer's template by rendering it around markers.

    Raises:
        PromptError: The template repeats, drops, alters or reorders the contents of a system, user, assistant chat.
    """
    kwargs = dict(template_kwargs or {})
    problems = []
    for folded in (False, True):
        layout = ChatLayout(("", "", "", ""), folded, kwargs)
        try:
            rendered = _render(tokenizer, layout.messages(*_MARKERS), kwargs)
        except Exception as error:  # a template is a program: it may raise anything, jinja2 errors or others
            problems.append(f"{'folded' if folded else 'with a system message'}: {error}")
            continue
        cuts = _cut_at_markers(rendered)
        if cuts is None:
            problems.append(f"{'folded' if folded else 'with a system message'}: contents missing, repeated or moved")
            continue
        first, second, third, last = cuts
        return ChatLayout((first, second, third, last), folded, kwargs)
    raise PromptError(
        "no fixed structure around persona, question and answer could be read from the chat template "
        f"({'; '.join(problems)}): pass a tokenizer whose chat_template renders each message's content once, in order"
    )


def _cut_at_markers(rendered: str) -> list[str] | None:
    pieces, rest = [], rendered
    for marker in _MARKERS:
        before, found, rest = rest.partition(marker)
        if not found:
            return None
        pieces.append(before)
    pieces.append(rest)
    return None if any(marker in piece for marker in _MARKERS for piece in pieces) else pieces


def _render(tokenizer: ChatTokenizer, messages: list[dict[str, str]], kwargs: Mapping[str, Any]) -> str:
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False, **kwargs)
    return str(rendered)


def prepare_prompts(
    tokenizer: Any, chats: Sequence[Chat], *, template_kwargs: Mapping[str, Any] | None = None
) -> list[Prompt]:
    """Renders and tokenizes chats and finds their spans.

    The rendered text is tokenized with `add_special_tokens=False`: the template has written the special tokens.
    A token belongs to a span when it overlaps it by at least one character, so a token that straddles the border
    of two spans belongs to both.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        chats: The contents to render.
        template_kwargs: Passed to the template, such as `{"enable_thinking": False}`.

    Raises:
        PromptError: A content is empty, holds a special token's text, or cannot be found for certain; names the sample.
    """
    checked = require_chat_tokenizer(tokenizer)
    layout = chat_layout(checked, template_kwargs)
    texts, ranges = [], []
    for chat in chats:
        for name, content in zip(_CONTENT_NAMES, chat[1:], strict=True):
            if not content.strip():
                raise PromptError(f"sample {chat.sample_id!r}: the {_SPOKEN[name]} is empty: {_EMPTY_ADVICE[name]}")
        text = _render_sample(checked, layout, chat)
        texts.append(text)
        ranges.append(_locate(chat, layout, text))
    if not texts:
        return []
    encoding = checked(texts, add_special_tokens=False, return_offsets_mapping=True)
    special_ids = _special_ids(checked)
    return [
        _assemble(chat, layout, text, char_ranges, ids, offsets, special_ids)
        for chat, text, char_ranges, ids, offsets in zip(
            chats, texts, ranges, encoding["input_ids"], encoding["offset_mapping"], strict=True
        )
    ]


_SPOKEN = {"template": "system prompt", "question": "question", "response": "answer"}
_EMPTY_ADVICE = {
    "template": "give the persona view some text",
    "question": "remove the row or give it a question",
    "response": "remove the row or give it an answer",
}


def _render_sample(tokenizer: ChatTokenizer, layout: ChatLayout, chat: Chat) -> str:
    try:
        return _render(tokenizer, layout.messages(*chat[1:]), layout.template_kwargs)
    except Exception as error:  # see chat_layout: user templates may raise anything
        raise PromptError(f"sample {chat.sample_id!r}: the chat template raised {error!r}") from error


def _locate(chat: Chat, layout: ChatLayout, text: str) -> tuple[tuple[int, int], ...]:
    """Character ranges of the three contents in the rendering, proven or refused."""
    contents = chat[1:]
    for kept in product(*(_trimmings(content) for content in contents)):
        pieces = [piece for pair in zip(layout.segments, (*kept, ""), strict=True) for piece in pair]
        if "".join(pieces) == text:
            return _ranges(layout.segments, kept)
    readings = _readings(contents, layout.segments, text)
    if len(readings) != 1:
        raise PromptError(
            f"sample {chat.sample_id!r}: the chat template changes the contents and "
            f"{'no' if not readings else 'more than one'} reading of the rendering fits them: "
            "simplify the text (think blocks, template tags) or the template"
        )
    return readings[0]


def _trimmings(content: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((content, content.strip(), content.lstrip(), content.rstrip())))


def _ranges(segments: Sequence[str], kept: Sequence[str]) -> tuple[tuple[int, int], ...]:
    ranges, position = [], 0
    for segment, content in zip(segments, kept, strict=False):
        start = position + len(segment)
        position = start + len(content)
        ranges.append((start, position))
    return tuple(ranges)


def _readings(contents: Sequence[str], segments: Sequence[str], text: str) -> list[tuple[tuple[int, int], ...]]:
    """Every way to read `text` as segments around non-empty contiguous pieces of the contents (at most two)."""
    head, middle_1, middle_2, tail = segments
    if not text.startswith(head) or not text.endswith(tail):
        return []
    end = len(text) - len(tail)
    found: list[tuple[tuple[int, int], ...]] = []
    for first_end in _occurrences(text, middle_1, len(head), end):
        persona = (len(head), first_end)
        if not _is_piece(text, persona, contents[0]):
            continue
        question_start = first_end + len(middle_1)
        for second_end in _occurrences(text, middle_2, question_start, end):
            question = (question_start, second_end)
            answer = (second_end + len(middle_2), end)
            if _is_piece(text, question, contents[1]) and _is_piece(text, answer, contents[2]):
                found.append((persona, question, answer))
                if len(found) > 1:
                    return found
    return found


def _occurrences(text: str, needle: str, start: int, end: int) -> list[int]:
    if not needle:
        return list(range(start, end + 1))
    places, position = [], text.find(needle, start, end)
    while position >= 0:
        places.append(position)
        position = text.find(needle, position + 1, end)
    return places


def _is_piece(text: str, place: tuple[int, int], content: str) -> bool:
    start, end = place
    return start < end and text[start:end] in content


def _assemble(
    chat: Chat,
    layout: ChatLayout,
    text: str,
    char_ranges: Sequence[tuple[int, int]],
    ids: list[int],
    offsets: list[tuple[int, int]],
    special_ids: frozenset[int],
) -> Prompt:
    special = [token in special_ids for token in ids]
    spans = []
    for name, (start, end) in zip(_CONTENT_NAMES, char_ranges, strict=True):
        inside = [index for index, (left, right) in enumerate(offsets) if max(left, start) < min(right, end)]
        if not inside:
            raise PromptError(f"sample {chat.sample_id!r}: no token covers the {_SPOKEN[name]} {text[start:end]!r}")
        for index in inside:
            if special[index]:
                raise PromptError(
                    f"sample {chat.sample_id!r}: the {_SPOKEN[name]} contains {text[slice(*offsets[index])]!r}, which "
                    "the tokenizer reads as a control token: remove or rephrase it"
                )
        spans.append(Span(start, end, inside[0], inside[-1] + 1))
    kept = [text[start:end] for start, end in char_ranges]
    changed = zip(_CONTENT_NAMES, kept, chat[1:], strict=True)
    return Prompt(
        sample_id=chat.sample_id,
        question=chat.user,
        prompt_text=text,
        spans=PromptSpans(*spans),
        offset_mapping=[(left, right) for left, right in offsets],
        input_ids=torch.tensor(ids, dtype=torch.long),
        is_special=torch.tensor(special, dtype=torch.bool),
        folded=layout.folded,
        rewritten=tuple(name for name, now, given in changed if now != given),
    )


def _special_ids(tokenizer: Any) -> frozenset[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}
