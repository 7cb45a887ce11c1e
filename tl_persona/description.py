"""Describes one saved file of persona vectors, for people.

Judging whether it is still the right one is `store`'s work.
"""

from pathlib import Path

import msgspec

from tl_persona.artifact import tensor_of
from tl_persona.artifact_header import SUFFIX, header_of, read_bytes, tensor_is_intact
from tl_persona.manifest import name_and_sample_ids
from tl_persona.provenance import Provenance


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
