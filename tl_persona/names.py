"""Which names may be those of files and folders: one plain name each, that stays in the folder it is put into."""

import os
import re
import unicodedata

from tl_persona.errors import InputError

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
