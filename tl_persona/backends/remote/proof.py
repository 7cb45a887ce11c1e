"""The most sharing that a model on a server was shown to run exactly.

A server does not say how its model masks or positions texts that share a row, continue a prefix or are padded. So for
every kind of shortcut in a plan a probe text runs as planned, and whole and alone as well, in one request. The means
over each of its segments and over its last token must agree at every hook, and what differs is not used again.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_persona.backends.probes import Findings, Probe, texts_by_kind
from tl_persona.backends.remote.tracing import Payload, payload_of
from tl_persona.backends.shortcuts import Kind, Placed, choice_in, next_best, stands_for
from tl_persona.errors import RemoteRefusedError
from tl_persona.plan.plan import Plan, Sharing
from tl_persona.plan.rows import Pass, Row, Segment
from tl_persona.tensors import Sample, SlotSums


@dataclass(frozen=True)
class Comparison:
    """What to run, and which slots of the result must agree.

    Attributes:
        plan: The passes of the probe texts, and the same texts alone.
        slots: For each sample of the plan the slots of its masks.
        n_slots: Number of slots.
        pairs: For each probe, slots that must agree: as planned, alone.
    """

    plan: Plan
    slots: list[list[int]]
    n_slots: int
    pairs: list[list[tuple[int, int]]]

    def errors(self, sums: Float[Tensor, "slot hook d_model"]) -> list[float]:
        """For each probe the largest difference relative to the norm; infinite where anything is not finite."""
        return [self._error(sums, pairs) for pairs in self.pairs]

    def _error(self, sums: Tensor, pairs: Sequence[tuple[int, int]]) -> float:
        shared = torch.stack([sums[first] for first, _ in pairs]).double()
        alone = torch.stack([sums[second] for _, second in pairs]).double()
        norms = alone.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        error = float(((shared - alone).norm(dim=-1) / norms).max())
        return error if error == error else float("inf")


def comparison_of(probes: Sequence[Probe]) -> Comparison:
    """One request that runs every probe text both ways.

    Args:
        probes: At least one.
    """
    samples: list[Sample] = []
    slots: list[list[int]] = []
    passes: list[Pass] = []
    pairs: list[list[tuple[int, int]]] = []
    n_slots = 1  # nobody looks at slot 0
    for probe in probes:
        plan, member = probe.plan, probe.text.member
        segments = [segment for each in probe.passes for row in each.rows for segment in row.segments]
        place: dict[int, int] = {}
        for one in {member, *(index for segment in segments for index in segment.members)}:
            place[one] = len(samples)
            samples.append(plan.samples[one])
            slots.append([0] * len(plan.samples[one].masks))
        context = len(passes) if len(probe.passes) > 1 else None
        for each in probe.passes:
            last = each is probe.passes[-1]
            passes.append(_renumbered(each, place, kept=not last, context=context if last else None))
        pieces = [(segment.start, segment.stop) for _, segment in probe.pieces]
        if len(probe.passes) > 1:
            pieces.insert(0, (0, probe.passes[0].width))
        text, given = plan.samples[member], plan.given[member]
        count = len(pieces) + 1
        mine = place[member]
        samples[mine] = replace(text, masks=_masks(len(text.input_ids), pieces))
        slots[mine] = list(range(n_slots, n_slots + count))
        passes.append(Pass((Row((Segment((len(samples),), 0, len(given.input_ids)),)),)))
        samples.append(replace(given, masks=_masks(len(given.input_ids), pieces)))
        slots.append(list(range(n_slots + count, n_slots + 2 * count)))
        pairs.append([(slot, slot + count) for slot in slots[mine]])
        n_slots += 2 * count
    whole = replace(probes[0].plan, samples=tuple(samples), given=tuple(samples), passes=tuple(passes))
    return Comparison(whole, slots, n_slots, pairs)


def _renumbered(each: Pass, place: Mapping[int, int], *, kept: bool, context: int | None) -> Pass:
    rows = tuple(
        Row(tuple(replace(part, members=tuple(place[one] for one in part.members)) for part in row.segments))
        for row in each.rows
    )
    return Pass(rows, context=context, kept=kept)


def _masks(n_tokens: int, pieces: Sequence[tuple[int, int]]) -> Bool[Tensor, "mask pos"]:
    """One for each piece, and one for the last token of the last."""
    masks = torch.zeros((len(pieces) + 1, n_tokens), dtype=torch.bool)
    for mask, (start, stop) in zip(masks, pieces, strict=False):
        mask[start:stop] = True
    masks[-1, pieces[-1][1] - 1] = True
    return masks


_CACHE_NAMES = ("past_key_values", "cache")
"""Tried in this order: servers lag behind, and the older name goes into both for now."""

_NAMES = {Sharing.PACKED: "packed prefixes", Sharing.CACHED: "cached prefixes", Sharing.NONE: "batching"}


class Proof:
    """What is known of the shortcuts of one model.

    Args:
        tolerance: The largest relative difference that counts as exact.
        critical_lengths: Lengths at which the model may start to treat a text differently.
        chosen_keys: How many keys a token attends to where the model chooses them by what they are.

    Attributes:
        sharing: The most that was not refuted for the last plan.
        fallbacks: What was refuted, and why, in order.
        cache_name: The argument that continues a cache on the server.
        tolerance: See the argument.
    """

    def __init__(self, tolerance: float, critical_lengths: Sequence[int] = (), chosen_keys: int | None = None) -> None:
        self.sharing = Sharing.PACKED
        self.fallbacks: list[str] = []
        self.tolerance = tolerance
        self.cache_name = _CACHE_NAMES[0]
        self._critical, self._chosen_keys = critical_lengths, chosen_keys
        self._findings = Findings()
        self._continued = False  # whether a cache was continued exactly, under the name that is kept

    def proven(self, part: Plan, hook_names: Sequence[str], run: Callable[[Payload], SlotSums]) -> Plan:
        """The plan with the most sharing that is exact, after as many requests as it takes to show it.

        Args:
            part: What is to run.
            hook_names: What is captured.
            run: Sends a request and gives the sums of its slots.

        Raises:
            RemoteError: The server did not bring a request to its end.
        """
        plan = part.with_sharing(Sharing.PACKED)
        while taken := texts_by_kind(plan, self._critical):
            flaw = choice_in(plan, self._chosen_keys) or self._flaw(plan, taken, hook_names, run)
            if flaw is None:
                break
            less = next_best(plan)
            note = f"{plan.sharing if plan.sharing is not Sharing.NONE else 'batching'}: {flaw}"
            if note not in self.fallbacks:
                self.fallbacks.append(note)
                logging.getLogger("tl_persona").warning(
                    "%s not exact on the server (%s): falling back to %s, which is slower",
                    f"{_NAMES[plan.sharing]} {'is' if plan.sharing is Sharing.NONE else 'are'}",
                    flaw,
                    "one whole text a pass" if plan.sharing is Sharing.NONE else less.sharing,
                )
            plan = less
        self.sharing = plan.sharing
        return plan

    def known(self, part: Plan, hook_names: Sequence[str]) -> Plan:
        """The plan without sharing, or every text alone where that was not shown to be exact."""
        plan = part.with_sharing(Sharing.NONE)
        kinds = texts_by_kind(plan, self._critical)
        left = [text for texts in kinds.values() for text in self._findings.left(None, texts, hook_names)]
        return plan.alone() if left else plan

    def _flaw(
        self,
        plan: Plan,
        taken: Mapping[Kind, Sequence[Placed]],
        hook_names: Sequence[str],
        run: Callable[[Payload], SlotSums],
    ) -> str | None:
        """Why passes of a plan cannot be trusted on the server's model; None where they can."""
        probes: list[Probe] = []
        for kind, texts in taken.items():
            left = self._findings.left(None, texts, hook_names)
            if left and (flaw := self._findings.flaw(None, kind)) is not None:
                return flaw
            while left:
                probe = self._findings.probe(None, plan, [left[0], *texts], self._critical)
                probes.append(probe)
                left = [text for text in left if not stands_for(probe.text.exposure, text.exposure, probe.text.telling)]
        return self._compared(probes, hook_names, run) if probes else None

    def _compared(
        self, probes: Sequence[Probe], hook_names: Sequence[str], run: Callable[[Payload], SlotSums]
    ) -> str | None:
        comparison = comparison_of(probes)
        continues = any(probe.text.kind.continues for probe in probes)
        first: str | None = None
        refuted = {probe.text.kind for probe in probes}
        # A name that was right once is the server's.
        for name in _CACHE_NAMES if continues and not self._continued else [self.cache_name]:
            try:
                sums = run(payload_of(comparison.plan, comparison.slots, comparison.n_slots, name))
            except RemoteRefusedError as refusal:
                if not any(probe.text.kind.shares for probe in probes):
                    raise  # plain rows are all that could be asked for instead
                first = first or str(refusal)
                continue
            errors = dict(zip(probes, comparison.errors(sums), strict=True))
            wrong = {probe: error for probe, error in errors.items() if not error <= self.tolerance}
            if not wrong:
                self.cache_name, self._continued = name, self._continued or continues
            flaws = [self._seen(probe, error) for probe, error in wrong.items()]
            for probe in errors.keys() - wrong.keys():
                self._findings.add(None, probe, hook_names)
            if not wrong:
                return None
            first = first or flaws[0]
            # Where a number is none, another text may fare better.
            refuted = {probe.text.kind for probe, error in wrong.items() if error < float("inf")}
        assert first is not None
        for kind in refuted:
            self._findings.add_flaw(None, kind, first)
        return first

    def _seen(self, probe: Probe, error: float) -> str:
        given = probe.plan.given[probe.text.member]
        return (
            f"sample {given.sample_id!r} of {len(given.input_ids)} tokens differs by {error:.1e} from itself run "
            f"alone, more than {self.tolerance:.0e}"
        )
