"""Reads a chat template's structure and proves where it puts each message's content.

The template is rendered once with unique markers as contents, which gives the fixed segments around them, and a few
times with white space beside the markers, which shows what it trims. A real rendering must then be those segments
with the trimmed contents in the gaps, character for character. Where a template cuts a content (a think block, say),
what it kept is accepted only if exactly one reading of the rendering exists. Everything else is refused.

Tokens are `spans`' work, and turning samples into messages is `prompts`'.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from tl_persona.errors import PromptError

FOLD_SEPARATOR = "\n\n"
"""What stands between system prompt and question where both share the user turn."""

CharRange = tuple[int, int]
"""A half-open range of characters."""


class ChatTokenizer(Protocol):
    """The part of a fast Hugging Face tokenizer that this package uses."""

    chat_template: Any
    is_fast: bool

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...
    def __call__(self, text: Any, **kwargs: Any) -> Any: ...
    def decode(self, token_ids: Any, **kwargs: Any) -> str: ...


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


def template_digest(tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> str:
    """SHA-256, in hex, of the text of the chat template in use.

    Of several named templates that is the one called `default`, unless `template_kwargs` has `chat_template` (a name
    or a template) or `tools`, which transformers answers with the template called `tool_use`.

    Raises:
        PromptError: The tokenizer cannot be used, or has named templates and none is the default.
    """
    checked = require_chat_tokenizer(tokenizer)
    return hashlib.sha256(_template_in_use(checked, template_kwargs or {}).encode()).hexdigest()


def _template_in_use(tokenizer: Any, kwargs: Mapping[str, Any]) -> str:
    choice = {name: kwargs[name] for name in ("chat_template", "tools") if name in kwargs}
    try:
        return str(tokenizer.get_chat_template(**choice))
    except ValueError as error:
        named = tokenizer.chat_template
        names = ", ".join(map(repr, named)) if isinstance(named, Mapping) else "none"
        raise PromptError(
            f"the tokenizer's named chat templates ({names}) have no default: choose one with "
            'template_kwargs={"chat_template": NAME}'
        ) from error


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
        segments: The fixed text before, between and after the contents.
        trims: What is stripped from each content.
        folded: True where the template takes no system message, so that the system prompt was put in front of the
            first user turn. A template that folds by itself takes one.
    """

    roles: tuple[str, ...]
    segments: tuple[str, ...]
    trims: tuple[Trim, ...]
    folded: bool

    def messages(self, contents: Sequence[str]) -> list[dict[str, str]]:
        """The contents as messages."""
        return _messages(self.roles, contents, folded=self.folded)

    def locate(self, contents: Sequence[str], text: str) -> tuple[CharRange, ...]:
        """Where each content lies in `text`, the rendering of these contents.

        Raises:
            PromptError: No reading of the rendering fits the contents, or more than one does.
        """
        kept = [trim.apply(content) for trim, content in zip(self.trims, contents, strict=True)]
        if _joined(self.segments, kept) == text:
            return _ranges(self.segments, kept)
        readings = _Readings(self, contents, text).find()
        if len(readings) != 1:
            raise PromptError(
                f"the chat template changes the contents and {'more than one' if readings else 'no'} reading of the "
                f"rendering fits them: {_ADVICE}"
            )
        for (start, end), content, expected in zip(readings[0], contents, kept, strict=True):
            if text[start:end] != expected and _reaches_outside(text, start, end, content):
                raise PromptError(
                    "the chat template cuts a content where its own text goes on like it, so the border is open: "
                    f"{_ADVICE}"
                )
        return readings[0]


_ADVICE = "simplify the text (think blocks, template tags), or use a template that leaves it as it is"
_RESERVED = frozenset(
    "conversation tokenize add_generation_prompt continue_final_message padding truncation max_length return_tensors "
    "return_dict return_assistant_tokens_mask tokenizer_kwargs".split()
)
_EDGES = (" ", "\n", "\t", "\u2003")  # an em space stands for what only a full str.strip removes


def learn_layout(
    tokenizer: ChatTokenizer, roles: Sequence[str], template_kwargs: Mapping[str, Any] | None = None
) -> ChatLayout:
    """Learns what the tokenizer's template writes around messages of these roles.

    Args:
        tokenizer: From `require_chat_tokenizer`.
        roles: `system` (if at all, first), `user` and `assistant`.
        template_kwargs: Passed to the template.

    Raises:
        PromptError: The template repeats, drops, alters or reorders contents, or a keyword is not the caller's.
    """
    kwargs = dict(template_kwargs or {})
    if _RESERVED & kwargs.keys():
        raise PromptError(
            f"template_kwargs may not set {min(_RESERVED & kwargs.keys())!r}: it decides what is rendered"
        )
    _template_in_use(tokenizer, kwargs)
    roles = tuple(roles)
    foldable = roles[:2] == ("system", "user")
    problems = []
    for folded in (False, True) if foldable else (False,):
        manner = "with the system prompt inside the user turn" if folded else f"as {', '.join(roles)} messages"
        try:
            rendered = render(tokenizer, _messages(roles, _markers(roles), folded=folded), kwargs)
        except PromptError as error:
            problems.append(f"{manner}: {error}")
            continue
        segments = _cut(rendered, _markers(roles))
        if segments is not None:
            trims = _learn_trims(tokenizer, roles, segments, folded, kwargs)
            return ChatLayout(roles, segments, trims, folded)
        problems.append(f"{manner}: contents are missing, repeated, altered or moved")
        if _markers(roles)[0] in rendered:
            break  # the template does take the system message: to fold it would change what the model reads
    raise PromptError(
        f"no fixed structure around the contents could be read from the chat template ({'; '.join(problems)}): "
        "use a template that renders each message's content once, in order"
    )


