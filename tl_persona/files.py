"""Files read and written with care, and the locks between those who do.

Files are written whole or not at all; nothing is read but files; no link is followed out of where it should stay. Locks
between processes and threads are held by a file. What is read from elsewhere becomes bytes, JSON and types, and each
flaw an error that names the file. Opening leaves an `OSError` to the caller, who knows what was wanted; otherwise only
`StoreError` and its kinds come out of here.
"""

import errno
import itertools
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec
from filelock import FileLock, Timeout

from tl_persona.errors import CorruptFileError, NotStoredError, StoreError

SET_FORMAT = "tl_persona.steering_vector_set"
SET_FILE = "metadata.json"


TEMPORARY_PREFIX = ".tmp-"
"""Names of unfinished files start with this; every reader of a folder passes over them."""


def open_regular(path: Path, buffering: int = -1) -> BinaryIO:
    """Open a file for reading; what is no file, such as a pipe or a device, may never end or never begin.

    Args:
        path: The file.
        buffering: As for `open`.

    Raises:
        OSError: There is none, or it is no regular file.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
        return os.fdopen(handle, "rb", buffering)
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: Path, at_most: int | None = None) -> bytes:
    """All of a file; see `open_regular`.

    Args:
        path: The file.
        at_most: More bytes than these are refused unread. A file with holes can claim any size, and use no disk.

    Raises:
        OSError: It cannot be read, or does not fit into the memory.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if at_most is not None and size > at_most:
            raise OSError(errno.EFBIG, f"it has {size} bytes, and {at_most} are the most", str(path))
        try:
            return file.read()
        except MemoryError as error:
            raise OSError(errno.ENOMEM, f"its {size} bytes do not fit into the memory", str(path)) from error


def present(path: Path) -> bool:
    """Whether something is there, links followed: `Path.exists`, but an answer that the system refuses is an error.

    Raises:
        StoreError: The system will not say: a folder on the way is closed, the links run in a circle, or no name is
            like that.
    """
    return _mode(path) is not None


def is_folder(path: Path) -> bool:
    """Whether a folder is there, links followed.

    Raises:
        StoreError: The system will not say.
    """
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def is_regular(path: Path) -> bool:
    """Whether a file is there that is no pipe or device, links followed.

    Raises:
        StoreError: The system will not say.
    """
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def folders_below(folder: Path, depth: int, root: Path) -> list[Path]:
    """The folders `depth` levels below `folder`, in order; hidden ones are passed over.

    Args:
        folder: Where to look; where it is not there, nothing is found.
        depth: At least 1.
        root: Links may lead anywhere below it.

    Raises:
        StoreError: A folder cannot be listed, or a link leads out of `root`.
    """
    found = [folder] if is_folder(folder) else []
    for _ in range(depth):
        try:
            inner = [path for outer in found for path in sorted(outer.iterdir()) if not path.name.startswith(".")]
        except OSError as error:
            raise StoreError(f"cannot list {error.filename}: {reason(error)}") from error
        found = [path for path in inner if is_folder(path)]
        for path in found:
            refuse_outside(path, root)
    return found


def resolved(path: Path) -> Path:
    """The absolute path behind all symbolic links.

    Raises:
        StoreError: They run in a circle, or no path is like that.
    """
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise StoreError(f"cannot follow the symbolic links of {str(path)!r}: {reason(error)}") from error


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Put `data` at `path` so that a reader sees the old file or the new one, also after a loss of power.

    Args:
        path: The file.
        data: All of its bytes.
        durable: False forgoes the wait for the disk: after a loss of power the file may hold anything.

    Raises:
        StoreError: The file system refused. What was at `path` before is still there.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}")
    try:
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if durable:
            fsync_folder(path.parent)
    except (OSError, ValueError) as error:  # ValueError: as in `_mode`
        raise StoreError(f"cannot write {path}: {reason(error)}; check free space and permissions") from error


def free_name(path: Path) -> Path:
    """`path`, or with a number after it the first that nothing has.

    Example:
        >>> free_name(Path("nowhere/p1.safetensors.damaged")).name
        'p1.safetensors.damaged'
    """
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(candidate for candidate in itertools.chain([path], numbered) if not os.path.lexists(candidate))


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable; Windows has no such call, and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents, durably; an existing folder is left as it is.

    Raises:
        StoreError: The file system refused.
    """
    missing = [path for path in (folder, *folder.parents) if not present(path)]
    try:
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            fsync_folder(path.parent)
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file")
    except OSError as error:
        raise StoreError(f"cannot create the folder {folder}: {reason(error)}; choose another one") from error


def refuse_outside(path: Path, root: Path) -> None:
    """Check that `path`, with symbolic links followed, lies under `root`.

    Raises:
        StoreError: A link on the way leads elsewhere, or in a circle.
    """
    target, allowed = resolved(path), resolved(root)
    if not target.is_relative_to(allowed):
        raise StoreError(
            f"{path} is a symbolic link to {target}, outside {allowed}: nothing is read or written through it"
        )


def reason(error: BaseException) -> str:
    """What the system said, without the path that the message around it already names."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a null character, or a surrogate that no file system can have
        raise StoreError(f"cannot look at {str(path)!r}: {reason(error)}") from error


SECONDS = 60.0
"""How long is waited. A lock is held for one save, or one rewriting: milliseconds, a few seconds at worst."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep others who ask for the same lock out until the end.

    Args:
        path: The lock's file, which is made where it is not there, and stays.

    Raises:
        StoreError: The lock cannot be had.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=SECONDS, poll_interval=0.005)
    except Timeout as error:
        raise StoreError(f"another process has held {path} for {SECONDS:.0f} s; is it stuck?") from error
    except (OSError, NotImplementedError) as error:
        raise StoreError(f"cannot lock {path}: {reason(error)}; check its permissions") from error
    try:
        yield
    finally:
        lock.release()


MAX_BYTES = 256 * 2**20
"""Far above any real file: a vector has some thousands of numbers, a set in one file some hundred vectors."""

_T = TypeVar("_T")

Fields = dict[str, Any]
"""The arguments of a `SteeringVector` by name."""


def read_bytes(path: Path) -> bytes:
    """All of a regular file.

    Raises:
        NotStoredError: There is none.
        StoreError: It cannot be read, or is beyond all measure.
    """
    try:
        return read_regular(path, MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotStoredError(f"{path}: there is no such file") from error
    except (OSError, ValueError) as error:  # ValueError: no file can have such a name
        raise StoreError(f"cannot read {str(path)!r}: {reason(error)}") from error


def parsed_json(data: bytes, source: Path) -> Any:
    """Any JSON.

    Raises:
        CorruptFileError: It is none.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{source}: not JSON: {error}") from error


def converted(data: Any, kind: type[_T], source: Path) -> _T:
    """Parsed JSON as a type.

    Raises:
        CorruptFileError: It does not fit.
    """
    try:
        return msgspec.convert(data, kind)
    except (msgspec.ValidationError, RecursionError, UnicodeError) as error:  # a key may hold a lone surrogate
        raise CorruptFileError(f"{source}: not what is expected there: {error}") from error
