"""Learns what a chat template writes around the contents of messages.

The template is rendered once with unique markers as contents, which gives the fixed segments around them. Reading real
renderings with what was learned is `reading`'s work, tokens are `spans`', and turning samples into messages is
`prompts`'.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from tl_persona.errors import PromptError
from tl_persona.layout import ChatLayout, as_messages, draw_markers


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
    template = _template_in_use(tokenizer, kwargs)
    roles = tuple(roles)
    foldable = roles[:2] == ("system", "user")
    marks, problems = draw_markers(roles, (template, repr(kwargs))).contents, []
    for folded in (False, True) if foldable else (False,):
        manner = "with the system prompt inside the user turn" if folded else f"as {', '.join(roles)} messages"
        try:
            rendered = render(tokenizer, as_messages(roles, marks, folded=folded), kwargs)
        except PromptError as error:
            problems.append(f"{manner}: {error}")
            continue
        found = _cut(rendered, marks)
        if found is not None and _is_usable(found.order, roles):
            return ChatLayout(roles, found.order, found.segments, folded)
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
