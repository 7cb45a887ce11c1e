"""Runs one pass of a plan through `run_with_cache`, on either TransformerLens class.

The classes differ in how a prefix's keys and values are continued and in what they must be kept from computing; that
difference is all that is here. Which passes to run is `plan`'s work.
"""

import copy
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_persona.errors import HookError
from tl_persona.hooks import layer_of
from tl_persona.models import HookedModel
from tl_persona.plan import Pass, Plan, Row, Segment, Sharing

_PAD_ID = 0  # any valid id does: what follows a text cannot change it, and padding is never pooled

_EMBEDDING = re.compile(r"(hook_)?(pos_)?embed(\.|$)")


@runtime_checkable
class Runner(Protocol):
    """Runs passes on one model."""

    sharing: Sharing
    """The most that this model may be capable of; `proof` finds out whether it is."""

    def run(
        self, plan: Plan, each: Pass, names: Sequence[str], context: Any, context_length: int
    ) -> tuple[Mapping[str, Tensor], Any]:
        """Captures the hooks of one pass.

        Args:
            plan: The plan the pass is of.
            each: What to run.
            names: Hook names.
            context: What an earlier kept pass returned; None where this one starts a text.
            context_length: Tokens in the context.

        Returns:
            Tensors of shape (row, pos, d_model) by hook name, and the keys and values to continue, if kept.
        """


def runner_for(model: HookedModel) -> Runner:
    """The runner that fits the model's class."""
    return BridgeRunner(model) if hasattr(model, "original_model") else HookedRunner(model)


