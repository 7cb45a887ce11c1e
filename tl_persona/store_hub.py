"""A store of persona vectors on the Hugging Face hub: the methods that `PersonaVectorStore` inherits.

A repository holds what lies under the store's root, `<model>/<mask_strategy>/<variant>/<persona_id>.safetensors` and
the `manifest.json` of each folder, with a card. Talking to the hub is the work of `export.repositories`, the card that
of `export.cards`, filling a store with files from elsewhere that of `merging`.
"""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from tl_persona import manifest
from tl_persona.artifact_header import SUFFIX, read_header
from tl_persona.errors import InputError, NotStoredError
from tl_persona.export.cards import store_card
from tl_persona.export.repositories import CARD, pull_files, push_files
from tl_persona.files import folders_below, refuse_outside
from tl_persona.manifest_files import MANIFEST
from tl_persona.merging import merge_stores
from tl_persona.names import model_folder_name, safe_component
from tl_persona.provenance import Provenance

_Store = TypeVar("_Store", bound="StoreHub")


class StoreHub(ABC):
    """What a store does with the hub."""

    model_name: str
    root_dir: Path

    @abstractmethod
    def __init__(
        self,
        model_name: str,
        root_dir: str | Path | None = None,
        mask_strategy: object | None = None,
        variants: Sequence[str] = (),
    ) -> None: ...

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Put all that the store has of its model into a dataset repository, with a generated card, in one commit.

        Every strategy and variant goes; the repository is made where there is none. Files that are there and not in the
        store stay.

        Args:
            repo_id: Such as `me/persona-vectors`.
            license: A licence's identifier for the card, such as `cc-by-4.0`; None states none.
            private: Whether a repository that is made is private; None leaves it to the account's setting.
            revision: The branch; None is the main one.
            token: None takes the one that `hf auth login` stored, or `HF_TOKEN`.

        Returns:
            The address of the commit.

        Raises:
            NotStoredError: Nothing is stored, or there is no such branch.
            InputError: The repository's id is none.
            StoreError: A file cannot be read; the hub refused, or cannot be reached.
        """
        root = self.root_dir / model_folder_name(self.model_name)
        files: dict[str, Path | bytes] = {}
        folders = []
        provenance: Provenance | None = None
        refuse_outside(root, self.root_dir)
        for folder in folders_below(root, 2, self.root_dir):
            index = manifest.read_index(folder)
            if index.shape is None:
                continue
            within = folder.relative_to(self.root_dir).as_posix()
            for persona_id in index.personas:
                path = folder / f"{persona_id}{SUFFIX}"
                files[f"{within}/{path.name}"] = path
                provenance = provenance or read_header(path).provenance
            files[f"{within}/{MANIFEST}"] = index.encoded()
            folders.append((folder.parent.name, folder.name, len(index.personas), index.shape))
        if not folders:
            raise NotStoredError(f"nothing is stored in {root}; extract it first")
        card = store_card(repo_id, self.model_name, folders, provenance, license).encode()
        return push_files(
            repo_id,
            "dataset",
            {**files, CARD: card},
            message=f"Persona vectors of {self.model_name}",
            private=private,
            revision=revision,
            token=token,
        )

    @classmethod
    def from_hub(
        cls: type[_Store],
        repo_id: str,
        root_dir: str | Path | None = None,
        *,
        model_name: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> _Store:
        """Copy the vectors of a dataset repository into a store on this machine, and open it.

        Nothing that comes from there is trusted: only safetensors files and manifests at the places where a store has
        them are fetched, and each is verified before it is in the store. A persona that the store has already, computed
        from something else, is a conflict, and nothing is written.

        Args:
            repo_id: Such as `me/persona-vectors`.
            root_dir: Root of the store to fill; None is the default root.
            model_name: Which model's vectors; None where the repository has those of one model.
            revision: Branch, tag or commit; None is the main branch.
            token: None takes the one that `hf auth login` stored, or `HF_TOKEN`.

        Raises:
            NotStoredError: There is no such repository or revision, or it holds no vectors.
            InputError: It holds those of several models and none is named; the id is none.
            StoreMismatchError: What is there does not fit what the store has.
            CorruptFileError: A file is damaged, or no vectors.
            StoreError: The hub refused, or cannot be reached; the file system refused.
        """
        asked = None if model_name is None else model_folder_name(model_name)
        with tempfile.TemporaryDirectory() as folder:
            names = pull_files(
                repo_id, "dataset", lambda path: _is_wanted(path, asked), Path(folder), revision=revision, token=token
            )
            models = {name.split("/")[0]: name for name in names if name.endswith(SUFFIX)}
            if not models:
                raise NotStoredError(f"dataset {repo_id!r} holds no vectors{f' of {model_name}' if model_name else ''}")
            if len(models) > 1:
                raise InputError(
                    f"dataset {repo_id!r} has vectors of {', '.join(sorted(models))}: name one by model_name"
                )
            (found, example), *_ = models.items()
            store = cls(model_name or _model_named(found, Path(folder, example)), root_dir)
            merge_stores([folder], store.root_dir)
        return store


def _is_wanted(path: str, model_folder: str | None) -> bool:
    """Whether a path is one that a store writes, safe on any system."""
    parts = path.split("/")
    if len(parts) != 4 or model_folder not in (None, parts[0]):
        return False
    name = parts[3].removesuffix(SUFFIX)
    if name == parts[3] and name != MANIFEST:
        return False
    try:
        for part in (*parts[:3], *([] if name == MANIFEST else [name])):
            safe_component(part, "name")
    except InputError:
        return False
    return True


def _model_named(folder: str, example: Path) -> str:
    """The model's name by a file of its own, or by its folder, as `/` is written `__` there."""
    recorded = read_header(example).provenance
    if recorded is not None and recorded.model_name.replace("/", "__") == folder:
        return recorded.model_name
    return folder.replace("__", "/")
