"""Steering vectors over layers: sets of them, the choice of a layer, and steering at several at once.

A single vector is in `steering_vector`, the file formats in `vector_files`, the table in `layer_table`. Extracting
vectors is the work of `caa`; persona vectors are in `store`.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_persona.display import Card, Shown
from tl_persona.errors import CorruptFileError, InputError
from tl_persona.layer_table import METRICS, LayerTable, row_of, score_of
from tl_persona.models.facts import HookedModel
from tl_persona.set_files import read_set, write_set
from tl_persona.steering.interventions import Mode, attach
from tl_persona.steering.positions import Positions
from tl_persona.steering_vector import SteeringVector, belonging, built
from tl_persona.vector_files import encode
from tl_persona.vectors_export import SetExports

__all__ = ["LayerTable", "SteeringVector", "SteeringVectorSet"]


class SteeringVectorSet(SetExports, Shown):
    """The vectors of one behaviour and one model, at most one a layer.

    Its ways to other programs and to the Hugging Face hub are the methods of `SetExports`.

    Args:
        behavior: The behaviour all of them stand for.
        vectors: The first vectors.

    Raises:
        InputError: A vector does not belong in the set; see `add`.

    Example:
        >>> vectors = SteeringVectorSet("refusal", [SteeringVector("refusal", i, torch.ones(2) * i, "tiny")
        ...                                         for i in (2, 1)])
        >>> vectors.layers, vectors[2].norm == vectors.get_best("norm").norm, vectors.get(7)
        ([1, 2], True, None)
    """

    def __init__(self, behavior: str, vectors: Iterable[SteeringVector] | None = None) -> None:
        self.behavior = behavior
        self._vectors: dict[int, SteeringVector] = {}
        for vector in vectors or ():
            self.add(vector)

    def add(self, vector: SteeringVector) -> None:
        """Add a vector, in place of an earlier one at the same hook.

        Raises:
            InputError: It is of another behaviour, model or width, or at another hook of a layer already there.
        """
        if vector.behavior != self.behavior:
            raise InputError(f"{vector.label} does not belong in a set for behavior {self.behavior!r}")
        present = self._vectors.get(vector.layer_index)
        if present is not None and present.hook_name != vector.hook_name:
            raise InputError(
                f"layer {vector.layer_index} already has {present.hook_name}, so {vector.hook_name} has no place; "
                "make one set for each kind of hook"
            )
        for what, wanted, seen in belonging(next(iter(self), vector), vector):
            if wanted != seen:
                raise InputError(f"{vector.label} does not belong in this set: {what} {seen!r}, not {wanted!r}")
        self._vectors[vector.layer_index] = vector

    def get(self, layer_index: int) -> SteeringVector | None:
        """The vector of a layer, or None."""
        return self._vectors.get(layer_index)

    def __getitem__(self, layer_index: int) -> SteeringVector:
        if layer_index not in self._vectors:
            raise KeyError(f"no vector for layer {layer_index}; there are {self.layers}")
        return self._vectors[layer_index]

    def __len__(self) -> int:
        return len(self._vectors)

    def __iter__(self) -> Iterator[SteeringVector]:
        """The vectors by ascending layer."""
        return iter([self._vectors[layer] for layer in self.layers])

    def __repr__(self) -> str:
        return f"SteeringVectorSet({self.behavior!r}, model {self.model_name!r}, layers {self.layers})"

    def _card(self) -> Card:
        facts = {"model": str(self.model_name), "layers": f"{len(self)}: {self.layers}"}
        return Card(f"steering vectors for {self.behavior}", facts, self.summary() if len(self) else None)

    @property
    def layers(self) -> list[int]:
        """The layers there are, ascending."""
        return sorted(self._vectors)

    @property
    def model_name(self) -> str | None:
        """The model of the vectors; None in an empty set."""
        return next((vector.model_name for vector in self), None)

    def to(self, *args: Any, **kwargs: Any) -> "SteeringVectorSet":
        """The set on another device or in another floating dtype, with the arguments of `Tensor.to`."""
        return SteeringVectorSet(self.behavior, [vector.to(*args, **kwargs) for vector in self])

    def get_best(self, metric: str | None = None) -> SteeringVector:
        """The vector of the layer that is best by one measure; among equals, of the lowest layer.

        Residual norms grow with depth, as every block adds to the stream, and differences grow along: the largest
        norm, the usual choice, mostly finds the deepest layer, whatever the pairs. `separation` asks instead how
        well held-out pairs are told apart, on pairs the direction was not fitted on.

        Args:
            metric: `separation`: the held-out AUC, and d' where AUCs are equal, as when several layers separate
                fully. `split_half`: the cosine between random halves. `norm`: the vector's norm. None is
                `separation`, or `norm`, with a warning, for a set that has no separation at any layer.

        Raises:
            InputError: The set is empty, or the metric unknown or missing at a layer.
        """
        if not self._vectors:
            raise InputError(f"the set for {self.behavior!r} is empty: there is no best vector")
        if metric is None:
            metric = "separation"
            if all(score_of(vector, metric) is None for vector in self):
                metric = "norm"
                warnings.warn(
                    f"the vectors for {self.behavior!r} have no held-out separation, so the best is taken by norm, "
                    "which mostly finds the deepest layer; extract with 4 or more pairs to have it",
                    stacklevel=2,
                )
        if metric not in METRICS:
            raise InputError(f"unknown metric {metric!r}; there are {', '.join(METRICS)}")
        scores = {vector.layer_index: score for vector in self if (score := score_of(vector, metric)) is not None}
        if len(scores) < len(self):
            missing = [layer for layer in self.layers if layer not in scores]
            available = [name for name in METRICS if all(score_of(vector, name) is not None for vector in self)]
            raise InputError(f"no {metric} at layers {missing}; available at all layers: {', '.join(available)}")
        return self[max(scores, key=lambda layer: (scores[layer], -layer))]

    def steer(
        self,
        model: HookedModel,
        coefficient: float = 1.0,
        *,
        layers: Iterable[int] | None = None,
        positions: Positions = None,
        mode: Mode = "add",
    ) -> AbstractContextManager[None]:
        """Apply the vectors of all layers at once, or of the chosen ones, as `SteeringVector.steer` does.

        What is added at several layers adds up on its way: take a smaller coefficient than for one layer.

        Raises:
            HookError: The model lacks a hook.
            InputError: The set is empty or has no such layer, is of another model or width, or an argument means
                nothing.
        """
        return attach(model, [v.intervention(model, coefficient, positions, mode) for v in self.chosen(layers)])

    def project(self, activations: Float[Tensor, "*batch layer d_model"]) -> Float[Tensor, "*batch layer"]:
        """Projection of each layer's activations on that layer's vector at norm 1, in the order of `layers`.

        Raises:
            InputError: The set is empty, there are not as many layers, widths differ, or a vector is zero.
        """
        if not len(self) or activations.shape[-2] != len(self):
            raise InputError(f"activations of {activations.shape[-2]} layers, for vectors at layers {self.layers}")
        return torch.stack([vector.project(activations[..., i, :]) for i, vector in enumerate(self)], dim=-1)

    def summary(self) -> LayerTable:
        """One row a layer: norms and statistics; print it, show it in a notebook, or make it a pandas frame."""
        return LayerTable(tuple(row_of(vector) for vector in self))

    def save(self, folder: str | Path) -> None:
        """Write `layer_<N>.safetensors` for every layer, then `metadata.json`, which says which files belong.

        Until all of it is there, the folder holds what it held. Files of layers that an older set had are left and not
        read again.

        Raises:
            InputError: Some metadata has no JSON form.
            StoreError: The file system refused; the folder holds the older set or this one, whole.
        """
        files = {vector.layer_index: encode(vector, vector.label) for vector in self}
        write_set(Path(folder), self.behavior, self.model_name, files)

    @classmethod
    def load(cls, folder: str | Path) -> "SteeringVectorSet":
        """Read a set that `save` wrote, or one of rotalabs-steer (`metadata.json`, `layer_<N>.json` and `.pt`).

        Raises:
            NotStoredError: The folder holds no set, or a layer's file is gone.
            CorruptFileError: A file is damaged, or not the one that was saved with this set.
            StoreError: A later version of this package wrote it, a file cannot be read, or a link leads out of the
                folder.
        """
        behavior, layers = read_set(Path(folder))
        vectors = cls(behavior)
        for layer, fields, source in layers:
            vector = built(fields, source)
            if vector.layer_index != layer:
                raise CorruptFileError(f"{folder}: the file of layer {layer} holds layer {vector.layer_index}")
            try:
                vectors.add(vector)
            except InputError as error:
                raise CorruptFileError(f"{folder}: layer {layer}: {error}") from error
        return vectors
