"""Joins stores that were filled apart, such as one root for each machine, into one.

Files are copied as they are, whole or not at all, and verified on the way. Nothing is averaged: a persona that two
stores hold is one vector if both would be computed alike, and a conflict otherwise. Sources are only read.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from tl_persona.errors import InputError, NotStoredError, StoreMismatchError
from tl_persona.files import folders_below, is_regular, make_folder, refuse_outside, resolved, write_atomically
from tl_persona.store import manifest
from tl_persona.store.file import decode
from tl_persona.store.folder import disagreements, facts_of_folder, facts_of_header, paths_of_vectors
from tl_persona.store.header import SUFFIX, ArtifactHeader, read_bytes, read_header
from tl_persona.store.manifest_files import Entry, is_entry, read_recorded

OnConflict: TypeAlias = Literal["error", "keep", "replace"]

_Incoming: TypeAlias = dict[str, list[ArtifactHeader]]
"""For each persona of one folder its files in the sources, in their order."""


@dataclass
class MergedFolder:
    """What a merge did in one folder of the target.

    Attributes:
        folder: The folder of one model, strategy and variant.
        copied: Personas that the target did not have.
        same: Personas it had already, computed from the same.
        replaced: Personas whose vector gave way to another one.
        left: Personas whose vector stayed though a source has another one.
    """

    folder: Path
    copied: int = 0
    same: int = 0
    replaced: int = 0
    left: int = 0


def merge_stores(
    sources: Sequence[str | Path], target: str | Path, on_conflict: OnConflict = "error"
) -> list[MergedFolder]:
    """Copy every vector of the stores `sources` into the store `target`, and rebuild its manifests.

    All files' headers are compared before anything is written. A merge that was stopped is continued by the same
    call, and other processes may save to the target meanwhile.

    Args:
        sources: Roots of stores, the folders above the models' folders.
        target: Root of the store to fill; it need not exist.
        on_conflict: What to do about a persona that is stored twice and would not be computed alike: `error` refuses
            the merge, `keep` leaves what came first (the target's, then the sources' in order), `replace` takes the
            last.

    Returns:
        What was done, for each folder that the sources have.

    Raises:
        InputError: No sources, a source that is the target, or an unknown `on_conflict`.
        NotStoredError: A source holds no vectors.
        StoreMismatchError: Files of one folder differ in shape, hooks or weights, are of different models or under
            different interventions, or there is a conflict.
        CorruptFileError: A file is damaged; what was copied before is whole.
        StoreError: The file system refused, or a link leads out of a source or of the target.

    Example:
        >>> import tempfile, torch
        >>> from tl_persona.store import PersonaVectorStore
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for machine, persona in (("a", "p1"), ("b", "p2")):
        ...         with PersonaVectorStore("org/model", Path(folder, machine)) as store:
        ...             _ = store.save("templated", persona, "Ada", torch.ones(2, 3), ["q1"])
        ...     (done,) = merge_stores([Path(folder, "a"), Path(folder, "b")], Path(folder, "all"))
        ...     done.copied, PersonaVectorStore("org/model", Path(folder, "all")).list_personas(["templated"])
        (2, ['p1', 'p2'])
    """
    root = Path(target).expanduser()
    roots = [Path(source).expanduser() for source in sources]
    if not roots:
        raise InputError("no stores to merge: name at least one")
    if on_conflict not in get_args(OnConflict):
        raise InputError(f"unknown on_conflict {on_conflict!r}: choose {', '.join(get_args(OnConflict))}")
    surveys: dict[Path, _Incoming] = {}
    for source in roots:
        if resolved(source) == resolved(root):
            raise InputError(f"{source} is the target itself: name other stores")
        _read_source(source, root, surveys)
    for folder, incoming in surveys.items():
        _refuse_mismatches(folder, incoming)
        if on_conflict == "error":
            _refuse_conflicts(folder, incoming)
    return [_merge_folder(folder, surveys[folder], root, on_conflict) for folder in sorted(surveys)]


def _read_source(source: Path, root: Path, surveys: dict[Path, _Incoming]) -> None:
    found = False
    for folder in folders_below(source, 3, source):  # <source>/<model>/<strategy>/<variant>
        target = root / folder.relative_to(source)
        for path in paths_of_vectors(folder):
            if os.path.islink(path):
                refuse_outside(path, source)
            if not is_regular(path):
                continue
            persona_id = path.name.removesuffix(SUFFIX)
            surveys.setdefault(target, {}).setdefault(persona_id, []).append(read_header(path, persona_id))
            found = True
    if not found:
        raise NotStoredError(
            f"{source} holds no persona vectors: name the root of a store, the folder above the models' folders"
        )


def _refuse_mismatches(folder: Path, incoming: _Incoming) -> None:
    """Compares every incoming header with one of the target, or with the first of them."""
    held = facts_of_folder(folder)
    for headers in incoming.values():
        for header in headers:
            facts = facts_of_header(header)
            for what, (there, other), (here, path) in disagreements(held, facts):
                raise StoreMismatchError(
                    f"{path} and {other} cannot lie in one folder: their {what} are {here!r} and {there!r}. "
                    "Merge them into different roots"
                )
            held = facts | held


def _refuse_conflicts(folder: Path, incoming: _Incoming) -> None:
    conflicts = []
    for persona_id, headers in incoming.items():
        present = [header for header in (_held(folder, persona_id), *headers) if header is not None]
        conflicts += [(persona_id, present[0], other) for other in present[1:] if not _same(present[0], other)]
    if conflicts:
        persona_id, first, second = conflicts[0]
        more = f", and {len(conflicts) - 1} more such files" if len(conflicts) > 1 else ""
        raise StoreMismatchError(
            f"persona {persona_id!r}: {first.source} and {second.source} were not computed from the same"
            f"{_difference(first, second)}{more}. Nothing was merged; pass on_conflict (--on-conflict) keep or replace"
        )


def _difference(first: ArtifactHeader, second: ArtifactHeader) -> str:
    there, here = first.provenance, second.provenance
    lines = there.differences(here) if there is not None and here is not None else []
    return f" ({'; '.join(lines)})" if lines else ""


def _held(folder: Path, persona_id: str) -> ArtifactHeader | None:
    try:
        return read_header(folder / f"{persona_id}{SUFFIX}", persona_id)
    except NotStoredError:
        return None


def _same(first: ArtifactHeader, second: ArtifactHeader) -> bool:
    """Whether both would be computed alike, or the files are equal, whatever is not known of them."""
    there, here = first.provenance, second.provenance
    if there is not None and here is not None and not there.differences(here):
        return True  # not by the digest: an earlier version's covers fewer fields
    return first.digest == second.digest and read_bytes(first.source) == read_bytes(second.source)


def _merge_folder(folder: Path, incoming: _Incoming, root: Path, on_conflict: OnConflict) -> MergedFolder:
    report = MergedFolder(folder)
    refuse_outside(folder, root)
    make_folder(folder)
    copied: set[str] = set()
    nameless: dict[str, ArtifactHeader] = {}
    for persona_id, headers in incoming.items():
        path = folder / f"{persona_id}{SUFFIX}"
        # One lock a file: who saves to the target meanwhile does not wait for thousands of copies.
        with manifest.locked(folder):
            refuse_outside(path, root)
            held = _held(folder, persona_id)
            chosen = _chosen(held, headers, on_conflict)
            if chosen is not held:
                data = read_bytes(chosen.source)
                decode(data, chosen.source, persona_id)
                write_atomically(path, data)
                copied.add(persona_id)
        alike = [header for header in headers if header is chosen or _same(chosen, header)]
        if held is None:
            report.copied += 1
        elif chosen is not held:
            report.replaced += 1
        elif len(alike) == len(headers):
            report.same += 1
        else:
            report.left += 1
        if alike and not chosen.is_ours:
            nameless[persona_id] = alike[-1] if on_conflict == "replace" else alike[0]
    with manifest.locked(folder):
        told = _entries_of(nameless, folder, copied, on_conflict)
        manifest.rewrite(folder, trust=False, told=told)
    return report


def _chosen(held: ArtifactHeader | None, headers: list[ArtifactHeader], on_conflict: OnConflict) -> ArtifactHeader:
    chosen = held or headers[0]
    for header in headers:
        if _same(chosen, header):
            continue
        if on_conflict == "error":  # refused before, so it was saved since
            raise StoreMismatchError(f"{chosen.source} was saved during the merge, and differs from {header.source}")
        if on_conflict == "replace":
            chosen = header
    return chosen


def _entries_of(
    nameless: Mapping[str, ArtifactHeader], folder: Path, copied: Collection[str], on_conflict: OnConflict
) -> dict[str, Entry]:
    """Files of other libraries do not hold names and sample ids: the manifests beside them do.

    Files that the target had already are asked too: a merge that was killed before it came to the manifest says, run
    again, what it would have said.
    """
    places = {header.source.parent for header in nameless.values()}
    manifests = {place: read_recorded(place).manifest["personas"] for place in places}
    held = read_recorded(folder).manifest["personas"]
    entries = {}
    for persona_id, header in nameless.items():
        told = manifests[header.source.parent].get(persona_id)
        wanted = on_conflict == "replace" or not _says_something(held.get(persona_id))
        if persona_id in copied or (wanted and _says_something(told)):
            entries[persona_id] = manifest.entry_from(header, told)
    return entries


def _says_something(entry: object) -> bool:
    return is_entry(entry) and bool(entry["name"] or entry["sample_ids"])
