"""Learns what a chat template writes around the contents of messages, and reads renderings with it.

The template is rendered once with unique markers as contents, which gives the fixed segments around them. Of every chat
two more renderings are made, each with markers in the place of every second content, so that what is kept of the others
stands between known text. Markers are drawn for each chat, so that none of its texts contains one. Nothing is searched
for, and nothing is guessed from the contents. All kept parts together must be the real rendering, character for
character. A part that is less than its content must be a piece of it that
cannot be larger. Everything else raises a `PromptError`.
"""

import hashlib
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice, pairwise, product
from typing import Any, NamedTuple, Protocol, runtime_checkable

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
        glue: What stands before the last content but one, and between it and the last, where the two are one message.
    """

    roles: tuple[str, ...]
    order: tuple[int, ...]
    segments: tuple[str, ...]
    folded: bool
    glue: tuple[str, str] | None = None

    def messages(self, contents: Sequence[str]) -> list[dict[str, str]]:
        """The contents as messages."""
        return as_messages(self.roles, contents, folded=self.folded, glue=self.glue)

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


def as_messages(
    roles: Sequence[str], contents: Sequence[str], *, folded: bool, glue: tuple[str, str] | None = None
) -> list[dict[str, str]]:
    """Contents as messages; folded, the first two share the user turn, and with glue the last two are one message."""
    if glue is not None:
        last = glue[0] + contents[-2] + glue[1] + contents[-1]
        roles, contents = (*roles[:-2], roles[-1]), (*contents[:-2], last)
    if folded:
        roles, contents = roles[1:], (contents[0] + FOLD_SEPARATOR + contents[1], *contents[2:])
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


def _joined(segments: Sequence[str], gaps: Sequence[str]) -> str:
    return "".join(piece for pair in zip(segments, (*gaps, ""), strict=True) for piece in pair)


@runtime_checkable
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


_RESERVED = {
    *("conversation", "tokenize", "add_generation_prompt", "continue_final_message", "padding", "truncation"),
    *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}


def learn_layout(
    tokenizer: ChatTokenizer,
    roles: Sequence[str],
    template_kwargs: Mapping[str, Any] | None = None,
    glue: tuple[str, str] | None = None,
) -> ChatLayout:
    """Learns what the tokenizer's template writes around messages of these roles.

    Args:
        tokenizer: From `require_chat_tokenizer`.
        roles: `system` (if at all, first), `user` and `assistant`.
        template_kwargs: Passed to the template.
        glue: As `ChatLayout` has it.

    Raises:
        PromptError: The template repeats, drops, alters or reorders contents, or a keyword is not the caller's.
    """
    kwargs = dict(template_kwargs or {})
    if _RESERVED & kwargs.keys():
        raise PromptError(
            f"template_kwargs may not set {min(_RESERVED & kwargs.keys())!r}: it decides what is rendered"
        )
    template = _template_in_use(tokenizer, kwargs)
    roles = tuple(roles)
    foldable = roles[:2] == ("system", "user")
    marks, problems = draw_markers(roles, (template, repr(kwargs), *(glue or ()))).contents, []
    for folded in (False, True) if foldable else (False,):
        manner = "with the system prompt inside the user turn" if folded else f"as {', '.join(roles)} messages"
        try:
            rendered = render(tokenizer, as_messages(roles, marks, folded=folded, glue=glue), kwargs)
        except PromptError as error:
            problems.append(f"{manner}: {error}")
            continue
        found = _cut(rendered, marks)
        if found is not None and _is_usable(found.order, roles):
            return ChatLayout(roles, found.order, found.segments, folded, glue)
        problems.append(f"{manner}: contents are missing, repeated, altered or moved")
        if marks[0] in rendered:
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


class _Cut(NamedTuple):
    """A rendering cut at its markers: their order in the text, and what stands around them."""

    order: tuple[int, ...]
    segments: tuple[str, ...]


def _cut(rendered: str, marks: Sequence[str]) -> _Cut | None:
    """The rendering cut at its markers, or None unless each occurs once."""
    if any(rendered.count(mark) != 1 for mark in marks):
        return None
    order = tuple(sorted(range(len(marks)), key=lambda index: rendered.index(marks[index])))
    segments, rest = [], rendered
    for index in order:
        before, _, rest = rest.partition(marks[index])
        segments.append(before)
    return _Cut(order, (*segments, rest))


def _is_usable(order: Sequence[int], roles: Sequence[str]) -> bool:
    """Whether the turns keep their order. The system prompt may stand anywhere before the last question's text."""
    question = len(roles) - 1 - roles[::-1].index("user")
    turns = [index for index in order if roles[index] != "system"]
    return turns == sorted(turns) and all(
        order.index(index) < order.index(question) for index, role in enumerate(roles) if role == "system"
    )


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
        self._layouts: dict[tuple[tuple[str, ...], tuple[str, str] | None], ChatLayout] = {}

    def read(self, roles: tuple[str, ...], contents: Sequence[str], glue: tuple[str, str] | None = None) -> Rendering:
        """The rendering of one chat; `glue` is as `ChatLayout` has it.

        Raises:
            PromptError: The template takes no such chat, or where the contents lie cannot be told for certain.
        """
        key = roles, glue
        if key not in self._layouts:
            self._layouts[key] = learn_layout(self._tokenizer, roles, self._kwargs, glue)
        try:
            return self._read(self._layouts[key], contents)
        except PromptError:
            # A template that writes the date or time has another layout after midnight.
            layout = learn_layout(self._tokenizer, roles, self._kwargs, glue)
            if layout == self._layouts[key]:
                raise
            self._layouts[key] = layout
        return self._read(layout, contents)

    def _read(self, layout: ChatLayout, contents: Sequence[str]) -> Rendering:
        text = self._render(layout, contents)
        marks = draw_markers(layout.roles, (text, *contents, *layout.segments, *(layout.glue or ())))
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
