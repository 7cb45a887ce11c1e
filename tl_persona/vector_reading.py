"""What reading the files of steering vectors has in common: bytes, JSON, types, each flaw an error that names the file.

What the files mean is said in `vector_files`, `rotalabs_files` and `set_files`.
"""

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tl_persona.errors import CorruptFileError, NotStoredError, StoreError
from tl_persona.files import read_regular, reason

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
    except (msgspec.ValidationError, RecursionError) as error:
        raise CorruptFileError(f"{source}: not what is expected there: {error}") from error
