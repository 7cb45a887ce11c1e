"""Runs one pass of a plan through `run_with_cache`, on either TransformerLens class or a transformers model itself.

The classes differ in how a prefix's keys and values are continued and in what they must be kept from computing; that
difference is all that is here.
"""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_persona.backends.local.native import NativeParts, native_parts
from tl_persona.backends.local.plain import TransformersModel
from tl_persona.backends.local.trial import Trial, additive, known_trial, new_cache, trial_of
from tl_persona.errors import HookError, InputError
from tl_persona.models.facts import HookedModel
from tl_persona.models.hooks import stop_layer
from tl_persona.plan.passes import needs_mask, pass_positions, pass_tokens, pass_visibility
from tl_persona.plan.plan import Plan, Sharing
from tl_persona.plan.rows import Pass


@runtime_checkable
class Runner(Protocol):
    """Runs passes on one model."""

    sharing: Sharing
    """The most that this model may be capable of; `proof` finds out whether it is."""

    attention: str
    """How attention is computed in passes that take a shortcut: `stepwise`, as the model's class does, or `fused`."""

    @property
    def limits(self) -> Mapping[Sharing, str]:
        """Kinds of sharing that were tried on a few tokens in vain, with what was seen; empty before the trial."""

    @property
    def costs(self) -> Mapping[str, str]:
        """What it computes although nobody reads it, with what was seen; empty before the trial."""

    def prepare(self) -> None:
        """Tries what the model takes, if that is not known yet."""

    def obstacle(self, names: Sequence[str]) -> str | None:
        """Why it cannot run passes that capture these hooks, on the model as it is now; asked once before a plan."""

    def run(
        self,
        plan: Plan,
        each: Pass,
        names: Sequence[str],
        context: Any,
        context_length: int,
        only_row: int | None = None,
    ) -> tuple[Mapping[str, Tensor], Any]:
        """Captures the hooks of one pass.

        Args:
            plan: The plan the pass is of.
            each: What to run.
            names: Hook names.
            context: What an earlier kept pass returned; None where this one starts a text.
            context_length: Tokens in the context.
            only_row: The one row that is captured; None captures all.

        Returns:
            Tensors of shape (row, pos, d_model) by hook name, and the keys and values to continue, if kept.
        """


def runners_for(model: HookedModel) -> list[Runner]:
    """The runners that fit the model's class, the fastest first; the last one takes no shortcut within a pass."""
    if isinstance(model, TransformersModel):
        return [BridgeRunner(model)]
    if hasattr(model, "original_model"):
        return [FusedBridgeRunner(model), BridgeRunner(model)]
    return [HookedRunner(model)]


class HookedRunner:
    """Passes on a `HookedTransformer`, which can continue a frozen cache but not place texts side by side."""

    sharing = Sharing.CACHED
    attention = "stepwise"

    limits: Mapping[Sharing, str] = MappingProxyType({})
    costs: Mapping[str, str] = MappingProxyType({})

    def __init__(self, model: HookedModel) -> None:
        self._model = model

    def prepare(self) -> None:
        """The class has one signature, and what it does not take it refuses."""

    def obstacle(self, names: Sequence[str]) -> str | None:
        return None

    def run(
        self,
        plan: Plan,
        each: Pass,
        names: Sequence[str],
        context: Any,
        context_length: int,
        only_row: int | None = None,
    ) -> tuple[Mapping[str, Tensor], Any]:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        tokens = pass_tokens(plan, each).to(self._model.cfg.device)
        # With its own default, a tokenizer that pads left would make the model look for padding in the ids.
        arguments: dict[str, Any] = {"padding_side": "right"}
        past: Any = None
        if each.kept:
            past = TransformerLensKeyValueCache.init_cache(self._model.cfg, self._model.cfg.device, len(each.rows))
        elif context is not None:
            past = _expanded(context, len(each.rows))
        if past is not None:
            arguments = {"past_kv_cache": past, "attention_mask": torch.ones_like(tokens)}
        captured = _captured(self._model, tokens, names, only_row, stop_at_layer=stop_layer(names), **arguments)
        return captured, past if each.kept else None


def _expanded(cache: Any, n_rows: int) -> Any:
    """A frozen view of a one-row cache for several rows; nothing is copied until attention needs it."""
    view = copy.copy(cache)
    view.previous_attention_mask = cache.previous_attention_mask.expand(n_rows, -1)
    view.entries = [copy.copy(entry) for entry in cache.entries]
    for entry in view.entries:
        entry.past_keys = entry.past_keys.expand(n_rows, -1, -1, -1)
        entry.past_values = entry.past_values.expand(n_rows, -1, -1, -1)
    view.freeze()
    return view