def render(tokenizer: ChatTokenizer, messages: Sequence[Mapping[str, str]], kwargs: Mapping[str, Any]) -> str:
    """The template's rendering of whole messages.

    Raises:
        PromptError: The template raised; the message has what it said.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False, **kwargs))
    except Exception as error:  # a template is a program and may raise anything, jinja2's errors or others
        raise PromptError(f"the chat template raised {type(error).__name__}: {error}") from error


def _messages(roles: Sequence[str], contents: Sequence[str], *, folded: bool) -> list[dict[str, str]]:
    if folded:
        roles, contents = roles[1:], (contents[0] + FOLD_SEPARATOR + contents[1], *contents[2:])
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


def _markers(roles: Sequence[str]) -> tuple[str, ...]:
    # Letters only: no template has a reason to trim, escape or split them. No marker is part of another.
    digits = str.maketrans("0123456789", "abcdefghij")
    return tuple(f"QzvX{role}{str(index).translate(digits)}XvzQ" for index, role in enumerate(roles))


def _cut(rendered: str, markers: Sequence[str]) -> tuple[str, ...] | None:
    """The pieces of a rendering around the markers, or None unless each occurs once and in order."""
    pieces, rest = [], rendered
    for marker in markers:
        before, found, rest = rest.partition(marker)
        if not found:
            return None
        pieces.append(before)
    pieces.append(rest)
    return None if any(marker in piece for marker in markers for piece in pieces) else tuple(pieces)


def _learn_trims(
    tokenizer: ChatTokenizer, roles: tuple[str, ...], segments: tuple[str, ...], folded: bool, kwargs: Mapping[str, Any]
) -> tuple[Trim, ...]:
    """What is stripped from each content, seen from one white-space character at one end of every marker."""
    stripped: list[tuple[list[str], list[str]]] = [([], []) for _ in roles]
    for edge in _EDGES:
        for side in (0, 1):
            contents = [edge + marker if side == 0 else marker + edge for marker in _markers(roles)]
            try:
                pieces = _cut(render(tokenizer, _messages(roles, contents, folded=folded), kwargs), _markers(roles))
            except PromptError:
                continue  # refused with this white space: a sample that has it is refused by name
            for index, marks in enumerate(stripped):
                # Before a content lies the segment of its own number, after it the next.
                if pieces is not None and pieces[index + side] == segments[index + side]:
                    marks[side].append(edge)
    return tuple(Trim(*(None if len(marks) == len(_EDGES) else "".join(marks) for marks in pair)) for pair in stripped)


def _joined(segments: Sequence[str], kept: Sequence[str]) -> str:
    return "".join(piece for pair in zip(segments, (*kept, ""), strict=True) for piece in pair)


def _ranges(segments: Sequence[str], kept: Sequence[str]) -> tuple[CharRange, ...]:
    ranges, position = [], 0
    for segment, content in zip(segments[:-1], kept, strict=True):
        start = position + len(segment)
        position = start + len(content)
        ranges.append((start, position))
    return tuple(ranges)


def _reaches_outside(text: str, start: int, end: int, content: str) -> bool:
    """True where the content goes on beyond its kept part just as the text around that part does."""
    before = len(text[:start].rstrip())
    after = end + len(text[end:]) - len(text[end:].lstrip())
    return (before > 0 and text[before - 1 : end] in content) or (
        after < len(text) and text[start : after + 1] in content
    )


class _Readings:
    """Every way, at most two, to read a rendering as a layout's segments around contiguous pieces of the contents."""

    _LOOKS = 20_000  # far more than a text of pages needs; keeps a hostile one from taking minutes

    def __init__(self, layout: ChatLayout, contents: Sequence[str], text: str) -> None:
        self._layout = layout
        self._contents = contents
        self._text = text
        self._end = len(text) - len(layout.segments[-1])
        self._looks = 0
        self._found: list[tuple[CharRange, ...]] = []

    def find(self) -> list[tuple[CharRange, ...]]:
        head, tail = self._layout.segments[0], self._layout.segments[-1]
        if self._text.startswith(head) and self._text.endswith(tail) and len(head) <= self._end:
            self._extend((), len(head))
        return self._found

    def _extend(self, done: tuple[CharRange, ...], start: int) -> None:
        """Adds the readings that begin with the ranges `done`, the next content starting at `start`."""
        index = len(done)
        content, trim = self._contents[index], self._layout.trims[index]
        last = index == len(self._contents) - 1
        following = self._layout.segments[index + 1]
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
