"""The index of one folder of persona vectors: `manifest.json`, and `manifest.pending` beside it.

The files are the truth. The index spares readers the headers of files that have not changed since they were
indexed; anything it lacks, or has wrong, is read from the files again, and so it may be lost at any time.
Rewriting the index for every new file would cost more the more there are. Above `SMALL` bytes, new entries are
therefore appended to `manifest.pending`, and the index is rewritten once they exceed a fixed share of it.
"""

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import msgspec
from filelock import FileLock, Timeout

from tl_persona.artifact import SUFFIX, ArtifactHeader, read_header
from tl_persona.errors import CorruptFileError, NotStoredError, StoreError, StoreMismatchError
from tl_persona.files import TEMPORARY_PREFIX, reason, write_atomically

MANIFEST = "manifest.json"
PENDING = "manifest.pending"
LOCK = ".manifest.lock"
FORMAT_VERSION = 1

SMALL = 64 * 1024
"""Bytes up to which rewriting the index costs no more than the two fsyncs of a save."""

PENDING_SHARE = 8
"""The index is rewritten when pending entries exceed an eighth of it: nine bytes written for each byte kept."""

_LOCK_SECONDS = 60.0  # The lock is held for one save, or one rewriting: milliseconds, a few seconds at worst.
_HEAD_BYTES = 4096

Entry = dict[str, Any]


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """What one folder holds.

    Attributes:
        shape: `(layer, d_model)` of every vector; None while there are none.
        hook_names: The hooks of the first axis, where a file records them.
        personas: For every readable file the persona's `name`, `sample_ids` and `file` (`size`, `mtime_ns`), with
            `digest` where its provenance is known.
        extra: Entries of the manifest that are none of ours, kept as they are.
    """

    shape: tuple[int, int] | None
    hook_names: list[str] | None
    personas: dict[str, Entry]
    extra: dict[str, Any]


def read_index(folder: Path, *, trust: bool = True) -> Index:
    """The index of `folder`, as its files are now; an absent folder is an empty one.

    Args:
        folder: The folder of one model, strategy and variant.
        trust: Whether entries that fit their file's size and time are believed; otherwise every header is read.

    Raises:
        StoreError: The folder cannot be read, or a later version of this package wrote its manifest.
        StoreMismatchError: Two files differ in shape.
    """
    manifest = _read_manifest(folder)
    entries: dict[str, Any] = {**manifest["personas"], **_read_pending(folder)}
    shape = _shape_of(manifest)
    personas: dict[str, Entry] = {}
    unread: list[tuple[str, Path, os.stat_result]] = []
    for persona_id, path, stat in _artifacts(folder):
        known = entries.get(persona_id)
        if trust and shape is not None and _is_entry(known) and known.get("file") == _file_facts(stat):
            personas[persona_id] = known
        else:
            unread.append((persona_id, path, stat))

    shape_from: Path | None = folder / MANIFEST if personas else None
    hook_names = _hook_names_of(manifest) if personas else None
    for persona_id, path, stat in unread:
        try:
            header = read_header(path, persona_id)
            entry = _entry_from(header, stat, manifest["personas"].get(persona_id))
            if hook_names is None and header.provenance is not None:
                hook_names = list(header.provenance.hook_names)
        except StoreError as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
            continue
        if shape_from is None:
            if shape not in (None, header.shape):
                warnings.warn(f"{folder / MANIFEST} says {shape} for files of {header.shape}", stacklevel=2)
            shape, shape_from = header.shape, path
        elif shape != header.shape:
            raise StoreMismatchError(
                f"{path} holds vectors of shape {header.shape}, but {shape_from} of {shape}: "
                "one folder has one shape; move one of them away"
            )
        personas[persona_id] = entry
    ours = {"format_version", "num_layers", "hidden_size", "hook_names", "personas"}
    return Index(
        shape=shape if personas else None,
        hook_names=hook_names if personas else None,
        personas=dict(sorted(personas.items())),
        extra={key: value for key, value in manifest.items() if key not in ours},
    )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes and threads from writing to `folder`.

    Raises:
        StoreError: The lock cannot be had.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=_LOCK_SECONDS, poll_interval=0.005)
    except Timeout as error:
        raise StoreError(f"another process has held {folder / LOCK} for {_LOCK_SECONDS:.0f} s; is it stuck?") from error
    except (OSError, NotImplementedError) as error:
        raise StoreError(f"cannot lock {folder / LOCK}: {reason(error)}; check its permissions") from error
    try:
        yield
    finally:
        lock.release()


def record(folder: Path, path: Path) -> None:
    """Index the file at `path`, just written to `folder`, whose lock the caller holds.

    Raises:
        StoreError: The index cannot be written. The file itself is safe, and readers find it.
    """
    try:
        manifest_bytes = _size(folder / MANIFEST)
        if manifest_bytes >= SMALL:
            persona_id = path.name.removesuffix(SUFFIX)
            line = {"id": persona_id, "entry": _entry_from(read_header(path), path.stat(), None)}
            _append(folder / PENDING, json.dumps(line).encode() + b"\n")
    except OSError as error:
        raise StoreError(f"cannot index {path}: {reason(error)}; the vectors themselves are saved") from error
    if manifest_bytes < SMALL or _size(folder / PENDING) * PENDING_SHARE > manifest_bytes:
        rewrite(folder)


