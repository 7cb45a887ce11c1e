"""One persona's vectors as the bytes of one safetensors file, and back.

The header tells everything known of the vectors, and two checksums make every altered byte show. The bytes
follow from the contents alone, so the same vectors always make the same file. Folders and indexes are
`manifest`'s and `store`'s work. Files without our header, as other libraries write them, are read as they are.
The format is specified in `docs/store.md`.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Any

import msgspec
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from tl_persona.errors import CorruptFileError, InputError, NonFiniteError, NotStoredError, StoreError
from tl_persona.files import reason
from tl_persona.provenance import Provenance
from tl_persona.tensors import LayerVectors

FORMAT = "tl_persona.persona_vector"
FORMAT_VERSION = "1"
TENSOR_NAME = "activations"
SUFFIX = ".safetensors"

MAX_HEADER_BYTES = 100_000_000
"""The bound that safetensors itself sets."""

_ALIGNMENT = 8
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
            raise _corrupt(self.source, f"its {key} cannot be read ({error})") from error


def encode(
    vectors: Tensor,
    *,
    persona_id: str,
    persona_name: str,
    sample_ids: list[str],
    provenance: Provenance | None = None,
) -> bytes:
    """The file for one persona: `vectors` (layer, d_model) in float32, and all that is known of them.

    Raises:
        InputError: The tensor is not 2-D and floating, or does not fit its provenance, or a text is not Unicode.
        NonFiniteError: A layer holds NaN or infinity, or a number beyond float32.
    """
    _check_tensor(vectors, persona_id, sample_ids, provenance)
    single = vectors.detach().to(device="cpu", dtype=torch.float32).contiguous()
    _check_finite(single, persona_id, provenance)
    body = single.numpy().astype("<f4", copy=False).tobytes()

    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "persona_id": persona_id,
        "persona_name": persona_name,
        "sample_ids": json.dumps(sample_ids),
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    if provenance is not None:
        metadata |= {"digest": provenance.digest(), "provenance": _provenance_text(provenance, persona_id)}
    header: dict[str, Any] = {
        "__metadata__": metadata,
        TENSOR_NAME: {"dtype": "F32", "shape": list(single.shape), "data_offsets": [0, len(body)]},
    }
    try:
        "".join((persona_name, *sample_ids)).encode()
        metadata["header_sha256"] = _header_checksum(header)
    except UnicodeEncodeError as error:
        raise InputError(f"persona {persona_id!r}: its name or a sample id has a lone surrogate, no text") from error
    text = _canonical(header)
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text + body


def decode(data: bytes, source: Path, persona_id: str | None = None) -> tuple[ArtifactHeader, LayerVectors]:
    """The header and the vectors, in float32, of a whole file, its checksums verified.

    Raises:
        CorruptFileError: The file is truncated or altered, or holds another persona than `persona_id`.
        StoreError: A later version of this package wrote it.
    """
    header = _parse(data[:8], data[8 : 8 + _header_length(data[:8], len(data), source)], len(data), source, persona_id)
    if not tensor_is_intact(data, header):
        raise _corrupt(source, "the checksum of its tensor does not fit")
    return header, tensor_of(data, source)


def tensor_is_intact(data: bytes, header: ArtifactHeader) -> bool:
    """Whether the tensor's bytes fit their checksum; True also where another library recorded none."""
    if not header.is_ours:
        return True
    start, stop = header.tensor_range
    return hashlib.sha256(memoryview(data)[start:stop]).hexdigest() == header.metadata.get("sha256")


def tensor_of(data: bytes, source: Path) -> LayerVectors:
    """The vectors of a whole file in float32, whatever its checksum says.

    Raises:
        CorruptFileError: There is no such tensor in it.
    """
    try:
        vectors = safetensors.torch.load(data)[TENSOR_NAME]
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise _corrupt(source, f"safetensors cannot read it ({error})") from error
    if not vectors.is_floating_point():
        raise _corrupt(source, f"its tensor is {vectors.dtype}, not floating point")
    return vectors.to(torch.float32)


def read_bytes(path: Path) -> bytes:
    """A whole file.

    Raises:
        NotStoredError: There is none.
        StoreError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise NotStoredError(f"nothing is stored at {path}; extract it first") from error
    except OSError as error:
        raise StoreError(f"cannot read {path}: {reason(error)}") from error


def read_header(path: Path, persona_id: str | None = None) -> ArtifactHeader:
    """The header of a file, at a cost that does not depend on the tensor; a truncated tensor is noticed.

    Raises:
        NotStoredError: There is no such file.
        CorruptFileError: The file is truncated or altered, or holds another persona than `persona_id`.
        StoreError: It cannot be read, or a later version of this package wrote it.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            return _parse(prefix, file.read(_header_length(prefix, size, path)), size, path, persona_id)
    except FileNotFoundError as error:
        raise NotStoredError(f"nothing is stored at {path}; extract it first") from error
    except OSError as error:
        raise StoreError(f"cannot read {path}: {reason(error)}") from error


