"""What a file of persona vectors says and holds, read and checked without torch: its header, and its numbers.

The header tells everything known of the vectors, and two checksums make every altered byte show. Files without our
header, as other libraries write them, are read as they are. The format is specified in `docs/concepts/store.md`.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from jaxtyping import Float

from tl_persona.errors import CorruptFileError, NotStoredError, StoreError
from tl_persona.files import open_regular, read_regular, reason
from tl_persona.provenance import Provenance

FORMAT = "tl_persona.persona_vector"
FORMAT_VERSION = "1"
TENSOR_NAME = "activations"
SUFFIX = ".safetensors"

MAX_HEADER_BYTES = 16 * 2**20
"""Far above any real header; parsed, it may take some thirty times as much memory."""

_OURS = frozenset({"persona_id", "persona_name", "sample_ids", "sha256", "header_sha256"})


class ArtifactHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What a file says of its vectors, before they are read.

    Attributes:
        source: The file.
        shape: `(layer, d_model)`.
        dtype: As safetensors writes it; `F32` in our files.
        tensor_range: First byte of the tensor in the file, and the first byte after it.
        metadata: The header's own text entries; none of ours when another library wrote the file.
    """

    source: Path
    shape: tuple[int, int]
    dtype: str
    tensor_range: tuple[int, int]
    metadata: dict[str, str]

    @property
    def is_ours(self) -> bool:
        """Whether this package wrote the file, and so vouches for its contents."""
        return self.metadata.get("format") == FORMAT or not _OURS.isdisjoint(self.metadata)

    @property
    def persona_id(self) -> str | None:
        """The persona, or None in another library's file."""
        return self.metadata.get("persona_id")

    @property
    def persona_name(self) -> str | None:
        """The persona's display name, or None in another library's file."""
        return self.metadata.get("persona_name")

    @property
    def digest(self) -> str | None:
        """`Provenance.digest` of what the vectors were computed from; None where no provenance was given."""
        return self.metadata.get("digest")

    @property
    def sample_ids(self) -> list[str] | None:
        """Ids of the averaged samples, or None in another library's file."""
        text = self.metadata.get("sample_ids")
        return None if text is None else self._decoded("sample_ids", text, list[str])

    @property
    def provenance(self) -> Provenance | None:
        """What the vectors were computed from, where it was given."""
        text = self.metadata.get("provenance")
        return None if text is None else self._decoded("provenance", text, Provenance)

    def _decoded(self, key: str, text: str, kind: Any) -> Any:
        try:
            return msgspec.json.decode(text, type=kind)
        except (msgspec.DecodeError, RecursionError) as error:
            raise damaged(self.source, f"its {key} cannot be read ({error})") from error


def read_bytes(path: Path) -> bytes:
    """A whole file, once its header is read: a file with holes can be of any length, and takes no disk.

    Raises:
        NotStoredError: There is none.
        CorruptFileError: The header is altered, or promises another length.
        StoreError: It cannot be read, or a later version of this package wrote it.
    """
    read_header(path)
    with _reading(path):
        return read_regular(path)


def read_header(path: Path, persona_id: str | None = None) -> ArtifactHeader:
    """The header of a file, at a cost that does not depend on the tensor; a truncated tensor is noticed.

    Raises:
        NotStoredError: There is no such file.
        CorruptFileError: The file is truncated or altered, or holds another persona than `persona_id`.
        StoreError: It cannot be read, or a later version of this package wrote it.
    """
    with _reading(path), open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        prefix = file.read(8)
        return _parse(prefix, file.read(_header_length(prefix, size, path)), size, path, persona_id)


def format_of(path: Path) -> str | None:
    """The format a safetensors file says it is of; None where it does not say, or cannot be read so far."""
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            text = file.read(_header_length(file.read(8), size, path))
        metadata = msgspec.json.decode(text, type=_Formatted).metadata
    except (OSError, CorruptFileError, msgspec.DecodeError, RecursionError, UnicodeError):
        return None
    return None if metadata is None else metadata.format


def header_of(data: bytes, source: Path, persona_id: str | None = None) -> ArtifactHeader:
    """The header of a whole file, whose tensor is not looked at.

    Raises:
        CorruptFileError: The file is truncated, its header altered, or it holds another persona than `persona_id`.
        StoreError: A later version of this package wrote it.
    """
    return _parse(data[:8], data[8 : 8 + _header_length(data[:8], len(data), source)], len(data), source, persona_id)


def tensor_is_intact(data: bytes, header: ArtifactHeader) -> bool:
    """Whether the tensor's bytes fit their checksum; True also where another library recorded none."""
    if not header.is_ours:
        return True
    start, stop = header.tensor_range
    return hashlib.sha256(memoryview(data)[start:stop]).hexdigest() == header.metadata.get("sha256")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotStoredError(f"nothing is stored at {path}; extract it first") from error
    except OSError as error:
        raise StoreError(f"cannot read {path}: {reason(error)}") from error


class _Format(msgspec.Struct):
    format: str | None = None


