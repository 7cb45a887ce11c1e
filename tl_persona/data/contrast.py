"""Contrast pairs: two texts, or two chats, that differ in one behaviour; and data sets of them.

The positive side shows the behaviour, the negative side does not; a steering vector points from negative to positive.
A pair is checked as soon as it is made. A data set has the pairs of one behaviour, in order: made, split, and read from
and written to JSON.
"""

import json
import random
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, overload, runtime_checkable

from tl_persona.errors import InputError, NotStoredError, StoreError
from tl_persona.files import make_folder, read_regular, reason, write_atomically
from tl_persona.provenance import text_digest

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


class ContrastPairDataset:
    """Contrast pairs of one behaviour, in order.

    Args:
        behavior: The behaviour's name; it names the vectors extracted from these pairs.
        pairs: `ContrastPair`s, dicts `{"positive", "negative"[, "metadata"]}` or objects with such attributes.
        description: What the positive and the negative side do.

    Raises:
        InputError: A pair cannot be used; the message has its index.

    Example:
        >>> data = ContrastPairDataset("politeness")
        >>> data.add_pair("Could you pass the salt, please?", "Pass the salt.", topic="dinner")
        >>> len(data), data[0].metadata, data.negatives
        (1, {'topic': 'dinner'}, ['Pass the salt.'])
    """

    def __init__(
        self,
        behavior: str,
        pairs: Iterable[ContrastPair | Mapping[str, Any] | PairLike] | None = None,
        description: str = "",
    ) -> None:
        if not isinstance(behavior, str) or not behavior:
            raise InputError(f"behavior is {behavior!r}; name what the positive side shows")
        self.behavior = behavior
        self.description = description
        self._pairs = [checked_pair(index, pair) for index, pair in enumerate(pairs or ())]

    def add(self, pair: ContrastPair | Mapping[str, Any] | PairLike) -> None:
        """Append a pair."""
        self._pairs.append(checked_pair(len(self._pairs), pair))

    def add_pair(self, positive: Side, negative: Side, **metadata: Any) -> None:
        """Append a pair given by its sides; keyword arguments become its metadata."""
        self.add({"positive": positive, "negative": negative, "metadata": metadata})

    @property
    def positives(self) -> list[Side]:
        """The positive sides, in order."""
        return [pair.positive for pair in self._pairs]

    @property
    def negatives(self) -> list[Side]:
        """The negative sides, in order."""
        return [pair.negative for pair in self._pairs]

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[ContrastPair]:
        return iter(self._pairs)

    @overload
    def __getitem__(self, index: int) -> ContrastPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[ContrastPair]: ...
    def __getitem__(self, index: int | slice) -> ContrastPair | list[ContrastPair]:
        return self._pairs[index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ContrastPairDataset):
            return NotImplemented
        return (self.behavior, self.description, self._pairs) == (other.behavior, other.description, other._pairs)

    __hash__ = None  # type: ignore[assignment]  # pairs can be added

    def __repr__(self) -> str:
        return f"ContrastPairDataset({self.behavior!r}, {len(self)} pairs)"

    def digest(self) -> str:
        """SHA-256, in hex, of both sides of every pair, in order; names and metadata are left out."""
        sides = [side for pair in self._pairs for side in (pair.positive, pair.negative)]
        return text_digest([json.dumps(side, sort_keys=True) for side in sides])

    def split(self, held_out: float | int, seed: int | None = 0) -> tuple["ContrastPairDataset", "ContrastPairDataset"]:
        """Draw pairs to hold out of extraction.

        Args:
            held_out: A number of pairs (int), or a share of them strictly between 0 and 1 (float), rounded.
            seed: Decides which pairs are drawn; None draws anew each time.

        Returns:
            The pairs to extract from and the held-out pairs, each in the original order.

        Raises:
            InputError: One of the two parts would be empty.

        Example:
            >>> data = ContrastPairDataset("demo", [{"positive": f"yes {i}", "negative": f"no {i}"} for i in range(8)])
            >>> rest, test = data.split(0.25)
            >>> len(rest), len(test)
            (6, 2)
        """
        is_share = isinstance(held_out, float)
        n_held_out = round(len(self) * held_out) if is_share and 0 < held_out < 1 else held_out
        if isinstance(n_held_out, float | bool) or not 0 < n_held_out < len(self):
            raise InputError(
                f"{self.behavior}: cannot hold {held_out!r} of {len(self)} pairs out; "
                "give a count that leaves both parts a pair, or a share between 0 and 1"
            )
        drawn = set(random.Random(seed).sample(range(len(self)), n_held_out))
        rest = [pair for index, pair in enumerate(self._pairs) if index not in drawn]
        test = [pair for index, pair in enumerate(self._pairs) if index in drawn]
        return (
            ContrastPairDataset(self.behavior, rest, self.description),
            ContrastPairDataset(self.behavior, test, self.description),
        )

    def save(self, path: str | Path) -> None:
        """Write the pairs as JSON; the file appears whole or not at all.

        Raises:
            InputError: Some metadata has no JSON form.
            StoreError: The file system refused.
        """
        data = {
            "behavior": self.behavior,
            "description": self.description,
            "pairs": [pair.to_dict() for pair in self._pairs],
        }
        try:
            text = json.dumps(data, ensure_ascii=False, indent=1, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"{self.behavior!r}: the description, or a pair's metadata, has no JSON form: {error}"
            ) from error
        path = Path(path)
        make_folder(path.parent)
        write_atomically(path, text + b"\n")

    @classmethod
    def load(cls, path: str | Path) -> "ContrastPairDataset":
        """Read pairs from JSON: `{"behavior", "pairs": [{"positive", "negative"[, "metadata"]}][, "description"]}`.

        Raises:
            NotStoredError: There is no such file.
            InputError: The file is not such JSON; the message names the file and, for a bad pair, its index.
            StoreError: The file cannot be read.
        """
        path = Path(path)
        try:
            data = json.loads(read_regular(path))
        except FileNotFoundError as error:
            raise NotStoredError(f"{path}: there is no such file of contrast pairs") from error
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {reason(error)}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON: {error}") from error
        return from_json(data, str(path))


