"""Steering vectors: one direction at one hook, sets of them over layers, and their files.

A vector is one safetensors file whose header says what it is; a set is a folder of those and a `metadata.json`. The
`.json` + `.pt` pairs of rotalabs-steer are read too, never written. Extracting vectors is the work of `caa`,
measuring them of `statistics`, applying them of `steering`; persona vectors are in `store`.
"""

import hashlib
import html
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from tl_persona.errors import (
    CorruptFileError,
    InputError,
    MissingDependencyError,
    NonFiniteError,
    NotStoredError,
    StoreError,
)
from tl_persona.files import make_folder, reason, write_atomically
from tl_persona.hooks import layer_of, resid_post
from tl_persona.models import HookedModel, source_of
from tl_persona.provenance import Provenance
from tl_persona.steering import Intervention, Mode, attach, project
from tl_persona.steering_positions import Positions

FORMAT = "tl_persona.steering_vector"
SET_FORMAT = "tl_persona.steering_vector_set"
FORMAT_VERSION = "1"
SUFFIX = ".safetensors"
METRICS = ("separation", "split_half", "norm")

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False, init=False)
class SteeringVector:
    """A direction in the activations of one hook that stands for a behaviour.

    `+` and `-` join vectors of one model and hook, `*` and `/` scale; none of these carry statistics over that no
    longer hold.

    Attributes:
        behavior: What the direction stands for.
        layer_index: The block; index i with the default hook is the output of block i.
        vector: The direction, floating point, finite.
        model_name: The model it was extracted from.
        extraction_method: How, such as `caa`.
        metadata: Facts that JSON can hold: `num_pairs`, `token_position`, `pos_mean_norm`, `neg_mean_norm` and
            `vector_norm` as extracted, and `statistics` (see `statistics.LayerStatistics`).
        hook_name: The hook it acts at; by default `resid_post` of the block.
        provenance: What it was computed from, where that is known.

    Raises:
        InputError: The tensor is not 1-D floating point, or the hook sits in another block than `layer_index`.
        NonFiniteError: The tensor holds NaN or infinity.

    Example:
        >>> v = SteeringVector("refusal", 7, torch.tensor([3.0, 4.0]), "tiny")
        >>> v.hook_name, v.norm, v.dim, v.normalize().vector
        ('blocks.7.hook_resid_post', 5.0, 2, tensor([0.6000, 0.8000]))
        >>> (v - 0.5 * v).vector
        tensor([1.5000, 2.0000])
    """

    behavior: str
    layer_index: int
    vector: Float[Tensor, "d_model"] = field(repr=False)
    model_name: str
    extraction_method: str
    metadata: dict[str, Any]
    hook_name: str
    provenance: Provenance | None

    def __init__(
        self,
        behavior: str,
        layer_index: int,
        vector: Float[Tensor, "d_model"],
        model_name: str,
        extraction_method: str = "caa",
        metadata: Mapping[str, Any] | None = None,
        *,
        hook_name: str | None = None,
        provenance: Provenance | None = None,
    ) -> None:
        what = f"steering vector {behavior!r}, layer {layer_index!r}"
        if not isinstance(layer_index, int) or isinstance(layer_index, bool) or layer_index < 0:
            raise InputError(f"{what}: the layer must be an int from 0")
        hook_name = resid_post(layer_index) if hook_name is None else hook_name
        block = layer_of(hook_name)
        if block is not None and block != layer_index:
            raise InputError(f"{what}: its hook {hook_name!r} sits in block {block}")
        flaw = _flaw(vector)
        if flaw is not None:
            raise InputError(f"{what}: {flaw}; it must be one non-empty, 1-D floating-point tensor")
        if not vector.isfinite().all():
            raise NonFiniteError(f"{what}: the vector holds NaN or infinity, or overflows {vector.dtype}")
        fields = {
            "behavior": behavior,
            "layer_index": layer_index,
            "vector": vector.detach(),
            "model_name": model_name,
            "extraction_method": extraction_method,
            "metadata": dict(metadata or {}),
            "hook_name": hook_name,
            "provenance": provenance,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def norm(self) -> float:
        """L2 norm."""
        return float(self._float64.norm())

    @property
    def dim(self) -> int:
        """The model's d_model."""
        return self.vector.shape[0]

    def normalize(self) -> "SteeringVector":
        """The vector at norm 1.

        Raises:
            InputError: It is zero.
        """
        if self.norm == 0:
            raise InputError(f"{self._label} is zero: it has no direction to normalize")
        unit = (self._float64 / self.norm).to(self.vector)
        return replace(self, vector=unit, metadata={**self.metadata, "normalized": True})

    def scale(self, factor: int | float) -> "SteeringVector":
        """The vector times `factor`, which is recorded; at zero or below, its statistics no longer hold and go.

        Raises:
            InputError: The factor is not finite.
        """
        if not math.isfinite(factor):
            raise InputError(f"{self._label}: cannot scale by {factor}")
        metadata = {**self.metadata, "scale_factor": self.metadata.get("scale_factor", 1.0) * factor}
        if factor <= 0:
            metadata.pop("statistics", None)
        return replace(self, vector=self.vector * factor, metadata=metadata)

    def to(self, *args: Any, **kwargs: Any) -> "SteeringVector":
        """The vector on another device or in another floating dtype, with the arguments of `Tensor.to`."""
        return replace(self, vector=self.vector.to(*args, **kwargs))

    def __add__(self, other: "SteeringVector") -> "SteeringVector":
        return self._joined(other, "+") if isinstance(other, SteeringVector) else NotImplemented

    def __sub__(self, other: "SteeringVector") -> "SteeringVector":
        return self._joined(other, "-") if isinstance(other, SteeringVector) else NotImplemented

    def __mul__(self, factor: int | float) -> "SteeringVector":
        return self.scale(factor) if isinstance(factor, int | float) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, divisor: int | float) -> "SteeringVector":
        if not isinstance(divisor, int | float):
            return NotImplemented
        if divisor == 0:
            raise InputError(f"{self._label}: cannot divide by zero")
        return self.scale(1 / divisor)

    def __neg__(self) -> "SteeringVector":
        return self.scale(-1)

    def steer(
        self, model: HookedModel, coefficient: float = 1.0, *, positions: Positions = None, mode: Mode = "add"
    ) -> AbstractContextManager[None]:
        """Apply the vector at its hook while a `with` block runs; `steering.Intervention` has the arguments' meaning.

        Raises:
            HookError: The model lacks the hook.
            InputError: The vector is of another model or width, or an argument means nothing.
        """
        return attach(model, [self._intervention(model, coefficient, positions, mode)])

    def project(self, activations: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
        """Projection of activations on the vector at norm 1, in their own units; see `steering.project`.

        Raises:
            InputError: Widths differ, or the vector is zero.
        """
        return project(activations, self.vector)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all.

        Args:
            path: Its name; `.safetensors` is appended, or takes the place of `.pt` or `.json`.

        Returns:
            The file written.

        Raises:
            InputError: The metadata has no JSON form.
            StoreError: The file system refused.
        """
        file = _own_path(Path(path))
        data = _encode(self)
        make_folder(file.parent)
        write_atomically(file, data)
        return file

    @classmethod
    def load(cls, path: str | Path) -> "SteeringVector":
        """Read a vector that `save` wrote, or a `.json` + `.pt` pair of rotalabs-steer.

        Args:
            path: Any spelling: with `.safetensors`, `.json`, `.pt`, or without. Where both kinds of file are there
                and `.safetensors` is not spelled out, ours is read.

        Raises:
            NotStoredError: There is neither kind of file.
            CorruptFileError: The file is truncated or altered, or holds something else.
            StoreError: A later version of this package wrote it.
        """
        path = Path(path)
        if path.is_dir():
            raise NotStoredError(f"{path} is a folder; read a set of vectors with SteeringVectorSet.load")
        own = _own_path(path)
        if own.exists() or path.suffix == SUFFIX:
            return _decode(_read(own), own)
        pair = path.with_suffix(".json"), path.with_suffix(".pt")
        if not any(file.exists() for file in pair):
            raise NotStoredError(f"{path}: no steering vector is there: neither {own.name} nor {pair[0].name}")
        return _read_rotalabs(*pair)

    @property
    def _float64(self) -> Float[Tensor, "d_model"]:
        return self.vector.to("cpu", torch.float64)  # not on the device: not all have float64

    @property
    def _label(self) -> str:
        return f"steering vector {self.behavior!r} at {self.hook_name}"

    def _intervention(self, model: HookedModel, coefficient: float, positions: Positions, mode: Mode) -> Intervention:
        _check_same_model(self, model)
        return Intervention(self.hook_name, self.vector, coefficient, mode, positions)

    def _joined(self, other: "SteeringVector", symbol: str) -> "SteeringVector":
        for what, left, right in [*_belonging(self, other), ("hook", self.hook_name, other.hook_name)]:
            if left != right:
                raise InputError(f"cannot join {self._label} and {other._label}: {what} {left!r} and {right!r}")
        theirs = other.vector.to(self.vector.device)
        return replace(
            self,
            behavior=_both(self.behavior, symbol, other.behavior),
            vector=self.vector + theirs if symbol == "+" else self.vector - theirs,
            extraction_method=_both(self.extraction_method, symbol, other.extraction_method),
            metadata={"joined": [self.behavior, symbol, other.behavior]},
            provenance=None,
        )


class SteeringVectorSet:
    """The vectors of one behaviour and one model, at most one a layer.

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
            raise InputError(f"{vector._label} does not belong in a set for behavior {self.behavior!r}")
        present = self._vectors.get(vector.layer_index)
        if present is not None and present.hook_name != vector.hook_name:
            raise InputError(
                f"layer {vector.layer_index} already has {present.hook_name}, so {vector.hook_name} has no place; "
                "make one set for each kind of hook"
            )
        for what, wanted, seen in _belonging(next(iter(self), vector), vector):
            if wanted != seen:
                raise InputError(f"{vector._label} does not belong in this set: {what} {seen!r}, not {wanted!r}")
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
            if all(_score(vector, metric) is None for vector in self):
                metric = "norm"
                warnings.warn(
                    f"the vectors for {self.behavior!r} have no held-out separation, so the best is taken by norm, "
                    "which mostly finds the deepest layer; extract with 4 or more pairs to have it",
                    stacklevel=2,
                )
        if metric not in METRICS:
            raise InputError(f"unknown metric {metric!r}; there are {', '.join(METRICS)}")
        scores = {vector.layer_index: score for vector in self if (score := _score(vector, metric)) is not None}
        if len(scores) < len(self):
            missing = [layer for layer in self.layers if layer not in scores]
            available = [name for name in METRICS if all(_score(vector, name) is not None for vector in self)]
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
        chosen = self.layers if layers is None else list(layers)
        missing = [layer for layer in chosen if layer not in self._vectors]
        if missing:
            raise InputError(f"no vector for layers {missing} of {self.behavior!r}; there are {self.layers}")
        return attach(model, [self[layer]._intervention(model, coefficient, positions, mode) for layer in chosen])

    def project(self, activations: Float[Tensor, "*batch layer d_model"]) -> Float[Tensor, "*batch layer"]:
        """Projection of each layer's activations on that layer's vector at norm 1, in the order of `layers`.

        Raises:
            InputError: The set is empty, there are not as many layers, widths differ, or a vector is zero.
        """
        if not len(self) or activations.shape[-2] != len(self):
            raise InputError(f"activations of {activations.shape[-2]} layers, for vectors at layers {self.layers}")
        return torch.stack([vector.project(activations[..., i, :]) for i, vector in enumerate(self)], dim=-1)

    def summary(self) -> "LayerTable":
        """One row a layer: norms and statistics; print it, show it in a notebook, or make it a pandas frame."""
        return LayerTable(tuple(_row(vector) for vector in self))

    def save(self, folder: str | Path) -> None:
        """Write `layer_<N>.safetensors` for every layer, then `metadata.json`, which says which files belong.

        Files of layers that an older set in the folder had are left there and not read again.

        Raises:
            InputError: Some metadata has no JSON form.
            StoreError: The file system refused.
        """
        folder = Path(folder)
        files = {vector.layer_index: _encode(vector) for vector in self}
        make_folder(folder)
        for layer, data in files.items():
            write_atomically(folder / f"layer_{layer}{SUFFIX}", data)
        metadata = {
            "format": SET_FORMAT,
            "format_version": FORMAT_VERSION,
            "behavior": self.behavior,
            "model_name": self.model_name,
            "layers": self.layers,
            "sha256": {str(layer): hashlib.sha256(data).hexdigest() for layer, data in files.items()},
        }
        write_atomically(folder / "metadata.json", f"{json.dumps(metadata, indent=1)}\n".encode())

    @classmethod
    def load(cls, folder: str | Path) -> "SteeringVectorSet":
        """Read a set that `save` wrote, or one of rotalabs-steer (`metadata.json`, `layer_<N>.json` and `.pt`).

        Raises:
            NotStoredError: The folder holds no set, or a layer's file is gone.
            CorruptFileError: A file is damaged, or not the one that was saved with this set.
            StoreError: A later version of this package wrote it.
        """
        folder = Path(folder)
        source = folder / "metadata.json"
        found = _converted(_parsed_json(_read(source), source), _SetMetadata, source)
        if found.format is not None:
            _check_version(found.format, found.format_version, SET_FORMAT, source)
        vectors = cls(found.behavior)
        for layer in found.layers:
            if found.format is None:
                vector = _read_rotalabs(folder / f"layer_{layer}.json", folder / f"layer_{layer}.pt")
            else:
                file = folder / f"layer_{layer}{SUFFIX}"
                data = _read(file)
                if hashlib.sha256(data).hexdigest() != found.sha256.get(str(layer)):
                    raise CorruptFileError(f"{file} is not the file saved with {source}: save the set again")
                vector = _decode(data, file)
            if vector.layer_index != layer:
                raise CorruptFileError(f"{folder}: the file of layer {layer} holds layer {vector.layer_index}")
            try:
                vectors.add(vector)
            except InputError as error:
                raise CorruptFileError(f"{folder}: layer {layer}: {error}") from error
        return vectors


_STATISTICS = (
    "split_half",
    "agreement",
    "auc",
    "auc_low",
    "auc_high",
    "d_prime",
    "d_prime_low",
    "d_prime_high",
    "note",
)
_NORMS = ("pos_mean_norm", "neg_mean_norm")
_COLUMNS = ("layer", "hook_name", "num_pairs", "norm", *_NORMS, *_STATISTICS)
_HEADINGS = ("layer", "hook", "pairs", "norm", "split half", "agreement", "AUC", "d'", "note")


@dataclass(frozen=True)
class LayerTable:
    """What is known of the vectors of a set, one row a layer.

    Attributes:
        rows: Dicts with `layer`, `hook_name`, `norm` and the statistics; None where there is none.
    """

    rows: tuple[dict[str, Any], ...]

    def __str__(self) -> str:
        cells = [_HEADINGS, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        def line(tag: str, cells: Iterable[str]) -> str:
            return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

        return f"<table>{line('th', _HEADINGS)}{''.join(line('td', _cells(row)) for row in self.rows)}</table>"

    def to_pandas(self) -> Any:
        """The rows as a pandas DataFrame, indexed by layer.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingDependencyError("a frame needs pandas: pip install pandas") from error
        return pandas.DataFrame(list(self.rows), columns=list(_COLUMNS)).set_index("layer")


def _row(vector: SteeringVector) -> dict[str, Any]:
    found = {"layer": vector.layer_index, "hook_name": vector.hook_name, "norm": vector.norm}
    found |= {name: vector.metadata.get(name) for name in ("num_pairs", *_NORMS)}
    found |= {name: _statistics(vector).get(name) for name in _STATISTICS}
    return {name: found[name] for name in _COLUMNS}


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    def number(name: str, form: str = ".2f") -> str:
        return "" if row[name] is None else format(row[name], form)

    def interval(name: str) -> str:
        low, high = number(f"{name}_low"), number(f"{name}_high")
        return f"{number(name)} [{low}, {high}]" if low and high else number(name)

    return (
        str(row["layer"]),
        row["hook_name"],
        number("num_pairs", "d"),
        number("norm", ".4g"),
        number("split_half"),
        number("agreement"),
        interval("auc"),
        interval("d_prime"),
        row["note"] or "",
    )


def _statistics(vector: SteeringVector) -> Mapping[str, Any]:
    found = vector.metadata.get("statistics")
    return found if isinstance(found, Mapping) else {}


def _score(vector: SteeringVector, metric: str) -> tuple[float, ...] | None:
    """What a metric sorts by, larger being better; None where the vector lacks it."""
    found = _statistics(vector)
    if metric == "norm":
        return (vector.norm,)
    if metric == "split_half":
        return None if found.get("split_half") is None else (found["split_half"],)
    if found.get("auc") is None:
        return None
    return found["auc"], -math.inf if found.get("d_prime") is None else found["d_prime"]


def _belonging(one: SteeringVector, other: SteeringVector) -> Iterator[tuple[str, object, object]]:
    """What two vectors have in common if they come from one model, by name."""
    yield "model", one.model_name, other.model_name
    yield "width", one.dim, other.dim
    if one.provenance is not None and other.provenance is not None:
        yield "revision", one.provenance.revision, other.provenance.revision
        yield "weights", one.provenance.weights, other.provenance.weights


def _check_same_model(vector: SteeringVector, model: HookedModel) -> None:
    """Names are compared without the owner's: a hub id and a local copy of it are one model."""
    source = source_of(model)
    named = source.name if source is not None else getattr(getattr(model, "cfg", None), "model_name", None)
    theirs = vector.provenance.revision if vector.provenance is not None else None
    same_files = source is not None and source.revision is not None and source.revision == theirs
    if named and not same_files and Path(str(named)).name.lower() != Path(vector.model_name).name.lower():
        raise InputError(
            f"{vector._label} is of model {vector.model_name!r}, this is {str(named)!r}: extract one here, or, to try "
            "it all the same, use tl_persona.steering.attach with its hook_name and vector"
        )


def _both(one: str, symbol: str, other: str) -> str:
    return one if one == other else f"{one} {symbol} {other}"


class _SetMetadata(msgspec.Struct):
    behavior: str
    layers: list[int]
    format: str | None = None
    format_version: str | None = None
    sha256: dict[str, str] = {}


class _RotalabsMetadata(msgspec.Struct):
    behavior: str
    layer_index: int
    model_name: str
    extraction_method: str = "caa"
    metadata: dict[str, Any] = {}


class _Header(msgspec.Struct, kw_only=True):
    """The `__metadata__` of our files; safetensors allows texts only, so the rest is JSON."""

    sha256: str
    contents: str
    contents_sha256: str


class _Contents(msgspec.Struct, kw_only=True):
    behavior: str
    layer_index: int
    hook_name: str
    model_name: str
    extraction_method: str
    metadata: dict[str, Any]
    provenance: Provenance | None


def _flaw(vector: object) -> str | None:
    """Why something is no vector; None if it is one."""
    if not isinstance(vector, Tensor):
        return f"got {type(vector).__name__}"
    if vector.layout != torch.strided or vector.device.type == "meta":
        return f"got a {vector.layout} tensor on {vector.device}"
    if vector.ndim != 1 or not vector.numel() or not vector.is_floating_point():
        return f"got {vector.dtype} of shape {tuple(vector.shape)}"
    return None


def _own_path(path: Path) -> Path:
    if not path.name:
        raise InputError(f"{str(path)!r} names no file")
    if path.suffix in (SUFFIX, ".pt", ".json"):
        return path.with_suffix(SUFFIX)
    return path.with_name(path.name + SUFFIX)  # not with_suffix: "layer_0.5" has no suffix to lose


def _encode(vector: SteeringVector) -> bytes:
    fields = {name: getattr(vector, name) for name in _Contents.__struct_fields__}
    try:
        fields["provenance"] = None if vector.provenance is None else msgspec.to_builtins(vector.provenance)
        contents = json.dumps(fields, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{vector._label}: its metadata or provenance has no JSON form: {error}") from error
    tensor = vector.vector.cpu().contiguous()
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "sha256": _tensor_digest(tensor),
        "contents": contents,
        "contents_sha256": hashlib.sha256(contents.encode()).hexdigest(),
    }
    return _with_sorted_header(safetensors.torch.save({"vector": tensor}, header))


def _with_sorted_header(data: bytes) -> bytes:
    """The same file with its header in order: safetensors writes metadata in a new order each time."""
    start = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(json.loads(data[8:start]), sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the tensor aligned
    return len(text).to_bytes(8, "little") + text + data[start:]


def _decode(data: bytes, source: Path) -> SteeringVector:
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CorruptFileError(f"{source}: not a whole safetensors file: {error}") from error
    texts = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    _check_version(texts.get("format"), texts.get("format_version"), FORMAT, source)
    header = _converted(texts, _Header, source)
    tensor = tensors.get("vector")
    if tensor is None or _tensor_digest(tensor) != header.sha256:
        raise CorruptFileError(f"{source}: the vector does not fit its checksum: the file was altered")
    if hashlib.sha256(header.contents.encode()).hexdigest() != header.contents_sha256:
        raise CorruptFileError(f"{source}: the header does not fit its checksum: the file was altered")
    found = _converted(_parsed_json(header.contents.encode(), source), _Contents, source)
    fields = {name: getattr(found, name) for name in _Contents.__struct_fields__}
    return _built({**fields, "vector": tensor}, source)


def _read_rotalabs(metadata: Path, tensor: Path) -> SteeringVector:
    found = _converted(_parsed_json(_read(metadata), metadata), _RotalabsMetadata, metadata)
    if not tensor.exists():
        raise NotStoredError(f"{tensor}: there is no such file, though {metadata.name} is there")
    try:
        vector = torch.load(tensor, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle raises whatever its bytes lead to
        raise CorruptFileError(f"{tensor}: holds no plain tensor: {error}") from error
    flaw = _flaw(vector)
    if flaw is not None:
        raise CorruptFileError(f"{tensor}: {flaw}; it should hold one non-empty, 1-D floating-point tensor")
    fields = {name: getattr(found, name) for name in _RotalabsMetadata.__struct_fields__}
    return _built({**fields, "vector": vector}, tensor)


def _built(fields: dict[str, Any], source: Path) -> SteeringVector:
    try:
        return SteeringVector(**fields)
    except (InputError, NonFiniteError) as error:
        raise CorruptFileError(f"{source}: {error}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotStoredError(f"{path}: there is no such file") from error
    except OSError as error:
        raise StoreError(f"cannot read {path}: {reason(error)}") from error


def _parsed_json(data: bytes, source: Path) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{source}: not JSON: {error}") from error


def _converted(data: Any, kind: type[_T], source: Path) -> _T:
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise CorruptFileError(f"{source}: not what is expected there: {error}") from error


def _check_version(format_: object, version: object, expected: str, source: Path) -> None:
    if format_ != expected:
        raise CorruptFileError(f"{source}: its format is {format_!r}, not {expected!r}")
    if version != FORMAT_VERSION:
        raise StoreError(f"{source}: has format version {version!r}, this package reads {FORMAT_VERSION!r}: upgrade")


def _tensor_digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
