"""The index of one folder of persona vectors: what is there, and what `manifest.json` says to others.

The files are the truth. The index spares readers the headers of files that have not changed since they were
indexed; anything it lacks, or has wrong, is read from the files again, and so it may be lost at any time.
Rewriting the index for every new file would cost more the more there are. Above `SMALL` bytes, new entries are
therefore appended to `manifest.pending`, and the index is rewritten once they exceed a fixed share of it. An index can
also be compared with the headers of its files.
"""

import contextlib
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from tl_persona import files
from tl_persona.errors import StoreError, StoreMismatchError
from tl_persona.files import free_name, reason
from tl_persona.store.folder import artifacts, leftovers_of
from tl_persona.store.header import SUFFIX, ArtifactHeader, read_header
from tl_persona.store.manifest_files import (
    FORMAT_VERSION,
    MANIFEST,
    PENDING,
    Entry,
    FileFacts,
    Recorded,
    append_pending,
    encode_manifest,
    facts_of,
    is_believable,
    is_entry,
    read_index_file,
    read_recorded,
    write_manifest,
)

LOCK = ".manifest.lock"
DAMAGED_SUFFIX = ".damaged"

SMALL = 64 * 1024
"""Bytes up to which rewriting the index costs no more than the two fsyncs of a save."""

PENDING_SHARE = 8
"""The index is rewritten when pending entries exceed an eighth of it: nine bytes written for each byte kept."""


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """What one folder holds.

    Attributes:
        shape: `(layer, d_model)` of every vector; None while there are none.
        hook_names: The hooks of the first axis, where a file records them.
        personas: The entry of every readable file.
        facts: By the same ids, what tells whether the file has changed since.
        extra: Entries of the manifest that are none of ours, kept as they are.
    """

    shape: tuple[int, int] | None
    hook_names: list[str] | None
    personas: dict[str, Entry]
    facts: dict[str, FileFacts]
    extra: dict[str, Any]

    def encoded(self) -> bytes:
        """The `manifest.json` that says this."""
        head: dict[str, Any] = {"format_version": FORMAT_VERSION}
        if self.shape is not None:
            head |= {"num_layers": self.shape[0], "hidden_size": self.shape[1]}
        if self.hook_names is not None:
            head["hook_names"] = self.hook_names
        return encode_manifest(head | self.extra, self.personas)


def read_index(folder: Path, *, trust: bool = True, written: str | None = None) -> Index:
    """The index of `folder`, as its files are now; an absent folder is an empty one.

    Args:
        folder: The folder of one model, strategy and variant.
        trust: Whether entries of files that look unchanged are believed; otherwise every header is read.
        written: A persona whose file was written just now. It is read in any case: within one tick of the clock, an old
            file and a new one can look alike.

    Raises:
        StoreError: The folder cannot be read, or a later version of this package wrote its manifest.
        StoreMismatchError: Two files differ in shape.
    """
    return _index_of(folder, read_recorded(folder), trust, written)


