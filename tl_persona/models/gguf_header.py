"""The header of a GGUF file: its texts, and where its tensors lie.

A file may come from anywhere, so nothing it declares is believed before the bytes are seen to be there, and no more is
read than the header. Numbers among the metadata are passed over. Little-endian files of versions 2 and 3, as all
programs write them today. A header that is not whole, or of another kind, raises `ValueError`.

Declined: what the tensors hold, whose size in bytes depends on their type.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

MAX_BYTES = 256 * 2**20
"""Far above any real header: the largest, of models with 256,000 tokens, have some 20 MB."""

_CHUNK = 1 << 16  # bytes read at once
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of each type of number."""

_LENGTH = struct.Struct("<Q")
_UINT32, _TEXT, _LIST = 4, 8, 9
_ALIGNMENT_KEY = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class GgufTensorInfo:
    """What the header says of one tensor.

    Attributes:
        shape: Outermost axis first.
        kind: The number of its type; 0 is float32.
        start: The byte of the file where it begins, which may lie beyond the end of the file.
    """

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class GgufHeader:
    """All that stands before the tensors' bytes.

    Attributes:
        raw: The bytes of the header, from the first of the file to the last before the padding.
        texts: The texts and lists of texts among the metadata, by key.
        tensors: The tensors by name, in the header's order.
    """

    raw: bytes
    texts: dict[str, str | list[str]]
    tensors: dict[str, GgufTensorInfo]


def read_gguf_header(read: Callable[[int], bytes], size: int) -> GgufHeader:
    """Read the header of a GGUF file.

    Args:
        read: The `read` of the file, open at its beginning.
        size: Of the file, in bytes.

    Raises:
        ValueError: It is no whole GGUF header of a version known here, or larger than `MAX_BYTES`.
        OSError: The file cannot be read.
    """
    cursor = _Cursor(read, size)
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin as GGUF does")
    version = cursor.number("<I")
    if version not in (2, 3):
        raise ValueError(f"it is of GGUF version {version}")
    tensor_count, key_count = cursor.number("<Q"), cursor.number("<Q")
    texts: dict[str, str | list[str]] = {}
    alignment = _DEFAULT_ALIGNMENT
    seen = set()
    for _ in range(key_count):
        key, kind = cursor.text(), cursor.number("<I")
        if key in seen:
            raise ValueError(f"it has the key {key!r} twice")
        seen.add(key)
        if kind == _TEXT:
            texts[key] = cursor.text()
        elif kind == _LIST:
            found = cursor.list_of_texts()
            if found is not None:
                texts[key] = found
        elif key == _ALIGNMENT_KEY and kind == _UINT32:
            alignment = cursor.number("<I")
        else:
            cursor.skip(kind, 1)
    if alignment < 1:
        raise ValueError("its alignment is 0")
    described = {}
    for _ in range(tensor_count):
        name, dimensions = cursor.text(), cursor.number("<I")
        if name in described or dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} is there twice, or has {dimensions} dimensions")
        shape = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
        described[name] = shape, cursor.number("<I"), cursor.number("<Q")
    start = -(-cursor.place // alignment) * alignment
    tensors = {name: GgufTensorInfo(shape, kind, start + offset) for name, (shape, kind, offset) in described.items()}
    return GgufHeader(cursor.passed(), texts, tensors)


class _Cursor:
    """Takes bytes in order, reads little beyond them, and never takes more than there are."""

    def __init__(self, read: Callable[[int], bytes], size: int) -> None:
        self._read = read
        self._size = size
        self._data = bytearray()
        self.place = 0

    def passed(self) -> bytes:
        return bytes(self._data[: self.place])

    def take(self, size: int) -> bytes:
        start = self._pass(size)
        return bytes(self._data[start : self.place])

    def number(self, form: str) -> int:
        start = self._pass(struct.calcsize(form))
        return int(struct.unpack_from(form, self._data, start)[0])

    def text(self) -> str:
        return self.take(self.number("<Q")).decode()

    def skip(self, kind: int, count: int) -> None:
        if kind not in _SIZES:
            raise ValueError(f"it has a value of type {kind}")
        self._pass(_SIZES[kind] * count)

    def list_of_texts(self) -> list[str] | None:
        """A list; None, passed over, where it is one of numbers."""
        kind, count = self.number("<I"), self.number("<Q")
        if kind != _TEXT:
            self.skip(kind, count)
            return None
        self._refuse_beyond(self.place + 8 * count)  # each has its length before it
        found = []
        for _ in range(count):  # a hundred thousand times for a real model: no calls that can be spared
            start = self.place + _LENGTH.size
            if start > len(self._data):
                self._reach(start)
            self.place = start + _LENGTH.unpack_from(self._data, self.place)[0]
            if self.place > len(self._data):
                self._reach(self.place)
            found.append(self._data[start : self.place].decode())
        return found

    def _pass(self, size: int) -> int:
        """Move on, and give the place before."""
        start, self.place = self.place, self.place + size
        self._reach(self.place)
        return start

    def _reach(self, end: int) -> None:
        self._refuse_beyond(end)
        while len(self._data) < end:
            more = self._read(max(_CHUNK, end - len(self._data)))
            if not more:
                raise ValueError(f"it ends at byte {len(self._data)}, within its header")
            self._data += more

    def _refuse_beyond(self, end: int) -> None:
        if end > self._size:
            raise ValueError(f"it ends at byte {self._size}, within what it says it holds")
        if end > MAX_BYTES:
            raise ValueError(f"its header is larger than {MAX_BYTES} bytes")
