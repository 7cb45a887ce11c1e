"""Checks one saved file: checksums, shape, finite numbers, and whether its provenance contradicts the rest of it.

A persona vector is checked without torch. A steering vector is loaded, which checks it alike. Whether files fit each
other and their index is `store_check`'s work.
"""

from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from tl_persona.artifact_header import SUFFIX, ArtifactHeader, damaged, header_of, read_bytes, tensor_is_intact
from tl_persona.artifact_numbers import numbers_of
from tl_persona.errors import CorruptFileError, InputError, NonFiniteError, StoreError
from tl_persona.files import present

Kind = Literal["damaged", "unreadable", "numbers", "provenance", "misfit", "link", "index"]


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong.

    Attributes:
        path: The file or folder.
        kind: `damaged` (truncated, altered or renamed), `unreadable` (refused by the system, or of a later version),
            `numbers` (not finite), `provenance` (contradicts the file or its place), `misfit` (does not fit its
            neighbours), `link` (leads out of the folder) or `index` (the manifest is behind or broken).
        what: A sentence on it.
        repaired: Whether it was put right.
    """

    path: Path
    kind: Kind
    what: str
    repaired: bool = False


class FileCheck(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one file.

    Attributes:
        size: Its bytes.
        problems: What is wrong with it.
        header: The header of a persona vector that can be read; None for any other file.
        has_provenance: Whether it says what it was computed from; True where it cannot be read.
    """

    size: int
    problems: tuple[Problem, ...] = ()
    header: ArtifactHeader | None = None
    has_provenance: bool = True


def check_persona_file(path: Path) -> FileCheck:
    """Everything about a file of persona vectors that it alone tells."""
    size = 0
    try:
        data = read_bytes(path)
        size = len(data)
        header = intact_header(data, path)
        bad_layers = _layers_not_finite(data, header)
        contradictions = _contradictions(header)
    except StoreError as error:
        return FileCheck(size=size, problems=(_of_error(path, error),))
    problems = [Problem(path, "provenance", what) for what in contradictions]
    if bad_layers:
        more = "" if len(bad_layers) == 1 else f" and {len(bad_layers) - 1} more"
        problems.append(Problem(path, "numbers", f"layer {bad_layers[0]}{more} holds NaN or infinity"))
    return FileCheck(size=size, problems=tuple(problems), header=header, has_provenance=header.provenance is not None)


def check_steering_file(path: Path) -> FileCheck:
    """Everything about a file with one steering vector."""
    from tl_persona.steering_vector import SteeringVector  # Needs torch, which checking a store does without.

    size = 0
    try:
        size = path.stat().st_size if present(path) else 0
        vector = SteeringVector.load(path)
    except (StoreError, InputError, NonFiniteError) as error:
        return FileCheck(size=size, problems=(_of_error(path, error),))
    return FileCheck(size=size, has_provenance=vector.provenance is not None)


def intact_header(data: bytes, path: Path) -> ArtifactHeader:
    """The header of a file of persona vectors whose checksums fit, and whose persona is that of its name.

    Raises:
        CorruptFileError: They do not.
        StoreError: A later version of this package wrote it.
    """
    header = header_of(data, path, path.name.removesuffix(SUFFIX))
    if not tensor_is_intact(data, header):
        raise damaged(path, "the checksum of its tensor does not fit")
    return header


def _of_error(path: Path, error: Exception) -> Problem:
    what = str(error).removeprefix(f"{path} is damaged: ").removeprefix(f"{path}: ")  # The path is told beside it.
    if isinstance(error, NonFiniteError):
        return Problem(path, "numbers", what)
    return Problem(path, "damaged" if isinstance(error, CorruptFileError) else "unreadable", what)


def _layers_not_finite(data: bytes, header: ArtifactHeader) -> list[int]:
    return [int(layer) for layer in np.flatnonzero(~np.isfinite(numbers_of(data, header)).all(axis=1))]


def _contradictions(header: ArtifactHeader) -> list[str]:
    """How a file's provenance contradicts the rest of its header."""
    provenance, sample_ids = header.provenance, header.sample_ids
    if provenance is None:
        return []
    found = []
    if header.digest != provenance.digest():
        found.append("its digest is not that of its provenance")
    if len(provenance.hook_names) != header.shape[0]:
        found.append(f"its provenance names {len(provenance.hook_names)} hooks for {header.shape[0]} layers")
    if sample_ids is not None and list(provenance.sample_ids) != sample_ids:
        found.append("its sample ids are not those of its provenance")
    return found
