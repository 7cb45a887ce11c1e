"""The file of a steering vector: bytes from what a vector says of itself, and back, nothing trusted unread.

A vector is one safetensors file whose header says what it is. What goes to another program must mean the same there.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import msgspec
import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from tl_persona.errors import CorruptFileError, InputError, StoreError
from tl_persona.files import Fields, converted, parsed_json
from tl_persona.models.hooks import resid_post
from tl_persona.provenance import Provenance


def label_of(vector: Fields) -> str:
    """A vector's name in messages."""
    return f"steering vector {vector['behavior']!r} at {vector['hook_name']}"


def block_outputs(vectors: Iterable[Fields], consumer: str) -> list[Fields]:
    """The vectors, all at the output of a block, the one place that every program means by a layer's number.

    Raises:
        InputError: There is none, or one acts at another hook.
    """
    chosen = list(vectors)
    if not chosen:
        raise InputError(f"there is no vector to hand to {consumer}: the set is empty")
    for vector in chosen:
        if vector["hook_name"] != resid_post(vector["layer_index"]):
            raise InputError(
                f"{label_of(vector)} has no counterpart in {consumer}, which knows the outputs of blocks only: "
                f"extract at {resid_post(vector['layer_index'])}"
            )
    return chosen


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


def norm_of(tensor: Float[Tensor, "d_model"]) -> float:
    """L2 norm, in float64 and not on the device: not all have it."""
    return float(tensor.to("cpu", torch.float64).norm())


def encode(vector: Fields) -> bytes:
    """The file of a steering vector.

    Raises:
        InputError: Its metadata or provenance has no JSON form.
    """
    contents = contents_of(vector)
    tensor = vector["vector"].cpu().contiguous()
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "sha256": tensor_digest(tensor),
        "contents": contents,
        "contents_sha256": hashlib.sha256(contents.encode()).hexdigest(),
    }
    return _with_sorted_header(safetensors.torch.save({"vector": tensor}, header))


def contents_of(vector: Fields) -> str:
    """All that a steering vector says of itself but its tensor, as one line of JSON.

    Raises:
        InputError: Its metadata or provenance has no JSON form.
    """
    fields = {name: vector[name] for name in _Contents.__struct_fields__}
    try:
        fields["provenance"] = None if vector["provenance"] is None else msgspec.to_builtins(vector["provenance"])
        return json.dumps(fields, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{label_of(vector)}: its metadata or provenance has no JSON form: {error}") from error


def fields_of(contents: str, tensor: Tensor, source: Path) -> Fields:
    """What `contents_of` wrote, with the tensor it belongs to.

    Raises:
        CorruptFileError: The text is something else.
    """
    found = converted(parsed_json(contents.encode(), source), _Contents, source)
    return {**{name: getattr(found, name) for name in _Contents.__struct_fields__}, "vector": tensor}


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
