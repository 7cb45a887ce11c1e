"""The block of code that a server runs: a session of traces, one a pass, that leaves sums and nothing else.

nnsight sends the source of the `with` block below together with the variables it reads. A server has torch,
transformers and nnsight but not this package, so the block is written out flat, with plain values only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nnsight import save
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend
from torch import Tensor

from tl_persona.backends.remote.payload import Payload
from tl_persona.backends.remote.sites import Site


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
