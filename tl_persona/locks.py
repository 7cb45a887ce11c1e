"""Locks between processes and threads, held by a file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tl_persona.errors import StoreError
from tl_persona.files import reason

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
