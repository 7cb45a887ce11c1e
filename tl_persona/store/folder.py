"""One folder of persona vectors: the files in it, what they may be called, and what all of them share.

Names are safe on any system. Vectors that differ in shape, hooks or processing of weights are not comparable layer by
layer, and readers of the published layout expect one shape a folder; those of other models or under other interventions
are about something else. What a vector must share is compared with one file or with a few, so the cost does not grow
with the folder.
"""

import os
import re
import unicodedata
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from stat import S_ISREG
from typing import Any, TypeAlias

from tl_persona.errors import CorruptFileError, InputError, NotStoredError, StoreError, StoreMismatchError
from tl_persona.files import TEMPORARY_PREFIX, reason, refuse_outside
from tl_persona.provenance import Provenance, deciding_scheme
from tl_persona.store.header import SUFFIX, ArtifactHeader, read_header
from tl_persona.store.manifest_files import MANIFEST, stated_shape


def paths_of_vectors(folder: Path) -> list[Path]:
    """Everything in `folder` that is called as a file of vectors is, in order; none where the folder is absent.

    Raises:
        StoreError: The folder cannot be listed.
    """
    return sorted(Path(item.path) for item in _listed(folder) if _is_called_vectors(item.name))


def artifacts(folder: Path) -> Iterator[tuple[str, Path, os.stat_result]]:
    """Persona id, path and status of every file of vectors in `folder`, in no order; none where it is absent.

    Of a link that leads out of the store there is a warning instead.

    Raises:
        StoreError: The folder cannot be listed, or the system will not say what is in it.
    """
    root = Path(os.path.abspath(folder / "../../.."))  # folder is <root>/<model>/<strategy>/<variant>
    for item in _listed(folder):
        if not _is_called_vectors(item.name):
            continue
        path = Path(item.path)
        try:
            if item.is_symlink():
                refuse_outside(path, root)
            stat = item.stat()
        except FileNotFoundError:  # Removed or moved since it was listed, or a link to nothing.
            continue
        except StoreError as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
            continue
        except OSError as error:
            raise StoreError(f"cannot look at {path}: {reason(error)}") from error
        if S_ISREG(stat.st_mode):
            yield item.name.removesuffix(SUFFIX), path, stat


def _is_called_vectors(name: str) -> bool:
    return name.endswith(SUFFIX) and not name.startswith(".")


def leftovers_of(folder: Path) -> list[Path]:
    """Unfinished files; for who holds the lock, and so is the only writer, what a killed process left.

    Raises:
        StoreError: The folder cannot be listed.
    """
    return [Path(item.path) for item in _listed(folder) if item.name.startswith(TEMPORARY_PREFIX)]


