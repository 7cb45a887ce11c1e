"""The files of steering vectors: bytes from what a vector says of itself, and back, nothing trusted unread.

A vector is one safetensors file whose header says what it is; folders of them are the work of `set_files`. The `.json`
+ `.pt` pairs of rotalabs-steer are read too; writing them is the work of `export.peers`, and making vectors of what was
read that of `steering_vector`.
"""

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from tl_persona.errors import CorruptFileError, InputError, NotStoredError, StoreError
from tl_persona.files import read_regular, reason
from tl_persona.provenance import Provenance

FORMAT = "tl_persona.steering_vector"
FORMAT_VERSION = "1"
SUFFIX = ".safetensors"

_T = TypeVar("_T")

Fields = dict[str, Any]
"""The arguments of a `SteeringVector` by name."""


class _RotalabsMetadata(msgspec.Struct):
    behavior: str
    layer_index: int
    model_name: str
    extraction_method: str = "caa"
    metadata: dict[str, Any] = {}


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
    if vector.ndim != 1 or not vector.numel() or not vector.is_floating_point():
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
    except (TypeError, ValueError) as error:
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
        StoreError: A later version of this package wrote it.
    """
    if path.is_dir():
        raise NotStoredError(f"{path} is a folder; read a set of vectors with SteeringVectorSet.load")
    own = own_path(path)
    if own.exists() or path.suffix == SUFFIX:
        return decode(read_bytes(own), own), own
    pair = path.with_suffix(".json"), path.with_suffix(".pt")
    if not any(file.exists() for file in pair):
        raise NotStoredError(f"{path}: no steering vector is there: neither {own.name} nor {pair[0].name}")
    return read_rotalabs(*pair), pair[1]


def holds_vector(path: Path) -> bool:
    """Whether a file says that it holds a steering vector; the rest of it may still be damaged."""
    if path.suffix in (".pt", ".json"):
        return True
    try:
        with safetensors.safe_open(path, "pt") as opened:
            return (opened.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


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
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CorruptFileError(f"{source}: not a whole safetensors file: {error}") from error
    texts = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    check_version(texts.get("format"), texts.get("format_version"), FORMAT, source)
    header = converted(texts, _Header, source)
    tensor = tensors.get("vector")
    flaw = flaw_of(tensor)
    if tensor is None or flaw is not None:
        raise CorruptFileError(f"{source}: {flaw}; it should hold one non-empty, 1-D floating-point tensor")
    if tensor_digest(tensor) != header.sha256:
        raise CorruptFileError(f"{source}: the vector does not fit its checksum: the file was altered")
    if hashlib.sha256(header.contents.encode()).hexdigest() != header.contents_sha256:
        raise CorruptFileError(f"{source}: the header does not fit its checksum: the file was altered")
    return fields_of(header.contents, tensor, source)


def read_rotalabs(metadata: Path, tensor: Path) -> Fields:
    """What a pair of files of rotalabs-steer holds; nothing but a tensor is unpickled.

    Raises:
        NotStoredError: One of them is gone.
        CorruptFileError: They hold something else.
    """
    found = converted(parsed_json(read_bytes(metadata), metadata), _RotalabsMetadata, metadata)
    if not tensor.exists():
        raise NotStoredError(f"{tensor}: there is no such file, though {metadata.name} is there")
    data = read_bytes(tensor)
    try:
        _refuse_swollen(data)
        vector = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle raises whatever its bytes lead to
        raise CorruptFileError(f"{tensor}: holds no plain tensor: {error}") from error
    flaw = flaw_of(vector)
    if flaw is None and not vector.is_contiguous():
        flaw = "got a view that claims more numbers than it stores"
    if flaw is not None:
        raise CorruptFileError(f"{tensor}: {flaw}; it should hold one non-empty, 1-D floating-point tensor")
    fields = {name: getattr(found, name) for name in _RotalabsMetadata.__struct_fields__}
    return {**fields, "vector": vector}


def _refuse_swollen(data: bytes) -> None:
    """Torch writes its archives uncompressed; a compressed one can unfold to any size, and an older format too."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > len(data):
                raise ValueError(f"its entry {entry.filename!r} is compressed, or longer than the file")


def read_bytes(path: Path) -> bytes:
    """All of a regular file.

    Raises:
        NotStoredError: There is none.
        StoreError: It cannot be read.
    """
    try:
        return read_regular(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotStoredError(f"{path}: there is no such file") from error
    except OSError as error:
        raise StoreError(f"cannot read {path}: {reason(error)}") from error


def parsed_json(data: bytes, source: Path) -> Any:
    """Any JSON.

    Raises:
        CorruptFileError: It is none.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{source}: not JSON: {error}") from error


def converted(data: Any, kind: type[_T], source: Path) -> _T:
    """Parsed JSON as a type.

    Raises:
        CorruptFileError: It does not fit.
    """
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise CorruptFileError(f"{source}: not what is expected there: {error}") from error


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