def rewrite(folder: Path, *, trust: bool = True) -> Index:
    """Write `manifest.json` anew from what is in `folder`, whose lock the caller holds.

    Raises:
        StoreError: The folder cannot be read or written.
    """
    index = read_index(folder, trust=trust)
    write_atomically(folder / MANIFEST, _encoded(index))
    try:
        (folder / PENDING).unlink(missing_ok=True)
        # Who holds the lock is the only writer: temporary files are what a killed process left.
        for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
            leftover.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"cannot clean up {folder}: {reason(error)}") from error
    return index


def is_up_to_date(folder: Path) -> bool:
    """Whether `manifest.json` alone says all there is to say of `folder`."""
    try:
        current = (folder / MANIFEST).read_bytes()
    except OSError:
        return not any(_artifacts(folder))
    return not (folder / PENDING).exists() and current == _encoded(read_index(folder))


def any_header(folder: Path) -> ArtifactHeader | None:
    """The header of some readable file, at a cost that does not depend on how many there are."""
    for persona_id, path, _ in _artifacts(folder):
        try:
            return read_header(path, persona_id)
        except (CorruptFileError, NotStoredError):
            continue
    return None


def name_and_sample_ids(header: ArtifactHeader) -> tuple[str | None, list[str] | None]:
    """The persona's name and sample ids from the file's header, or for another library's file from its manifest."""
    if header.is_ours:
        return header.persona_name, header.sample_ids
    entry = _read_manifest(header.source.parent)["personas"].get(header.source.name.removesuffix(SUFFIX))
    return (entry["name"] or None, [str(x) for x in entry["sample_ids"]]) if _is_entry(entry) else (None, None)


def stated_shape(folder: Path) -> tuple[int, int] | None:
    """The shape at the head of `manifest.json`, read without the rest of it.

    Raises:
        StoreError: A later version of this package wrote the manifest.
    """
    try:
        with open(folder / MANIFEST, "rb") as file:
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


def _artifacts(folder: Path) -> Iterator[tuple[str, Path, os.stat_result]]:
    try:
        with os.scandir(folder) as listing:
            for item in listing:
                if item.name.endswith(SUFFIX) and not item.name.startswith(".") and item.is_file():
                    yield item.name.removesuffix(SUFFIX), Path(item.path), item.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(f"cannot list {folder}: {reason(error)}") from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        _check_version(folder, manifest.get("format_version", FORMAT_VERSION))
        if isinstance(manifest.get("personas"), dict):
            return manifest
        problem = "it has no mapping 'personas'"
    except FileNotFoundError:
        return {"personas": {}}
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        problem = str(error)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {reason(error)}") from error
    warnings.warn(f"{path} is damaged ({problem}); reading the files' headers instead", stacklevel=3)
    return {"personas": {}}


def _check_version(folder: Path, version: object) -> None:
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{folder / MANIFEST} is of format version {version!r}, this tl_persona knows version {FORMAT_VERSION}: "
            "upgrade tl_persona"
        )


def _read_pending(folder: Path) -> dict[str, Any]:
    try:
        lines = (folder / PENDING).read_bytes().splitlines()
    except OSError:
        return {}
    entries = {}
    for line in lines:
        try:
            pending = msgspec.json.decode(line, type=dict[str, Any])
            entries[str(pending["id"])] = pending["entry"]
        except (msgspec.DecodeError, RecursionError, UnicodeError, KeyError):
            continue  # A line cut short by a kill: the file's header has what it said.
    return entries


def _shape_of(manifest: dict[str, Any]) -> tuple[int, int] | None:
    layers, width = manifest.get("num_layers"), manifest.get("hidden_size")
    return (layers, width) if isinstance(layers, int) and isinstance(width, int) else None


def _hook_names_of(manifest: dict[str, Any]) -> list[str] | None:
    names = manifest.get("hook_names")
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _is_entry(entry: object) -> TypeGuard[Entry]:
    return isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("sample_ids"), list)


def _entry_from(header: ArtifactHeader, stat: os.stat_result, previous: object) -> Entry:
    """An entry out of a file's header; only what another library's file does not say comes from `previous`."""
    name, sample_ids = header.persona_name, header.sample_ids
    if not header.is_ours and _is_entry(previous):
        name, sample_ids = previous["name"], previous["sample_ids"]
    entry: Entry = {"name": name or "", "sample_ids": sample_ids or []}
    if header.digest is not None:
        entry["digest"] = header.digest
    return entry | {"file": _file_facts(stat)}


def _file_facts(stat: os.stat_result) -> dict[str, int]:
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _encoded(index: Index) -> bytes:
    """One line a persona: short to read for people, and for tools that compare lines."""
    head: dict[str, Any] = {"format_version": FORMAT_VERSION}
    if index.shape is not None:
        head |= {"num_layers": index.shape[0], "hidden_size": index.shape[1]}
    if index.hook_names is not None:
        head["hook_names"] = index.hook_names
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in (head | index.extra).items()]
    rows = [f"    {json.dumps(persona_id)}: {json.dumps(entry)}" for persona_id, entry in index.personas.items()]
    personas = "{\n" + ",\n".join(rows) + "\n  }" if rows else "{}"
    return ("{\n" + ",\n".join([*lines, f'  "personas": {personas}']) + "\n}\n").encode()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _append(path: Path, line: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    with os.fdopen(handle, "ab") as file:
        file.write(line)
