"""Compares the index of a folder with the headers of its files. Writing it anew is `manifest`'s work."""

import contextlib
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

from tl_persona.artifact_header import ArtifactHeader, read_header
from tl_persona.errors import StoreError
from tl_persona.manifest import entry_from, undisturbed
from tl_persona.manifest_files import read_recorded
from tl_persona.manifest_folder import artifacts


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
