"""The store of persona vectors: what is saved as one tensor, a pandas frame, a numpy file, or on the Hugging Face hub.

What is stored is float32, and so is what comes out. A repository holds what lies under the store's root,
`<model>/<mask_strategy>/<variant>/<persona_id>.safetensors` and the `manifest.json` of each folder, with a card.
"""

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_persona.errors import InputError, MissingDependencyError, NotStoredError, StoreMismatchError
from tl_persona.files import folders_below, make_folder, refuse_outside, write_atomically
from tl_persona.hub import CARD, pull_files, push_files, store_card
from tl_persona.provenance import Provenance
from tl_persona.store import manifest
from tl_persona.store.core import StoredVectors
from tl_persona.store.folder import model_folder_name, safe_component
from tl_persona.store.header import SUFFIX, read_header
from tl_persona.store.manifest_files import MANIFEST
from tl_persona.store.merge import merge_stores

_Store = TypeVar("_Store", bound="PersonaVectorStore")


class PersonaVectorStore(StoredVectors):
    """The vectors of one model, by variant and persona.

    Saving is atomic and safe for several processes at once. Use the store as a context manager, or call `flush`,
    so that `manifest.json` is complete when you are done; readers of this package do not need it to be.

    Args:
        model_name: Names the folder; `/` becomes `__`.
        root_dir: Where the store lies; by default `artifacts/activations` under the current directory.
        mask_strategy: What methods use that are not given another; a `MaskStrategy` or its value. None is the default.
        variants: What methods look into that are not given others.

    Raises:
        InputError: The model name or the strategy cannot name a folder.

    Example:
        >>> import tempfile, torch
        >>> root = tempfile.TemporaryDirectory()
        >>> with PersonaVectorStore("org/model", root.name) as store:
        ...     folder = store.save("templated", "p1", "Ada", torch.ones(2, 3), ["q1", "q2"])
        >>> store.load("templated", "p1").sum().item()
        6.0
        >>> store.persona_names(["p1"], ["templated"])
        {'p1': 'Ada'}
        >>> root.cleanup()
    """

    def load_matrix(
        self,
        prompt_variant: str,
        persona_ids: Sequence[str] | None = None,
        mask_strategy: object | None = None,
        *,
        include_baseline: bool = False,
    ) -> Float[Tensor, "persona layer d_model"]:
        """The vectors of many personas, stacked, in float32.

        Args:
            prompt_variant: Which variant.
            persona_ids: Which personas, in this order; None is `list_personas([prompt_variant])`, sorted by id.
            mask_strategy: None takes the store's own.
            include_baseline: Whether None includes `baseline_assistant`.

        Returns:
            Row i of the first axis belongs to persona i of that order; the second axis is that of `load`.

        Raises:
            NotStoredError: There is nothing to stack, or nothing under one of the ids.
            StoreMismatchError: Two vectors differ in shape.
            CorruptFileError: A file is truncated or altered.

        Example:
            >>> import tempfile
            >>> from tl_persona.store import PersonaVectorStore
            >>> with tempfile.TemporaryDirectory() as root, PersonaVectorStore("org/model", root) as store:
            ...     for name, value in {"b": 2.0, "a": 1.0}.items():
            ...         _ = store.save("templated", name, name.upper(), torch.full((3, 4), value), ["q1"])
            ...     matrix = store.load_matrix("templated")
            >>> matrix.shape, matrix[:, 0, 0]
            (torch.Size([2, 3, 4]), tensor([1., 2.]))
        """
        ids = self._ids(prompt_variant, persona_ids, mask_strategy, include_baseline)
        first = self.load(prompt_variant, ids[0], mask_strategy)
        matrix = first.new_empty((len(ids), *first.shape))
        for row, persona_id in enumerate(ids):
            vectors = first if row == 0 else self.load(prompt_variant, persona_id, mask_strategy)
            if vectors.shape != first.shape:
                raise StoreMismatchError(
                    f"persona {persona_id!r} has vectors of shape {tuple(vectors.shape)}, {ids[0]!r} of "
                    f"{tuple(first.shape)}: they cannot be stacked; extract one of them again"
                )
            matrix[row] = vectors
        return matrix

    def to_dataframe(
        self,
        variants: Sequence[str] | None = None,
        persona_ids: Sequence[str] | None = None,
        mask_strategy: object | None = None,
        *,
        include_baseline: bool = False,
    ) -> Any:
        """The vectors as a pandas frame: one row a variant, persona and layer, one float32 column a dimension.

        Args:
            variants: None takes those of the store's own in which something is stored.
            persona_ids: As in `load_matrix`.
            mask_strategy: None takes the store's own.
            include_baseline: As in `load_matrix`.

        Returns:
            A `pandas.DataFrame` with the index levels `variant`, `persona_id` and `layer` (the position in `load`), so
            that `frame.xs(12, level="layer")` has the shape that scikit-learn wants.

        Raises:
            MissingDependencyError: pandas is not installed.
            NotStoredError: Nothing is stored there.
            StoreMismatchError: Two vectors differ in shape.
            CorruptFileError: A file is truncated or altered.

        Example:
            >>> import tempfile
            >>> from tl_persona.store import PersonaVectorStore
            >>> with tempfile.TemporaryDirectory() as root, PersonaVectorStore("org/model", root) as store:
            ...     _ = store.save("templated", "ada", "Ada", torch.tensor([[1.0, 2.0], [3.0, 4.0]]), ["q1"])
            ...     store.to_dataframe(["templated"]).loc[("templated", "ada", 1)].tolist()
            [3.0, 4.0]
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingDependencyError("a frame needs pandas: pip install pandas") from error
        wanted = self.available_variants(None, mask_strategy) if variants is None else list(variants)
        if not wanted:
            raise NotStoredError(f"nothing is stored of {self.model_name} in the variants {list(self.variants)}")
        keys: list[tuple[str, str, int]] = []
        blocks = []
        for variant in wanted:
            ids = self._ids(variant, persona_ids, mask_strategy, include_baseline)
            matrix = self.load_matrix(variant, ids, mask_strategy)
            keys += [(variant, persona_id, layer) for persona_id in ids for layer in range(matrix.shape[1])]
            blocks.append(matrix.flatten(0, 1))
        if len({block.shape[1] for block in blocks}) > 1:
            raise StoreMismatchError(f"the variants {wanted} hold vectors of different widths: ask for one at a time")
        index = pandas.MultiIndex.from_tuples(keys, names=["variant", "persona_id", "layer"])
        return pandas.DataFrame(torch.cat(blocks).numpy(), index=index)

    def export_npz(
        self,
        path: str | Path,
        prompt_variant: str,
        persona_ids: Sequence[str] | None = None,
        mask_strategy: object | None = None,
        *,
        include_baseline: bool = False,
    ) -> Path:
        """Write what `load_matrix` gives as a numpy file, without pickle, whole or not at all.

        It holds `vectors` (persona, layer, d_model) in float32; `persona_ids` and `persona_names` (persona,), the name
        empty where there is none; `hook_names` (layer,), empty where they were not recorded; and the texts
        `model_name`, `variant` and `mask_strategy`.

        Args:
            path: The file; `.npz` is appended where it is missing.
            prompt_variant: As in `load_matrix`, like the arguments that follow.
            persona_ids: Which personas.
            mask_strategy: None takes the store's own.
            include_baseline: Whether None includes `baseline_assistant`.

        Returns:
            The file written.

        Raises:
            NotStoredError: There is nothing to write.
            StoreMismatchError: Two vectors differ in shape.
            CorruptFileError: A file is truncated or altered.
            StoreError: The file system refused.

        Example:
            >>> import tempfile
            >>> from tl_persona.store import PersonaVectorStore
            >>> with tempfile.TemporaryDirectory() as root, PersonaVectorStore("org/model", root) as store:
            ...     _ = store.save("templated", "ada", "Ada", torch.ones(2, 3), ["q1"])
            ...     with np.load(store.export_npz(f"{root}/vectors", "templated")) as arrays:
            ...         arrays["persona_ids"].tolist(), arrays["vectors"].shape
            (['ada'], (1, 2, 3))
        """
        ids = self._ids(prompt_variant, persona_ids, mask_strategy, include_baseline)
        vectors = self.load_matrix(prompt_variant, ids, mask_strategy)
        names = self.persona_names(ids, [prompt_variant], mask_strategy)
        recorded = self.provenance(prompt_variant, ids[0], mask_strategy)
        strategy = self.mask_strategy if mask_strategy is None else mask_strategy
        buffer = io.BytesIO()
        np.savez(
            buffer,
            vectors=vectors.numpy(),
            persona_ids=np.array(ids, dtype=np.str_),
            persona_names=np.array([names.get(persona_id, "") for persona_id in ids], dtype=np.str_),
            hook_names=np.array(() if recorded is None else recorded.hook_names, dtype=np.str_),
            model_name=np.array(self.model_name),
            variant=np.array(prompt_variant),
            mask_strategy=np.array(str(getattr(strategy, "value", strategy))),
        )
        file = Path(path)
        file = file if file.suffix == ".npz" else file.with_name(f"{file.name}.npz")
        make_folder(file.parent)
        write_atomically(file, buffer.getvalue())
        return file

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

    def _ids(
        self, variant: str, persona_ids: Sequence[str] | None, mask_strategy: object | None, include_baseline: bool
    ) -> list[str]:
        if persona_ids is not None:
            ids = list(persona_ids)
        else:
            ids = self.list_personas([variant], mask_strategy, include_baseline=include_baseline)
        if not ids:
            strategy = self.mask_strategy if mask_strategy is None else mask_strategy
            raise NotStoredError(
                f"no persona of {self.model_name} is stored for {variant} and {strategy}: extract first"
            )
        return ids


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
