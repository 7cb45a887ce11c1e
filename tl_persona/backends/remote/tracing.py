"""What a request carries, and the block of code that a server runs with it: a session of traces, one a pass.

A mean over a sample's selected tokens, and a mean over samples, are weighted sums of activations. So a request has
slots, each a sum wanted back, and for every pass one matrix of weights (slot, selected token).

nnsight sends the source of the `with` block below together with the variables it reads. A server has torch,
transformers and nnsight but not this package, so the block is written out flat, with plain values only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from nnsight import save
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend
from torch import Tensor

from tl_persona.backends.remote.sites import Site
from tl_persona.plan.passes import needs_mask, pass_positions, pass_tokens, pass_visibility
from tl_persona.plan.plan import Plan
from tl_persona.plan.rows import Pass, Segment

Slots = Sequence[Sequence[int]]
"""For each sample of a plan, the slot that each of its masks is added to."""


@dataclass(frozen=True)
class Payload:
    """The passes of one request.

    Attributes:
        passes: For every pass a mapping of plain values and CPU tensors, for the server has no classes of ours:
            `ids` (row, pos); `positions` (row, pos) and `visible` (row, pos, key), or None where the model's own
            will do; `rows`; `kept` and `context`, as in `plan.rows.Pass`; `used`, the selected tokens among row * pos;
            `weights` (slot, selected), float32.
        n_slots: Number of sums.
        cache_name: The argument that continues a cache, as the server's transformers calls it.
    """

    passes: tuple[dict[str, Any], ...]
    n_slots: int
    cache_name: str = "past_key_values"


def payload_of(plan: Plan, slots: Slots, n_slots: int, cache_name: str = "past_key_values") -> Payload:
    """The passes of a plan, with every sample's masks averaged and added to their slots."""
    passes = []
    for each in plan.passes:
        length = 0 if each.context is None else plan.passes[each.context].width
        masked = needs_mask(plan, each)
        weights = _weights(plan, each, slots, n_slots)
        used = weights.any(dim=0).nonzero()[:, 0]
        passes.append(
            {
                "ids": pass_tokens(plan, each),
                "positions": pass_positions(each) if masked else None,
                "visible": pass_visibility(each, length) if masked else None,
                "rows": len(each.rows),
                "kept": each.kept,
                "context": each.context,
                "used": used,
                "weights": weights[:, used],
            }
        )
    return Payload(tuple(passes), n_slots, cache_name)


def _weights(plan: Plan, each: Pass, slots: Slots, n_slots: int) -> Float[Tensor, "slot token"]:
    """For every token of a pass, row after row, what it adds to every slot."""
    weights = torch.zeros((n_slots, len(each.rows) * each.width))
    for row_index, row in enumerate(each.rows):
        offset = row_index * each.width
        for segment in row.segments:
            for member in segment.members:
                _add_sample(weights[:, offset : offset + len(segment)], plan, segment, member, slots[member])
            offset += len(segment)
    return weights


def _add_sample(weights: Tensor, plan: Plan, segment: Segment, member: int, slots: Sequence[int]) -> None:
    masks = plan.samples[member].masks.cpu()
    share = masks[:, segment.start : segment.stop].float() / masks.sum(dim=1, keepdim=True)
    for slot, part in zip(slots, share, strict=True):
        weights[slot] += part


@dataclass(frozen=True)
class Chunk:
    """The blocks one request runs.

    Attributes:
        start: The first; all before it are skipped.
        stop: The one after the last; nothing from it on runs.
        entries: For every pass the residual that enters block `start`, shape (row, pos, d_model); empty at block 0.
        leave: True where the residual after the last block is wanted back, to enter the next chunk with.
    """

    start: int
    stop: int
    entries: tuple[Tensor, ...] = ()
    leave: bool = False


class _Capture(Backend):  # type: ignore[misc]
    """Keeps the request instead of running it."""

    blob: bytes = b""

    def __call__(self, tracer: Any = None) -> None:
        self.blob = RequestModel.serialize(tracer, compress=True)


