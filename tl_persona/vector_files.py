"""The files of steering vectors: bytes from what a vector says of itself, and back, nothing trusted unread.

A vector is one safetensors file whose header says what it is; folders of them are the work of `set_files`, pairs of
rotalabs-steer that of `rotalabs_files`, and making vectors of what was read that of `steering_vector`.
"""

import hashlib
import json
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import msgspec
import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from tl_persona.errors import CorruptFileError, InputError, NotStoredError, StoreError
from tl_persona.files import Fields, converted, is_folder, parsed_json, present, read_bytes
from tl_persona.provenance import Provenance
from tl_persona.rotalabs_files import read_rotalabs

FORMAT = "tl_persona.steering_vector"
FORMAT_VERSION = "1"
SUFFIX = ".safetensors"

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Of a vector; torch does not calculate with shorter floats."""

_DTYPE_NAMES = ("F64", "F32", "F16", "BF16")


class _Header(msgspec.Struct, kw_only=True):
    """The `__metadata__` of our files; safetensors allows texts only, so the rest is JSON."""

    sha256: str
    contents: str
    contents_sha256: str


class _Contents(msgspec.Struct, kw_only=True):
    """All of a vector but its tensor."""

    behavior: str
    layer_index: int
    hook_name: str
    model_name: str
    extraction_method: str
    metadata: dict[str, Any]
    provenance: Provenance | None


def flaw_of(vector: object) -> str | None:
    """Why something is no vector; None if it is one."""
    if not isinstance(vector, Tensor):
        return f"got {type(vector).__name__}"
    if vector.layout != torch.strided or vector.device.type == "meta":
        return f"got a {vector.layout} tensor on {vector.device}"
    if vector.ndim != 1 or not vector.numel() or vector.dtype not in _DTYPES:
        return f"got {vector.dtype} of shape {tuple(vector.shape)}"
    return None


def own_path(path: Path) -> Path:
    """The name of our file for any spelling of it.

    Raises:
        InputError: The path names no file.
    """
    if not path.name:
        raise InputError(f"{str(path)!r} names no file")
    if path.suffix in (SUFFIX, ".pt", ".json"):
        return path.with_suffix(SUFFIX)
    return path.with_name(path.name + SUFFIX)  # not with_suffix: "layer_0.5" has no suffix to lose


def encode(vector: Any, label: str) -> bytes:
    """The file of a `SteeringVector`.

    Args:
        vector: A `SteeringVector`; its type is defined further down the flow.
        label: Names it in errors.

    Raises:
        InputError: Its metadata or provenance has no JSON form.
    """
    contents = contents_of(vector, label)
    tensor = vector.vector.cpu().contiguous()
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "sha256": tensor_digest(tensor),
        "contents": contents,
        "contents_sha256": hashlib.sha256(contents.encode()).hexdigest(),
    }
    return _with_sorted_header(safetensors.torch.save({"vector": tensor}, header))


def contents_of(vector: Any, label: str) -> str:
    """All that a `SteeringVector` says of itself but its tensor, as one line of JSON.

    Raises:
        InputError: Its metadata or provenance has no JSON form.
    """
    fields = {name: getattr(vector, name) for name in _Contents.__struct_fields__}
    try:
        fields["provenance"] = None if vector.provenance is None else msgspec.to_builtins(vector.provenance)
        return json.dumps(fields, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{label}: its metadata or provenance has no JSON form: {error}") from error


def fields_of(contents: str, tensor: Tensor, source: Path) -> Fields:
    """What `contents_of` wrote, with the tensor it belongs to.

    Raises:
        CorruptFileError: The text is something else.
    """
    found = converted(parsed_json(contents.encode(), source), _Contents, source)
    return {**{name: getattr(found, name) for name in _Contents.__struct_fields__}, "vector": tensor}


def read_vector(path: Path) -> tuple[Fields, Path]:
    """What a vector's file holds, ours or rotalabs-steer's, and which file that is.

    Raises:
        NotStoredError: There is neither kind of file.
        CorruptFileError: The file is truncated or altered, or holds something else.
        StoreError: It cannot be read, or a later version of this package wrote it.
    """
    if is_folder(path):
        raise NotStoredError(f"{path} is a folder; read a set of vectors with SteeringVectorSet.load")
    own = own_path(path)
    if path.suffix == SUFFIX or present(own):
        return decode(read_bytes(own), own), own
    pair = path.with_suffix(".json"), path.with_suffix(".pt")
    if not any(map(present, pair)):
        raise NotStoredError(f"{path}: no steering vector is there: neither {own.name} nor {pair[0].name}")
    return read_rotalabs(*pair), pair[1]


def _with_sorted_header(data: bytes) -> bytes:
    """The same file with its header in order: safetensors writes metadata in a new order each time."""
    start = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(json.loads(data[8:start]), sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the tensor aligned
    return len(text).to_bytes(8, "little") + text + data[start:]


def decode(data: bytes, source: Path) -> Fields:
    """What the bytes of our file hold, checksums verified.

    Raises:
        CorruptFileError: They are truncated or altered, or something else.
        StoreError: A later version of this package wrote them.
    """
    try:
        tensors = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call, unused-ignore]
    except SafetensorError as error:
        raise CorruptFileError(f"{source}: not a whole safetensors file: {error}") from error
    texts = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    check_version(texts.get("format"), texts.get("format_version"), FORMAT, source)
    header = converted(texts, _Header, source)
    found = {name: (tensor["dtype"], tensor["shape"]) for name, tensor in tensors.items()}
    dtype, shape = found.get("vector", (None, []))
    if len(found) != 1 or dtype not in _DTYPE_NAMES or len(shape) != 1 or not shape[0]:
        raise CorruptFileError(f"{source}: holds {shown(found)}, not one 'vector', non-empty, 1-D and floating-point")
    tensor = safetensors.torch.load(data)["vector"]  # not earlier: torch cannot count up to every shape
    if tensor_digest(tensor) != header.sha256:
        raise CorruptFileError(f"{source}: the vector does not fit its checksum: the file was altered")
    if hashlib.sha256(header.contents.encode()).hexdigest() != header.contents_sha256:
        raise CorruptFileError(f"{source}: the header does not fit its checksum: the file was altered")
    return fields_of(header.contents, tensor, source)


def check_version(format_: object, version: object, expected: str, source: Path) -> None:
    """Refuses a file of another format or of a later version.

    Raises:
        CorruptFileError: Its format is another.
        StoreError: Its version is.
    """
    if format_ != expected:
        raise CorruptFileError(f"{source}: its format is {format_!r}, not {expected!r}")
    if version != FORMAT_VERSION:
        raise StoreError(f"{source}: has format version {version!r}, this package reads {FORMAT_VERSION!r}: upgrade")


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256, in hex, of a tensor's bytes in memory."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