class _TensorEntry(msgspec.Struct):
    dtype: str
    shape: list[Annotated[int, msgspec.Meta(ge=0)]]
    data_offsets: tuple[Annotated[int, msgspec.Meta(ge=0)], Annotated[int, msgspec.Meta(ge=0)]]


def _header_length(prefix: bytes, file_size: int, source: Path) -> int:
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= min(file_size - 8, MAX_HEADER_BYTES):
        raise _corrupt(source, f"its {file_size} bytes do not begin with a safetensors header")
    return length


def _parse(prefix: bytes, text: bytes, file_size: int, source: Path, persona_id: str | None) -> ArtifactHeader:
    try:
        header = msgspec.json.decode(text, type=dict[str, Any])
        metadata = msgspec.convert(header.get("__metadata__") or {}, dict[str, str])
        tensors = {name: msgspec.convert(x, _TensorEntry) for name, x in header.items() if name != "__metadata__"}
        checksum = _header_checksum(header)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise _corrupt(source, f"its header cannot be read ({error})") from error
    if TENSOR_NAME not in tensors:
        raise _corrupt(source, f"it has no tensor named {TENSOR_NAME!r}")
    entry, start = tensors[TENSOR_NAME], len(prefix) + len(text)
    expected_size = start + max(tensor.data_offsets[1] for tensor in tensors.values())
    if file_size != expected_size:
        raise _corrupt(source, f"it has {file_size} bytes where its header promises {expected_size}")
    if len(entry.shape) != 2:
        raise _corrupt(source, f"its tensor has shape {tuple(entry.shape)}, not (layer, d_model)")
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
        raise _corrupt(header.source, "the checksum of its header does not fit")
    if version != FORMAT_VERSION or header.metadata.get("format") != FORMAT:
        raise StoreError(
            f"{header.source} is of format {header.metadata.get('format')!r}, version {version!r}; "
            f"this tl_persona reads version {FORMAT_VERSION!r}: upgrade tl_persona"
        )
    if persona_id is not None and header.persona_id != persona_id:
        raise _corrupt(header.source, f"it holds persona {header.persona_id!r}: it was renamed or copied")


def _canonical(header: dict[str, Any]) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":")).encode()


def _header_checksum(header: dict[str, Any]) -> str:
    metadata = {key: text for key, text in (header.get("__metadata__") or {}).items() if key != "header_sha256"}
    return hashlib.sha256(_canonical(header | {"__metadata__": metadata})).hexdigest()


def _check_tensor(vectors: Tensor, persona_id: str, sample_ids: list[str], provenance: Provenance | None) -> None:
    if vectors.ndim != 2 or not vectors.is_floating_point() or math.prod(vectors.shape) == 0:
        raise InputError(
            f"persona {persona_id!r}: vectors must be floating point of shape (layer, d_model), "
            f"not {vectors.dtype} of shape {tuple(vectors.shape)}"
        )
    if provenance is None:
        return
    if len(provenance.hook_names) != vectors.shape[0]:
        raise InputError(
            f"persona {persona_id!r}: provenance names {len(provenance.hook_names)} hooks "
            f"for vectors of {vectors.shape[0]} layers"
        )
    if list(provenance.sample_ids) != sample_ids:
        raise InputError(f"persona {persona_id!r}: sample_ids are not those of its provenance")


def _check_finite(vectors: Tensor, persona_id: str, provenance: Provenance | None) -> None:
    bad = [layer for layer, good in enumerate(vectors.isfinite().all(dim=1).tolist()) if not good]
    if bad:
        hook = "" if provenance is None else f" ({provenance.hook_names[bad[0]]})"
        more = "" if len(bad) == 1 else f" and {len(bad) - 1} more"
        raise NonFiniteError(
            f"persona {persona_id!r}: layer {bad[0]}{hook}{more} holds NaN, infinity or a number beyond float32; "
            "nothing was saved. Try another dtype"
        )


def _provenance_text(provenance: Provenance, persona_id: str) -> str:
    try:
        return msgspec.json.encode(provenance, order="sorted").decode()
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"persona {persona_id!r}: its provenance cannot be written as JSON ({error})") from error


def _corrupt(source: Path, what: str) -> CorruptFileError:
    return CorruptFileError(f"{source} is damaged: {what}. Extract it again, or restore a copy")
