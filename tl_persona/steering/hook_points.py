"""Puts functions on the hook points of a TransformerLens model, and takes them off again.

What can be known of a hook and a direction before the model runs is checked here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_persona.errors import HookError, InputError, NonFiniteError
from tl_persona.models.facts import HookedModel
from tl_persona.models.hooks import layer_of, resolve_hooks


def hooked_form(model: Any) -> Any:
    """A model that has hooks, as it is; a transformers model with hooks on its own decoder layers.

    Raises:
        ModelError: Its decoder layers cannot be told.
    """
    if hasattr(model, "hook_dict"):
        return model
    from tl_persona.backends.local.boot import with_hooks

    return with_hooks(model)


def hook_point(model: HookedModel, hook_name: str, direction: Float[Tensor, "d_model"]) -> Any:
    """The model's hook point, after all checks that need no pass.

    Raises:
        HookError: There is none, or it does not fire in every pass.
        InputError: The direction has another width, or the model has no hooks.
    """
    hook_dict = getattr(model, "hook_dict", None)
    if hook_dict is None:
        raise InputError(
            f"a model of type {type(model).__name__} has no TransformerLens hooks: load it with tl_persona.load_model"
        )
    if hook_name not in hook_dict:
        chosen = resolve_hooks([hook_name], hook_dict, int(model.cfg.n_layers))  # raises, with the nearest names
        raise HookError(f"{hook_name!r} is a choice of layers, not a hook: pass a name, such as {chosen[0]!r}")
    point = hook_dict[hook_name]
    outside = layer_of(hook_name) is None and not hook_name.startswith(("ln_final.", "unembed."))
    if outside and not hasattr(model, "original_model"):
        raise HookError(
            f"a {type(model).__name__} passes {hook_name} by when it generates: choose blocks.0.hook_resid_pre"
        )
    if len(direction) != model.cfg.d_model:
        raise InputError(f"{hook_name}: the direction has width {len(direction)}, the model {model.cfg.d_model}")
    return point


def check_edit_is_felt(model: HookedModel, hook_name: str, point: Any) -> None:
    """Refuse a hook whose value an edit does not reach beyond.

    Raises:
        HookError: It is `hook_resid_mid` of a TransformerBridge or a transformers model, or what the hook shows is not
            what is added to the stream.
    """
    require_meaning(model, hook_name)
    if hook_name.endswith("hook_resid_mid") and not (point.name == hook_name and getattr(point, "is_felt", True)):
        raise HookError(
            f"on a {type(model).__name__}, {hook_name} is what the MLP reads ({point.name}), and an edit there never "
            "reaches the stream: choose hook_resid_pre, hook_resid_post or hook_attn_out"
        )


def require_meaning(model: HookedModel, hook_name: str) -> None:
    """Refuse a hook of an added part that is not what is added to the stream.

    Raises:
        HookError: What the parts of the block show do not add up to the stream.
    """
    from tl_persona.backends.local.sums import require_added

    require_added(model, [hook_name])


@contextmanager
def hooked(model: Any, hook_name: str, point: Any, hook: Callable[..., Tensor | None]) -> Iterator[None]:
    """Has a function on a hook point while the block runs.

    Raises:
        HookError: The model does not fire that hook as it is set up.
    """
    try:
        # Permanent, so that reset_hooks() in the block, the caller's or TransformerLens's own, leaves it alone.
        model.add_hook(hook_name, hook, is_permanent=True)
    except (AssertionError, ValueError, NotImplementedError) as error:
        raise HookError(f"the model does not let {hook_name} be hooked: {error}") from error
    try:
        yield
    finally:
        for handle in [handle for handle in point.fwd_hooks if handle.user_hook is hook]:
            handle.hook.remove()
            point.fwd_hooks.remove(handle)


def check_activation(activation: Tensor, hook_name: str, direction: Float[Tensor, "d_model"]) -> None:
    """Refuse what is not a stream of tokens as wide as the direction.

    Raises:
        HookError: It is not.
    """
    if activation.ndim != 3 or activation.shape[-1] != len(direction):
        raise HookError(
            f"hook {hook_name!r} has shape {tuple(activation.shape)}, not (batch, pos, {len(direction)}): choose one "
            "whose last axis is d_model, such as blocks.0.hook_resid_post"
        )


def checked_direction(direction: object, where: str) -> Float[Tensor, "d_model"]:
    """The direction, cut off from any graph.

    Raises:
        InputError: It is not a 1-D floating-point tensor.
        NonFiniteError: It holds NaN or infinity.
    """
    if not isinstance(direction, Tensor) or direction.ndim != 1 or not direction.is_floating_point():
        seen = f"{direction.dtype} of shape {tuple(direction.shape)}" if isinstance(direction, Tensor) else direction
        raise InputError(f"{where}: a direction must be a 1-D floating-point tensor, got {seen}")
    if not direction.isfinite().all():
        raise NonFiniteError(f"{where}: the direction holds NaN or infinity")
    return direction.detach()


def unit_direction(direction: Float[Tensor, "d_model"]) -> Float[Tensor, "d_model"]:
    """The direction at norm 1, in float64 on the CPU: squares of float16 overflow, and not all devices have float64."""
    exact = direction.to("cpu", torch.float64)
    unit: Tensor = exact / exact.norm()
    return unit
