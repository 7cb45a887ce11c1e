"""Lists one folder of persona vectors. What is in the files is `artifact_header`'s work, the index `manifest`'s."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISREG

from tl_persona.artifact_header import SUFFIX
from tl_persona.errors import StoreError
from tl_persona.files import TEMPORARY_PREFIX, reason, refuse_outside


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
