"""The wrapped model's own attention and norms, put into a TransformerBridge for passes that nobody looks into.

A bridge computes attention product by product, and every norm twice, so that its inner hooks can fire. The model that
it wraps has one fused call for the first and computes the second once. Declined are models without such a call, and
those for which the bridge keeps weights of its own; whether the numbers are the same is `proof`'s work.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from tl_persona.backends.local.observers import is_observed

_SOFT_CAP = re.compile("attn.*(soft_?cap|logit_?cap)|(soft_?cap|logit_?cap).*attn")

FUSED = "sdpa"
"""Attention as `torch.nn.functional.scaled_dot_product_attention` computes it, in transformers' words."""


class NativeParts:
    """Attentions and norms of a bridge, as they were found at one moment; see `native_parts`.

    Args:
        components: The bridge's components.
        configs: What the attentions are configured by, read each time they run.
    """

    def __init__(self, components: Sequence[Any], configs: Sequence[Any]) -> None:
        self._configs = configs
        self._forwards = [(component, _own_forward(component)) for component in components]
        self._inside = [
            module
            for component in components
            for module in component.modules()
            if all(module is not edge for edge in (component, component.hook_in, component.hook_out))
        ]

    def unobserved(self, hook_points: Iterable[Any] = ()) -> bool:
        """Whether no hook sits inside a component, and none of these points lies there."""
        wanted = {id(point) for point in hook_points}
        return not is_observed(self._inside) and not any(id(module) in wanted for module in self._inside)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model's own code runs instead of the bridge's until the end, however that comes about."""
        with ExitStack() as stack:
            for config in self._configs:
                stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
                config._attn_implementation = FUSED
            for component, forward in self._forwards:
                # Past the bridge's __setattr__, which would write to the module it wraps.
                vars(component)["forward"] = forward
                stack.callback(vars(component).pop, "forward")
            yield


def native_parts(model: Any) -> NativeParts | str:
    """What can run natively in a bridge, or why attention cannot.

    It cannot where transformers has no fused call for the architecture (soft-capped scores, ALiBi), where the bridge
    computes with weights of its own (a joint projection that it has split, processed weights), and where somebody has
    changed how attention is computed already.
    """
    try:
        return _native_parts(model)
    except AttributeError as error:  # a name that another release has
        return f"the installed TransformerLens and transformers are not known here ({error})"


def _native_parts(model: Any) -> NativeParts | str:
    if not getattr(model.original_model, "_supports_sdpa", False):
        return "transformers has no fused attention for this architecture"
    if getattr(model, "compatibility_mode", False):
        return "the weights were processed"
    found = attentions(model)
    if not found:
        return "its blocks have no attention of a kind that is known"
    if not all(map(_same_weights, found)):
        return "the bridge computes attention with weights of its own"
    configs = list({id(config): config for config in map(_config_of, found)}.values())
    flaw = next((flaw for flaw in map(_why_not_fused, configs) if flaw is not None), None)
    if flaw is not None:
        return flaw
    components = [*found, *(norm for block in model.blocks for norm in block.children() if _is_norm(norm))]
    if any("forward" in vars(component) for component in components):
        return "somebody has replaced how attention is computed"
    return NativeParts(components, configs)


def attentions(model: Any) -> list[Any]:
    """The attention component of every block of a bridge that has one."""
    return [block._modules["attn"] for block in model.blocks if "attn" in block._modules]


def _config_of(attention: Any) -> Any:
    return getattr(attention.original_component, "config", None)


def _why_not_fused(config: Any) -> str | None:
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in ("eager", FUSED):
        return f"its attention is configured as {implementation!r}"
    if config.sub_configs:  # a config of several parts hands a change down to all of them
        return "its configuration has several parts"
    # Fused attention leaves soft caps out, and short texts hardly show it.
    capped = sorted(name for name, value in vars(config).items() if value and _SOFT_CAP.search(name))
    return f"its scores are capped ({', '.join(capped)})" if capped else None


def _same_weights(attention: Any) -> bool:
    theirs = {id(weight) for weight in attention.original_component.parameters()}
    return all(id(weight) in theirs for weight in attention.parameters())


def _is_norm(component: Any) -> bool:
    from transformer_lens.model_bridge.generalized_components import NormalizationBridge, RMSNormalizationBridge

    known = type(component) in (NormalizationBridge, RMSNormalizationBridge)
    return known and bool(component.use_native_layernorm_autograd)


def _own_forward(component: Any) -> Callable[..., Any]:
    """The wrapped module's forward, between the component's outer hooks."""
    original = component.original_component.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if "hidden_states" in kwargs:
            kwargs["hidden_states"] = component.hook_in(kwargs["hidden_states"])
        else:
            args = (component.hook_in(args[0]), *args[1:])
        output = original(*args, **kwargs)
        if isinstance(output, torch.Tensor):
            return component.hook_out(output)
        return (component.hook_out(output[0]), *output[1:])

    return forward
