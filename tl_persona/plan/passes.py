"""A pass of a plan as tensors: token ids, positions, who attends to whom. The same for every backend."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_persona.plan.plan import Plan, Sharing
from tl_persona.plan.rows import Pass, Row, Segment

_PAD_ID = 0  # any valid id does: what follows a text cannot change it, and padding is never pooled


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
