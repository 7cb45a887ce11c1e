"""The folders of rotalabs-steer: `.json` + `.pt` pairs, read and written, and nothing run of what is in them.

A `.pt` file is an archive: a pickle, which says how a tensor is put together, and the bytes of its numbers. The pickle
is never unpickled. It is one plain 1-D tensor's, instruction by instruction, or refused; then its few numbers say
which bytes are the vector.
"""

import io
import json
import pickletools
import sys
import zipfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import torch
from jaxtyping import Float
from torch import Tensor

from tl_persona.errors import CorruptFileError, InputError, NotStoredError, StoreError
from tl_persona.files import (
    SET_FILE,
    SET_FORMAT,
    Fields,
    converted,
    make_folder,
    parsed_json,
    present,
    read_bytes,
    write_atomically,
)
from tl_persona.vectors.files import block_outputs, contents_of


def write_rotalabs(folder: Path, vectors: Iterable[Fields]) -> Path:
    """Write a folder that rotalabs-steer loads as a set of its own.

    It has `metadata.json`, and for each layer `layer_<N>.json` and a plain tensor in `layer_<N>.pt`. The tensors are in
    torch's pickle, since its readers know nothing else; they load with `weights_only=True`, as rotalabs-steer loads
    them. Provenance has no place in it.

    Raises:
        InputError: There is no vector, one is no output of a block, metadata has no JSON form, or the folder holds a
            set of this package, whose files would be mixed up with these.
        StoreError: The file system refused.
    """
    chosen = sorted(block_outputs(vectors, "rotalabs-steer"), key=lambda vector: int(vector["layer_index"]))
    if _holds_own_set(folder):
        raise InputError(f"{folder} holds a set of this package's own format: choose another folder")
    files = {}
    for vector in chosen:
        contents_of(vector)  # raises where JSON cannot hold the metadata, before anything is written
        described = {
            "behavior": vector["behavior"],
            "layer_index": vector["layer_index"],
            "model_name": vector["model_name"],
            "extraction_method": vector["extraction_method"],
            "metadata": dict(vector["metadata"]),
            "vector_shape": list(vector["vector"].shape),
        }
        pickled = BytesIO()
        torch.save(vector["vector"].cpu().clone(), pickled)  # a view would take its whole storage along
        files[f"layer_{vector['layer_index']}.pt"] = pickled.getvalue()
        files[f"layer_{vector['layer_index']}.json"] = _json(described)
    metadata = {
        "behavior": chosen[0]["behavior"],
        "layers": [vector["layer_index"] for vector in chosen],
        "model_name": chosen[0]["model_name"],
    }
    make_folder(folder)
    for name, data in (*files.items(), (SET_FILE, _json(metadata))):
        write_atomically(folder / name, data)
    return folder


def _holds_own_set(folder: Path) -> bool:
    source = folder / SET_FILE
    try:
        found = parsed_json(read_bytes(source), source)
    except StoreError:
        return False
    return isinstance(found, dict) and found.get("format") == SET_FORMAT


def _json(data: object) -> bytes:
    return f"{json.dumps(data, indent=2)}\n".encode()


_PROGRAM = "data.pkl"
_MAX_PROGRAM_BYTES = 4096
"""A plain tensor's takes some 150."""

_REBUILD, _NO_HOOKS = "torch._utils _rebuild_tensor_v2", "collections OrderedDict"
_DTYPES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
}
_FORM = (
    *("GLOBAL", "MARK"),  # rebuild(
    *("MARK", "BINUNICODE", "GLOBAL", "BINUNICODE", "BINUNICODE", "INT", "TUPLE", "BINPERSID"),  # the stored numbers,
    *("INT", "INT", "TUPLE1", "INT", "TUPLE1", "BOOL"),  # first of them, (size,), (stride,), whether it had a gradient,
    *("GLOBAL", "EMPTY_TUPLE", "REDUCE", "TUPLE", "REDUCE", "STOP"),  # no hooks)
)
_KINDS = {"BININT": "INT", "BININT1": "INT", "BININT2": "INT", "LONG1": "INT", "NEWTRUE": "BOOL", "NEWFALSE": "BOOL"}
_WITHOUT_EFFECT = {"PROTO", "BINPUT", "LONG_BINPUT"}
"""The last two number what could be repeated; nothing in the form is."""


class _Metadata(msgspec.Struct):
    behavior: str
    layer_index: int
    model_name: str
    extraction_method: str = "caa"
    metadata: dict[str, Any] = {}


def read_rotalabs(metadata: Path, tensor: Path) -> Fields:
    """What a pair of files of rotalabs-steer holds.

    Raises:
        NotStoredError: One of them is gone.
        CorruptFileError: They hold something else.
        StoreError: One cannot be read.
    """
    found = converted(parsed_json(read_bytes(metadata), metadata), _Metadata, metadata)
    if not present(tensor):
        raise NotStoredError(f"{tensor}: there is no such file, though {metadata.name} is there")
    data = read_bytes(tensor)
    try:
        vector = _vector_in(data)
    except Exception as error:  # a broken archive raises whatever its bytes lead to
        raise CorruptFileError(f"{tensor}: holds no plain 1-D tensor of floats, as torch saves it: {error}") from error
    return {**{name: getattr(found, name) for name in _Metadata.__struct_fields__}, "vector": vector}


def _vector_in(data: bytes) -> Float[Tensor, "d_model"]:
    if not data.startswith(b"PK\x03\x04"):
        raise ValueError("it does not begin as an archive does")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        programs = [name for name in names if name.endswith(f"/{_PROGRAM}")]
        if len(programs) != 1:
            raise ValueError(f"it has {len(programs)} entries {_PROGRAM}")
        folder = programs[0].removesuffix(_PROGRAM)
        order = f"{folder}byteorder"
        if order in names and _entry(archive, order, len(data)) != sys.byteorder.encode():
            raise ValueError("it is of a machine with another byte order")
        dtype, key, stored, first, size = _described(_entry(archive, programs[0], _MAX_PROGRAM_BYTES))
        numbers = bytearray(_entry(archive, f"{folder}data/{key}", len(data)))
    if len(numbers) != stored * dtype.itemsize or not 0 <= first < first + size <= stored:
        raise ValueError(f"it claims numbers {first} to {first + size} of {stored}, and has {len(numbers)} bytes")
    return torch.frombuffer(numbers, dtype=dtype, count=size, offset=first * dtype.itemsize)


def _entry(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """Torch compresses nothing; what is compressed can unfold to any size."""
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > most:
        raise ValueError(f"its entry {name!r} is compressed, or longer than it can be")
    return archive.read(entry)


def _described(program: bytes) -> tuple[torch.dtype, str, int, int, int]:
    """Of the vector that a pickle describes: its type, the key of its numbers, how many, its first one, its size."""
    steps = [(step.name, value) for step, value, _ in pickletools.genops(program) if step.name not in _WITHOUT_EFFECT]
    for name, value in steps:
        if name == "GLOBAL" and value not in (_REBUILD, _NO_HOOKS, *_DTYPES):
            raise ValueError(f"it asks for {value!r}, as no plain tensor of floats does")
    if tuple(_KINDS.get(name, name) for name, _ in steps) != _FORM:
        raise ValueError("its pickle describes something else")
    rebuild, _, kind, key, _, stored, first, size, stride, hooks = [value for _, value in steps if value is not None]
    if (rebuild, hooks) != (_REBUILD, _NO_HOOKS) or kind not in _DTYPES or (stride != 1 and size > 1):
        raise ValueError("its pickle describes something else, or numbers that do not lie side by side")
    return _DTYPES[kind], key, stored, first, size
