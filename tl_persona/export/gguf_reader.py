"""Reads the parts of a GGUF file that a control vector has: texts, lists of texts, and float32 tensors.

The file may come from anywhere, so nothing it declares is believed before the bytes are seen to be there, and reading
takes no more memory than a small multiple of the file. Numbers among the metadata are passed over. Little-endian files
of versions 2 and 3, as all programs write them today. Writing is `control_vectors`' work, with the package `gguf`.
"""

import math
import struct
from dataclasses import dataclass

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of each type of number."""

_UINT32, _TEXT, _LIST = 4, 8, 9
_F32 = 0
_ALIGNMENT_KEY = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class GgufTensor:
    """One tensor.

    Attributes:
        shape: Outermost axis first.
        data: Little-endian float32; None for any other type.
    """

    shape: tuple[int, ...]
    data: bytes | None


def parse_gguf(data: bytes) -> tuple[dict[str, str | list[str]], dict[str, GgufTensor]]:
    """The texts and lists of texts by key, and the tensors by name.

    Raises:
        ValueError: It is no whole GGUF file of a version known here.
    """
    cursor = _Cursor(data)
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
    described = {}
    for _ in range(tensor_count):
        name, dimensions = cursor.text(), cursor.number("<I")
        if name in described or dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} is there twice, or has {dimensions} dimensions")
        shape = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
        described[name] = shape, cursor.number("<I"), cursor.number("<Q")
    if alignment < 1:
        raise ValueError("its alignment is 0")
    sizes = {name: 4 * math.prod(shape) for name, (shape, kind, _) in described.items() if kind == _F32}
    if sum(sizes.values()) > len(data):
        raise ValueError("its tensors are larger than the file: they end beyond it, or share their bytes")
    start = -(-cursor.place // alignment) * alignment
    tensors = {
        name: GgufTensor(shape, cursor.slice(start + offset, sizes[name]) if name in sizes else None)
        for name, (shape, _, offset) in described.items()
    }
    return texts, tensors


class _Cursor:
    """Takes bytes in order, and never more than there are."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.place = 0

    def slice(self, start: int, size: int) -> bytes:
        if start + size > len(self._data):
            raise ValueError(f"it ends at byte {len(self._data)}, within what it says it holds")
        return self._data[start : start + size]

    def take(self, size: int) -> bytes:
        found = self.slice(self.place, size)
        self.place += size
        return found

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def text(self) -> str:
        return self.take(self.number("<Q")).decode()

    def skip(self, kind: int, count: int) -> None:
        if kind not in _SIZES:
            raise ValueError(f"it has a value of type {kind}")
        self.slice(self.place, size := _SIZES[kind] * count)
        self.place += size

    def list_of_texts(self) -> list[str] | None:
        """A list; None, passed over, where it is one of numbers."""
        kind, count = self.number("<I"), self.number("<Q")
        if kind != _TEXT:
            self.skip(kind, count)
            return None
        self.slice(self.place, 8 * count)  # each has its length before it
        return [self.text() for _ in range(count)]
