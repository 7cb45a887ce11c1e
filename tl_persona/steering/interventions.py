"""Edits activations while a model runs: adds a direction, ablates it, or clamps the projection on it.

`attach` puts interventions on a model for the length of a `with` block. It works at hook names, through the model's own
hook points, so it holds for anything that runs in the block: a forward pass, `run_with_cache`, `generate`. The same
edit can be had as a forward hook for a decoder layer of plain transformers, or of what is built like it; putting that
on a module, and taking it off, is the caller's.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tl_persona.errors import HookError, InputError, NonFiniteError
from tl_persona.models.facts import mark_intervention
from tl_persona.steering.hook_points import (
    check_activation,
    check_edit_is_felt,
    checked_direction,
    hook_point,
    hooked,
    hooked_form,
    unit_direction,
)
from tl_persona.steering.pass_watch import CacheGuard, PassWatch
from tl_persona.steering.positions import Positions, check_positions, select

Mode: TypeAlias = Literal["add", "ablate", "clamp"]
_Edit: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Intervention:
    """One edit of the activations at one hook.

    With u the direction at norm 1, and x an activation:

    - `add`: x + coefficient * direction (activation addition; Turner et al. 2023, Rimsky et al. 2023).
    - `ablate`: x - (x.u) u, so that nothing is left along the direction (Arditi et al. 2024). It has no coefficient.
    - `clamp`: x + (coefficient - x.u) u, so that the projection is the coefficient.

    Attributes:
        hook_name: Where; the hook's last axis must be `d_model`.
        direction: Floating point, finite, and not zero for `ablate` and `clamp`.
        coefficient: See above. `add` at 0 leaves the model without a hook, so nothing changes, bit for bit.
        mode: See above.
        positions: Which tokens; see `steering.positions.Positions`. The others keep their activations bit for bit.

    Raises:
        InputError: One of them is none of this.
        NonFiniteError: The direction or the coefficient holds NaN or infinity.

    Example:
        >>> Intervention("blocks.3.hook_resid_post", torch.ones(4), 2.0, positions="last").mode
        'add'
        >>> Intervention("blocks.3.hook_resid_post", torch.zeros(4), mode="ablate")
        Traceback (most recent call last):
        tl_persona.errors.InputError: blocks.3.hook_resid_post: the direction is zero, so mode 'ablate' has no meaning
    """

    hook_name: str
    direction: Float[Tensor, "d_model"]
    coefficient: float = 1.0
    mode: Mode = "add"
    positions: Positions = None

    def __post_init__(self) -> None:
        direction = checked_direction(self.direction, self.hook_name)
        if self.mode not in get_args(Mode):
            raise InputError(f"unknown mode {self.mode!r}: choose {', '.join(get_args(Mode))}")
        if isinstance(self.coefficient, bool) or not isinstance(self.coefficient, int | float):
            raise InputError(f"{self.hook_name}: the coefficient must be a number, got {self.coefficient!r}")
        if not math.isfinite(self.coefficient):
            raise NonFiniteError(f"{self.hook_name}: the coefficient is {self.coefficient}")
        if self.mode == "ablate" and self.coefficient != 1:
            raise InputError(f"mode 'ablate' takes no coefficient, got {self.coefficient}; mode 'clamp' has one")
        if self.mode != "add" and not direction.any():
            raise InputError(f"{self.hook_name}: the direction is zero, so mode {self.mode!r} has no meaning")
        object.__setattr__(self, "direction", direction)
        object.__setattr__(self, "positions", check_positions(self.positions))


@contextmanager
def attach(model: Any, interventions: Iterable[Intervention]) -> Iterator[None]:
    """Edit the model's activations while the block runs.

    All is checked before the model is touched, and taken off again however the block ends. At one hook, interventions
    act in order, those of inner blocks after those of outer ones, and all of them after hooks that were there before;
    what is added later, the cache of `run_with_cache` included, sees the edited activation. `reset_hooks()` inside the
    block does not end it. Activations keep their dtype and device; `ablate` and `clamp` compute in float32 or better.

    Args:
        model: A `HookedTransformer`, a `TransformerBridge`, or a transformers model, on whose own decoder layers the
            hooks then lie.
        interventions: The edits.

    Raises:
        HookError: The model has no such hook, or an edit there would not be felt.
        InputError: There is no intervention, a direction has another width, or the model has no hooks. While the model
            runs: a position lies outside a text, or cannot be told (see `steering.positions.select`); or a bridge goes
            on with a key-value cache that did not take up what ran before.

    Example:
        with attach(model, [Intervention("blocks.3.hook_resid_post", direction, 4.0)]):
            print(generate(model, ["How are you?"], max_new_tokens=20)[0].text)
    """
    model = hooked_form(model)
    plan = [(wanted, hook_point(model, wanted.hook_name, wanted.direction)) for wanted in interventions]
    if not plan:
        raise InputError("there is nothing to steer with: pass at least one vector or intervention")
    for wanted, point in plan:
        check_edit_is_felt(model, wanted.hook_name, point)
    active = [
        (wanted, point, None if wanted.positions is None else PassWatch(model, wanted.hook_name))
        for wanted, point in plan
        if wanted.mode != "add" or (wanted.coefficient != 0 and wanted.direction.any())
    ]
    with ExitStack() as stack:
        stack.enter_context(CacheGuard(model))
        for wanted, point, watch in active:
            if watch is not None:
                stack.enter_context(watch)
            stack.enter_context(hooked(model, wanted.hook_name, point, _editing_hook(wanted, watch)))
        yield


def _editing_hook(wanted: Intervention, watch: PassWatch | None) -> Callable[..., Tensor]:
    edit = edit_of(wanted)

    def edit_activation(activation: Tensor, hook: Any) -> Tensor:
        check_activation(activation, wanted.hook_name, wanted.direction)
        if watch is None:
            return edit(activation)
        chosen = select(wanted.positions, watch.tokens(*activation.shape[:2])).to(activation.device)
        return torch.where(chosen[..., None], edit(activation), activation)

    mark_intervention(edit_activation, wanted.hook_name, digest_of(wanted))
    return edit_activation


def digest_of(wanted: Intervention) -> str:
    """SHA-256, in hex, of what an intervention does, from its numbers in float64."""
    positions = wanted.positions
    where = positions.tolist() if isinstance(positions, Tensor) else positions
    hasher = hashlib.sha256(repr((wanted.hook_name, wanted.mode, float(wanted.coefficient), where)).encode())
    hasher.update(wanted.direction.to("cpu", torch.float64).numpy().astype("<f8").tobytes())
    return hasher.hexdigest()


def edit_of(wanted: Intervention) -> Callable[[Tensor], Tensor]:
    """What an intervention makes of activations (..., d_model) at every position; its `positions` play no part here."""
    return _adding(wanted) if wanted.mode == "add" else _setting(wanted)


def _adding(wanted: Intervention) -> _Edit:
    exact = wanted.coefficient * wanted.direction.to("cpu", torch.float64)
    ready: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def add(activation: Tensor) -> Tensor:
        key = activation.device, activation.dtype
        if key not in ready:
            ready[key] = exact.to(*key)
            if not ready[key].isfinite().all():
                raise NonFiniteError(f"{wanted.hook_name}: coefficient times direction overflows {activation.dtype}")
        return activation + ready[key]

    return add


def _setting(wanted: Intervention) -> _Edit:
    """Sets the projection; ablation sets it to zero."""
    target = wanted.coefficient if wanted.mode == "clamp" else 0.0
    exact = unit_direction(wanted.direction)
    ready: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def set_projection(activation: Tensor) -> Tensor:
        key = activation.device, torch.promote_types(activation.dtype, torch.float32)
        if key not in ready:
            ready[key] = exact.to(*key)
        wide = activation.to(key[1])
        missing = target - wide @ ready[key]
        return (wide + missing[..., None] * ready[key]).to(activation.dtype)

    return set_projection


def forward_hook(wanted: Intervention) -> Callable[[Any, Any, Any], Any]:
    """A function for `module.register_forward_hook` that edits the hidden states a module returns.

    They may come as a tensor (..., d_model), or first in a tuple, whose rest stays as it is.

    Args:
        wanted: The edit; it acts on every position.

    Raises:
        HookError: While the model runs: the module returns something else or another width, or a part of the stream
            of which only the sum could be set.
    """

    def steer_output(module: Any, inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(hidden, Tensor) or hidden.shape[-1] != len(wanted.direction):
            seen = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(output).__name__
            raise HookError(
                f"{type(module).__name__} returned {seen}, not hidden states of width {len(wanted.direction)}: put the "
                f"hook for {wanted.hook_name} on the decoder layer of that number"
            )
        if hidden is output:
            return edit(hidden)
        if wanted.mode != "add" and any(isinstance(part, Tensor) and part.shape == hidden.shape for part in output[1:]):
            raise HookError(
                f"{type(module).__name__} returned its stream in two parts, and mode {wanted.mode!r} would set "
                "only one: use mode 'add'"
            )
        return (edit(hidden), *output[1:])

    edit = edit_of(wanted)
    mark_intervention(steer_output, wanted.hook_name, digest_of(wanted))
    return steer_output
