"""Reads projections off activations: those at hand, or those of a model while it runs.

Only the projections are kept, and nothing is edited.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tl_persona.errors import InputError
from tl_persona.steering.hook_points import (
    check_activation,
    checked_direction,
    hook_point,
    hooked,
    hooked_form,
    require_meaning,
    unit_direction,
)
from tl_persona.steering.pass_watch import CacheGuard, PassTokens, PassWatch, require_clear


def project(
    activations: Float[Tensor, "*batch d_model"], direction: Float[Tensor, "d_model"], *, normalize: bool = True
) -> Float[Tensor, "*batch"]:
    """Projection of activations on a direction, in float32 or better, on the activations' device.

    Args:
        activations: Any number of them, `d_model` being the last axis.
        direction: Of any norm.
        normalize: Divide by the direction's norm, so that the result is a length in the activations' units; False gives
            the plain dot product.

    Raises:
        InputError: Widths differ, or the direction is zero and is to be normalized.
        NonFiniteError: The direction holds NaN or infinity.

    Example:
        >>> project(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([0.0, 2.0]))
        tensor([4., 1.])
    """
    direction = checked_direction(direction, "project")
    if activations.shape[-1] != len(direction):
        raise InputError(f"the direction has width {len(direction)}, the activations {activations.shape[-1]}")
    if normalize:
        if not direction.any():
            raise InputError("the direction is zero: nothing can be projected on it")
        direction = unit_direction(direction)
    dtype = torch.promote_types(activations.dtype, torch.float32)
    return activations.to(dtype) @ direction.to(activations.device, dtype)


@runtime_checkable
class HasDirection(Protocol):
    """What `monitor` needs of a vector; a `SteeringVector` has it."""

    @property
    def behavior(self) -> str: ...
    @property
    def hook_name(self) -> str: ...
    @property
    def vector(self) -> Tensor: ...


@dataclass
class Monitor:
    """Projections of every token that passed, padding included, on the CPU; activations are not kept.

    Attributes:
        projections: For each name, one tensor a pass, in order.
    """

    projections: dict[str, list[Float[Tensor, "batch pos"]]] = field(default_factory=dict)
    _starts: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def texts(self, name: str) -> list[Float[Tensor, "batch pos"]]:
        """One tensor a text: the passes of one `generate` call joined, prompt first.

        The last token that was generated never passes through the model, so it has no projection. Without a key-value
        cache every pass runs its whole text again, and counts as one.
        """
        passes, starts = self.projections[name], self._starts[name]
        return [torch.cat(passes[start:end], dim=1) for start, end in zip(starts, [*starts[1:], None], strict=True)]

    def _record(self, name: str, values: Float[Tensor, "batch pos"], tokens: PassTokens) -> None:
        if not tokens.goes_on:
            self._starts[name].append(len(self.projections[name]))
        self.projections[name].append(values.detach().cpu())


@contextmanager
def monitor(
    model: Any, directions: Mapping[str, tuple[str, Float[Tensor, "d_model"]]] | Iterable[HasDirection]
) -> Iterator[Monitor]:
    """Record the projection of every token on some directions, at norm 1, while the block runs.

    A monitor sees the edits of steering blocks it is inside of, and not those of blocks inside it.

    Args:
        model: What runs in the block: a hooked model, or a transformers model, on whose own layers the hooks then lie.
        directions: A hook name and a direction for each name; or vectors, named by their behaviour, or by
            `behaviour@hook` where several share one.

    Raises:
        HookError: The model has no such hook.
        InputError: There is no direction, one has another width or is zero, or two have one name and hook.

    Example:
        with monitor(model, vectors) as seen:
            generate(model, ["How are you?"], max_new_tokens=20)
        print(seen.texts("refusal")[-1])
    """
    named = dict(directions) if isinstance(directions, Mapping) else _named(directions)
    if not named:
        raise InputError("there is nothing to monitor: pass at least one direction")
    model = hooked_form(model)
    plan = []
    for name, (hook_name, direction) in named.items():
        checked = checked_direction(direction, name)
        if not checked.any():
            raise InputError(f"{name}: the direction is zero: nothing can be projected on it")
        plan.append((name, hook_name, checked, hook_point(model, hook_name, checked), PassWatch(model, hook_name)))
        require_meaning(model, hook_name)
    seen = Monitor({name: [] for name in named}, {name: [] for name in named})
    with ExitStack() as stack:
        stack.enter_context(CacheGuard(model))
        for name, hook_name, direction, point, watch in plan:
            record = _recording_hook(seen, name, hook_name, direction, watch)
            stack.enter_context(watch)
            stack.enter_context(hooked(model, hook_name, point, record))
        yield seen


def _named(vectors: Iterable[HasDirection]) -> dict[str, tuple[str, Tensor]]:
    vectors = list(vectors)
    behaviors = [vector.behavior for vector in vectors]
    named: dict[str, tuple[str, Tensor]] = {}
    for vector in vectors:
        alone = behaviors.count(vector.behavior) == 1
        name = vector.behavior if alone else f"{vector.behavior}@{vector.hook_name}"
        if name in named:
            raise InputError(f"two vectors are called {name}: pass a mapping, to name them yourself")
        named[name] = vector.hook_name, vector.vector
    return named


def _recording_hook(
    seen: Monitor, name: str, hook_name: str, direction: Tensor, watch: PassWatch
) -> Callable[..., None]:
    def record_projection(activation: Tensor, hook: Any) -> None:
        check_activation(activation, hook_name, direction)
        tokens = watch.tokens(*activation.shape[:2])
        require_clear(tokens, f"a monitor of {name}", only_drafts=True)
        seen._record(name, project(activation, direction), tokens)

    return record_projection
