"""Steering vectors over layers: sets of them, the choice of a layer, steering at several at once, and ways out."""

import logging
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from tl_persona.display import Card, Shown
from tl_persona.errors import CorruptFileError, InputError, NotStoredError
from tl_persona.files import SET_FILE, Fields
from tl_persona.hub import CARD, pull_files, push_files, set_card
from tl_persona.models.facts import HookedModel
from tl_persona.models.hooks import LayerSelection
from tl_persona.steering.interventions import Mode, attach
from tl_persona.steering.positions import Positions
from tl_persona.vectors.best import BestLayer, best_of
from tl_persona.vectors.files import SUFFIX, encode
from tl_persona.vectors.gguf import read_control_vector, write_control_vector
from tl_persona.vectors.libraries import as_repeng, as_steering_vectors, from_repeng, from_steering_vectors
from tl_persona.vectors.rotalabs import write_rotalabs
from tl_persona.vectors.set_files import read_set, write_set
from tl_persona.vectors.table import LayerTable, row_of
from tl_persona.vectors.vector import SteeringVector, as_fields, belonging, built

_Set = TypeVar("_Set", bound="SteeringVectorSet")
_SET_FILES = re.compile(rf"{re.escape(SET_FILE)}|layer_[0-9]{{1,9}}{re.escape(SUFFIX)}")


