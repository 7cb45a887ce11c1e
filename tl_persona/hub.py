"""Fetches the files of a data set from the Hugging Face hub or a local folder, and reads the item bank among them.

Every other file is only fetched here: reading personas and questions is `samples`' work. The hub's client is loaded
when a file is fetched from the hub, so a local folder works without it. No torch here.
"""

import os
from pathlib import Path
from typing import Literal, overload

import msgspec

from tl_persona.errors import InputError
from tl_persona.files import present
from tl_persona.jsonl import StrPath, read_document

BANK_FILE = "implicit_shared_mc_bank.json"
"""The item bank: which free-response questions each shared multiple-choice question was made from."""


@overload
def fetch(repo: StrPath, revision: str | None, name: str) -> Path: ...
@overload
def fetch(repo: StrPath, revision: str | None, name: str, *, optional: Literal[True]) -> Path | None: ...
def fetch(repo: StrPath, revision: str | None, name: str, *, optional: bool = False) -> Path | None:
    """The local path of the file `name` of a data set.

    In a local folder only an optional file is looked for; another that is missing is found out when it is read.

    Args:
        repo: A dataset repository's id on the hub, or a local folder.
        revision: Branch, tag or commit of the repository; None for its main branch, and for a folder.
        name: The file's path inside the repository.
        optional: Return None where the data set has no such file.

    Raises:
        InputError: The file cannot be had from the hub, or a revision was asked of a local folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fetch(folder, None, "qa.jsonl").name, fetch(folder, None, BANK_FILE, optional=True)
        ('qa.jsonl', None)
    """
    if os.path.isdir(repo):  # False where the system refuses the name: it may still be a repository's
        if revision is not None:
            raise InputError(f"{repo} is a local folder, which has no revision {revision!r}; leave revision out")
        path = Path(repo, name)
        return None if optional and not present(path) else path
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(repo), name, repo_type="dataset", revision=revision))
    except (EntryNotFoundError, OSError, ValueError) as error:
        # Without network an absent file counts as optional only where the hub once said that it does not exist:
        # to go on without the bank could let test questions leak into training.
        if optional and isinstance(error, EntryNotFoundError):
            known = try_to_load_from_cache(str(repo), name, repo_type="dataset", revision=revision)
            if known is _CACHED_NO_EXIST or not isinstance(error, LocalEntryNotFoundError):
                return None
        raise InputError(f"{name} of {repo}: neither a local folder nor available from the hub: {error}") from error


class _BankItem(msgspec.Struct):
    bank_id: str | None = None
    related_frq_qids: tuple[str, ...] | None = None


class _Bank(msgspec.Struct):
    items: tuple[_BankItem, ...] = ()


def related_frq_qids(bank: Path) -> dict[str, tuple[str, ...]]:
    """The `related_frq_qids` that an item bank gives for each of its `bank_id`s; items of one bank id add up.

    Raises:
        InputError: The file cannot be read or is no item bank.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, BANK_FILE)
        ...     _ = path.write_text('{"items": [{"bank_id": "b1", "related_frq_qids": ["f1", "f2"]}]}')
        ...     related_frq_qids(path)
        {'b1': ('f1', 'f2')}
    """
    related: dict[str, list[str]] = {}
    for item in read_document(bank, _Bank).items:
        if item.bank_id:
            related.setdefault(item.bank_id, []).extend(item.related_frq_qids or ())
    return {bank_id: tuple(qids) for bank_id, qids in related.items()}
