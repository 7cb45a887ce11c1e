"""One persona's vectors as the bytes of one safetensors file, and back; and such a file described for people.

The bytes follow from the contents alone, so the same vectors always make the same file.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from tl_persona.errors import InputError, NonFiniteError
from tl_persona.provenance import Provenance
from tl_persona.store.header import (
    FORMAT,
    FORMAT_VERSION,
    SUFFIX,
    TENSOR_NAME,
    ArtifactHeader,
    canonical_bytes,
    damaged,
    header_checksum,
    header_of,
    numbers_of,
    read_bytes,
    tensor_is_intact,
)
from tl_persona.store.manifest import name_and_sample_ids
from tl_persona.tensors import LayerVectors

_ALIGNMENT = 8


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
        metadata["header_sha256"] = header_checksum(header)
    except UnicodeEncodeError as error:
        raise InputError(f"persona {persona_id!r}: its name or a sample id has a lone surrogate, no text") from error
    text = canonical_bytes(header)
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text + body


def decode(data: bytes, source: Path, persona_id: str | None = None) -> tuple[ArtifactHeader, LayerVectors]:
    """The header and the vectors, in float32, of a whole file, its checksums verified.

    Raises:
        CorruptFileError: The file is truncated or altered, or holds another persona than `persona_id`.
        StoreError: A later version of this package wrote it.
    """
    header = header_of(data, source, persona_id)
    if not tensor_is_intact(data, header):
        raise damaged(source, "the checksum of its tensor does not fit")
    return header, tensor_of(data, header)


def tensor_of(data: bytes, header: ArtifactHeader) -> LayerVectors:
    """The vectors of a whole file in float32, whatever its checksum says.

    Raises:
        CorruptFileError: They are no floating-point matrix of the shape that the header says.
    """
    numbers = numbers_of(data, header)
    return torch.from_numpy(numbers.astype(numbers.dtype.newbyteorder("="))).to(torch.float32)


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


class ArtifactDescription(msgspec.Struct, frozen=True, kw_only=True):
    """What `describe` found in one file.

    Attributes:
        path: The file.
        persona_id: From its header, else its name.
        persona_name: From its header or the manifest beside it; None where neither knows.
        sample_ids: Likewise.
        shape: `(layer, d_model)`.
        dtype: As safetensors writes it, such as `F32`.
        layer_norms: Euclidean norm of each layer's vector, in the activations' own units.
        provenance: What the vectors were computed from; None where it was not recorded.
        checksum_ok: Whether the tensor's bytes fit their checksum; None where none was recorded.
    """

    path: Path
    persona_id: str
    persona_name: str | None
    sample_ids: tuple[str, ...] | None
    shape: tuple[int, int]
    dtype: str
    layer_norms: tuple[float, ...]
    provenance: Provenance | None
    checksum_ok: bool | None


def describe(path: str | Path) -> ArtifactDescription:
    """Everything that one saved file says of itself.

    Raises:
        NotStoredError: There is no such file.
        CorruptFileError: It is truncated or its header altered; an altered tensor shows as `checksum_ok=False`.
        StoreError: It cannot be read, or a newer tl_persona wrote it.
    """
    path = Path(path)
    data = read_bytes(path)
    header = header_of(data, path)
    intact = tensor_is_intact(data, header)
    vectors = tensor_of(data, header)
    name, sample_ids = name_and_sample_ids(header)
    return ArtifactDescription(
        path=path,
        persona_id=header.persona_id or path.name.removesuffix(SUFFIX),
        persona_name=name,
        sample_ids=None if sample_ids is None else tuple(sample_ids),
        shape=header.shape,
        dtype=header.dtype,
        layer_norms=tuple(vectors.double().norm(dim=1).tolist()),
        provenance=header.provenance,
        checksum_ok=intact if header.is_ours else None,
    )
