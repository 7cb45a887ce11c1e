"""One contrast pair: two texts, or two chats, that differ in one behaviour, checked as soon as it is made.

Many pairs are `contrast_dataset`'s work.
"""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from tl_persona.errors import InputError

ROLES = ("system", "user", "assistant")
"""The roles a chat message may have."""

Side = str | Sequence[Mapping[str, str]]
"""One side of a pair: raw text, or chat messages `{"role": ..., "content": ...}`."""


@runtime_checkable
class PairLike(Protocol):
    """A pair of another library: anything with a positive and a negative side."""

    @property
    def positive(self) -> Any: ...

    @property
    def negative(self) -> Any: ...


@dataclass(frozen=True)
class ContrastPair:
    """Two sides that differ in one behaviour.

    Attributes:
        positive: The side that shows the behaviour; chat messages are kept as a tuple of dicts.
        negative: The side that does not.
        metadata: Anything worth keeping about the pair, such as its topic; it takes no part in extraction.

    Raises:
        InputError: A side is empty, the sides are equal or of two kinds, or a chat has an unknown role, an empty
            message, or a last message that is not the assistant's.

    Example:
        >>> pair = ContrastPair("I will not do that.", "I will do that.", {"topic": "demo"})
        >>> pair.positive, pair.is_chat
        ('I will not do that.', False)
        >>> question = {"role": "user", "content": "Ready?"}
        >>> chat = ContrastPair([question, {"role": "assistant", "content": "Yes."}],
        ...                     [question, {"role": "assistant", "content": "No."}])
        >>> chat.shared_turns
        ({'role': 'user', 'content': 'Ready?'},)
    """

    positive: Side
    negative: Side
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        positive = _checked_side("positive", self.positive)
        negative = _checked_side("negative", self.negative)
        if isinstance(positive, str) is not isinstance(negative, str):
            kinds = " and ".join("text" if isinstance(side, str) else "chat" for side in (positive, negative))
            raise InputError(f"the two sides are {kinds}; give both as text or both as chat messages")
        if positive == negative:
            raise InputError(f"the two sides are identical: {reprlib.repr(positive)}; they must differ")
        if not isinstance(self.metadata, Mapping):
            raise InputError(f"metadata is {reprlib.repr(self.metadata)}, not a mapping")
        object.__setattr__(self, "positive", positive)
        object.__setattr__(self, "negative", negative)
        object.__setattr__(self, "metadata", dict(self.metadata))

    @property
    def is_chat(self) -> bool:
        """True for chat messages, False for raw text."""
        return not isinstance(self.positive, str)

    @property
    def shared_turns(self) -> tuple[dict[str, str], ...]:
        """The leading messages both sides have in common; none for raw text."""
        if isinstance(self.positive, str) or isinstance(self.negative, str):
            return ()
        shared = []
        for ours, theirs in zip(self.positive, self.negative, strict=False):
            if ours != theirs:
                break
            shared.append(dict(ours))
        return tuple(shared)

    def to_dict(self) -> dict[str, Any]:
        """The pair as JSON has it: `positive`, `negative`, `metadata`."""
        return {"positive": self.positive, "negative": self.negative, "metadata": self.metadata}


def checked_pair(index: int, pair: object) -> ContrastPair:
    """A pair in any accepted form as a `ContrastPair`.

    Raises:
        InputError: It cannot be used; the message has `index`.
    """
    if isinstance(pair, ContrastPair):
        return pair
    if isinstance(pair, Mapping):
        fields = {name: pair[name] for name in ("positive", "negative", "metadata") if name in pair}
    else:
        fields = {name: getattr(pair, name) for name in ("positive", "negative", "metadata") if hasattr(pair, name)}
    missing = [name for name in ("positive", "negative") if name not in fields]
    if missing:
        raise InputError(f"pair {index}: no {missing[0]!r} in {reprlib.repr(pair)}; a pair needs both sides")
    try:
        return ContrastPair(**fields)
    except InputError as error:
        raise InputError(f"pair {index}: {error}") from error


def _checked_side(name: str, side: object) -> str | tuple[dict[str, str], ...]:
    if isinstance(side, str):
        return _checked_text(f"the {name} text", side)
    if not isinstance(side, list | tuple):
        raise InputError(f"the {name} side is {reprlib.repr(side)}; give text or a list of chat messages")
    if not side:
        raise InputError(f"the {name} side has no messages; give at least the assistant's answer")
    messages = []
    for number, message in enumerate(side):
        where = f"message {number} of the {name} side"
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise InputError(f"{where} is {reprlib.repr(message)}; it needs 'role' and 'content' and nothing else")
        if message["role"] not in ROLES:
            raise InputError(f"{where} has role {message['role']!r}; known are {', '.join(ROLES)}")
        content = _checked_text(f"the content of {where}", message["content"])
        messages.append({"role": message["role"], "content": content})
    if messages[-1]["role"] != "assistant":
        raise InputError(f"the {name} side ends with role {messages[-1]['role']!r}; end it with the assistant's answer")
    return tuple(messages)


def _checked_text(name: str, text: object) -> str:
    if not isinstance(text, str):
        raise InputError(f"{name} is {reprlib.repr(text)}, not a string")
    if not text.strip():
        raise InputError(f"{name} is empty: {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate: no tokenizer and no JSON file can hold it
        raise InputError(f"{name} is not valid Unicode at character {error.start}: {reprlib.repr(text)}") from error
    return text
