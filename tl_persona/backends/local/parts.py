"""What the parts of a block add to the residual stream, found in a transformers model.

`hook_attn_out` and `hook_mlp_out` are what is added, behind whatever norm or factor stands between a module and the
stream: `resid_pre + attn_out + mlp_out = resid_post`, also while somebody edits one of them. In a transformers model
the places are found by running a few tokens, under the same names for every family: attention is whatever mixes tokens,
and comes first.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_persona.backends.local.reference import Reference, first_activation
from tl_persona.backends.shortcuts import tolerance_of

N_TOKENS = 3
"""That are enough to see what is added to what."""

_ROUNDINGS = 4
"""Of a sum of three, and of a product, in each element."""

_DEVIATION = 16
"""Roundings that a sum may be off at a position."""


class Part(NamedTuple):
    """Where a hook inside a block is.

    Attributes:
        module: Path below the decoder layer.
        before: Whether it is what the module takes, or else what it gives.
        factor: What that is multiplied with before it is added.
    """

    module: str
    before: bool
    factor: float = 1.0


class BlockParts(NamedTuple):
    """The hooks of one decoder layer.

    Attributes:
        parts: Those inside it, by name, in the order in which they are reached; none where no two modules give what is
            added.
        written_into: Names of hooks whose value is overwritten later in the pass, so that who keeps it has to copy it.
    """

    parts: Mapping[str, Part]
    written_into: frozenset[str]


class _Value(NamedTuple):
    """What a module of a layer took or gave: as it was then, and the tensor itself."""

    module: str
    before: bool
    was: Float[Tensor, "pos d_model"]
    tensor: Tensor

    @property
    def is_written_into(self) -> bool:
        return not torch.equal(_exact(self.tensor), self.was)


class _Watch:
    """What the modules of each decoder layer take and give in one pass, edited where a part is given."""

    def __init__(self, reference: Reference, edited: Sequence[Mapping[str, Part]] | None = None) -> None:
        self._reference, self._edited = reference, edited
        path, self._width = reference.decoder_layers()
        self._layers = list(reference.model.get_submodule(path))
        self._layer: int | None = None
        self.values: list[list[_Value]] = [[] for _ in self._layers]

    def run(self) -> "_Watch":
        handles = list(self._hooks())
        try:
            self._reference.run(torch.arange(1, 1 + N_TOKENS)[None] % self._reference.vocabulary)
        finally:
            for handle in handles:
                handle.remove()
        return self

    def _hooks(self) -> Iterator[Any]:
        for number, layer in enumerate(self._layers):
            for path, module in layer.named_modules():

                def take(_module: Any, args: Any, kwargs: Any, number: int = number, path: str = path) -> None:
                    if not path:
                        self._layer = number
                    self._see(number, path, True, first_activation((*args, *kwargs.values())))

                def give(_module: Any, _args: Any, output: Any, number: int = number, path: str = path) -> Any:
                    stream = output[0] if isinstance(output, tuple | list) and output else output
                    new = self._see(number, path, False, stream)
                    if not path:
                        self._layer = None
                    if new is None:
                        return None
                    return new if stream is output else type(output)((new, *output[1:]))

                yield module.register_forward_pre_hook(take, with_kwargs=True)
                yield module.register_forward_hook(give)

    def _see(self, number: int, path: str, before: bool, value: Any) -> Tensor | None:
        shape = (1, N_TOKENS, self._width)
        if self._layer != number or not isinstance(value, Tensor) or value.shape != shape:
            return None
        edited = None
        if self._edited is not None and not before:
            factor = next((part.factor for part in _added(self._edited[number]) if part.module == path), None)
            if factor is not None:
                edited = value = value + edit_at(value, f"{number} {path}") / factor
        self.values[number].append(_Value(path, before, _exact(value), value))
        return edited


def parts_of(reference: Reference) -> list[BlockParts]:
    """The hooks inside every decoder layer of a transformers model, found by running three tokens twice.

    Args:
        reference: The model, or a twin of it, without anybody's hooks.

    Raises:
        NoReferenceError: It cannot be run on token ids alone, or its decoder layers cannot be told.
    """
    numbers = [1.0, *_numbers(reference.model.config.to_dict())]
    seen = _Watch(reference).run().values
    found = [_parts(values, numbers) for values in seen]
    held = _holds_when_edited(reference, found)
    return [
        BlockParts(parts if holds else {}, _written_into(values, parts))
        for parts, values, holds in zip(found, seen, held, strict=True)
    ]


def _parts(values: Sequence[_Value], numbers: Sequence[float]) -> dict[str, Part]:
    edges = [value for value in values if not value.module]
    if len(edges) != 2:
        return {}
    before, after = (edge.was for edge in edges)
    epsilon = torch.finfo(edges[1].tensor.dtype).eps
    times = [value.module for value in values if not value.before]
    given = [
        value for value in values if value.module and not value.before and times.count(value.module) == 1
        if value.was.any()
    ]  # fmt: skip
    for factor in numbers:
        # Of modules that give the same, the last is the nearest to the stream.
        for second, first in combinations(reversed(given), 2):
            added = factor * first.was, factor * second.was
            if _is_sum((before, *added), after, epsilon):
                parts = {"hook_attn_out": Part(first.module, False, factor)}
                middle = _taken(values, (before, added[0]), epsilon)
                if middle is not None:
                    parts["hook_resid_mid"] = Part(middle, True)
                return parts | {"hook_mlp_out": Part(second.module, False, factor)}
    return {}


def _taken(values: Sequence[_Value], terms: Sequence[Tensor], epsilon: float) -> str | None:
    """The first module that takes a sum, if one does."""
    inside = (value for value in values if value.module and value.before)
    return next((value.module for value in inside if _is_sum(terms, value.was, epsilon)), None)


def _is_sum(terms: Sequence[Tensor], total: Tensor, epsilon: float) -> bool:
    sizes = torch.stack([term.abs() for term in terms]).sum(dim=0)
    return bool(((torch.stack(list(terms)).sum(dim=0) - total).abs() <= _ROUNDINGS * epsilon * sizes).all())


def _holds_when_edited(reference: Reference, parts: Sequence[Mapping[str, Part]]) -> list[bool]:
    """Whether what is written to the places that were found reaches the stream as it is."""
    if not any(parts):
        return [False] * len(parts)
    held = []
    for each, values in zip(parts, _Watch(reference, parts).run().values, strict=True):
        at = {(value.module, value.before): value for value in values}
        places = [(part.module, False) for part in _added(each)]
        if not each or not {("", True), ("", False), *places} <= at.keys():
            held.append(False)
            continue
        added = [part.factor * at[place].was for part, place in zip(_added(each), places, strict=True)]
        after = at["", False]
        held.append(deviation([at["", True].was, *added], after.was) <= tolerated(after.tensor.dtype))
    return held


def _added(parts: Mapping[str, Part]) -> list[Part]:
    return [part for name, part in parts.items() if name != "hook_resid_mid"]


def _written_into(values: Sequence[_Value], parts: Mapping[str, Part]) -> frozenset[str]:
    places = {"hook_resid_pre": Part("", True), "hook_resid_post": Part("", False)} | dict(parts)
    overwritten = {(value.module, value.before) for value in values if value.is_written_into}
    return frozenset(name for name, part in places.items() if (part.module, part.before) in overwritten)


def tolerated(dtype: torch.dtype) -> float:
    """How far a sum of three may be off in this dtype, relative to it."""
    return max(_DEVIATION * torch.finfo(dtype).eps, tolerance_of("float32"))


def deviation(terms: Sequence[Tensor], total: Tensor) -> float:
    """How far a sum is from a total, relative to it, at the worst position."""
    sums = torch.stack(list(terms)).sum(dim=0)
    size = total.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    worst = float(((sums - total).norm(dim=-1) / size).max())
    return worst if worst == worst else float("inf")


def edit_at(value: Tensor, place: str) -> Tensor:
    """Something as long as a value or more, another at every place, the same in every process."""
    generator = torch.Generator().manual_seed(sum(place.encode()))
    noise = torch.randn(value.shape[-1], generator=generator).to(value.device, torch.float32)
    return (noise * (1 + value.float().abs().mean())).to(value.dtype)


def _exact(value: Tensor) -> Tensor:
    return value.detach()[0].to("cpu", torch.float64, copy=True)


def _numbers(settings: Any) -> Iterator[float]:
    """Those that a configuration names and that are no whole ones."""
    if isinstance(settings, float) and settings not in (0.0, 1.0):
        yield settings
    inner = settings.values() if isinstance(settings, dict) else settings if isinstance(settings, list) else ()
    for one in inner:
        yield from _numbers(one)
