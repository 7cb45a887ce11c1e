"""Files to a repository on the Hugging Face hub, and back.

What goes there, and which names are wanted back, is decided by the callers. What comes back is not trusted: only files
of the wanted names are fetched, and they are copied into a folder of the caller's, under those names and as plain
files; reading them is then the same as reading any file, checksums included. The hub's client is loaded when used.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeAlias, cast

from tl_persona.errors import InputError, NotStoredError, StoreError
from tl_persona.files import make_folder, reason, write_atomically

RepoType: TypeAlias = Literal["model", "dataset"]

CARD = "README.md"

_COMMIT = re.compile(r"[0-9a-f]{40}")


def push_files(
    repo_id: str,
    repo_type: RepoType,
    files: Mapping[str, Path | bytes],
    *,
    message: str,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
) -> str:
    """Put files into a repository, all in one commit; the repository is made where there is none.

    Args:
        repo_id: Such as `me/refusal-vectors`.
        repo_type: `model` or `dataset`.
        files: Contents by path in the repository.
        message: Of the commit.
        revision: The branch; None is the main one.
        private: Whether a repository that is made is private; None leaves it to the account's setting.
        token: None takes the one that `hf auth login` stored, or `HF_TOKEN`.

    Returns:
        The address of the commit.

    Raises:
        InputError: The repository's id is none.
        NotStoredError: There is no such branch.
        StoreError: The hub refused, or cannot be reached.
    """
    with _told_plainly(f"cannot push to {repo_type} {repo_id!r}"):
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        additions = [CommitOperationAdd(path, source) for path, source in files.items()]
        done = api.create_commit(repo_id, additions, commit_message=message, repo_type=repo_type, revision=revision)
        return str(done.commit_url)


def pull_files(
    repo_id: str,
    repo_type: RepoType,
    wanted: Callable[[str], bool],
    folder: Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> list[str]:
    """Copy the wanted files of one commit of a repository into a folder.

    Args:
        repo_id: Such as `me/refusal-vectors`.
        repo_type: `model` or `dataset`.
        wanted: Whether a path in the repository is wanted; it decides alone which names are written.
        folder: Where to; paths are as in the repository.
        revision: Branch, tag or commit; None is the main branch.
        token: None takes the one that `hf auth login` stored, or `HF_TOKEN`.

    Returns:
        The paths.

    Raises:
        InputError: The repository's id is none.
        NotStoredError: There is no such repository, or no such revision.
        StoreError: The hub refused, cannot be reached, or answers what it should not; the file system refused.
    """
    with _told_plainly(f"cannot fetch {repo_type} {repo_id!r}"):
        from huggingface_hub import HfApi, RepoFile

        api = HfApi(token=token)
        commit = str(api.repo_info(repo_id, repo_type=repo_type, revision=revision).sha)
        if not _COMMIT.fullmatch(commit):
            raise StoreError(f"{repo_type} {repo_id!r}: the hub names a commit {commit!r}, which is none")
        entries = api.list_repo_tree(repo_id, recursive=True, revision=commit, repo_type=repo_type)
        names = [entry.path for entry in entries if isinstance(entry, RepoFile) and wanted(entry.path)]
        for name in names:
            data = Path(api.hf_hub_download(repo_id, name, repo_type=repo_type, revision=commit)).read_bytes()
            make_folder((folder / name).parent)
            write_atomically(folder / name, data)
    return names


@contextmanager
def _told_plainly(what: str) -> Iterator[None]:
    """The hub client's many errors as few of ours; its own is chained."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # What is refused, malformed or out of reach; the bases are those of the HTTP library under the hub's client.
    failures = cast(tuple[type[Exception], ...], (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__))
    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise NotStoredError(f"{what}: {_first_line(error)}; check the id, the revision and the token") from error
    except HFValidationError as error:
        raise InputError(f"{what}: {_first_line(error)}") from error
    except StoreError:
        raise
    except failures as error:
        raise StoreError(f"{what}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in reason(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
