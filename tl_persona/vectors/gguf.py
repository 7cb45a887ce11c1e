"""GGUF control vectors: written as llama.cpp reads them, and read back.

llama.cpp adds the tensor `direction.i` to the output of block i, for i from 1 to the last block. There is no direction
0, so a vector of block 0 cannot be written. All else that a vector says of itself goes along in keys of our own, which
other programs pass over. The format is specified in `docs/how-to/take-vectors-elsewhere.md`. Writing needs the package
`gguf`, loaded then.

A file may come from anywhere, so nothing it declares is believed before the bytes are seen to be there, and reading
takes no more memory than a small multiple of the file. The header is `models.gguf_header`'s work.
"""

import math
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import ModuleType

import numpy
import torch
from torch import Tensor

from tl_persona.errors import CorruptFileError, InputError, MissingDependencyError, NonFiniteError, StoreError
from tl_persona.files import Fields, make_folder, read_bytes, write_atomically
from tl_persona.models.gguf_header import read_gguf_header
from tl_persona.provenance import text_digest
from tl_persona.vectors.files import block_outputs, contents_of, fields_of, label_of, tensor_digest

_F32 = 0


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
    header = read_gguf_header(BytesIO(data).read, len(data))
    sizes = {name: 4 * math.prod(info.shape) for name, info in header.tensors.items() if info.kind == _F32}
    if sum(sizes.values()) > len(data):
        raise ValueError("its tensors are larger than the file: they end beyond it, or share their bytes")
    for name, size in sizes.items():
        if header.tensors[name].start + size > len(data):
            raise ValueError(f"it ends at byte {len(data)}, within what it says it holds")
    return header.texts, {
        name: GgufTensor(info.shape, data[info.start : info.start + sizes[name]] if name in sizes else None)
        for name, info in header.tensors.items()
    }


ARCHITECTURE = "controlvector"
FORMAT_VERSION = "1"
SUFFIX = ".gguf"

_MODEL_HINT = f"{ARCHITECTURE}.model_hint"
_LAYER_COUNT = f"{ARCHITECTURE}.layer_count"
_VERSION = "tl_persona.format_version"
_CONTENTS = "tl_persona.contents"
_DIGEST = "tl_persona.sha256"
_DIRECTION = re.compile(r"direction\.(0|[1-9][0-9]{0,8})")


