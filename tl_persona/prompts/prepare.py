"""Renders and tokenizes chats, with the proven spans of system prompt, question and answer."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from tl_persona.errors import PromptError
from tl_persona.prompts.alignment import TokenAligner
from tl_persona.prompts.prompt import NO_SPAN, Change, ContentProof, Prompt, PromptSpans, SpanProof, change_of
from tl_persona.prompts.reasoning import ROLE, Reasoning, check_reasoning, read_chat
from tl_persona.prompts.template import ChatReader, Rendering, require_chat_tokenizer, template_digest


class Chat(NamedTuple):
    """The three contents of one chat, and the id of the sample they belong to."""

    sample_id: str
    system: str
    user: str
    assistant: str


def prepare_prompts(
    tokenizer: Any,
    chats: Sequence[Chat],
    *,
    template_kwargs: Mapping[str, Any] | None = None,
    reasoning: Reasoning = "include",
) -> list[Prompt]:
    """Renders and tokenizes chats of a system prompt, a question and an answer, and finds their spans.

    The rendered text is tokenized with `add_special_tokens=False`: the template has written the special tokens.
    A token belongs to a span when it overlaps it by at least one character, so a token that straddles the border
    of two spans belongs to both.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        chats: The contents to render.
        template_kwargs: Passed to the template, such as `{"enable_thinking": False}`.
        reasoning: Whether a block of reasoning that the answer begins with, and the template shows, counts as answer.

    Raises:
        PromptError: A content is empty, holds a special token's text, or cannot be found for certain; names the sample.
    """
    roles = ("system", "user", "assistant")
    conversations = [_Conversation(chat.sample_id, roles, chat[1:]) for chat in chats]
    return _prepare(tokenizer, conversations, template_kwargs, reasoning)


def prepare_messages(
    tokenizer: Any,
    samples: Sequence[tuple[str, Sequence[Mapping[str, Any]]]],
    *,
    template_kwargs: Mapping[str, Any] | None = None,
    reasoning: Reasoning = "include",
) -> list[Prompt]:
    """Renders and tokenizes chats of any number of turns that end with an answer, and finds their spans.

    Spans are as in `prepare_prompts`: `template` is the system message (an empty span at 0 where the chat has none,
    even if the template then writes one of its own), `question` the last user turn, `response` the last message.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        samples: Ids and messages `{"role": ..., "content": ...}`: a system message if wanted, then user and assistant
            turns as the template allows them, an assistant turn last.
        template_kwargs: Passed to the template, such as `{"enable_thinking": False}`.
        reasoning: As in `prepare_prompts`.

    Raises:
        PromptError: As in `prepare_prompts`, or messages that are not such a chat; names the sample.
    """
    return _prepare(tokenizer, [_conversation(*sample) for sample in samples], template_kwargs, reasoning)


class _Conversation(NamedTuple):
    """The contents of one chat and their roles; the last is the answer."""

    sample_id: str
    roles: tuple[str, ...]
    contents: tuple[str, ...]

    @property
    def question(self) -> int:
        return len(self.roles) - 1 - self.roles[::-1].index("user")

    def name(self, index: int) -> str:
        """What a content is called in a `ContentProof`."""
        if self.roles[index] == "system":
            return "template"
        if self.roles[index] == ROLE:
            return ROLE
        if index == len(self.roles) - 1:
            return "response"
        return "question" if index == self.question else f"message {index + 1}"


_SPOKEN = {"template": "system prompt", "question": "question", "response": "answer"}
_EMPTY_ADVICE = {
    "template": "give the persona view some text, or leave the message out",
    "question": "remove the sample or give it a question",
    "response": "remove the sample or give it an answer",
}


def _conversation(sample_id: str, messages: Sequence[Mapping[str, Any]]) -> _Conversation:
    for number, message in enumerate(messages, 1):
        if message.keys() != {"role", "content"} or not all(isinstance(text, str) for text in message.values()):
            raise PromptError(
                f"sample {sample_id!r}: message {number} has the keys {sorted(message)}: a message needs a role and a "
                "content, both text, and nothing else"
            )
    roles = tuple(message["role"] for message in messages)
    turns = roles[1:] if roles[:1] == ("system",) else roles
    if not set(turns) <= {"user", "assistant"} or "user" not in turns or turns[-1] != "assistant":
        raise PromptError(
            f"sample {sample_id!r}: the roles are {', '.join(roles) or 'none'}: pass a system message first or none, "
            "then user and assistant turns, at least one of each, an assistant turn last"
        )
    return _Conversation(sample_id, roles, tuple(message["content"] for message in messages))


def _prepare(
    tokenizer: Any,
    conversations: Sequence[_Conversation],
    template_kwargs: Mapping[str, Any] | None,
    reasoning: Reasoning,
) -> list[Prompt]:
    check_reasoning(reasoning)
    reader = ChatReader(require_chat_tokenizer(tokenizer), dict(template_kwargs or {}))
    renderings, read = [], []
    for conversation in conversations:
        _refuse_unusable(conversation)
        try:
            roles, contents, rendering = read_chat(reader, conversation.roles, conversation.contents, reasoning)
            renderings.append(rendering)
            read.append(conversation._replace(roles=roles, contents=contents))
        except PromptError as error:
            raise PromptError(f"sample {conversation.sample_id!r}: {error}") from error
    if not renderings:
        return []
    texts = [rendering.text for rendering in renderings]
    encoding = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, padding=False, truncation=False)
    aligner = TokenAligner(tokenizer)
    digest = template_digest(tokenizer, template_kwargs)
    encoded = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    prompts = [
        _assemble(conversation, rendering, ids, offsets, aligner, digest)
        for conversation, rendering, (ids, offsets) in zip(read, renderings, encoded, strict=True)
    ]
    _tell_what_is_dropped(prompts, digest)
    return prompts


_TOLD: set[str] = set()
"""Digests of templates of which it was said that they drop a part of answers."""


def _tell_what_is_dropped(prompts: Sequence[Prompt], digest: str) -> None:
    cut = [prompt.sample_id for prompt in prompts if Change.CUT in prompt.proof.changes("response")]
    if cut and digest not in _TOLD:
        _TOLD.add(digest)
        logging.getLogger("tl_persona").warning(
            "the chat template drops a part of %d of %d answers (sample %r first), a block of reasoning perhaps: what "
            "it shows of them counts as answer",
            len(cut),
            len(prompts),
            cut[0],
        )


def _refuse_unusable(conversation: _Conversation) -> None:
    for index, content in enumerate(conversation.contents):
        name = conversation.name(index)
        what = f"sample {conversation.sample_id!r}: the {_SPOKEN.get(name, name)}"
        if not content.strip():
            raise PromptError(f"{what} is empty: {_EMPTY_ADVICE.get(name, 'leave the turn out')}")
        if not content.isascii() and any("\ud800" <= character <= "\udfff" for character in content):
            raise PromptError(f"{what} holds half of a surrogate pair, which is no text: read the file as UTF-8")


def _assemble(
    conversation: _Conversation,
    rendering: Rendering,
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    aligner: TokenAligner,
    digest: str,
) -> Prompt:
    id_row, offset_rows = np.array(ids, dtype=np.int64), np.array(offsets, dtype=np.int64).reshape(-1, 2)
    layout, text, char_ranges = rendering
    special = aligner.special(text, id_row, offset_rows, layout.segments)
    spans, contents = {}, []
    for index, (char_range, content) in enumerate(zip(char_ranges, conversation.contents, strict=True)):
        name = conversation.name(index)
        try:
            spans[name] = aligner.span(text, char_range, id_row, offset_rows, special)
        except PromptError as error:
            raise PromptError(f"sample {conversation.sample_id!r}: the {_SPOKEN.get(name, name)} {error}") from error
        added = aligner.added_tokens(spans[name], id_row)
        contents.append(ContentProof(name, char_range, change_of(content, text[slice(*char_range)]), added))
    return Prompt(
        sample_id=conversation.sample_id,
        question=conversation.contents[conversation.question],
        prompt_text=text,
        spans=PromptSpans(spans.get("template", NO_SPAN), spans["question"], spans["response"]),
        offset_mapping=[(left, right) for left, right in offsets],
        input_ids=torch.from_numpy(id_row),
        is_special=torch.from_numpy(special),
        proof=SpanProof(tuple(contents), layout.segments, layout.folded, digest),
    )
