"""Checks everything saved under a folder, and rebuilds the indexes of stores.

Each file by itself: checksums, shape, finite numbers, and whether its provenance contradicts the rest of it. Then each
with its neighbours, its place and the index of its folder. A persona vector is checked without torch; a steering vector
is loaded, which checks it alike. Repair makes indexes anew and moves damaged vectors out of the way; it deletes no
vector and computes none.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from tl_persona.errors import CorruptFileError, InputError, NonFiniteError, NotStoredError, StoreError
from tl_persona.files import free_name, fsync_folder, is_folder, present, reason, refuse_outside
from tl_persona.models.known_wrong import known_wrong
from tl_persona.provenance import Provenance
from tl_persona.store import manifest
from tl_persona.store.folder import SharedFacts, disagreements, facts_of_header, model_folder_name
from tl_persona.store.header import (
    SUFFIX,
    ArtifactHeader,
    damaged,
    format_of,
    header_of,
    numbers_of,
    read_bytes,
    tensor_is_intact,
)
from tl_persona.store.manifest import flaws_of_index
from tl_persona.store.manifest_files import MANIFEST

SET_FILE = "metadata.json"


Kind = Literal["damaged", "unreadable", "numbers", "provenance", "wrong", "misfit", "link", "index"]


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong.

    Attributes:
        path: The file or folder.
        kind: `damaged` (truncated, altered or renamed), `unreadable` (refused by the system, or of a later version),
            `numbers` (not finite), `provenance` (contradicts the file or its place), `wrong` (of a class known
            to give wrong numbers for its architecture), `misfit` (does not fit its neighbours, or is of another model
            or under other interventions), `link` (leads out of the folder) or `index` (the manifest is behind or
            broken).
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
    problems += _of_notes(path, header.provenance)
    if bad_layers:
        more = "" if len(bad_layers) == 1 else f" and {len(bad_layers) - 1} more"
        problems.append(Problem(path, "numbers", f"layer {bad_layers[0]}{more} holds NaN or infinity"))
    return FileCheck(size=size, problems=tuple(problems), header=header, has_provenance=header.provenance is not None)


def check_steering_file(path: Path) -> FileCheck:
    """Everything about a file with one steering vector."""
    from tl_persona.vectors.vector import SteeringVector  # Needs torch, which checking a store does without.

    size = 0
    try:
        size = path.stat().st_size if present(path) else 0
        vector = SteeringVector.load(path)
    except (StoreError, InputError, NonFiniteError) as error:
        return FileCheck(size=size, problems=(_of_error(path, error),))
    problems = tuple(_of_notes(path, vector.provenance))
    return FileCheck(size=size, problems=problems, has_provenance=vector.provenance is not None)


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


def _of_notes(path: Path, provenance: Provenance | None) -> list[Problem]:
    wrong = None if provenance is None else known_wrong(provenance.notes)
    if provenance is None or wrong is None:
        return []
    made_with = f"{wrong.model_class} of TransformerLens {provenance.notes['transformer-lens']}"
    what = (
        f"{made_with} is wrong for {wrong.architecture}, by {wrong.error:g} of the residuals' size in one measurement"
    )
    return [Problem(path, "wrong", f"{what}: extract it again with another release or class")]


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


_READ = (SUFFIX, ".json", ".pt")
_STEERING_FORMAT = "tl_persona.steering_vector"  # As `vector_files` writes it, which needs torch to be imported.


class Checkup(msgspec.Struct, frozen=True, kw_only=True):
    """What `check_saved` found.

    Attributes:
        n_files: Files of vectors that were looked at.
        n_unrecorded: Those of them that record no checksum, as other libraries' do not: only their form was checked.
        n_without_provenance: Those that do not say what they were computed from.
        problems: What was wrong, in the order of the paths.
        repairs: What was done about it, one line each.
    """

    n_files: int
    n_unrecorded: int
    n_without_provenance: int
    problems: tuple[Problem, ...]
    repairs: tuple[str, ...] = ()


def check_saved(
    path: str | Path, *, repair: bool = False, on_progress: Callable[[int, int], None] | None = None
) -> Checkup:
    """Check every vector under `path`: a store or any folder of it, one file, a steering vector or a set of them.

    Args:
        path: What to check. Links inside a folder that lead out of it are named, and not followed.
        repair: Move damaged persona vectors aside, as `<name>.damaged`, and write the manifests that need it anew from
            the files. Other processes may go on saving meanwhile.
        on_progress: Called with the bytes checked so far and all there are.

    Raises:
        NotStoredError: There is nothing at `path`, or no vectors in it.
        StoreError: A folder cannot be listed, or a repair cannot be written.

    Example:
        >>> import tempfile, torch
        >>> from tl_persona.store import PersonaVectorStore
        >>> with tempfile.TemporaryDirectory() as root:
        ...     with PersonaVectorStore("org/model", root) as store:
        ...         folder = store.save("templated", "p1", "Ada", torch.ones(2, 3), ["q1"])
        ...     _ = (folder / "manifest.json").write_text("{")
        ...     [problem.kind for problem in check_saved(root, repair=True).problems], check_saved(root).problems
        (['index'], ())
    """
    root = Path(path).expanduser()
    if not present(root):
        raise NotStoredError(f"nothing is stored at {root}")
    check = _Check(root, on_progress)
    check.run()
    if not check.n_files and not check.problems:
        raise NotStoredError(f"{root} holds no vectors: name a store, one of its folders, a file or a set")
    if repair:
        check.repair()
    return Checkup(
        n_files=check.n_files,
        n_unrecorded=check.n_unrecorded,
        n_without_provenance=check.n_without_provenance,
        problems=tuple(sorted(check.problems, key=lambda problem: problem.path)),
        repairs=tuple(check.repairs),
    )


class _Check:
    """One walk over a folder, with what was found on the way."""

    def __init__(self, root: Path, on_progress: Callable[[int, int], None] | None) -> None:
        self.root = root
        self.problems: list[Problem] = []
        self.repairs: list[str] = []
        self.n_files = self.n_unrecorded = self.n_without_provenance = 0
        self._on_progress = on_progress
        self._done = self._total = 0

    def run(self) -> None:
        if not is_folder(self.root):
            self._file(self.root)
            return
        folders = dict(self._walk())
        self._total = sum(_size(file) for files in folders.values() for file in files)
        for folder, files in folders.items():
            if _is_set(folder):
                self._set(folder, files)
                continue
            steering = [file for file in files if _is_steering(file)]
            for file in steering:
                self._file(file)
            personas = [file for file in files if file not in steering]
            if personas or os.path.lexists(folder / MANIFEST):
                self._persona_folder(folder, personas)

    def repair(self) -> None:
        """Put right what can be, folder by folder, under the lock of each."""
        todo = {problem.path.parent for problem in self.problems if problem.kind in ("damaged", "index")}
        for folder in sorted(folder for folder in todo if not _is_set(folder)):
            bad = [problem.path for problem in self.problems if problem.kind == "damaged"]
            with manifest.locked(folder), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # They say of the broken manifest what `problems` says.
                for file in bad:
                    if file.parent == folder and not _is_steering(file):
                        self._set_aside(file)
                try:
                    index = manifest.rewrite(folder, trust=False)
                except StoreError as error:
                    self.repairs.append(f"{folder / MANIFEST}: left as it is: {error}")
                    continue
            self.repairs.append(f"{folder / MANIFEST}: written anew from {len(index.personas)} files")
            self.problems = [
                msgspec.structs.replace(each, repaired=True)
                if each.kind == "index" and each.path.parent == folder
                else each
                for each in self.problems
            ]

    def _walk(self) -> Iterator[tuple[Path, list[Path]]]:
        def refuse(error: OSError) -> None:
            raise StoreError(f"cannot list {error.filename}: {reason(error)}") from error

        for name, folders, files in os.walk(self.root, onerror=refuse):
            folder = Path(name)
            folders[:] = sorted(entry for entry in folders if not entry.startswith("."))
            read = [folder / file for file in sorted(files) if file.endswith(_READ) and not file.startswith(".")]
            links = [path for path in [folder / entry for entry in folders] + read if os.path.islink(path)]
            # Of a manifest that is a link, the check of the index says so.
            outside = {path for path in links if path.name != MANIFEST and self._leads_outside(path)}
            yield folder, [path for path in read if path.suffix == SUFFIX and path not in outside]

    def _leads_outside(self, link: Path) -> bool:
        try:
            refuse_outside(link, self.root)
        except StoreError as error:
            self._problem(link, "link", str(error))
            return True
        return False

    def _persona_folder(self, folder: Path, files: list[Path]) -> None:
        headers: dict[str, ArtifactHeader] = {}
        facts: SharedFacts = {}
        for file in files:
            header = self._file(file)
            if header is None:
                continue
            headers[file.name.removesuffix(SUFFIX)] = header
            own = facts_of_header(header)
            for what, (there, other), (here, _) in disagreements(facts, own):
                self._problem(file, "misfit", f"its {what} does not fit {other.name}: {here!r}, there {there!r}")
            facts = own | facts
            self._check_place(file, header)
        self._check_index(folder, headers, {file.name.removesuffix(SUFFIX) for file in files})

    def _file(self, path: Path) -> ArtifactHeader | None:
        found = check_steering_file(path) if _is_steering(path) else check_persona_file(path)
        self.problems += found.problems
        self.n_files += 1
        self.n_without_provenance += not found.has_provenance
        self.n_unrecorded += found.header is not None and not found.header.is_ours
        self._done += found.size
        if self._on_progress is not None:
            self._on_progress(self._done, max(self._total, self._done))
        return found.header

    def _check_place(self, file: Path, header: ArtifactHeader) -> None:
        """Whether a file lies under the model and strategy it was computed from; `root` must be the store's."""
        place = file.relative_to(self.root).parts
        provenance = header.provenance
        if provenance is None or len(place) != 4:
            return
        try:
            model = model_folder_name(provenance.model_name)
        except InputError:
            model = provenance.model_name
        for what, computed, folder in (("model", model, place[0]), ("strategy", provenance.strategy, place[1])):
            if computed != folder:
                self._problem(file, "provenance", f"it lies under the {what} {folder!r}, but is of {computed!r}")

    def _check_index(self, folder: Path, headers: dict[str, ArtifactHeader], found: set[str]) -> None:
        try:
            flaws = flaws_of_index(folder, headers, found)
        except StoreError as error:
            self._problem(folder / MANIFEST, "unreadable", str(error))
            return
        if flaws:
            self._problem(folder / MANIFEST, "index", "; ".join(flaws))

    def _set(self, folder: Path, files: list[Path]) -> None:
        from tl_persona.vectors.vector_set import SteeringVectorSet  # Needs torch.

        for file in files:
            self._file(file)
        if any(problem.path.parent == folder and problem.kind != "wrong" for problem in self.problems):
            return
        try:
            loaded = SteeringVectorSet.load(folder)
        except (StoreError, InputError, NonFiniteError) as error:
            self._problem(folder / SET_FILE, "damaged", str(error))
        else:
            self.n_files += len(loaded) - len(files)  # Those of rotalabs-steer are not in `files`.

    def _set_aside(self, file: Path) -> None:
        try:
            intact_header(read_bytes(file), file)
        except CorruptFileError:
            pass
        except StoreError:
            return
        else:
            return  # Another process has replaced it since.
        target = free_name(file.with_name(f"{file.name}{manifest.DAMAGED_SUFFIX}"))
        try:
            os.replace(file, target)
            fsync_folder(file.parent)
        except OSError as error:
            raise StoreError(f"cannot move {file} aside: {reason(error)}") from error
        self.repairs.append(f"{file}: moved to {target.name}, extract it again")

    def _problem(self, path: Path, kind: Kind, what: str) -> None:
        self.problems.append(Problem(path, kind, what))


def _is_set(folder: Path) -> bool:
    return os.path.lexists(folder / SET_FILE) and not os.path.lexists(folder / MANIFEST)


def _is_steering(path: Path) -> bool:
    return path.suffix in (".pt", ".json") or format_of(path) == _STEERING_FORMAT


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