def _index_of(folder: Path, recorded: Recorded, trust: bool, written: str | None) -> Index:
    shape = recorded.shape
    personas: dict[str, Entry] = {}
    facts: dict[str, FileFacts] = {}
    unread: list[tuple[str, Path]] = []
    for persona_id, path, stat in artifacts(folder):
        facts[persona_id] = facts_of(stat)
        known = recorded.entries.get(persona_id)
        unchanged = trust and persona_id != written and recorded.facts.get(persona_id) == facts[persona_id]
        if unchanged and shape is not None and is_believable(known):
            personas[persona_id] = known
        else:
            unread.append((persona_id, path))

    shape_from: Path | None = folder / MANIFEST if personas else None
    hook_names = recorded.hook_names if personas else None
    for persona_id, path in unread:
        try:
            header = read_header(path, persona_id)
            entry = entry_from(header, recorded.manifest["personas"].get(persona_id))
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
        facts={persona_id: facts[persona_id] for persona_id in sorted(personas)},
        extra={key: value for key, value in recorded.manifest.items() if key not in ours},
    )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes and threads from writing to `folder`.

    Raises:
        StoreError: The lock cannot be had.
    """
    with files.locked(folder / LOCK):
        yield


@contextmanager
def undisturbed(folder: Path) -> Iterator[None]:
    """As `locked` for who only reads: nothing is made, and where the lock cannot be had it is done without."""
    with ExitStack() as stack:
        if os.path.lexists(folder / LOCK):
            with suppress(StoreError):
                stack.enter_context(locked(folder))
        yield


def record(folder: Path, path: Path) -> None:
    """Index the file at `path`, just written to `folder`, whose lock the caller holds.

    Raises:
        StoreError: The index cannot be written. The file itself is safe, and readers find it.
    """
    persona_id = path.name.removesuffix(SUFFIX)
    try:
        manifest_bytes = _size(folder / MANIFEST)
        if manifest_bytes >= SMALL:
            append_pending(folder, persona_id, entry_from(read_header(path), None), facts_of(path.stat()))
        due = manifest_bytes < SMALL or _size(folder / PENDING) * PENDING_SHARE > manifest_bytes
    except OSError as error:
        raise StoreError(f"cannot index {path}: {reason(error)}; the vectors themselves are saved") from error
    if due:
        rewrite(folder, written=persona_id)


def rewrite(
    folder: Path, *, trust: bool = True, written: str | None = None, told: Mapping[str, Entry] | None = None
) -> Index:
    """Write `manifest.json` anew from what is in `folder`, whose lock the caller holds; see `read_index`.

    A broken manifest is kept beside it, since names that only it had may still be read out of it by eye.

    Args:
        folder: The folder of one model, strategy and variant.
        trust: As for `read_index`.
        written: Likewise.
        told: What else is known of files that do not say names and sample ids themselves, instead of what is indexed.

    Raises:
        StoreError: The folder cannot be read or written.
    """
    recorded = read_recorded(folder)
    recorded.manifest["personas"].update(told or {})
    index = _index_of(folder, recorded, trust, written)
    leftovers = leftovers_of(folder)
    try:
        if recorded.problem is not None:
            os.replace(folder / MANIFEST, free_name(folder / f"{MANIFEST}{DAMAGED_SUFFIX}"))
        # Who holds the lock is the only writer: temporary files are what a killed process left.
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"cannot clean up {folder}: {reason(error)}") from error
    write_manifest(folder, index.encoded(), index.facts)
    return index


def is_up_to_date(folder: Path) -> bool:
    """Whether `manifest.json` alone says all there is to say of `folder`, and a killed process left nothing there."""
    if os.path.lexists(folder / PENDING) or leftovers_of(folder):
        return False
    try:
        current = read_index_file(folder / MANIFEST)
    except OSError:
        return not any(artifacts(folder))
    return current == read_index(folder).encoded()


def name_and_sample_ids(header: ArtifactHeader) -> tuple[str | None, list[str] | None]:
    """The persona's name and sample ids from the file's header, or for another library's file from its manifest."""
    if header.is_ours:
        return header.persona_name, header.sample_ids
    listed = read_recorded(header.source.parent).manifest["personas"]
    entry = listed.get(header.source.name.removesuffix(SUFFIX))
    return (entry["name"] or None, [str(x) for x in entry["sample_ids"]]) if is_entry(entry) else (None, None)


def entry_from(header: ArtifactHeader, previous: object) -> Entry:
    """An entry out of a file's header; only what another library's file does not say comes from `previous`."""
    name, sample_ids = header.persona_name, header.sample_ids
    if not header.is_ours and is_entry(previous):
        name, sample_ids = previous["name"], previous["sample_ids"]
    entry: Entry = {"name": name or "", "sample_ids": sample_ids or []}
    return entry if header.digest is None else entry | {"digest": header.digest}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def flaws_of_index(folder: Path, headers: Mapping[str, ArtifactHeader], present: Collection[str]) -> list[str]:
    """What the index lacks or has wrong, with the number of entries concerned; nothing when it is right.

    Others may save meanwhile. What seems wrong is therefore looked at again while nobody does, with the files as they
    are then.

    Args:
        folder: The folder of one model, strategy and variant.
        headers: By persona, the headers of the files that can be trusted.
        present: The personas that have a file, trusted or not.

    Raises:
        StoreError: The manifest cannot be read, or a later version of this package wrote it.
    """
    if not _flaws(folder, headers, present):
        return []
    now, there = {}, set()
    with undisturbed(folder):
        for persona_id, path, _ in sorted(artifacts(folder)):
            there.add(persona_id)
            if persona_id in headers or persona_id not in present:
                with contextlib.suppress(StoreError):
                    now[persona_id] = read_header(path, persona_id)
        return _flaws(folder, now, there)


def _flaws(folder: Path, headers: Mapping[str, ArtifactHeader], present: Collection[str]) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What they say is told here.
        recorded = read_recorded(folder)
    if recorded.problem is not None:
        return [f"it is damaged: {recorded.problem}"]
    listed = recorded.entries
    expected = {name: entry_from(header, listed.get(name)) for name, header in headers.items()}
    concerned = {
        "of files that it does not have": [name for name in expected if name not in listed],
        "without a file": [name for name in listed if name not in present],
        "not as their files say": [name for name in expected if name in listed and listed[name] != expected[name]],
    }
    flaws = [f"{len(names)} entries {what}: {_some(names)}" for what, names in concerned.items() if names]
    shapes = {header.shape for header in headers.values()}
    if shapes and shapes != {recorded.shape}:
        flaws.append(f"it says shape {recorded.shape}, the files {sorted(shapes)}")
    return flaws


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