class BridgeRunner:
    """Passes on a `TransformerBridge`, through the Hugging Face cache and masks of the model it wraps.

    Or on that model itself, under the same hook names.
    """

    sharing = Sharing.PACKED
    attention = "stepwise"

    def __init__(self, model: HookedModel) -> None:
        self._model = model
        self._original: Any = model.original_model  # type: ignore[attr-defined]
        self._trial = known_trial(model)

    @property
    def limits(self) -> Mapping[Sharing, str]:
        return {} if self._trial is None else self._trial.limits

    @property
    def costs(self) -> Mapping[str, str]:
        return {} if self._trial is None else self._trial.costs

    def prepare(self) -> None:
        if self._trial is None or not self._trial.lasting:
            self._trial = trial_of(self._model)

    def _tried(self) -> Trial:
        if self._trial is None:
            self._trial = trial_of(self._model)
        return self._trial

    def obstacle(self, names: Sequence[str]) -> str | None:
        return None

    def run(
        self,
        plan: Plan,
        each: Pass,
        names: Sequence[str],
        context: Any,
        context_length: int,
        only_row: int | None = None,
    ) -> tuple[Mapping[str, Tensor], Any]:
        trial = self._tried()
        with trial.renamed(self._model):
            return self._run(plan, each, names, context, context_length, only_row, trial, trial.arguments)

    def _run(
        self,
        plan: Plan,
        each: Pass,
        names: Sequence[str],
        context: Any,
        context_length: int,
        only_row: int | None,
        trial: Trial,
        quiet: Mapping[str, Any],
    ) -> tuple[Mapping[str, Tensor], Any]:
        tokens = pass_tokens(plan, each).to(self._model.cfg.device)
        arguments = dict(quiet)
        past: Any = None
        if each.kept:
            past = new_cache(self._original)
        elif context is not None:
            past = _continued(context, len(each.rows))
        if past is not None:
            if trial.cache_name is None:
                raise InputError(f"the model continues no cache: {trial.limits[Sharing.CACHED]}")
            arguments |= {trial.cache_name: past, "use_cache": True}
        if needs_mask(plan, each):
            arguments["position_ids"] = pass_positions(each).to(tokens.device)
            visible = pass_visibility(each, context_length).to(tokens.device)
            arguments["attention_mask"] = additive(visible, self._original.dtype)
        if trial.stops:
            arguments["stop_at_layer"] = stop_layer(names)
        return _captured(self._model, tokens, names, only_row, **arguments), past if each.kept else None


class FusedBridgeRunner(BridgeRunner):
    """The same with the wrapped model's own attention and norms, in passes that take a shortcut, so that both prove.

    What runs whole and alone runs as the bridge has it: the plain path is what all else is compared with.
    """

    attention = "fused"

    def __init__(self, model: HookedModel) -> None:
        super().__init__(model)
        self._parts: NativeParts | None = None

    def obstacle(self, names: Sequence[str]) -> str | None:
        parts = native_parts(self._model)
        if isinstance(parts, str):
            self._parts = None
            return parts
        self._parts = parts
        hook_dict = self._model.hook_dict
        if parts.unobserved(hook_dict.get(name) for name in names):
            return None
        return "a hook lies inside attention or a norm"

    def run(
        self,
        plan: Plan,
        each: Pass,
        names: Sequence[str],
        context: Any,
        context_length: int,
        only_row: int | None = None,
    ) -> tuple[Mapping[str, Tensor], Any]:
        shortcut = each.kept or each.packed or each.context is not None
        # A hook may have come since the plan began, with whoever takes the samples one by one.
        if not shortcut or self._parts is None or not self._parts.unobserved():
            return super().run(plan, each, names, context, context_length, only_row)
        trial = self._tried()
        with self._parts.in_place():
            return self._run(plan, each, names, context, context_length, only_row, trial, trial.without_logits)


def _continued(cache: Any, n_rows: int) -> Any:
    """A cache that starts from another's keys and values; appending to it makes new tensors and leaves those alone."""
    from transformers.cache_utils import DynamicLayer

    view = copy.copy(cache)
    view.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in view.layers:
        if type(layer) is DynamicLayer:
            layer.__class__ = _forgetful_layer()
        if n_rows > 1 and getattr(layer, "keys", None) is not None:
            layer.keys = layer.keys.expand(n_rows, -1, -1, -1)
            layer.values = layer.values.expand(n_rows, -1, -1, -1)
    return view


@functools.cache
def _forgetful_layer() -> Any:
    """A layer of a cache that gives what it was appended to and keeps none of it.

    Nothing continues a continuation, and its keys and values hold the prefix once for every row: those of all layers,
    kept until the end of a pass, would be most of the memory that it takes.
    """
    from transformers.cache_utils import DynamicLayer

    class ForgetfulLayer(DynamicLayer):  # type: ignore[misc, no-untyped-call, unused-ignore]
        def update(self, *args: Any, **kwargs: Any) -> Any:
            before = self.keys, self.values
            appended = super().update(*args, **kwargs)
            self.keys, self.values = before
            return appended

    return ForgetfulLayer


def _captured(
    model: HookedModel, tokens: Int[Tensor, "row pos"], names: Sequence[str], only_row: int | None, **arguments: Any
) -> Mapping[str, Tensor]:
    """What a model's hooks give, (row, pos, d_model) by hook name; of one row only where the others are not wanted."""
    run = functools.partial(model.run_with_cache, tokens, return_type=None, return_cache_object=False, **arguments)
    if only_row is None:
        return run(names_filter=list(names))[1]
    captured: dict[str, Tensor] = {}

    def kept_at(name: str) -> Callable[..., None]:
        def keep(activation: Tensor, hook: Any) -> None:
            # A copy: a view would hold the other rows as well.
            captured[name] = activation[only_row : only_row + 1].clone()

        return keep

    with model.hooks(fwd_hooks=[(name, kept_at(name)) for name in names]):
        run(names_filter=[])
    return captured


def capture_of(captured: Mapping[str, Tensor], name: str) -> Float[Tensor, "..."]:
    """What a pass captured at one hook.

    Raises:
        HookError: The hook did not fire.
    """
    if name not in captured:
        raise HookError(f"hook {name!r} did not fire on this model: choose a residual hook")
    return captured[name]
