"""Whether a shortcut is exact on this model, found by running a real sample both ways.

Sliding windows, recurrent state, positions counted from the padding: an architecture has many ways to break a shared
prefix, and no list of them is complete. So none is trusted: of every kind of pass that takes a shortcut, one also runs
whole and alone, and every layer must agree at every position of a text in it. What holds is remembered with the model.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tl_persona.backends.local.passes import Runner, capture_of
from tl_persona.exactness import tolerance_of
from tl_persona.models import ModelFacts
from tl_persona.pass_tensors import needs_mask, stop_layer
from tl_persona.plan import Plan, Sharing
from tl_persona.rows import Pass, Row, Segment

_EXACT_DTYPES = ("float64", "float32")
"""Agreement is asked of every position, but in half precision of the mean over each segment: there a rounding can send
a token to another expert, and the plain path is as fickle."""


class Regime(NamedTuple):
    """Passes that a model can be expected to treat alike.

    Attributes:
        continues: Whether they continue a kept prefix.
        masked: Whether they need a mask and positions of their own.
        several: Whether they have more than one row.
        lengths: For each critical length of the model, whether prefix, longest text and number of keys are below (-1),
            at (0) or above (1) it.
    """

    continues: bool
    masked: bool
    several: bool
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Verdict:
    """What came of a proof.

    Attributes:
        holds: Whether the largest difference is within the tolerance.
        reason: What was seen, for people.
        hooks: The hooks it was found for.
        lasting: False where NaN or infinity got in the way, which another sample may not have.
    """

    holds: bool
    reason: str
    hooks: frozenset[str]
    lasting: bool = True


class _Witness(NamedTuple):
    """A text in a pass, up to one of its segments."""

    row: int
    member: int
    stop: int


class _Memory(NamedTuple):
    """What is known of one model: verdicts by dtype, attention and regime, and which failures were told."""

    verdicts: dict[tuple[str, str, Regime], Verdict]
    told: set[tuple[str, str]]


class Settled(NamedTuple):
    """What came of settling a plan: how it may run, by which runner, and notes on why."""

    plan: Plan
    runner: Runner
    notes: dict[str, Any]


_MEMORIES: "WeakKeyDictionary[Any, _Memory]" = WeakKeyDictionary()


class Prover:
    """Proves the shortcuts of plans on one model.

    Args:
        model: Verdicts are remembered for as long as it lives.
        runners: What can run its passes, the fastest first; the last is what all are compared with.
        facts: Of the model.
        critical_lengths: Lengths at which the model may start to treat a text differently.
    """

    def __init__(
        self, model: Any, runners: Sequence[Runner], facts: ModelFacts, critical_lengths: Sequence[int]
    ) -> None:
        self._runners, self._facts, self._critical = runners, facts, critical_lengths
        self._memory = _MEMORIES.setdefault(model, _Memory({}, set()))

    def settle(self, plan: Plan, names: Sequence[str]) -> Settled:
        """The plan, or one with less sharing where its shortcuts are not exact on this model, and who runs it."""
        fallbacks: list[str] = []
        while taken := shortcuts(plan, self._critical):
            failures: list[tuple[str, str]] = []
            for runner in self._runners:
                if not runner.applies(names):
                    continue
                verdicts = (self._verdict(runner, plan, regime, index, names) for regime, index in taken.items())
                # Lazily: what comes after the first failure need not be proven.
                failed = next((verdict for verdict in verdicts if not verdict.holds), None)
                if failed is None:
                    for attention, reason in failures:
                        fallbacks.append(self._told(f"{attention} attention", reason, "the bridge's own"))
                    # The limit, not the figure: what is written must not depend on which sample came first.
                    notes = {"sharing": str(plan.sharing), "proof": f"within {tolerance_of(self._facts.dtype):.0e}"}
                    return Settled(plan, runner, _noted(notes, fallbacks, runner))
                failures.append((runner.attention, failed.reason))
            # Without any shortcut inside the pass it is not exact either: the sharing is at fault.
            less = next_best(plan.sharing)
            fallbacks.append(self._told(f"{plan.sharing}", failures[-1][1], str(less)))
            plan = plan.with_sharing(less)
        return Settled(plan, self._runners[-1], _noted({"sharing": str(Sharing.NONE)}, fallbacks))

    def _told(self, what: str, reason: str, instead: str) -> str:
        """Warns of a failure, once a model, and gives its note."""
        if (self._facts.dtype, what) not in self._memory.told:
            self._memory.told.add((self._facts.dtype, what))
            logging.getLogger("tl_persona").warning(
                "%s: %s is not exact here (%s): falling back to %s, which is slower",
                self._facts.name,
                what if what.endswith("attention") else f"{what} prefixes",
                reason,
                instead,
            )
        return f"{what}: {reason}"

    def _verdict(self, runner: Runner, plan: Plan, regime: Regime, index: int, names: Sequence[str]) -> Verdict:
        dtype, verdicts = self._facts.dtype, self._memory.verdicts
        key = (dtype, runner.attention, regime)
        known = verdicts.get(key)
        # What is right for several rows is right for one.
        for candidate in (known, verdicts.get((*key[:2], regime._replace(several=True)))):
            if candidate and candidate.lasting and (not candidate.holds or candidate.hooks.issuperset(names)):
                return candidate
        hooks = self._hooks_to_prove(names)
        verdict = prove(runner, self._runners[-1], plan, index, hooks, dtype, self._critical)
        if known is not None and known.holds and verdict.holds:
            verdict = replace(verdict, hooks=verdict.hooks | known.hooks)
        verdicts[key] = verdict
        return verdict

    def _hooks_to_prove(self, names: Sequence[str]) -> list[str]:
        """The wanted hooks, and the residual after every block that runs for them."""
        stop = stop_layer(names)
        blocks = range(self._facts.n_layers if stop is None else stop)
        residuals = [f"blocks.{block}.hook_resid_post" for block in blocks]
        return list(dict.fromkeys([*names, *(name for name in residuals if name in self._facts.hook_names)]))


def _noted(notes: dict[str, Any], fallbacks: list[str], runner: Runner | None = None) -> dict[str, Any]:
    """Notes with what is not always there."""
    if runner is not None and runner.attention == "fused":
        notes["attention"] = runner.attention
    if fallbacks:
        notes["fallbacks"] = fallbacks
    return notes


def shortcuts(plan: Plan, critical_lengths: Sequence[int]) -> dict[Regime, int]:
    """The kinds of shortcut that a plan takes, each with the pass that goes furthest in it."""
    furthest: dict[Regime, tuple[tuple[int, int], int]] = {}
    for index, each in enumerate(plan.passes):
        if each.context is None and not each.packed:
            continue
        context = 0 if each.context is None else plan.passes[each.context].width
        text = max(segment.stop for row in each.rows for segment in row.segments)
        regime = Regime(
            continues=each.context is not None,
            masked=needs_mask(plan, each),
            several=len(each.rows) > 1,
            lengths=_sides(critical_lengths, context, text, context + each.width),
        )
        rank = (len(each.rows), text)
        if regime not in furthest or rank > furthest[regime][0]:
            furthest[regime] = (rank, index)
    return {
        regime: index
        for regime, (_, index) in furthest.items()
        if regime.several or regime._replace(several=True) not in furthest
    }


def _sides(critical_lengths: Sequence[int], *lengths: int) -> tuple[int, ...]:
    return tuple((length > limit) - (length < limit) for limit in critical_lengths for length in lengths)


def next_best(sharing: Sharing) -> Sharing:
    """What to fall back to."""
    return Sharing.CACHED if sharing is Sharing.PACKED else Sharing.NONE


def prove(
    runner: Runner,
    plain_runner: Runner,
    plan: Plan,
    index: int,
    names: Sequence[str],
    dtype: str,
    critical_lengths: Sequence[int] = (),
) -> Verdict:
    """Compares one pass of a plan with the plain path, on the text in it that is most exposed to its company."""
    each = plan.passes[index]
    hooks = frozenset(names)
    try:
        before, fast = _run(runner, plan, each, names)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # an architecture may refuse in any way; plain passes do not depend on it
        return Verdict(False, f"it raised {type(error).__name__}: {error}", hooks)
    worst = 0.0
    for witness in _witnesses(each, critical_lengths):
        whole = Pass((Row((Segment((witness.member,), 0, witness.stop),)),))
        plain, _ = plain_runner.run(plan, whole, names, None, 0)
        for name in names:
            expected = capture_of(plain, name)[0].detach().cpu().double()
            size = expected.norm(dim=-1)
            # A position that is all but zero is measured against the others, which it is added to or averaged with.
            scale = size.clamp_min(float(size.median())).clamp_min(torch.finfo(torch.float64).tiny)
            for segment, got in _pieces(plan, each, witness, before, fast, name):
                part = slice(segment.start, segment.stop)
                errors = (got - expected[part]).norm(dim=-1) / scale[part]
                difference = float(errors.max() if dtype in _EXACT_DTYPES else errors.mean())
                if not difference < float("inf"):
                    return Verdict(False, f"NaN or infinity at {name}", hooks, lasting=False)
                worst = max(worst, difference)
    tolerance = tolerance_of(dtype)
    return Verdict(worst <= tolerance, f"relative difference {worst:.1e}, allowed {tolerance:.0e}", hooks)


def _run(
    runner: Runner, plan: Plan, each: Pass, names: Sequence[str]
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Captures of the pass that is continued, if any, and of the pass itself."""
    if each.context is None:
        return {}, runner.run(plan, each, names, None, 0)[0]
    prefix = plan.passes[each.context]
    before, context = runner.run(plan, prefix, names, None, 0)
    # Whatever continues a prefix must leave it as it was for the next pass: recurrent state is written in place.
    first = each.rows[0].segments[0]
    token = Pass((Row((replace(first, stop=first.start + 1),)),), context=each.context)
    runner.run(plan, token, names, context, prefix.width)
    return before, runner.run(plan, each, names, context, prefix.width)[0]


