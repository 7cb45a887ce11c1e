"""The files that the index of a folder is made of, each read without being trusted, and written whole.

- `manifest.json`: what the vectors of the folder say of themselves; the same vectors make the same bytes.
- `manifest.pending`: entries that are newer than it, one a line.
- `.manifest.times`: sizes, times and inodes that the files had when they were indexed. It says nothing of the vectors,
  only which of them need not be read again on this disk, so it is never copied, and may be lost at any time.

None is read through a symbolic link. What the index means, and when which file is written, is `manifest`'s work.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import msgspec

from tl_persona.errors import StoreError
from tl_persona.files import open_regular, read_regular, reason, write_atomically

MANIFEST = "manifest.json"
PENDING = "manifest.pending"
TIMES = ".manifest.times"
FORMAT_VERSION = 1

MAX_BYTES = 2**30
"""What an index may have; the entries of four hundred thousand personas with 240 samples each."""

MAX_DEPTH = 32
"""How deep a manifest may nest. Ours nests three levels; much deeper ones can be read, and not be written again."""

_HEAD_BYTES = 4096
_PLAIN = frozenset({str, int, float, bool, type(None)})

Entry: TypeAlias = dict[str, Any]
"""What the index has of one persona: `name`, `sample_ids`, and `digest` where its provenance is known."""

FileFacts: TypeAlias = tuple[int, int, int]
"""Size, modification time in ns and inode: as long as they stay, the file is taken to be the one that was indexed."""


class _Pending(msgspec.Struct):
    id: str
    entry: Entry
    file: FileFacts


class _Times(msgspec.Struct):
    manifest_sha256: str
    files: dict[str, FileFacts]


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """What the index files say, whether or not it is still so.

    Attributes:
        manifest: `manifest.json` as it is; with `personas` only where there is none or it is broken.
        entries: Its entries, and over them the pending ones; anything may stand in one.
        facts: For the entries that may be believed, what their files were like.
        problem: Why `manifest.json` cannot be used; None if it can, or is not there.
    """

    manifest: dict[str, Any]
    entries: dict[str, Any]
    facts: dict[str, FileFacts]
    problem: str | None

    @property
    def shape(self) -> tuple[int, int] | None:
        """`(layer, d_model)` where the manifest has it."""
        layers, width = self.manifest.get("num_layers"), self.manifest.get("hidden_size")
        return (layers, width) if isinstance(layers, int) and isinstance(width, int) else None

    @property
    def hook_names(self) -> list[str] | None:
        """The hooks where the manifest has them."""
        names = self.manifest.get("hook_names")
        return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def facts_of(stat: os.stat_result) -> FileFacts:
    """What is compared to tell whether a file has changed."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def is_entry(entry: object) -> TypeGuard[Entry]:
    """Whether something is an entry of the published layout."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return False
    sample_ids = entry.get("sample_ids")
    return isinstance(sample_ids, list) and _PLAIN.issuperset(map(type, sample_ids))


def is_believable(entry: object) -> TypeGuard[Entry]:
    """Whether an entry is such as this package writes, to be written again as it is."""
    return is_entry(entry) and _PLAIN.issuperset(type(value) for key, value in entry.items() if key != "sample_ids")


def read_index_file(path: Path) -> bytes:
    """All of one of the files of an index.

    Raises:
        OSError: It cannot be read, is a symbolic link, or larger than any index.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a symbolic link", str(path))
    return read_regular(path, MAX_BYTES)


def read_recorded(folder: Path) -> Recorded:
    """All that the index files of `folder` say; a broken one says nothing, and of a broken manifest there is a warning.

    Raises:
        StoreError: The manifest cannot be read, or a later version of this package wrote it.
    """
    data, manifest, problem = _read_manifest(folder)
    if problem is not None:
        warnings.warn(f"{folder / MANIFEST} is damaged ({problem}); reading the files' headers instead", stacklevel=3)
    facts = _read_times(folder, data)
    entries: dict[str, Any] = dict(manifest["personas"])
    for pending in _read_pending(folder):
        entries[pending.id] = pending.entry
        facts[pending.id] = pending.file
    return Recorded(manifest=manifest, entries=entries, facts=facts, problem=problem)


