"""The most sharing that a model on a server was shown to run exactly.

A server does not say how its model masks or positions texts that share a row or continue a prefix. So of every kind of
pass that a plan takes a shortcut with, one runs as planned, and one text in it runs whole and alone as well, in one
request. The means over each of the text's segments and over its last token must agree at every hook, and what differs
is not used again.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_persona.backends.remote.tracing import Payload, payload_of
from tl_persona.errors import RemoteRefusedError
from tl_persona.plan.plan import Plan, Sharing
from tl_persona.plan.rows import Pass, Row, Segment
from tl_persona.tensors import SlotSums


@dataclass(frozen=True)
class Witness:
    """What to run, and which slots of the result must agree.

    Attributes:
        plan: The passes as planned, and the texts alone.
        slots: For each sample of the plan the slots of its masks.
        n_slots: Number of slots.
        pairs: Slots that must agree: as planned, alone.
    """

    plan: Plan
    slots: list[list[int]]
    n_slots: int
    pairs: list[tuple[int, int]]

    def error(self, sums: Float[Tensor, "slot hook d_model"]) -> float:
        """The largest difference relative to the norm, over slots and hooks; infinite where anything is not finite."""
        shared = torch.stack([sums[first] for first, _ in self.pairs]).double()
        alone = torch.stack([sums[second] for _, second in self.pairs]).double()
        norms = alone.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        error = float(((shared - alone).norm(dim=-1) / norms).max())
        return error if error == error else float("inf")


Kind = tuple[bool, bool, bool]
"""Of a pass: whether it continues a prefix, holds several texts in a row, has several rows."""


def kinds_of(plan: Plan) -> dict[Kind, int]:
    """The kinds of pass that need a proof, and for each the pass with the longest reach."""
    found: dict[Kind, int] = {}
    for index, each in enumerate(plan.passes):
        kind = (each.context is not None, each.packed, len(each.rows) > 1)
        shortcut = each.context is not None or each.packed
        if shortcut and (kind not in found or reach_of(plan, each) > reach_of(plan, plan.passes[found[kind]])):
            found[kind] = index
    return found


def reach_of(plan: Plan, each: Pass) -> int:
    """The most keys that a row of a pass has before and beside it."""
    return each.width + (0 if each.context is None else plan.passes[each.context].width)


def witness_of(plan: Plan, chosen: Sequence[int]) -> Witness:
    """A request that runs the chosen passes of a plan, and one text of each alone.

    Args:
        plan: What is to be proven.
        chosen: Indices of its passes.
    """
    samples, slots = list(plan.samples), [[0] * len(each.masks) for each in plan.samples]  # nobody looks at slot 0
    contexts: dict[int, int] = {}
    passes: list[Pass] = []
    alone: list[Pass] = []
    pairs: list[tuple[int, int]] = []
    n_slots = 1
    for index in chosen:
        each = plan.passes[index]
        if each.context is not None and each.context not in contexts:
            contexts[each.context] = len(passes)
            passes.append(plan.passes[each.context])
        context = None if each.context is None else contexts[each.context]
        passes.append(replace(each, context=context, kept=False))
        member, pieces = _most_exposed(plan, each)
        text = plan.samples[member]
        masks = _masks(len(text.input_ids), pieces)
        first, second = n_slots, n_slots + len(masks)
        n_slots = second + len(masks)
        pairs += zip(range(first, second), range(second, n_slots), strict=True)
        samples[member], slots[member] = replace(text, masks=masks), list(range(first, second))
        alone.append(Pass((Row((Segment((len(samples),), 0, len(text.input_ids)),)),)))
        samples.append(samples[member])
        slots.append(list(range(second, n_slots)))
    return Witness(replace(plan, samples=tuple(samples), passes=(*passes, *alone)), slots, n_slots, pairs)


def _most_exposed(plan: Plan, each: Pass) -> tuple[int, list[tuple[int, int]]]:
    """The text of a pass with the most beside it, and where the pieces begin and end that it is computed in."""
    ranked = []
    for row_index, row in enumerate(each.rows):
        for place, segment in enumerate(row.segments):
            for member in segment.members:
                if segment.stop == len(plan.samples[member].input_ids):
                    ranked.append((place > 0, row_index, segment.stop, member))
    _, row_index, _, member = max(ranked)
    pieces = [] if each.context is None else [(0, plan.passes[each.context].width)]
    pieces += [(part.start, part.stop) for part in each.rows[row_index].segments if member in part.members]
    return member, pieces


def _masks(n_tokens: int, pieces: Sequence[tuple[int, int]]) -> Bool[Tensor, "mask pos"]:
    masks = torch.zeros((len(pieces) + 1, n_tokens), dtype=torch.bool)
    for mask, (start, stop) in zip(masks, pieces, strict=False):
        mask[start:stop] = True
    masks[-1, -1] = True
    return masks


_CACHE_NAMES = ("past_key_values", "cache")
"""Tried in this order: servers lag behind, and the older name goes into both for now."""

_NEXT_BEST = {Sharing.PACKED: Sharing.CACHED, Sharing.CACHED: Sharing.NONE}


class Proof:
    """What is known of the shortcuts of one model.

    Args:
        tolerance: The largest relative difference that counts as exact.

    Attributes:
        sharing: The most that was not refuted.
        fallbacks: What was, and why, in order.
        cache_name: The argument that continues a cache on the server.
        tolerance: See the argument.
    """

    def __init__(self, tolerance: float) -> None:
        self.sharing = Sharing.PACKED
        self.fallbacks: list[str] = []
        self.tolerance = tolerance
        self.cache_name = _CACHE_NAMES[0]
        self._reaches: dict[tuple[Sharing, Kind, frozenset[str]], int] = {}  # how many keys each was proven with

    def proven(self, part: Plan, hook_names: Sequence[str], run: Callable[[Payload], SlotSums]) -> Plan:
        """The plan with the most sharing that is exact, after as many requests as it takes to show it.

        Args:
            part: What is to run.
            hook_names: What is captured.
            run: Sends a request and gives the sums of its slots.

        Raises:
            RemoteError: The server did not bring a request to its end.
        """
        hooks = frozenset(hook_names)
        while True:
            plan = part.with_sharing(self.sharing)
            longest = kinds_of(plan)
            reaches = {kind: reach_of(plan, plan.passes[index]) for kind, index in longest.items()}
            todo = [
                kind for kind, reach in reaches.items() if self._reaches.get((self.sharing, kind, hooks), 0) < reach
            ]
            if not todo:
                return plan
            flaw = self._flaw(plan, [longest[kind] for kind in todo], run)
            if flaw is None:
                self._reaches |= {(self.sharing, kind, hooks): reaches[kind] for kind in todo}
                return plan
            self.fallbacks.append(f"{self.sharing}: {flaw}")
            less = _NEXT_BEST[self.sharing]
            logging.getLogger("tl_persona").warning(
                "%s prefixes are not exact on the server (%s): falling back to %s, which is slower",
                self.sharing,
                flaw,
                less,
            )
            self.sharing = less

    def _flaw(self, plan: Plan, chosen: Sequence[int], run: Callable[[Payload], SlotSums]) -> str | None:
        """Why passes of a plan cannot be trusted on the server's model; None where they can."""
        witness = witness_of(plan, chosen)
        flaw = None
        # A name that was right once is the server's.
        for name in [self.cache_name] if self._reaches else _CACHE_NAMES:
            try:
                sums = run(payload_of(witness.plan, witness.slots, witness.n_slots, name))
            except RemoteRefusedError as refusal:
                flaw = flaw or str(refusal)
                continue
            error = witness.error(sums)
            if error <= self.tolerance:
                self.cache_name = name
                return None
            flaw = flaw or f"differs by {error:.1e} from a text run alone, more than {self.tolerance:.0e}"
        return flaw
