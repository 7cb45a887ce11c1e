"""Whether a shortcut is exact on this model, found by running a real sample both ways.

Sliding windows, recurrent state, positions counted from the padding: an architecture has many ways to break a shared
prefix, and no list of them is complete. So none is trusted: of every kind of pass that takes a shortcut, one also runs
whole and alone, and every layer must agree at every position of a text in it. To lie beside another text, or to end
after the last token that a mask selects, is a shortcut too. What holds is remembered with the model, for texts up to
the length it was seen with.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tl_persona.backends.local.runners import Runner, capture_of
from tl_persona.backends.shortcuts import Regime, Shortcut, next_best, shortcuts, sides, tolerance_of
from tl_persona.models.facts import ModelFacts
from tl_persona.models.hooks import stop_layer
from tl_persona.plan.plan import Plan, Sharing
from tl_persona.plan.rows import Pass, Row, Segment

_NAMES = {Sharing.PACKED: "packed", Sharing.CACHED: "cached", Sharing.NONE: "batching"}

_EXACT_DTYPES = ("float64", "float32")
"""Agreement is asked of every position, but in half precision of the mean over each segment: there a rounding can send
a token to another expert, and the plain path is as fickle."""


@dataclass(frozen=True)
class Verdict:
    """What came of a proof.

    Attributes:
        holds: Whether the largest difference is within the tolerance.
        reason: What was seen, for people.
        hooks: The hooks it was found for.
        text: The longest text it was found with.
        keys: The most keys.
        lasting: False where NaN or infinity got in the way, which another sample may not have.
    """

    holds: bool
    reason: str
    hooks: frozenset[str] = frozenset()
    text: int = 0
    keys: int = 0
    lasting: bool = True

    def covers(self, shortcut: Shortcut) -> bool:
        """Whether it says how a shortcut fares, at the hooks it was found for."""
        return self.text >= shortcut.text and self.keys >= shortcut.keys if self.holds else self.lasting


class _Witness(NamedTuple):
    """A text in a pass, up to one of its segments, and its length as it was given."""

    row: int
    member: int
    stop: int
    given: int


class _Memory(NamedTuple):
    """What is known of one model: verdicts by dtype, attention and regime, and which failures were told."""

    verdicts: dict[tuple[str, str, Regime], list[Verdict]]
    told: set[tuple[str, str]]


class Settled(NamedTuple):
    """What came of settling a plan: how it may run, by which runner, and notes on why."""

    plan: Plan
    runner: Runner
    notes: dict[str, Any]


_MEMORIES: "WeakKeyDictionary[Any, _Memory]" = WeakKeyDictionary()


def forget_proofs(model: Any) -> None:
    """Have the shortcuts of a model that has changed proven anew."""
    _MEMORIES.pop(model, None)


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
        plain = self._runners[-1]
        plain.prepare()
        fallbacks = [self._told(what, seen, f"{what}: {seen}") for what, seen in plain.costs.items()]
        while taken := shortcuts(plan, self._critical):
            shares = any(regime.shares for regime in taken)
            if shares and plan.sharing in plain.limits:
                plan = self._within_limits(plan, fallbacks)
                continue
            failures: list[tuple[str, str, str]] = []
            for runner in self._runners:
                obstacle = runner.obstacle(names)
                if obstacle is not None:
                    failures.append((runner.attention, "cannot be used", obstacle))
                    continue
                verdicts = (self._verdict(runner, plan, regime, taken[regime], names) for regime in taken)
                # Lazily: what comes after the first failure need not be proven.
                failed = next((verdict for verdict in verdicts if not verdict.holds), None)
                if failed is None and not shares:
                    return Settled(plan, plain, _noted(_unshared(fallbacks), fallbacks))
                if failed is None:
                    for attention, what, reason in failures:
                        fallbacks.append(self._lost(f"{attention} attention", what, reason, "the bridge's own"))
                    # The limit, not the figure: what is written must not depend on which sample came first.
                    notes = {"sharing": str(plan.sharing), "proof": f"within {tolerance_of(self._facts.dtype):.0e}"}
                    return Settled(plan, runner, _noted(notes, fallbacks, runner))
                failures.append((runner.attention, "is not exact", failed.reason))
            # Without any shortcut inside the pass it is not exact either: the sharing is at fault.
            what, less = _NAMES[plan.sharing], next_best(plan)
            alone = plan.sharing is Sharing.NONE
            instead = "one whole text a pass" if alone else str(less.sharing)
            fallbacks.append(self._lost(what, "is not exact", failures[-1][2], instead))
            plan = less
        return Settled(plan, plain, _noted(_unshared(fallbacks), fallbacks))

    def _within_limits(self, plan: Plan, fallbacks: list[str]) -> Plan:
        """The plan with as much sharing as the model was found to be capable of with a few tokens."""
        limits = self._runners[-1].limits
        kind, less = (Sharing.CACHED, Sharing.NONE) if Sharing.CACHED in limits else (Sharing.PACKED, Sharing.CACHED)
        fallbacks.append(self._lost(str(kind), "is not possible", limits[kind], str(less)))
        return plan.with_sharing(less)

    def foreseen(self, plan: Plan) -> Plan:
        """The plan, or one with less sharing where it is known already that it will not do."""
        limits = self._runners[-1].limits
        while plan.sharing in limits:
            plan = next_best(plan)
        while any(
            all(self._known_to_fail(runner, regime) for runner in self._runners)
            for regime in shortcuts(plan, self._critical)
        ):
            plan = next_best(plan)
        return plan

    def _known_to_fail(self, runner: Runner, regime: Regime) -> bool:
        known = self._memory.verdicts.get(self._key(runner, regime), ())
        return any(verdict.lasting and not verdict.holds for verdict in known)

    def _key(self, runner: Runner, regime: Regime) -> tuple[str, str, Regime]:
        # Passes that share nothing run the same way whoever runs them.
        attention = runner.attention if regime.shares else self._runners[-1].attention
        return self._facts.dtype, attention, regime

    def _lost(self, what: str, how: str, reason: str, instead: str) -> str:
        """Warns of a shortcut that is not taken, once a model, and gives its note."""
        subject = f"{what} prefixes" if what in (Sharing.PACKED, Sharing.CACHED) else what
        message = f"{subject} {how} here ({reason}): falling back to {instead}, which is slower"
        return self._told(what, message, f"{what}: {reason}")

    def _told(self, what: str, message: str, note: str) -> str:
        if (self._facts.dtype, what) not in self._memory.told:
            self._memory.told.add((self._facts.dtype, what))
            logging.getLogger("tl_persona").warning("%s: %s", self._facts.name, message)
        return note

    def _verdict(self, runner: Runner, plan: Plan, regime: Regime, shortcut: Shortcut, names: Sequence[str]) -> Verdict:
        verdicts = self._memory.verdicts
        # What is right for several rows is right for one.
        known: list[Verdict] = [*verdicts.get(self._key(runner, regime), ())]
        known += verdicts.get(self._key(runner, regime._replace(several=True)), ())
        covering = [verdict for verdict in known if verdict.covers(shortcut)]
        failed = next((verdict for verdict in covering if not verdict.holds), None)
        if failed is not None or frozenset[str]().union(*(verdict.hooks for verdict in covering)).issuperset(names):
            return failed or covering[0]
        hooks = self._hooks_to_prove(names)
        for index in shortcut.passes:
            verdict = prove(runner, self._runners[-1], plan, index, hooks, self._facts.dtype, self._critical)
            if not verdict.holds:
                break
        verdict = replace(verdict, hooks=frozenset(hooks), text=shortcut.text, keys=shortcut.keys)
        verdicts.setdefault(self._key(runner, regime), []).append(verdict)
        return verdict

    def _hooks_to_prove(self, names: Sequence[str]) -> list[str]:
        """The wanted hooks, and the residual after every block that runs for them."""
        stop = stop_layer(names)
        blocks = range(self._facts.n_layers if stop is None else stop)
        residuals = [f"blocks.{block}.hook_resid_post" for block in blocks]
        return list(dict.fromkeys([*names, *(name for name in residuals if name in self._facts.hook_names)]))


def _unshared(fallbacks: Sequence[str]) -> dict[str, Any]:
    """Notes on a run that shares nothing, which never go without a reason."""
    notes = {"sharing": str(Sharing.NONE)}
    if not any(note.startswith(tuple(f"{name}:" for name in _NAMES.values())) for note in fallbacks):
        notes["why"] = "no two texts share a beginning that is worth a pass"
    return notes


def _noted(notes: dict[str, Any], fallbacks: list[str], runner: Runner | None = None) -> dict[str, Any]:
    """Notes with what is not always there."""
    if runner is not None and runner.attention == "fused":
        notes["attention"] = runner.attention
    if fallbacks:
        notes["fallbacks"] = fallbacks
    return notes


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
    given = replace(plan, samples=plan.given)
    try:
        before, fast = _run(runner, plan, each, names)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # an architecture may refuse in any way; plain passes do not depend on it
        return Verdict(False, f"it raised {type(error).__name__}: {error}")
    worst = 0.0
    for witness in _witnesses(plan, each, critical_lengths):
        whole = Pass((Row((Segment((witness.member,), 0, witness.given),)),))
        plain, _ = plain_runner.run(given, whole, names, None, 0)
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
                    return Verdict(False, f"NaN or infinity at {name}", lasting=False)
                worst = max(worst, difference)
    tolerance = tolerance_of(dtype)
    return Verdict(worst <= tolerance, f"relative difference {worst:.1e}, allowed {tolerance:.0e}")


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


def _witnesses(plan: Plan, each: Pass, critical_lengths: Sequence[int]) -> list[_Witness]:
    """The longest text with others before it in its row, or else in its pass.

    The longest on every other side of the lengths at which the model may treat a text differently too: a shorter one
    may be too short to show it. And where nothing is shared, the longest of all, of which most may have been cut.
    """
    ranked: list[tuple[tuple[bool, bool, int], _Witness]] = []
    for row_index, row in enumerate(each.rows):
        for place, segment in enumerate(row.segments):
            given, member = max((len(plan.given[index].input_ids), index) for index in segment.members)
            crowded = any(member not in above.members for above in row.segments[:place])
            ranked.append(((crowded, row_index > 0, segment.stop), _Witness(row_index, member, segment.stop, given)))
    exposed = max(ranked)[1]
    texts = [witness for _, witness in ranked]
    longest = max(texts, key=lambda text: text.given)
    by_length = sorted(texts, key=lambda text: (text.stop, text.given))
    found = {sides(critical_lengths, text.stop, text.given): text for text in (*by_length, exposed)}
    shares = each.context is not None or each.packed
    return list(dict.fromkeys([*found.values(), *([] if shares else [longest])]))


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