class _Formatted(msgspec.Struct):
    metadata: _Format | None = msgspec.field(name="__metadata__", default=None)


class _TensorEntry(msgspec.Struct):
    dtype: str
    shape: list[Annotated[int, msgspec.Meta(ge=0)]]
    data_offsets: tuple[Annotated[int, msgspec.Meta(ge=0)], Annotated[int, msgspec.Meta(ge=0)]]


def _header_length(prefix: bytes, file_size: int, source: Path) -> int:
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= min(file_size - 8, MAX_HEADER_BYTES):
        raise damaged(source, f"its {file_size} bytes do not begin with a safetensors header")
    return length


def _parse(prefix: bytes, text: bytes, file_size: int, source: Path, persona_id: str | None) -> ArtifactHeader:
    try:
        header = msgspec.json.decode(text, type=dict[str, Any])
        metadata = msgspec.convert(header.get("__metadata__") or {}, dict[str, str])
        tensors = {name: msgspec.convert(x, _TensorEntry) for name, x in header.items() if name != "__metadata__"}
        checksum = header_checksum(header)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise damaged(source, f"its header cannot be read ({error})") from error
    if TENSOR_NAME not in tensors:
        raise damaged(source, f"it has no tensor named {TENSOR_NAME!r}")
    entry, start = tensors[TENSOR_NAME], len(prefix) + len(text)
    expected_size = start + max(tensor.data_offsets[1] for tensor in tensors.values())
    if file_size != expected_size:
        raise damaged(source, f"it has {file_size} bytes where its header promises {expected_size}")
    if len(entry.shape) != 2 or 0 in entry.shape:
        raise damaged(source, f"its tensor has shape {tuple(entry.shape)}, not (layer, d_model)")
    n_bytes = entry.data_offsets[1] - entry.data_offsets[0]
    if math.prod(entry.shape) > 8 * n_bytes:  # A shape decides how much memory is asked for; no number is below a bit.
        raise damaged(source, f"its tensor of shape {tuple(entry.shape)} has {n_bytes} bytes")
    parsed = ArtifactHeader(
        source=source,
        shape=(entry.shape[0], entry.shape[1]),
        dtype=entry.dtype,
        tensor_range=(start + entry.data_offsets[0], start + entry.data_offsets[1]),
        metadata=metadata,
    )
    if parsed.is_ours:
        _check_header(parsed, checksum, persona_id)
    return parsed


def _check_header(header: ArtifactHeader, checksum: str, persona_id: str | None) -> None:
    version, recorded = header.metadata.get("format_version"), header.metadata.get("header_sha256")
    # The checksum of the header is made alike in every version, so an altered version number is found out.
    if recorded != checksum and (recorded is not None or version == FORMAT_VERSION):
        raise damaged(header.source, "the checksum of its header does not fit")
    if version != FORMAT_VERSION or header.metadata.get("format") != FORMAT:
        raise StoreError(
            f"{header.source} is of format {header.metadata.get('format')!r}, version {version!r}; "
            f"this tl_persona reads version {FORMAT_VERSION!r}: upgrade tl_persona"
        )
    if persona_id is not None and header.persona_id != persona_id:
        raise damaged(header.source, f"it holds persona {header.persona_id!r}: it was renamed or copied")


def canonical_bytes(header: dict[str, Any]) -> bytes:
    """The one way to write a header that its checksum is made of."""
    return json.dumps(header, sort_keys=True, separators=(",", ":")).encode()


def header_checksum(header: dict[str, Any]) -> str:
    """SHA-256, in hex, of a header without its own `header_sha256`."""
    metadata = {key: text for key, text in (header.get("__metadata__") or {}).items() if key != "header_sha256"}
    return hashlib.sha256(canonical_bytes(header | {"__metadata__": metadata})).hexdigest()


def damaged(source: Path, what: str) -> CorruptFileError:
    """The error about a file that cannot be trusted."""
    return CorruptFileError(f"{source} is damaged: {what}. Extract it again, or restore a copy")


_KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def numbers_of(data: bytes, header: ArtifactHeader) -> Float[np.ndarray, "layer d_model"]:
    """The numbers of a whole file, as they are; bfloat16 as float32.

    Raises:
        CorruptFileError: They are no floating-point matrix of the shape that the header says.
    """
    start, stop = header.tensor_range
    if header.dtype not in _KINDS:
        raise damaged(header.source, f"its tensor is {header.dtype}, not floating point of 16, 32 or 64 bits")
    kind = np.dtype(_KINDS[header.dtype])
    if stop - start != math.prod(header.shape) * kind.itemsize:
        raise damaged(header.source, f"its {stop - start} bytes are no {header.dtype} of shape {header.shape}")
    numbers = np.frombuffer(data, kind, math.prod(header.shape), start).reshape(header.shape)
    # A bfloat16 is the upper half of a float32; numpy has no such type.
    return (numbers.astype("<u4") << 16).view("<f4") if header.dtype == "BF16" else numbers
