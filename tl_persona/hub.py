"""Repositories of vectors on the Hugging Face hub: files there and back, and their cards.

What goes there, and which names are wanted back, is decided by the callers. What comes back is not trusted: only files
of the wanted names are fetched, and they are copied into a folder of the caller's, under those names and as plain
files; reading them is then the same as reading any file, checksums included. The hub's client is loaded when used.

A card, `README.md`, says what vectors are of, how far to trust them, how to load them. All of it follows from what the
vectors say of themselves and from the licence the caller names. Names come from files and may hold anything, so they
are written such that they stay text.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from tl_persona.errors import InputError, NotStoredError, StoreError
from tl_persona.files import make_folder, reason, write_atomically
from tl_persona.provenance import Provenance

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_MARKUP = re.compile(r"([\\`*_\[\]<>|#&])")


def set_card(
    repo_id: str,
    behavior: str,
    model_name: str,
    rows: Sequence[Mapping[str, Any]],
    methods: Iterable[str],
    provenance: Provenance | None,
    license: str | None,
) -> str:
    """The card of a set of steering vectors.

    Args:
        repo_id: Where it will lie.
        behavior: What the vectors stand for.
        model_name: The model they were extracted from.
        rows: One a layer, as `LayerTable.rows` has them.
        methods: How they were extracted.
        provenance: Of one of them, if it is known.
        license: A licence's identifier, such as `cc-by-4.0`; None states none.
    """
    figures = [
        ("layer", "norm", "pairs", "split half", "held-out AUC [95 %]", "d'"),
        *(
            (
                str(row["layer"]),
                _number(row["norm"], ".4g"),
                _number(row["num_pairs"], "d"),
                _number(row["split_half"]),
                _number(row["auc"]) + _interval(row["auc_low"], row["auc_high"]),
                _number(row["d_prime"]),
            )
            for row in rows
        ),
    ]
    return "\n".join(
        [
            *_head(model_name, license, "steering-vectors"),
            f"# Steering vectors: {_plain(behavior)}",
            "",
            f"Directions in the residual stream of {_model(model_name)} for the behaviour *{_plain(behavior)}*, one a "
            "layer; index i is the output of block i. Adding one, times a coefficient, steers towards the behaviour, a "
            "negative coefficient away from it.",
            "",
            *_table(figures),
            "",
            "Split half is the cosine between vectors of random halves of the pairs. The AUC is the chance that a "
            "held-out positive text lies further along than a negative one.",
            "",
            "```python",
            "from tl_persona import SteeringVectorSet, generate, load_model",
            "",
            f"vectors = SteeringVectorSet.from_hub({json.dumps(repo_id)})",
            f"model = load_model({json.dumps(model_name)})",
            "with vectors.get_best().steer(model, coefficient=1.0):",
            '    print(generate(model, ["..."], max_new_tokens=40)[0].text)',
            "```",
            "",
            "## Where they come from",
            "",
            *_table([("", ""), ("method", _plain(", ".join(sorted(set(methods))))), *_facts(provenance)]),
            "",
            *_licence(license),
        ]
    )


def store_card(
    repo_id: str,
    model_name: str,
    folders: Sequence[tuple[str, str, int, tuple[int, int]]],
    provenance: Provenance | None,
    license: str | None,
) -> str:
    """The card of a store of persona vectors.

    Args:
        repo_id: Where it will lie.
        model_name: The model they were extracted from.
        folders: Mask strategy, prompt variant, number of personas and shape (layer, d_model) of each folder.
        provenance: Of one of the vectors, if it is known.
        license: A licence's identifier, such as `cc-by-4.0`; None states none.
    """
    table: list[tuple[str, ...]] = [("mask strategy", "variant", "personas", "layers", "d_model")]
    table += [(_plain(a), _plain(b), str(count), *map(str, shape)) for a, b, count, shape in folders]
    return "\n".join(
        [
            *_head(model_name, license, "persona-vectors"),
            f"# Persona vectors of {_plain(model_name)}",
            "",
            f"Mean activations of {_model(model_name)} while it answers as each of several personas: one file a "
            "persona, one row a layer.",
            "",
            *_table(table),
            "",
            "```python",
            "from tl_persona import PersonaVectorStore",
            "",
            f"store = PersonaVectorStore.from_hub({json.dumps(repo_id)})",
            f"vectors = store.load({json.dumps(folders[0][1])}, store.list_personas([{json.dumps(folders[0][1])}])[0])",
            "```",
            "",
            "## Where they come from",
            "",
            *_table([("", ""), *_facts(provenance)]),
            "",
            *_licence(license),
        ]
    )


def _head(model_name: str, license: str | None, tag: str) -> list[str]:
    """The front matter; JSON strings are YAML strings."""
    lines = ["---", "library_name: tl_persona", f"tags: [tl_persona, {tag}]"]
    if license is not None:
        lines.append(f"license: {json.dumps(license)}")
    if _HUB_ID.fullmatch(model_name):
        lines.append(f"base_model: {json.dumps(model_name)}")
    return [*lines, "---", ""]


def _facts(provenance: Provenance | None) -> list[tuple[str, str]]:
    if provenance is None:
        return [("provenance", "not recorded")]
    facts = {
        "model": f"{provenance.model_name}, revision {provenance.revision or 'not known'}",
        "weights": f"{provenance.dtype}, {provenance.weights}",
        "tokens": provenance.strategy,
        "texts": f"{len(provenance.sample_ids)}, digest {provenance.prompts_digest}",
        **{name: str(value) for name, value in provenance.notes.items()},
    }
    return [(_plain(name), _plain(value)) for name, value in facts.items()]


def _licence(license: str | None) -> list[str]:
    said = "None is stated." if license is None else f"{_plain(license)}."
    return ["## Licence", "", f"{said} The licences of the model and of the texts may set limits of their own.", ""]


def _model(name: str) -> str:
    return f"[{_plain(name)}](https://huggingface.co/{name})" if _HUB_ID.fullmatch(name) else _plain(name)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = rows
    return [_line(head), _line(["---"] * len(head)), *map(_line, body)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """Text on one line, without markup."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))


def _number(value: int | float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def _interval(low: int | float | None, high: int | float | None) -> str:
    return "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"


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