def _listed(folder: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as listing:
            return list(listing)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(f"cannot list {folder}: {reason(error)}") from error


def any_header(folder: Path) -> ArtifactHeader | None:
    """The header of some readable file, at a cost that does not depend on how many there are."""
    return next(_headers(folder), None)


def some_recorded(folder: Path, but: Path) -> Iterator[tuple[Path, Provenance]]:
    """A few files and their provenance, up to the first that says all of which weights it is of and what acted.

    Args:
        folder: The folder.
        but: A file in it that is passed over.

    Raises:
        StoreError: The folder cannot be read.
    """
    for header in islice((header for header in _headers(folder) if header.source != but), _FEW):
        provenance = header.provenance
        if provenance is not None:
            yield header.source, provenance
            if is_identified(provenance):
                return


def is_identified(provenance: Provenance) -> bool:
    """Whether it is known which weights a vector is of, and what acted on the model."""
    return bool(provenance.identity) and provenance.known_interventions is not None


_FEW = 8
"""Headers that are read in search of one with an identity: those of earlier versions have none."""


def _headers(folder: Path) -> Iterator[ArtifactHeader]:
    for persona_id, path, _ in artifacts(folder):
        with suppress(CorruptFileError, NotStoredError):
            yield read_header(path, persona_id)


SharedFacts: TypeAlias = dict[str, tuple[Any, Path]]
"""By name what must be alike: the value, and the file that says so.

`shape`, `hook_names`, `weights` and, where they are known, `interventions` are compared as they are. Under `revision`
and each kind of digest is the whole identity of a file that has one; see `provenance.deciding_scheme`.
"""


def facts_of_header(header: ArtifactHeader) -> SharedFacts:
    """What a file says of what must be alike; without provenance, its shape only."""
    provenance, source = header.provenance, header.source
    facts = _facts(header.shape, provenance, source)
    if provenance is not None:
        facts |= {scheme: (provenance.identity, source) for scheme in provenance.identity}
        if provenance.known_interventions is not None:
            facts["interventions"] = (provenance.known_interventions or "none", source)
    return facts


def facts_of_folder(folder: Path) -> SharedFacts:
    """What a folder holds already, from one readable file of it, or from its manifest where there is none.

    Raises:
        StoreError: The folder cannot be read, or a later version of this package wrote its manifest.
    """
    stated, neighbour = stated_shape(folder), any_header(folder)
    if neighbour is not None:
        return facts_of_header(neighbour)
    return {} if stated is None else {"shape": (stated, folder / MANIFEST)}


def disagreements(held: SharedFacts, other: SharedFacts) -> Iterator[tuple[str, tuple[Any, Path], tuple[Any, Path]]]:
    """What differs: its name, and both sides of it. A fact that one side does not have differs from nothing."""
    for what, here in other.items():
        there = held.get(what)
        if there is None or there[0] == here[0]:
            continue
        if not isinstance(there[0], dict):
            yield what, there, here
        elif deciding_scheme(there[0], here[0]) == what and there[0][what] != here[0][what]:
            name = what if what == "revision" else "weights_digest"
            yield name, (there[0][what], there[1]), (here[0][what], here[1])


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


MAX_NAME_BYTES = 200
"""File systems allow 255 bytes; a suffix and a little room for tools come off that."""

_RESERVED = frozenset({"manifest"})

_ON_WINDOWS = os.name == "nt"
"""Elsewhere `a:b` is a name like any other, under which vectors may be stored already."""

_WINDOWS_SYNTAX = re.compile(r'[<>:"|?*]|[. ]$')
_WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\xb9\xb2\xb3]) *(\..*)?", re.IGNORECASE)


def safe_component(name: str, what: str) -> str:
    """Return `name` when it is one plain name, fit for a file of the system it is made on.

    Args:
        name: A persona id, a variant, or the like.
        what: What the name stands for, for the message.

    Raises:
        InputError: The name is empty, hidden, reserved, too long, or has separators or control characters; on
            Windows also where that system would take it for something else.

    Example:
        >>> safe_component("persona-7", "persona id")
        'persona-7'
    """
    flaw = _flaw(name)
    if flaw is not None:
        raise InputError(f"{what} {_shown(name)} cannot name a file: {flaw}. Choose a plain name")
    return name


def model_folder_name(model_name: str) -> str:
    """The folder of a model: its name with `/` as `__`.

    Raises:
        InputError: A part of the name between slashes is no `safe_component`.

    Example:
        >>> model_folder_name("HuggingFaceTB/SmolLM2-135M-Instruct")
        'HuggingFaceTB__SmolLM2-135M-Instruct'
    """
    folder = model_name.replace("/", "__")
    for part in (*model_name.split("/"), folder):
        flaw = _flaw(part)
        if flaw is not None:
            where = "" if part in (model_name, folder) else f" at {part!r}"
            raise InputError(
                f"model name {_shown(model_name)} cannot name a folder{where}: {flaw}. "
                "Use a hub id such as 'org/model', or any plain name, for a local path too"
            )
    return folder


def _flaw(name: str) -> str | None:
    if not name:
        return "it is empty, or a path that starts or ends with '/'"
    if "/" in name or "\\" in name:
        return "it has a path separator"
    if name.startswith("."):
        return "it starts with a dot"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        return "it has a control character or a lone surrogate"
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"it is longer than {MAX_NAME_BYTES} bytes"
    if name.casefold() in _RESERVED:
        return "the name is reserved for the index"
    if _ON_WINDOWS and (_WINDOWS_SYNTAX.search(name) or _WINDOWS_DEVICE.fullmatch(name)):
        return "Windows reads it as a drive, a device, a pattern or another name"
    return None


def _shown(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:60]}...")
