"""Whether a shortcut is exact on this model, found by running a real text both ways.

Sliding windows, recurrent state, positions counted from the padding: an architecture has many ways to break a shared
prefix, and no list of them is complete. So none is trusted: for every kind of shortcut a probe text also runs whole
and alone, and every layer must agree at every token of it. To lie beside another text, or to end after the last token
that a mask selects, is a shortcut too. What holds is remembered with the model, for the texts that the probe text
stands for.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tl_persona.backends.local.runners import Runner, capture_of
from tl_persona.backends.probes import Findings, Probe, texts_by_kind
from tl_persona.backends.shortcuts import Kind, Placed, choice_in, next_best, tolerance_of
from tl_persona.models.facts import ModelFacts
from tl_persona.models.hooks import stop_layer
from tl_persona.plan.plan import Plan, Sharing
from tl_persona.plan.rows import Pass, Row, Segment

_NAMES = {Sharing.PACKED: "packed", Sharing.CACHED: "cached", Sharing.NONE: "batching"}

_EXACT_DTYPES = ("float64", "float32")
"""Agreement is asked of every position, but in half precision of the mean over each segment: there a rounding can send
a token to another expert, and the plain path is as fickle."""


class Verdict(NamedTuple):
    """What came of comparing one probe text.

    Attributes:
        holds: Whether the largest difference is within the tolerance.
        reason: What was seen, for people.
        lasting: False where NaN or infinity got in the way, which another text may not have.
    """

    holds: bool
    reason: str
    lasting: bool = True


class _Memory(NamedTuple):
    """What is known of one model, and which failures were told."""

    findings: Findings
    told: set[tuple[str, str]]


class ProvenPlan(NamedTuple):
    """A plan that is exact on a model: how it may run, by which runner, and notes on why."""

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
        model: What is found is remembered for as long as it lives.
        runners: What can run its passes, the fastest first; the last is what all are compared with.
        facts: Of the model.
        device: Where it runs.
        critical_lengths: Lengths at which the model may start to treat a text differently.
        chosen_keys: How many keys a token attends to where the model chooses them by what they are; None where it
            attends to all that it may.
    """

    def __init__(
        self,
        model: Any,
        runners: Sequence[Runner],
        facts: ModelFacts,
        device: torch.device,
        critical_lengths: Sequence[int],
        chosen_keys: int | None = None,
    ) -> None:
        self._runners, self._facts, self._device = runners, facts, str(device)
        self._critical, self._chosen_keys = critical_lengths, chosen_keys
        self._memory = _MEMORIES.setdefault(model, _Memory(Findings(), set()))

    def prove(self, plan: Plan, names: Sequence[str]) -> ProvenPlan:
        """The plan, or one with less sharing where its shortcuts are not exact on this model, and who runs it."""
        plain = self._runners[-1]
        plain.prepare()
        fallbacks = [self._told(what, seen, f"{what}: {seen}") for what, seen in plain.costs.items()]
        while taken := texts_by_kind(plan, self._critical):
            shares = any(kind.shares for kind in taken)
            if shares and plan.sharing in plain.limits:
                plan = self._within_limits(plan, fallbacks)
                continue
            failures: list[tuple[str, str, str]] = []
            chosen = choice_in(plan, self._chosen_keys)
            if chosen is not None:
                failures.append((plain.attention, "is not exact", chosen))
            for runner in self._runners if chosen is None else ():
                obstacle = runner.obstacle(names)
                if obstacle is not None:
                    failures.append((runner.attention, "cannot be used", obstacle))
                    continue
                flaws = (self._flaw(runner, plan, kind, texts, names) for kind, texts in taken.items())
                # Lazily: what comes after the first flaw need not be proven.
                flaw = next((flaw for flaw in flaws if flaw is not None), None)
                if flaw is None and not shares:
                    return ProvenPlan(plan, plain, _noted(_unshared(fallbacks), fallbacks))
                if flaw is None:
                    for attention, what, reason in failures:
                        fallbacks.append(self._lost(f"{attention} attention", what, reason, "the bridge's own"))
                    # The limit, not the figure: what is written must not depend on which sample came first.
                    notes = {"sharing": str(plan.sharing), "proof": f"within {tolerance_of(self._facts.dtype):.0e}"}
                    return ProvenPlan(plan, runner, _noted(notes, fallbacks, runner))
                failures.append((runner.attention, "is not exact", flaw))
            # Without any shortcut inside the pass it is not exact either: the sharing is at fault.
            what, less = _NAMES[plan.sharing], next_best(plan)
            alone = plan.sharing is Sharing.NONE
            instead = "one whole text a pass" if alone else str(less.sharing)
            fallbacks.append(self._lost(what, "is not exact", failures[-1][2], instead))
            plan = less
        return ProvenPlan(plan, plain, _noted(_unshared(fallbacks), fallbacks))

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
        while taken := texts_by_kind(plan, self._critical):
            hopeless = any(
                all(self._known_to_fail(runner, kind, texts) for runner in self._runners)
                for kind, texts in taken.items()
            )
            if not hopeless and choice_in(plan, self._chosen_keys) is None:
                break
            plan = next_best(plan)
        return plan

    def _known_to_fail(self, runner: Runner, kind: Kind, texts: Sequence[Placed]) -> bool:
        way, findings = self._way(runner, kind), self._memory.findings
        return findings.flaw(way, kind) is not None and bool(findings.left(way, texts, ()))

    def _way(self, runner: Runner, kind: Kind) -> tuple[str, str, str]:
        # Passes that share nothing run the same way whoever runs them.
        attention = runner.attention if kind.shares else self._runners[-1].attention
        return self._facts.dtype, self._device, attention

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

    def _flaw(
        self, runner: Runner, plan: Plan, kind: Kind, texts: Sequence[Placed], names: Sequence[str]
    ) -> str | None:
        """Why texts of a kind are not exact; None where they are, or where probe texts that stand for them are."""
        way, findings = self._way(runner, kind), self._memory.findings
        hooks = self._hooks_to_prove(names)
        left = findings.left(way, texts, names)
        while left:
            flaw = findings.flaw(way, kind)
            if flaw is not None:
                return flaw
            probe = findings.probe(way, plan, [left[0], *texts], self._critical)
            try:
                verdict = compared(runner, self._runners[-1], probe, hooks, self._facts.dtype)
            except (MemoryError, torch.OutOfMemoryError):
                if probe.plan is plan:
                    raise
                # As it lies in the plan it takes no more room than the plan itself will.
                probe = Probe(plan, left[0])
                verdict = compared(runner, self._runners[-1], probe, hooks, self._facts.dtype)
            if not verdict.holds:
                if verdict.lasting:
                    findings.add_flaw(way, kind, verdict.reason)
                return verdict.reason
            findings.add(way, probe, hooks)
            left = findings.left(way, left, names)
        return None

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