def stated_shape(folder: Path) -> tuple[int, int] | None:
    """The shape at the head of `manifest.json`, read without the rest of it.

    Raises:
        StoreError: A later version of this package wrote the manifest.
    """
    try:
        if (folder / MANIFEST).is_symlink():  # `read_recorded` says so
            return None
        with open_regular(folder / MANIFEST) as file:
            head = file.read(_HEAD_BYTES).partition(b'"personas"')[0]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"cannot read {folder / MANIFEST}: {reason(error)}") from error
    stated = {key: int(value) for key, value in re.findall(rb'"(\w+)"\s*:\s*(\d{1,18})\b', head)}
    _check_version(folder, stated.get(b"format_version", FORMAT_VERSION))
    if b"num_layers" in stated and b"hidden_size" in stated:
        return stated[b"num_layers"], stated[b"hidden_size"]
    return None


def encode_manifest(head: Mapping[str, Any], personas: Mapping[str, Entry]) -> bytes:
    """One line a persona: short to read for people, and for tools that compare lines."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    rows = [f"    {json.dumps(persona_id)}: {json.dumps(entry)}" for persona_id, entry in personas.items()]
    listed = "{\n" + ",\n".join(rows) + "\n  }" if rows else "{}"
    return ("{\n" + ",\n".join([*lines, f'  "personas": {listed}']) + "\n}\n").encode()


def write_manifest(folder: Path, data: bytes, facts: Mapping[str, FileFacts]) -> None:
    """Replace `manifest.json`, then the times that go with it; the pending entries are in it, and go.

    Raises:
        StoreError: The file system refused.
    """
    write_atomically(folder / MANIFEST, data)
    times = _Times(hashlib.sha256(data).hexdigest(), dict(facts))
    with contextlib.suppress(StoreError):  # Without them, readers read every header: slower, and right.
        write_atomically(folder / TIMES, msgspec.json.encode(times), durable=False)
    try:
        (folder / PENDING).unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"cannot clean up {folder}: {reason(error)}") from error


def append_pending(folder: Path, persona_id: str, entry: Entry, facts: FileFacts) -> None:
    """Add one entry to `manifest.pending`, which is no link to follow.

    Raises:
        OSError: The file system refused.
    """
    line = msgspec.json.encode(_Pending(persona_id, entry, facts)) + b"\n"
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(folder / PENDING, flags, 0o666), "ab") as file:
        file.write(line)


def _read_manifest(folder: Path) -> tuple[bytes, dict[str, Any], str | None]:
    """Bytes and contents of the manifest, and what is wrong with it, if it is anything but absent."""
    path = folder / MANIFEST
    empty: dict[str, Any] = {"personas": {}}
    try:
        data = read_index_file(path)
    except FileNotFoundError:
        return b"", empty, None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return b"", empty, reason(error)
        raise StoreError(f"cannot read {path}: {reason(error)}") from error
    try:
        manifest = msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        return data, empty, str(error)
    _check_version(folder, manifest.get("format_version", FORMAT_VERSION))
    if not isinstance(manifest.get("personas"), dict):
        return data, empty, "it has no mapping 'personas'"
    if _nests_too_deep([value for key, value in manifest.items() if key != "personas"]):
        return data, empty, f"it nests deeper than {MAX_DEPTH} levels"
    return data, manifest, None


def _nests_too_deep(values: list[Any]) -> bool:
    """Whether `MAX_DEPTH` levels down there are still lists or mappings."""
    for _ in range(MAX_DEPTH):
        nested = [value for value in values if isinstance(value, list | dict)]
        values = [inner for value in nested for inner in (value.values() if isinstance(value, dict) else value)]
    return any(isinstance(value, list | dict) for value in values)


def _check_version(folder: Path, version: object) -> None:
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{folder / MANIFEST} is of format version {version!r}, this tl_persona knows version {FORMAT_VERSION}: "
            "upgrade tl_persona"
        )


def _read_times(folder: Path, manifest: bytes) -> dict[str, FileFacts]:
    """The facts that were written for exactly this manifest."""
    try:
        times = msgspec.json.decode(read_index_file(folder / TIMES), type=_Times)
    except (OSError, msgspec.DecodeError, RecursionError, UnicodeError):
        return {}
    return times.files if times.manifest_sha256 == hashlib.sha256(manifest).hexdigest() else {}


def _read_pending(folder: Path) -> list[_Pending]:
    try:
        lines = read_index_file(folder / PENDING).splitlines()
    except OSError:
        return []
    pending = []
    for line in lines:
        # A line cut short by a kill says nothing: the file's header has what it said.
        with contextlib.suppress(msgspec.DecodeError, RecursionError, UnicodeError):
            pending.append(msgspec.json.decode(line, type=_Pending))
    return pending
