"""Stored persona vectors as one tensor, as a pandas frame, and as a numpy file: methods that the store inherits.

Reading files is the store's work. What is stored is float32, and so is what comes out.
"""

import io
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_persona.display import Card, Shown
from tl_persona.errors import MissingDependencyError, NotStoredError, StoreError, StoreMismatchError
from tl_persona.files import make_folder, write_atomically
from tl_persona.provenance import Provenance
from tl_persona.tensors import LayerVectors


class StoreTables(Shown):
    """What a store gives to programs that compute with all of its vectors at once.

    One order everywhere: that of `persona_ids` where it is given, else that of `list_personas`.
    """

    model_name: str
    root_dir: Path
    mask_strategy: object | None
    variants: tuple[str, ...]

    @abstractmethod
    def load(self, prompt_variant: str, persona_id: str, mask_strategy: object | None = None) -> LayerVectors: ...

    @abstractmethod
    def list_personas(
        self,
        variants: Sequence[str] | None = None,
        mask_strategy: object | None = None,
        warn_missing: bool = True,
        *,
        include_baseline: bool = False,
    ) -> list[str]: ...

    @abstractmethod
    def list_layers(
        self, variants: Sequence[str], persona_ids: Sequence[str] | None = None, mask_strategy: object | None = None
    ) -> list[int]: ...

    @abstractmethod
    def persona_names(
        self, persona_ids: Sequence[str], variants: Sequence[str] | None = None, mask_strategy: object | None = None
    ) -> dict[str, str]: ...

    @abstractmethod
    def provenance(
        self, prompt_variant: str, persona_id: str, mask_strategy: object | None = None
    ) -> Provenance | None: ...

    @abstractmethod
    def available_variants(
        self, variants: Sequence[str] | None = None, mask_strategy: object | None = None
    ) -> list[str]: ...

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

    def _card(self) -> Card:
        """What the store's own strategy and variants hold; a folder that cannot be read is said to be so."""
        facts = {"root": str(self.root_dir), "strategy": str(getattr(self.mask_strategy, "value", self.mask_strategy))}
        for variant in self.variants:
            try:
                ids = self.list_personas([variant], include_baseline=True)
                layers = self.list_layers([variant])
            except StoreError as error:
                facts[variant] = f"cannot be read: {error}"
                continue
            held = (
                f"{len(ids)} persona{'' if len(ids) == 1 else 's'}, {len(layers)} layers" if ids else "nothing stored"
            )
            facts[variant] = held
        return Card(f"persona vectors of {self.model_name}", facts)

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