class HookedRunner:
    """Passes on a `HookedTransformer`, which can continue a frozen cache but not place texts side by side."""

    sharing = Sharing.CACHED

    def __init__(self, model: HookedModel) -> None:
        self._model = model

    def run(
        self, plan: Plan, each: Pass, names: Sequence[str], context: Any, context_length: int
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
        _, captured = self._model.run_with_cache(
            tokens,
            return_type=None,
            names_filter=list(names),
            stop_at_layer=stop_layer(names),
            return_cache_object=False,
            **arguments,
        )
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
    """Passes on a `TransformerBridge`, through the Hugging Face cache and masks of the model it wraps."""

    def __init__(self, model: HookedModel) -> None:
        self._model = model
        self._original: Any = model.original_model  # type: ignore[attr-defined]
        accepted = inspect.signature(self._original.forward).parameters
        anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
        # Attentions, caches and most logits are read by nobody here.
        self._arguments: dict[str, Any] = {"return_type": None, "return_cache_object": False}
        if "logits_to_keep" in accepted:
            self._arguments["logits_to_keep"] = 1
        if "output_attentions" in accepted or anything:
            self._arguments["output_attentions"] = False
        self._takes_use_cache = "use_cache" in accepted
        if not {"past_key_values", "use_cache"} <= set(accepted):
            self.sharing = Sharing.NONE
        elif not {"position_ids", "attention_mask"} <= set(accepted):
            self.sharing = Sharing.CACHED
        else:
            self.sharing = Sharing.PACKED

    def run(
        self, plan: Plan, each: Pass, names: Sequence[str], context: Any, context_length: int
    ) -> tuple[Mapping[str, Tensor], Any]:
        tokens = pass_tokens(plan, each).to(self._model.cfg.device)
        arguments = dict(self._arguments)
        past: Any = None
        if each.kept:
            from transformers import DynamicCache

            past = DynamicCache(config=self._original.config)
        elif context is not None:
            past = _continued(context, len(each.rows))
        if past is not None:
            arguments["past_key_values"] = past
        elif self._takes_use_cache:
            arguments["use_cache"] = False
        if needs_mask(plan, each):
            arguments["position_ids"] = pass_positions(each).to(tokens.device)
            visible = pass_visibility(each, context_length).to(tokens.device)
            arguments["attention_mask"] = _additive(visible, self._original.dtype)
        _, captured = self._model.run_with_cache(
            tokens, names_filter=list(names), stop_at_layer=stop_layer(names), **arguments
        )
        return captured, past if each.kept else None


def _continued(cache: Any, n_rows: int) -> Any:
    """A cache that starts from another's keys and values; appending to it makes new tensors and leaves those alone."""
    view = copy.copy(cache)
    view.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in view.layers:
        if n_rows > 1 and getattr(layer, "keys", None) is not None:
            layer.keys = layer.keys.expand(n_rows, -1, -1, -1)
            layer.values = layer.values.expand(n_rows, -1, -1, -1)
    return view


def _additive(visible: Bool[Tensor, "row pos key"], dtype: torch.dtype) -> Float[Tensor, "row 1 pos key"]:
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def capture_of(captured: Mapping[str, Tensor], name: str) -> Float[Tensor, "..."]:
    """What a pass captured at one hook.

    Raises:
        HookError: The hook did not fire.
    """
    if name not in captured:
        raise HookError(f"hook {name!r} did not fire on this model: choose a residual hook")
    return captured[name]


def stop_layer(names: Sequence[str]) -> int | None:
    """The first block that need not run; None where a hook lies behind the blocks or outside them."""
    needed = [_blocks_needed(name) for name in names]
    known = [count for count in needed if count is not None]
    return max(known) if len(known) == len(needed) else None


def _blocks_needed(name: str) -> int | None:
    layer = layer_of(name)
    if layer is not None:
        return layer + 1
    return 0 if _EMBEDDING.match(name) else None


def pass_tokens(plan: Plan, each: Pass) -> Int[Tensor, "row pos"]:
    """The token ids of a pass, padded on the right."""
    rows = [_row_tokens(plan, row) for row in each.rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_PAD_ID)


def _row_tokens(plan: Plan, row: Row) -> Int[Tensor, "pos"]:
    parts = [plan.samples[part.members[0]].input_ids[part.start : part.stop] for part in row.segments]
    return torch.cat(parts)


def needs_mask(plan: Plan, each: Pass) -> bool:
    """Whether a pass gets a mask and positions of its own; where some passes of a chain do, all do, and prove alike."""
    return each.packed or (each.context is not None and plan.sharing is Sharing.PACKED)


def pass_positions(each: Pass) -> Int[Tensor, "row pos"]:
    """The position of every token in its own text; 0 on padding."""
    positions = torch.zeros((len(each.rows), each.width), dtype=torch.long)
    for row, target in zip(each.rows, positions, strict=True):
        own = torch.cat([torch.arange(part.start, part.stop) for part in row.segments])
        target[: len(own)] = own
    return positions


def pass_visibility(each: Pass, context_length: int) -> Bool[Tensor, "row pos key"]:
    """Which keys each token may attend to: its context, its own segment up to itself, and segments above it.

    Padding attends to itself, so that no softmax is taken over nothing.
    """
    width = each.width
    visible = torch.zeros((len(each.rows), width, context_length + width), dtype=torch.bool)
    own = visible[:, :, context_length:]
    for row_index, row in enumerate(each.rows):
        visible[row_index, : len(row), :context_length] = True
        begin = 0
        above: list[tuple[Segment, frozenset[int], int]] = []
        for part in row.segments:
            members = frozenset(part.members)
            for other, others, other_begin in above:
                if other.stop <= part.start and members <= others:
                    own[row_index, begin : begin + len(part), other_begin : other_begin + len(other)] = True
            above.append((part, members, begin))
            begin += len(part)
    causal = torch.ones((width, width), dtype=torch.bool).tril()
    same = _segment_numbers(each)
    own |= (same[:, :, None] == same[:, None, :]) & causal
    return visible


def _segment_numbers(each: Pass) -> Int[Tensor, "row pos"]:
    """Which segment of its row a token is in; every padding token is one of its own."""
    numbers = torch.arange(each.width).repeat(len(each.rows), 1) + max(len(row.segments) for row in each.rows)
    for row, target in zip(each.rows, numbers, strict=True):
        lengths = torch.tensor([len(part) for part in row.segments])
        target[: len(row)] = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return numbers
