"""What all vectors of one folder share: shape, hooks and processing of weights.

Vectors that differ in one of these are not comparable layer by layer, and readers of the published layout expect one
shape a folder. Each function compares with one file or with a few, so the cost does not grow with the folder.
"""

import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from tl_persona import manifest
from tl_persona.artifact_header import ArtifactHeader, read_header
from tl_persona.errors import CorruptFileError, NotStoredError, StoreMismatchError
from tl_persona.manifest_files import MANIFEST, stated_shape
from tl_persona.provenance import Provenance

SharedFacts: TypeAlias = dict[str, tuple[Any, Path]]
"""By name what must be alike (`shape`, `hook_names`, `weights`): the value, and the file that says so."""


def facts_of_header(header: ArtifactHeader) -> SharedFacts:
    """What a file says of what must be alike; without provenance, its shape only."""
    return _facts(header.shape, header.provenance, header.source)


def facts_of_folder(folder: Path) -> SharedFacts:
    """What a folder holds already, from one readable file of it, or from its manifest where there is none.

    Raises:
        StoreError: The folder cannot be read, or a later version of this package wrote its manifest.
    """
    stated, neighbour = stated_shape(folder), manifest.any_header(folder)
    if neighbour is not None:
        return facts_of_header(neighbour)
    return {} if stated is None else {"shape": (stated, folder / MANIFEST)}


def disagreements(held: SharedFacts, other: SharedFacts) -> Iterator[tuple[str, tuple[Any, Path], tuple[Any, Path]]]:
    """What differs: its name, and both sides of it. A fact that one side does not have differs from nothing."""
    for what, here in other.items():
        there = held.get(what)
        if there is not None and there[0] != here[0]:
            yield what, there, here


def refuse_misfit(folder: Path, shape: tuple[int, int], provenance: Provenance | None) -> None:
    """Check that a vector can lie beside those in `folder`.

    Raises:
        StoreMismatchError: It has another shape, other hooks or other weights.
        StoreError: As `facts_of_folder`.
    """
    for what, (there, _), (here, _) in disagreements(facts_of_folder(folder), _facts(shape, provenance, folder)):
        raise StoreMismatchError(
            f"{folder} holds vectors whose {what} {_IS[what]} {there!r}; here {_IT[what]} {here!r}. "
            "Save it under another root, or remove that folder"
        )


def refuse_anothers_file(path: Path, persona_id: str) -> None:
    """Check that a persona's file is not another's: on a file system that ignores case, `Ada` and `ada` are one file.

    Raises:
        StoreMismatchError: It is.
    """
    try:
        holder = read_header(path).persona_id
    except (NotStoredError, CorruptFileError):
        return
    if holder is not None and holder != persona_id and _folded(holder) == _folded(persona_id):
        raise StoreMismatchError(f"{path} holds persona {holder!r}, which this file system takes for {persona_id!r}")


_IS: Mapping[str, str] = {"shape": "is", "hook_names": "are", "weights": "are"}
_IT: Mapping[str, str] = {"shape": "it is", "hook_names": "they are", "weights": "they are"}


def _facts(shape: tuple[int, int], provenance: Provenance | None, source: Path) -> SharedFacts:
    facts: dict[str, Any] = {"shape": shape}
    if provenance is not None:
        facts |= {"hook_names": provenance.hook_names, "weights": provenance.weights}
    return {what: (value, source) for what, value in facts.items()}


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
