"""Verdicts on hooked models, kept under the user's cache folder, so that another process need not compare again.

They are never required: a file that is absent, broken or cannot be written costs a comparison. `TL_PERSONA_CACHE` names
another folder, or is `off`.
"""

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec
import platformdirs

from tl_persona.errors import StoreError
from tl_persona.files import make_folder, write_atomically


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """What came of comparing a hooked model with the transformers model.

    Attributes:
        reference: The class of the transformers model.
        n_tokens: Length of the text.
        hook: Where they differ most.
        worst: By how much, relative to the norm.
        allowed: How much may be.
        holds: Whether it is within.
    """

    reference: str
    n_tokens: int
    hook: str
    worst: float
    allowed: float
    holds: bool


class _Stored(msgspec.Struct):
    key: dict[str, str]
    verdicts: dict[str, Difference]


def cache_folder() -> Path | None:
    """Where verdicts lie; None where nothing is to be kept."""
    asked = os.environ.get("TL_PERSONA_CACHE", "")
    if asked.lower() == "off":
        return None
    return Path(asked) if asked else platformdirs.user_cache_path("tl_persona", appauthor=False)


class VerdictFile:
    """The verdicts on one checkpoint in one form.

    Args:
        key: All that they depend on: checkpoint, class, dtype, device and releases.
    """

    def __init__(self, key: Mapping[str, str]) -> None:
        self._key = dict(key)
        folder = cache_folder()
        name = hashlib.sha256(msgspec.json.encode(self._key, order="sorted")).hexdigest()[:32]
        self._file = None if folder is None else folder / "verdicts" / f"{name}.json"

    @property
    def is_known(self) -> bool:
        """Whether there is any verdict."""
        return bool(self._read())

    def get(self, n_tokens: int, hook: str = "") -> Difference | None:
        """What came of comparing at this length, all blocks or one other hook; None where that is not known."""
        return self._read().get(f"{n_tokens} {hook}".strip())

    def put(self, n_tokens: int, verdict: Difference, hook: str = "") -> None:
        """Keep a verdict, if the file system lets."""
        if self._file is None:
            return
        stored = _Stored(self._key, {**self._read(), f"{n_tokens} {hook}".strip(): verdict})
        try:
            make_folder(self._file.parent)
            write_atomically(self._file, msgspec.json.encode(stored))
        except (OSError, StoreError) as error:
            logging.getLogger("tl_persona").info("a verdict is not kept: %s", error)

    def _read(self) -> dict[str, Difference]:
        if self._file is None:
            return {}
        try:
            stored = msgspec.json.decode(self._file.read_bytes(), type=_Stored)
        except (OSError, msgspec.DecodeError, UnicodeError):
            return {}
        return stored.verdicts if stored.key == self._key else {}