def compared(runner: Runner, plain_runner: Runner, probe: Probe, names: Sequence[str], dtype: str) -> Verdict:
    """Compares a probe text with the plain path, at every one of its tokens."""
    plan, member = probe.plan, probe.text.member
    given = plan.given[member]
    whole = Pass((Row((Segment((member,), 0, len(given.input_ids)),)),))
    expected, _ = plain_runner.run(replace(plan, samples=plan.given), whole, names, None, 0)
    ruler = _Ruler({name: capture_of(expected, name)[0] for name in names}, dtype)
    del expected
    worst, tolerance = 0.0, tolerance_of(dtype)
    try:
        for difference, name in _differences(runner, probe, names, ruler):
            if not difference < float("inf"):
                return Verdict(False, f"NaN or infinity at {name}", lasting=False)
            worst = max(worst, difference)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # an architecture may refuse in any way; plain passes do not depend on it
        return Verdict(False, f"it raised {type(error).__name__}: {error}")
    seen = f"relative difference {worst:.1e} for sample {given.sample_id!r} of {len(given.input_ids)} tokens"
    return Verdict(worst <= tolerance, f"{seen}, allowed {tolerance:.0e}")


def _differences(runner: Runner, probe: Probe, names: Sequence[str], ruler: "_Ruler") -> Iterator[tuple[float, str]]:
    """The largest of each segment of a probe text and each hook; what one pass captured is let go before the next."""
    plan, each = probe.plan, probe.passes[-1]
    context, length = None, 0
    if each.context is not None:
        prefix = plan.passes[each.context]
        captured, context = runner.run(plan, prefix, names, None, 0)
        yield from ruler.differences(captured, [(0, prefix.rows[0].segments[0])])
        ruler.forget(prefix.width)
        del captured
        length = prefix.width
        # Whatever continues a prefix must leave it as it was for the next pass: recurrent state is written in place.
        first = each.rows[0].segments[0]
        token = Pass((Row((replace(first, stop=first.start + 1),)),), context=each.context)
        runner.run(plan, token, names, context, length)
    captured, _ = runner.run(plan, each, names, context, length, only_row=probe.text.row)
    yield from ruler.differences(captured, probe.pieces)


class _Ruler:
    """What the plain path gave for one text, and how far something else is from it.

    Args:
        expected: Activations of shape (pos, d_model) by hook.
        dtype: Of the model.
    """

    def __init__(self, expected: dict[str, Tensor], dtype: str) -> None:
        self._expected, self._every = expected, dtype in _EXACT_DTYPES
        # A position that is all but zero is measured against the others, which it is added to or averaged with.
        self._typical = {name: float(_wide(text).norm(dim=-1).median()) for name, text in expected.items()}
        self._begin = 0

    def differences(
        self, captured: Mapping[str, Tensor], pieces: Sequence[tuple[int, Segment]]
    ) -> Iterator[tuple[float, str]]:
        """The largest relative difference of each segment at each hook.

        Args:
            captured: Of the text's row of a pass, (1, pos, d_model) by hook.
            pieces: The text's segments there, and where each begins.
        """
        for name, text in self._expected.items():
            for begin, segment in pieces:
                expected = _wide(text[segment.start - self._begin : segment.stop - self._begin])
                got = _wide(capture_of(captured, name)[0, begin : begin + len(segment)])
                scale = expected.norm(dim=-1).clamp_min(self._typical[name])
                errors = (got - expected).norm(dim=-1) / scale.clamp_min(torch.finfo(torch.float64).tiny)
                yield float(errors.max() if self._every else errors.mean()), name

    def forget(self, begin: int) -> None:
        """Lets go of the tokens before one."""
        self._expected = {name: text[begin - self._begin :].clone() for name, text in self._expected.items()}
        self._begin = begin


def _wide(text: Tensor) -> Tensor:
    return text.detach().cpu().double()