def as_pairs(
    pairs: ContrastPairDataset | Iterable[ContrastPair | Mapping[str, Any] | PairLike], behavior: str | None = None
) -> ContrastPairDataset:
    """Contrast pairs in any accepted form as a dataset.

    Args:
        pairs: A dataset (ours, or another library's with `behavior` and iteration), or an iterable of pairs.
        behavior: Name to give; None keeps the dataset's own, and a bare list is called `unknown`.

    Raises:
        InputError: There are no pairs, or one cannot be used; the message has its index.

    Example:
        >>> as_pairs([{"positive": "Yes!", "negative": "No."}], "agreement")
        ContrastPairDataset('agreement', 1 pairs)
    """
    if isinstance(pairs, str | Mapping | ContrastPair) or not isinstance(pairs, Iterable):
        raise InputError(f"contrast pairs are {reprlib.repr(pairs)}; give a ContrastPairDataset or a list of pairs")
    name = behavior or getattr(pairs, "behavior", None) or "unknown"
    dataset = ContrastPairDataset(name, pairs, getattr(pairs, "description", None) or "")
    if not len(dataset):
        raise InputError(f"{name}: there are no contrast pairs; give at least one")
    return dataset


def from_json(data: Any, source: str) -> ContrastPairDataset:
    """A dataset from parsed JSON; `source` names it in errors.

    Raises:
        InputError: It is not such JSON.
    """
    if not isinstance(data, dict) or not isinstance(data.get("pairs"), list):
        raise InputError(f"{source}: expected an object with 'behavior' and a list 'pairs'")
    behavior = data.get("behavior", "")
    if not isinstance(behavior, str):
        raise InputError(f"{source}: behavior is {reprlib.repr(behavior)}; name what the positive side shows")
    for index, pair in enumerate(data["pairs"]):
        if not isinstance(pair, dict):
            raise InputError(f"{source}: pair {index}: no 'positive' in {reprlib.repr(pair)}")
    try:
        return ContrastPairDataset(behavior, data["pairs"], str(data.get("description", "")))
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
