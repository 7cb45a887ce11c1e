"""What a request carries: the tensors of its passes, and weights that turn activations into means on the server.

A mean over a sample's selected tokens, and a mean over samples, are weighted sums of activations. So a request has
slots, each a sum wanted back, and for every pass one matrix of weights (slot, selected token).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

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