class SteeringVectorSet(Shown):
    """The vectors of one behaviour and one model, at most one a layer.

    Other programs mean by layer i what is meant here by default: the output of block i. They add a vector times a
    coefficient, as `steer` does, so vectors go over as they are; what acts at another hook is refused.

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

    def get_best(self, metric: str | None = None, *, among: LayerSelection = None) -> SteeringVector:
        """The vector of the layer that is best by one measure; among equals, of the lowest layer.

        Residual norms grow with depth, as every block adds to the stream, and differences grow along: the largest
        norm, the usual choice, mostly finds the deepest layer, whatever the pairs. `separation` asks instead how
        well held-out pairs are told apart, on pairs the direction was not fitted on. What decided, and how many layers
        tie with the one chosen, is what `best_layer` says; it goes to the log too. A choice in the last tenth of the
        layers comes with a warning.

        Args:
            metric: `separation`: the held-out AUC, and d' where AUCs are equal, as when several layers separate
                fully. `split_half`: the cosine between random halves. `norm`: the vector's norm. None is
                `separation`, or `norm`, with a warning, for vectors that have no separation at any layer.
            among: The layers to choose from, in the forms that `extract_caa_vectors` takes, such as `"10:20"`; those
                without a vector are left out. None is all.

        Raises:
            InputError: The set is empty, or has no vector among these layers; the metric is unknown or missing at one.
            HookError: `among` names a layer that the model does not have.
        """
        choice = self.best_layer(metric, among=among)
        logging.getLogger("tl_persona").info("the best vector for %r: %s", self.behavior, choice)
        if choice.caution:
            warnings.warn(choice.caution, stacklevel=2)
        return self[choice.layer]

    def best_layer(self, metric: str | None = None, *, among: LayerSelection = None) -> BestLayer:
        """The layer that `get_best` chooses: by which statistic, and which layers tie with it.

        Raises:
            InputError: As `get_best`.
            HookError: As `get_best`.
        """
        return best_of(self.behavior, [as_fields(vector) for vector in self], metric, among)

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
        return LayerTable(tuple(row_of(as_fields(vector)) for vector in self))

    def save(self, folder: str | Path) -> None:
        """Write `layer_<N>.safetensors` for every layer, then `metadata.json`, which says which files belong.

        Until all of it is there, the folder holds what it held. Files of layers that an older set had are left and not
        read again.

        Raises:
            InputError: Some metadata has no JSON form.
            StoreError: The file system refused; the folder holds the older set or this one, whole.
        """
        files = {vector.layer_index: encode(as_fields(vector)) for vector in self}
        write_set(Path(folder), self.behavior, self.model_name, files)

    @classmethod
    def load(cls: type[_Set], folder: str | Path) -> _Set:
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

    def chosen(self, layers: Iterable[int] | None = None) -> list[SteeringVector]:
        """The vectors of some layers, in that order, or all by ascending layer.

        Raises:
            InputError: The set has no such layer.
        """
        vectors = {vector.layer_index: vector for vector in self}
        wanted = list(vectors if layers is None else layers)
        missing = [layer for layer in wanted if layer not in vectors]
        if missing:
            raise InputError(f"no vector for layers {missing} of {self.behavior!r}; there are {list(vectors)}")
        return [vectors[layer] for layer in wanted]

    def _fields(self, layers: Iterable[int] | None) -> list[Fields]:
        return [as_fields(vector) for vector in self.chosen(layers)]

    def export_gguf(
        self, path: str | Path, *, layers: Iterable[int] | None = None, model_hint: str | None = None
    ) -> Path:
        """Write a GGUF control vector for llama.cpp (`--control-vector`), in float32.

        llama.cpp adds all directions of a file at once: choose the layer that steers best, or a few.

        Args:
            path: The file; `.gguf` is appended where it is missing.
            layers: Which layers go into it; None is all.
            model_hint: What the file says its model is, such as `llama`; None is the model's name.

        Returns:
            The file written.

        Raises:
            InputError: A vector acts on the output of block 0, which llama.cpp leaves alone, or on no output of a block
                at all; there is none, or not the layer asked for.
            NonFiniteError: A vector does not fit float32.
            MissingDependencyError: The package gguf is not installed.
            StoreError: The file system refused.
        """
        return write_control_vector(Path(path), self._fields(layers), model_hint)

    @classmethod
    def import_gguf(
        cls: type[_Set], path: str | Path, *, behavior: str | None = None, model_name: str | None = None
    ) -> _Set:
        """Read a GGUF control vector, ours with all that was known of it, or one of repeng or llama.cpp.

        Args:
            path: The file.
            behavior: What the vectors stand for; None is what the file says, or its stem.
            model_name: The model they are of, as `load_model` names it; None is what the file says.

        Raises:
            NotStoredError: There is no such file.
            CorruptFileError: It is no control vector that llama.cpp would take, or was altered since it was written.
            StoreError: It cannot be read, or a later version of this package wrote it.
        """
        source = Path(path)
        vectors = [built(fields, source) for fields in read_control_vector(source, behavior, model_name)]
        try:
            return cls(vectors[0].behavior, vectors)
        except InputError as error:
            raise CorruptFileError(f"{source}: {error}") from error

    def export_rotalabs(self, folder: str | Path, *, layers: Iterable[int] | None = None) -> Path:
        """Write a folder that rotalabs-steer loads as its own set; `load` reads it back.

        That format keeps its tensors in torch's pickle, which is why nothing else here writes it.

        Returns:
            The folder.

        Raises:
            InputError: There is no vector, or one is no output of a block, or has metadata without a JSON form; the
                folder holds a set that `save` wrote.
            StoreError: The file system refused.
        """
        return write_rotalabs(Path(folder), self._fields(layers))

    def to_steering_vectors(self, *, layers: Iterable[int] | None = None) -> Any:
        """The set as a `steering_vectors.SteeringVector`, whose `apply(model, multiplier=...)` steers with it.

        Raises:
            InputError: There is no vector, or one is no output of a block.
            MissingDependencyError: steering-vectors is not installed.
        """
        return as_steering_vectors(self._fields(layers))

    @classmethod
    def from_steering_vectors(cls: type[_Set], vector: Any, behavior: str, model_name: str) -> _Set:
        """A set of the vectors of a `steering_vectors.SteeringVector`, which says neither behaviour nor model.

        Raises:
            InputError: It is something else, acts on another part of a block, or counts blocks from the end.
        """
        return cls._of(from_steering_vectors(vector), behavior, model_name, "steering-vectors")

    def to_repeng(self, *, layers: Iterable[int] | None = None, model_type: str | None = None) -> Any:
        """The set as a `repeng.ControlVector`, for `ControlModel.set_control(vector, coeff)`, in float32.

        Args:
            layers: Which layers go into it; None is all.
            model_type: What repeng compares when it adds vectors, such as `llama`; None is the model's name.

        Raises:
            InputError: There is no vector, or one is no output of a block.
            MissingDependencyError: repeng is not installed.
        """
        return as_repeng(self._fields(layers), model_type)

    @classmethod
    def from_repeng(cls: type[_Set], control: Any, behavior: str, model_name: str | None = None) -> _Set:
        """A set of the vectors of a `repeng.ControlVector`.

        Args:
            control: The vector; its directions are at norm 1 where repeng's PCA made them.
            behavior: What it stands for.
            model_name: The model, as `load_model` names it; None is the control vector's `model_type`.

        Raises:
            InputError: It is something else, or counts blocks from the end.
        """
        model_type, vectors = from_repeng(control)
        return cls._of(vectors, behavior, model_type if model_name is None else model_name, "repeng")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Put the set, as `save` writes it, into a model repository, with a generated card, in one commit.

        The repository is made where there is none.

        Args:
            repo_id: Such as `me/refusal-vectors`.
            license: A licence's identifier for the card, such as `cc-by-4.0`; None states none.
            private: Whether a repository that is made is private; None leaves it to the account's setting.
            revision: The branch; None is the main one.
            token: None takes the one that `hf auth login` stored, or `HF_TOKEN`.

        Returns:
            The address of the commit.

        Raises:
            InputError: The set is empty, some metadata has no JSON form, or the repository's id is none.
            NotStoredError: There is no such branch.
            StoreError: The hub refused, or cannot be reached.
        """
        vectors = self.chosen()
        if not vectors:
            raise InputError(f"the set for {self.behavior!r} is empty: there is nothing to push")
        card = set_card(
            repo_id,
            self.behavior,
            vectors[0].model_name,
            [row_of(as_fields(vector)) for vector in vectors],
            [vector.extraction_method for vector in vectors],
            vectors[0].provenance,
            license,
        )
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            files: dict[str, Path | bytes] = {
                path.name: path for path in Path(folder).iterdir() if _SET_FILES.fullmatch(path.name)
            }
            return push_files(
                repo_id,
                "model",
                {**files, CARD: card.encode()},
                message=f"Steering vectors for {self.behavior}",
                private=private,
                revision=revision,
                token=token,
            )

    @classmethod
    def from_hub(
        cls: type[_Set], repo_id: str, *, revision: str | None = None, token: str | bool | None = None
    ) -> _Set:
        """Read a set from a model repository to which `push_to_hub` put it.

        Nothing that comes from there is trusted: only safetensors files and the file that names them are fetched, and
        their checksums are compared, as `load` does.

        Args:
            repo_id: Such as `me/refusal-vectors`.
            revision: Branch, tag or commit; None is the main branch.
            token: None takes the one that `hf auth login` stored, or `HF_TOKEN`.

        Raises:
            NotStoredError: There is no such repository or revision, or it holds no set.
            CorruptFileError: A file is damaged, or not the one that was saved with this set.
            InputError: The repository's id is none.
            StoreError: The hub refused, or cannot be reached; a later version of this package wrote the set.
        """
        with tempfile.TemporaryDirectory() as folder:
            names = pull_files(
                repo_id,
                "model",
                lambda path: _SET_FILES.fullmatch(path) is not None,
                Path(folder),
                revision=revision,
                token=token,
            )
            if SET_FILE not in names:
                raise NotStoredError(f"model {repo_id!r} holds no set of steering vectors: it has no {SET_FILE}")
            return cls.load(folder)

    @classmethod
    def _of(cls: type[_Set], vectors: Mapping[int, Tensor], behavior: str, model_name: str, method: str) -> _Set:
        return cls(behavior, [SteeringVector(behavior, i, vector, model_name, method) for i, vector in vectors.items()])
