"""The fingerprint of a checkpoint's files, for models that have no commit of a hub.

A fingerprint is `tensors-` and 16 hex digits of a SHA-256 over the files, in the order of their names:

- of `.safetensors` and `.gguf` files every tensor's name, type and shape, and of its bytes 4 KiB at the start, in the
  middle and at the end, or all of them up to 12 KiB; of `.gguf` files the metadata too;
- of `.json` and `.py` files every byte;
- of all others, and of files that are not what their suffix says, the size, and 256 blocks of 4 KiB spread evenly, or
  every byte up to 1 MiB.

That is 3 to 5 MB for 135 million parameters. Training moves nearly every number of the tensors it trains, and is
noticed. A few numbers altered between the blocks are not. The files' names count, the folder's does not.

No file raises an error: a damaged one has a fingerprint too, and one that cannot be read counts by its name. Whoever
loads it says what is wrong with it. Fingerprints that begin with `files-` are of an older kind, which read both ends
of each file; they cannot be compared with these.
"""

import hashlib
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from tl_persona.models.gguf_header import read_gguf_header

PREFIX = "tensors-"

_BLOCK = 4096  # bytes: a page of memory and of most disks, so that less would not be quicker
_BLOCKS = 256  # of a file whose tensors are not known: 1 MiB
_TEXTS = (".json", ".py")
_MOST_TEXT = 64 * 2**20  # bytes: the index of the largest checkpoint has some 10 MB
_MAX_HEADER = 100_000_000  # bytes: safetensors itself reads no longer header

_UNREAD = bytes(hashlib.sha256().digest_size)

_Blocks = list[tuple[int, int]]
"""Where to read: first byte and number of bytes."""


class _Tensor(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def fingerprint(files: Sequence[Path]) -> str:
    """One short text for files, the same wherever they lie and in whatever order they are given.

    Args:
        files: Of a checkpoint; links are followed, and a link counts by its own name.

    Example:
        >>> fingerprint([])
        'tensors-e3b0c44298fc1c14'
    """
    hasher = hashlib.sha256()
    for name, contents in sorted((os.fsencode(file.name), _digest(file)) for file in files):
        hasher.update(len(name).to_bytes(8, "big") + name + contents)
    return PREFIX + hasher.hexdigest()[:16]


def _digest(file: Path) -> bytes:
    """SHA-256 of what is looked at in one file."""
    try:
        if not file.is_file():  # a pipe might never begin
            return _UNREAD
        with open(file, "rb", buffering=_BLOCK) as stream:
            described, blocks = _layout(stream, file.suffix, os.fstat(stream.fileno()).st_size)
            hasher = hashlib.sha256(described)
            for start, size in blocks:
                stream.seek(start)
                hasher.update(stream.read(size))
            return hasher.digest()
    except OSError:
        return _UNREAD


def _layout(stream: BinaryIO, suffix: str, size: int) -> tuple[bytes, _Blocks]:
    """What a file says of its tensors, and the blocks of it to read."""
    try:
        if suffix == ".safetensors":
            return _safetensors(stream, size)
        if suffix == ".gguf":
            return _gguf(stream, size)
    except (ValueError, msgspec.MsgspecError, RecursionError):
        pass
    if size <= (_MOST_TEXT if suffix in _TEXTS else _BLOCK * _BLOCKS):
        return b"%d" % size, [(0, size)]
    return b"%d" % size, [(number * (size - _BLOCK) // (_BLOCKS - 1), _BLOCK) for number in range(_BLOCKS)]


def _safetensors(stream: BinaryIO, size: int) -> tuple[bytes, _Blocks]:
    prefix = stream.read(8)
    if len(prefix) < 8:
        raise ValueError("it ends within the length of its header")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(size - 8, _MAX_HEADER):
        raise ValueError("its header is longer than the file, or than safetensors reads")
    entries = msgspec.json.decode(stream.read(length), type=dict[str, msgspec.Raw])
    entries.pop("__metadata__", None)
    described, spans = [], []
    for name in sorted(entries):
        tensor = msgspec.json.decode(entries[name], type=_Tensor)
        start, end = (8 + length + offset for offset in tensor.data_offsets)
        described.append((name, tensor.dtype, tensor.shape, end - start))
        spans.append((start, end))
    return msgspec.json.encode(described), _blocks(spans, 8 + length, size)


def _gguf(stream: BinaryIO, size: int) -> tuple[bytes, _Blocks]:
    header = read_gguf_header(stream.read, size)
    starts = sorted({info.start for info in header.tensors.values()})
    # A tensor ends where the next begins: what its type says of its size need not be known.
    return header.raw, _blocks(zip(starts, [*starts[1:], size], strict=False), len(header.raw), size)


def _blocks(spans: Iterable[tuple[int, int]], least: int, most: int) -> _Blocks:
    """The blocks to read of tensors, each given by its first byte and the byte behind its last."""
    found: _Blocks = []
    for start, end in spans:
        if not least <= start <= end <= most:
            raise ValueError("a tensor lies outside the file")
        size = end - start
        if size <= 3 * _BLOCK:
            found.append((start, size))
        else:
            found += [(place, _BLOCK) for place in (start, start + (size - _BLOCK) // 2, end - _BLOCK)]
    return found
