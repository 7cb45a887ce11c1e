"""The folder of a set of steering vectors: a file a layer, and `metadata.json`, which says which belong.

The folder holds the older set or the newer one at any instant, whole: what is to be saved waits in a folder of its own
until `metadata.json` asks for it. Sets of rotalabs-steer are read too. Nothing is read or written through a link that
leads out of the folder.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from tl_persona.errors import CorruptFileError, NotStoredError, StoreError
from tl_persona.files import (
    SET_FILE,
    SET_FORMAT,
    Fields,
    converted,
    fsync_folder,
    locked,
    make_folder,
    parsed_json,
    present,
    read_bytes,
    reason,
    refuse_outside,
    write_atomically,
)
from tl_persona.vectors.files import FORMAT_VERSION, SUFFIX, check_version, decode
from tl_persona.vectors.rotalabs import read_rotalabs

LOCK = ".set.lock"
WAITING = ".set.next"
"""Only who holds the lock writes there, so all that is in it can be removed by who takes the lock next."""

_ATTEMPTS = 100
"""How often a set is read again that was replaced meanwhile."""


_Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class _Metadata(msgspec.Struct):
    behavior: str
    layers: list[int]
    format: str | None = None
    format_version: str | None = None
    sha256: dict[str, _Digest] = {}


def write_set(folder: Path, behavior: str, model_name: str | None, files: Mapping[int, bytes]) -> None:
    """Puts the encoded vectors by layer in place of the set that is there.

    Raises:
        StoreError: The file system refused. The older set is still there, or this one is.
    """
    digests = {str(layer): hashlib.sha256(data).hexdigest() for layer, data in files.items()}
    metadata = {
        "format": SET_FORMAT,
        "format_version": FORMAT_VERSION,
        "behavior": behavior,
        "model_name": model_name,
        "layers": list(files),
        "sha256": digests,
    }
    make_folder(folder)
    with locked(folder / LOCK):
        refuse_outside(folder / WAITING, folder)
        make_folder(folder / WAITING)
        for layer, data in files.items():
            write_atomically(_waiting(folder, digests[str(layer)]), data)
        write_atomically(folder / WAITING / SET_FILE, f"{json.dumps(metadata, indent=1)}\n".encode())
        try:
            (folder / WAITING / SET_FILE).replace(folder / SET_FILE)
            fsync_folder(folder)
        except OSError as error:
            raise StoreError(f"cannot replace {folder / SET_FILE}: {reason(error)}") from error
        try:
            for layer in files:
                # Layers with the same bytes cannot be: a file says which layer it is of.
                _waiting(folder, digests[str(layer)]).replace(_file(folder, layer))
            shutil.rmtree(folder / WAITING)
        except OSError as error:
            raise StoreError(f"cannot tidy up {folder}: {reason(error)}; the set itself is saved") from error


def read_set(folder: Path) -> tuple[str, list[tuple[int, Fields, Path]]]:
    """The behaviour of a set, ours or rotalabs-steer's, and for each layer what its file holds, and which that is.

    Raises:
        NotStoredError: The folder holds no set, or a layer's file is gone.
        CorruptFileError: A file is damaged, or not the one that was saved with this set.
        StoreError: A later version of this package wrote it, a file cannot be read, or a link leads out of the folder.
    """
    source = _inside(folder, folder / SET_FILE)
    for _ in range(_ATTEMPTS):
        metadata = read_bytes(source)
        try:
            return _decoded(folder, metadata)
        except StoreError:
            if read_bytes(source) == metadata:
                raise
            # Another set was saved since: of this one some files are gone.
    raise StoreError(f"{folder} is saved to without end: stop the program that does so")


def _decoded(folder: Path, metadata: bytes) -> tuple[str, list[tuple[int, Fields, Path]]]:
    source = folder / SET_FILE
    found = converted(parsed_json(metadata, source), _Metadata, source)
    if len(set(found.layers)) < len(found.layers):
        raise CorruptFileError(f"{source}: names a layer twice")
    if found.format is None:
        pairs = [(layer, *_pair(folder, layer)) for layer in found.layers]
        return found.behavior, [(layer, read_rotalabs(text, tensor), tensor) for layer, text, tensor in pairs]
    check_version(found.format, found.format_version, SET_FORMAT, source)
    files = [(layer, _file(folder, layer)) for layer in found.layers]
    return found.behavior, [
        (layer, decode(_read_layer(file, found.sha256.get(str(layer), "")), file), file) for layer, file in files
    ]


def _read_layer(file: Path, digest: str) -> bytes:
    """The bytes with this digest, which may still wait where a save was killed or is going on."""
    waiting = _waiting(file.parent, digest)
    for path in (file, waiting, file):  # it may have been moved in between
        try:
            data = read_bytes(_inside(file.parent, path))
        except NotStoredError:
            continue
        if hashlib.sha256(data).hexdigest() == digest:
            return data
    if not present(file):
        raise NotStoredError(f"{file}: there is no such file, though {SET_FILE} names it: save the set again")
    raise CorruptFileError(f"{file} is not the file saved with {file.with_name(SET_FILE)}: save the set again")


def _file(folder: Path, layer: int) -> Path:
    return folder / f"layer_{layer}{SUFFIX}"


def _waiting(folder: Path, digest: str) -> Path:
    return folder / WAITING / f"{digest}{SUFFIX}"


def _pair(folder: Path, layer: int) -> tuple[Path, Path]:
    text, tensor = (_inside(folder, folder / f"layer_{layer}{suffix}") for suffix in (".json", ".pt"))
    return text, tensor


def _inside(folder: Path, path: Path) -> Path:
    refuse_outside(path, folder)
    return path