def serialize(model: Any, payload: Payload, sites: Sequence[Site], blocks: str, chunk: Chunk) -> bytes:
    """The request, as it travels."""
    capture = _Capture()
    run_passes(model, payload, sites, blocks, chunk, backend=capture)
    return capture.blob


def run_passes(
    model: Any, payload: Payload, sites: Sequence[Site], blocks: str, chunk: Chunk, backend: Any = None
) -> dict[str, Any]:
    """Runs the passes on an nnsight model.

    Args:
        model: The nnsight model; without weights where `backend` sends the request away.
        payload: The passes and weights.
        sites: Where the hooks are, in the order in which the model reaches them.
        blocks: Path of the list of blocks.
        chunk: Which blocks to run.
        backend: nnsight's; None runs here.

    Returns:
        `sums`, shape (slot, hook, d_model), float32; `residuals`, one a pass where the chunk leaves any; `tuples`,
        whether the blocks put out tuples; `dtype` of the parameters. Empty where the backend only takes the request.
    """
    passes, n_slots, cache_name = payload.passes, payload.n_slots, payload.cache_name
    places = [(envoy_at(model, site.module), site.side) for site in sites]
    layers = envoy_at(model, blocks)
    start, stop, entries, leave = chunk.start, chunk.stop, list(chunk.entries), chunk.leave
    result: dict[str, Any] = {}
    with model.session(backend=backend):
        import copy

        from transformers import DynamicCache

        with torch.no_grad():
            result = {"residuals": [], "tuples": False, "dtype": str(model.dtype)}
            sums = torch.zeros(n_slots, len(places), model.config.get_text_config().hidden_size)
            caches: dict[int, Any] = {}
            for number in range(len(passes)):
                each = passes[number]
                inputs = {"input_ids": each["ids"], "use_cache": False}
                if each["positions"] is None:
                    inputs["attention_mask"] = torch.ones_like(each["ids"])
                else:
                    hidden = torch.zeros(each["visible"].shape, dtype=model.dtype)
                    hidden = hidden.masked_fill(~each["visible"], torch.finfo(model.dtype).min)
                    inputs["attention_mask"] = hidden[:, None]
                    inputs["position_ids"] = each["positions"]
                if each["kept"] or each["context"] is not None:
                    if each["context"] is None:
                        past: Any = DynamicCache(config=model.config)
                    else:
                        past = copy.copy(caches[each["context"]])
                        past.layers = [copy.copy(one) for one in past.layers]
                        for one in past.layers:
                            if getattr(one, "keys", None) is not None:
                                one.keys = one.keys.expand(each["rows"], -1, -1, -1)
                                one.values = one.values.expand(each["rows"], -1, -1, -1)
                        if each["positions"] is None:  # the mask covers what was read before, too
                            length = past.get_seq_length()
                            inputs["attention_mask"] = torch.ones(each["rows"], length + each["ids"].shape[1]).long()
                    inputs["use_cache"] = True
                    inputs[cache_name] = past
                    if each["kept"]:
                        caches[number] = past
                with model.trace(inputs) as tracer:
                    for index in range(start):
                        layers[index].skip(entries[number])
                    for index in range(len(places)):
                        value = places[index][0].output if places[index][1] == "output" else places[index][0].input
                        value = value[0] if isinstance(value, tuple) else value
                        picked = value.flatten(0, 1)[each["used"].to(value.device)].float()
                        sums[:, index] += (each["weights"].to(value.device) @ picked).cpu()
                    if leave or not len(places):
                        value = layers[stop - 1].output
                        result["tuples"] = isinstance(value, tuple)
                        if leave:
                            result["residuals"].append((value[0] if isinstance(value, tuple) else value).cpu())
                    tracer.stop()
            result["sums"] = sums
        save(result)
    return result


def envoy_at(model: Any, path: str) -> Any:
    """The nnsight object for a module, by the module's path."""
    found = model
    for part in path.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    return found