def write_control_vector(path: Path, vectors: Iterable[Fields], model_hint: str | None = None) -> Path:
    """Write vectors as one GGUF file, whole or not at all.

    Args:
        path: The file; `.gguf` is appended where it is missing.
        vectors: At most one a block, none of block 0; written as float32.
        model_hint: What the file says its model is; None is the model's name. No known program compares it.

    Returns:
        The file written.

    Raises:
        InputError: There is no vector, or one acts on the output of block 0 or at another hook.
        NonFiniteError: A vector does not fit float32.
        MissingDependencyError: The package gguf is not installed.
        StoreError: The file system refused.
    """
    chosen = sorted(block_outputs(vectors, "llama.cpp"), key=lambda vector: int(vector["layer_index"]))
    if chosen[0]["layer_index"] == 0:
        raise InputError(
            f"{label_of(chosen[0])}: a GGUF control vector has no direction 0, as llama.cpp leaves the output of "
            "block 0 alone: export without it, by layers=..."
        )
    contents = [contents_of(vector) for vector in chosen]
    tensors = [_as_float32(vector) for vector in chosen]
    if path.suffix != SUFFIX:
        path = path.with_name(path.name + SUFFIX)
    gguf = _gguf()
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder, "draft")
        writer = gguf.GGUFWriter(draft, ARCHITECTURE)
        writer.add_string(_MODEL_HINT, chosen[0]["model_name"] if model_hint is None else model_hint)
        writer.add_uint32(_LAYER_COUNT, len(chosen))
        writer.add_string(_VERSION, FORMAT_VERSION)
        writer.add_array(_CONTENTS, contents)
        writer.add_string(_DIGEST, _digest(contents, tensors))
        for vector, tensor in zip(chosen, tensors, strict=True):
            writer.add_tensor(f"direction.{vector['layer_index']}", tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        data = draft.read_bytes()
    make_folder(path.parent)
    write_atomically(path, data)
    return path


def read_control_vector(path: Path, behavior: str | None = None, model_name: str | None = None) -> list[Fields]:
    """What the vectors of a GGUF file are made of, ours or another program's.

    Args:
        path: The file.
        behavior: Takes the place of what the file says; a file that is not ours says nothing, and its stem is taken.
        model_name: Likewise; a file that is not ours has its model hint taken.

    Returns:
        The arguments of a `SteeringVector` for each layer, ascending; vectors in float32.

    Raises:
        NotStoredError: There is no such file.
        CorruptFileError: It is no control vector that llama.cpp would take, or was altered since it was written.
        StoreError: It cannot be read, or a later version of this package wrote it.
    """
    data = read_bytes(path)
    try:
        texts, directions = parse_gguf(data)
    except ValueError as error:
        raise CorruptFileError(f"{path}: not a whole GGUF file: {error}") from error
    architecture = texts.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise CorruptFileError(f"{path}: its architecture is {architecture!r}, not {ARCHITECTURE!r}")
    if not directions:
        raise CorruptFileError(f"{path}: it holds no direction")
    tensors = {}
    for name, found in directions.items():
        match = _DIRECTION.fullmatch(name)
        if match is None or match.group(1) == "0":
            raise CorruptFileError(f"{path}: tensor {name!r} is no direction of a block from 1 on")
        if found.data is None or len(found.shape) != 1 or not found.data:
            what = "not F32" if found.data is None else f"of shape {found.shape}"
            raise CorruptFileError(f"{path}: {name} is {what}: llama.cpp takes 1-D F32 only")
        tensor = torch.from_numpy(numpy.frombuffer(found.data, dtype="<f4").copy())
        tensors[int(match.group(1))] = tensor
    layers = sorted(tensors)
    if texts.keys().isdisjoint((_VERSION, _CONTENTS, _DIGEST)):
        vectors = [
            _foreign(layer, tensors[layer], path.stem, str(texts.get(_MODEL_HINT) or "unknown")) for layer in layers
        ]
    else:
        vectors = _own(path, texts, [tensors[layer] for layer in layers], layers)
    given = {"behavior": behavior, "model_name": model_name}
    return [fields | {name: value for name, value in given.items() if value is not None} for fields in vectors]


def _own(
    path: Path, texts: Mapping[str, str | list[str]], tensors: Sequence[Tensor], layers: Sequence[int]
) -> list[Fields]:
    if texts.get(_VERSION, FORMAT_VERSION) != FORMAT_VERSION:
        raise StoreError(
            f"{path}: has format version {texts.get(_VERSION)!r}, this package reads {FORMAT_VERSION!r}: upgrade"
        )
    contents = texts.get(_CONTENTS)
    if _VERSION not in texts or not isinstance(contents, list) or texts.get(_DIGEST) != _digest(contents, tensors):
        raise CorruptFileError(f"{path}: its directions do not fit their checksum: the file was altered")
    if len(contents) != len(tensors):
        raise CorruptFileError(f"{path}: it describes {len(contents)} directions and holds {len(tensors)}")
    found = [fields_of(text, tensor, path) for text, tensor in zip(contents, tensors, strict=True)]
    if [fields["layer_index"] for fields in found] != list(layers):
        raise CorruptFileError(f"{path}: its directions are of layers {list(layers)}, its description says otherwise")
    return found


def _foreign(layer: int, tensor: Tensor, behavior: str, model_name: str) -> Fields:
    return {
        "behavior": behavior,
        "layer_index": layer,
        "vector": tensor,
        "model_name": model_name,
        "extraction_method": "gguf",
    }


def _digest(contents: Sequence[str], tensors: Sequence[Tensor]) -> str:
    return text_digest([*contents, *map(tensor_digest, tensors)])


def _as_float32(vector: Fields) -> Tensor:
    tensor: Tensor = vector["vector"].to("cpu", torch.float32).contiguous()
    if not tensor.isfinite().all():
        raise NonFiniteError(f"{label_of(vector)} overflows float32, in which GGUF control vectors are written")
    return tensor


def _gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError(
            'writing GGUF files needs the package gguf: pip install "tl-persona[gguf]"'
        ) from error
    module: ModuleType = gguf
    return module
