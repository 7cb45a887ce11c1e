"""Writes files whole or not at all, reads nothing but files, and refuses names that would leave their folder.

What is in the files is decided elsewhere. Reading leaves an `OSError` to the caller, who knows what was wanted;
otherwise only `StoreError` and `InputError` come out of here.
"""

import errno
import itertools
import os
import secrets
import stat
import unicodedata
from pathlib import Path
from typing import BinaryIO

from tl_persona.errors import InputError, StoreError

TEMPORARY_PREFIX = ".tmp-"
"""Names of unfinished files start with this; every reader of a folder passes over them."""

MAX_NAME_BYTES = 200
"""File systems allow 255 bytes; a suffix and a little room for tools come off that."""

_RESERVED = frozenset({"manifest"})


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; what is no file, such as a pipe or a device, may never end or never begin.

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
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: Path) -> bytes:
    """All of a file; see `open_regular`.

    Raises:
        OSError: It cannot be read.
    """
    with open_regular(path) as file:
        return file.read()


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
    except OSError as error:
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
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
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
    try:
        target, allowed = path.resolve(), root.resolve()
    except (OSError, RuntimeError) as error:
        raise StoreError(f"cannot follow the symbolic links of {path}: {reason(error)}") from error
    if not target.is_relative_to(allowed):
        raise StoreError(
            f"{path} is a symbolic link to {target}, outside {allowed}: nothing is read or written through it"
        )


def safe_component(name: str, what: str) -> str:
    """Return `name` when it is one plain name, fit for a file on any system.

    Args:
        name: A persona id, a variant, or the like.
        what: What the name stands for, for the message.

    Raises:
        InputError: The name is empty, hidden, reserved, too long, or has separators or control characters.

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


def reason(error: BaseException) -> str:
    """What the system said, without the path that the message around it already names."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


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
    return None


def _shown(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:60]}...")
