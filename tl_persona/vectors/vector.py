"""A steering vector: one direction at one hook, with what is known of it, its arithmetic and its file."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_persona.display import Card, Shown
from tl_persona.errors import CorruptFileError, InputError, NonFiniteError, NotStoredError
from tl_persona.files import Fields, is_folder, make_folder, present, read_bytes, write_atomically
from tl_persona.models.facts import HookedModel, source_of
from tl_persona.models.hooks import layer_of, resid_post
from tl_persona.provenance import Provenance
from tl_persona.steering.interventions import Intervention, Mode, attach, forward_hook
from tl_persona.steering.monitor import project
from tl_persona.steering.positions import Positions
from tl_persona.vectors.files import SUFFIX, block_outputs, decode, encode, flaw_of, label_of, norm_of, own_path
from tl_persona.vectors.rotalabs import read_rotalabs
from tl_persona.vectors.table import facts_of


def read_vector(path: Path) -> tuple[Fields, Path]:
    """What a vector's file holds, ours or rotalabs-steer's, and which file that is.

    Raises:
        NotStoredError: There is neither kind of file.
        CorruptFileError: The file is truncated or altered, or holds something else.
        StoreError: It cannot be read, or a later version of this package wrote it.
    """
    if is_folder(path):
        raise NotStoredError(f"{path} is a folder; read a set of vectors with SteeringVectorSet.load")
    own = own_path(path)
    if path.suffix == SUFFIX or present(own):
        return decode(read_bytes(own), own), own
    pair = path.with_suffix(".json"), path.with_suffix(".pt")
    if not any(map(present, pair)):
        raise NotStoredError(f"{path}: no steering vector is there: neither {own.name} nor {pair[0].name}")
    return read_rotalabs(*pair), pair[1]


@dataclass(frozen=True, eq=False, init=False)
class SteeringVector(Shown):
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
            `vector_norm` as extracted, `statistics` (see `statistics.layers.LayerStatistics`), and `outliers`, the
            selected tokens of outlying norm (see `statistics.outliers.OutlierTally`).
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
        flaw = flaw_of(vector)
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
        return norm_of(self.vector)

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
            raise InputError(f"{self.label} is zero: it has no direction to normalize")
        unit = (self._float64 / self.norm).to(self.vector)
        return replace(self, vector=unit, metadata={**self.metadata, "normalized": True})

    def scale(self, factor: int | float) -> "SteeringVector":
        """The vector times `factor`, which is recorded; at zero or below, its statistics no longer hold and go.

        Raises:
            InputError: The factor is not finite.
        """
        if not math.isfinite(factor):
            raise InputError(f"{self.label}: cannot scale by {factor}")
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
            raise InputError(f"{self.label}: cannot divide by zero")
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
        return attach(model, [self.intervention(model, coefficient, positions, mode)])

    def as_forward_hook(self, coefficient: float = 1.0, *, mode: Mode = "add") -> Callable[[Any, Any, Any], Any]:
        """A function for `register_forward_hook` of the decoder layer `layer_index` of a plain transformers model.

        It steers every token, as `steer` does by default, until its handle is removed. The layer may return its hidden
        states as a tensor or first in a tuple.

        Raises:
            InputError: The vector does not act on the output of a block, or an argument means nothing.
            HookError: While the model runs: the module returns no hidden states of this width.

        Example:
            >>> layer = torch.nn.Identity()
            >>> vector = SteeringVector("refusal", 7, torch.tensor([3.0, 4.0]), "tiny")
            >>> handle = layer.register_forward_hook(vector.as_forward_hook(2.0))
            >>> layer(torch.zeros(1, 1, 2)), handle.remove()
            (tensor([[[6., 8.]]]), None)
        """
        block_outputs([as_fields(self)], "a decoder layer")
        return forward_hook(Intervention(self.hook_name, self.vector, coefficient, mode))

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
        file = own_path(Path(path))
        data = encode(as_fields(self))
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
            StoreError: It cannot be read, or a later version of this package wrote it.
        """
        return built(*read_vector(Path(path)))

    @property
    def _float64(self) -> Float[Tensor, "d_model"]:
        return self.vector.to("cpu", torch.float64)  # not on the device: not all have float64

    def _card(self) -> Card:
        return Card(f"steering vector for {self.behavior}", facts_of(as_fields(self)))

    @property
    def label(self) -> str:
        """Its name in messages."""
        return label_of(as_fields(self))

    def intervention(
        self, model: HookedModel, coefficient: float = 1.0, positions: Positions = None, mode: Mode = "add"
    ) -> Intervention:
        """What `steer` attaches.

        Raises:
            InputError: The vector is of another model, or an argument means nothing.
        """
        _check_same_model(self, model)
        return Intervention(self.hook_name, self.vector, coefficient, mode, positions)

    def _joined(self, other: "SteeringVector", symbol: str) -> "SteeringVector":
        for what, left, right in [*belonging(self, other), ("hook", self.hook_name, other.hook_name)]:
            if left != right:
                raise InputError(f"cannot join {self.label} and {other.label}: {what} {left!r} and {right!r}")
        theirs = other.vector.to(self.vector.device)
        return replace(
            self,
            behavior=_both(self.behavior, symbol, other.behavior),
            vector=self.vector + theirs if symbol == "+" else self.vector - theirs,
            extraction_method=_both(self.extraction_method, symbol, other.extraction_method),
            metadata={"joined": [self.behavior, symbol, other.behavior]},
            provenance=None,
        )


def belonging(one: SteeringVector, other: SteeringVector) -> Iterator[tuple[str, object, object]]:
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
            f"{vector.label} is of model {vector.model_name!r}, this is {str(named)!r}: extract one here, or, to try "
            "it all the same, use tl_persona.steering.attach with its hook_name and vector"
        )


def _both(one: str, symbol: str, other: str) -> str:
    return one if one == other else f"{one} {symbol} {other}"


def as_fields(vector: SteeringVector) -> Fields:
    """What a vector says of itself, by name, as its formats take it; `built` is the way back."""
    return {name: getattr(vector, name) for name in SteeringVector.__dataclass_fields__}


def built(fields: Fields, source: Path) -> SteeringVector:
    """A vector of what was read.

    Raises:
        CorruptFileError: The file was whole, and yet what it holds is no vector.
    """
    try:
        return SteeringVector(**fields)
    except (InputError, NonFiniteError) as error:
        raise CorruptFileError(f"{source}: {error}") from error