def _witnesses(each: Pass, critical_lengths: Sequence[int]) -> list[_Witness]:
    """The longest text with others before it in its row, or else in its pass; the longest of all if that may differ."""
    ranked: list[tuple[tuple[bool, bool, int], _Witness]] = []
    for row_index, row in enumerate(each.rows):
        for place, segment in enumerate(row.segments):
            member = segment.members[0]
            crowded = any(member not in above.members for above in row.segments[:place])
            ranked.append(((crowded, row_index > 0, segment.stop), _Witness(row_index, member, segment.stop)))
    exposed = max(ranked)[1]
    longest = max((witness for _, witness in ranked), key=lambda witness: witness.stop)
    alike = _sides(critical_lengths, exposed.stop) == _sides(critical_lengths, longest.stop)
    return [exposed] if alike else [exposed, longest]


def _pieces(
    plan: Plan, each: Pass, witness: _Witness, before: Mapping[str, Tensor], fast: Mapping[str, Tensor], name: str
) -> list[tuple[Segment, Tensor]]:
    """The segments of a text, each with what was captured for it."""
    pieces = []
    if each.context is not None:
        (segment,) = plan.passes[each.context].rows[0].segments
        pieces.append((segment, before[name][0]))
    offset = 0
    for segment in each.rows[witness.row].segments:
        if witness.member in segment.members and segment.stop <= witness.stop:
            pieces.append((segment, fast[name][witness.row, offset : offset + len(segment)]))
        offset += len(segment)
    return [(segment, got.detach().cpu().double()) for segment, got in pieces]
