"""Probe texts: what runs both ways, so that it stands for every text of a plan that takes a shortcut.

A text of the plan is laid out as unfavourably as any text of its kind lies in the plan: behind as many tokens of
others, before as many, beside a text that reaches as far. Its company is made of tokens of other texts. Where that
cannot be had without leaving the kind, the text is compared where it lies in the plan.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, pairwise
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from tl_persona.backends.shortcuts import (
    Exposure,
    Kind,
    Placed,
    is_telling,
    placed_text,
    placed_texts,
    sides,
    stands_for,
)
from tl_persona.plan.plan import Plan
from tl_persona.plan.rows import Pass, Row, Segment
from tl_persona.tensors import Sample

_COMPANY = 16
"""Texts of a plan that lend their tokens to the company of a probe text."""


class Probe(NamedTuple):
    """A text to compare.

    Attributes:
        plan: What it runs in.
        text: Where it runs there; all texts that its exposure stands for are as right as it is.
    """

    plan: Plan
    text: Placed

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The pass that is continued, if any, and the text's own."""
        each = self.plan.passes[self.text.at]
        return (each,) if each.context is None else (self.plan.passes[each.context], each)

    @property
    def pieces(self) -> list[tuple[int, Segment]]:
        """The segments of the text in its row, and where each begins there."""
        found, offset = [], 0
        for segment in self.plan.passes[self.text.at].rows[self.text.row].segments:
            if self.text.member in segment.members and segment.stop <= self.text.exposure.stop:
                found.append((offset, segment))
            offset += len(segment)
        return found


class _Proven(NamedTuple):
    """A probe text that was right, and at which hooks."""

    text: Placed
    hooks: frozenset[str]


class Findings:
    """What is known of one model's shortcuts: the probe texts that were right, and the kinds that were not."""

    def __init__(self) -> None:
        self._proven: dict[tuple[Hashable, Kind], list[_Proven]] = {}
        self._failed: dict[tuple[Hashable, Kind], str] = {}

    def left(self, way: Hashable, texts: Sequence[Placed], names: Sequence[str]) -> list[Placed]:
        """The texts that no probe text stands for at all of these hooks.

        Args:
            way: How they run, dtype, device and attention for instance: what was found out in another tells nothing.
            texts: Of any kinds.
            names: Hook names.
        """
        return [text for text in texts if not self._covered(way, text, names)]

    def _covered(self, way: Hashable, text: Placed, names: Sequence[str]) -> bool:
        standing = [
            each.hooks
            for each in self._proven.get((way, text.kind), ())
            if stands_for(each.text.exposure, text.exposure, each.text.telling)
        ]
        return bool(standing) and frozenset[str]().union(*standing).issuperset(names)

    def flaw(self, way: Hashable, kind: Kind) -> str | None:
        """What was seen of a kind that is not exact; None where nothing was."""
        return self._failed.get((way, kind))

    def probe(self, way: Hashable, plan: Plan, texts: Sequence[Placed], critical_lengths: Sequence[int]) -> Probe:
        """A probe for the first of some texts of one kind, and as far as possible for all, also those known already.

        With what was proven before, so that one plan after another takes few of them.
        """
        known = [each.text.exposure for each in self._proven.get((way, texts[0].kind), ())]
        return probe_of(plan, texts[0], [*(text.exposure for text in texts), *known], critical_lengths)

    def add(self, way: Hashable, probe: Probe, names: Sequence[str]) -> None:
        """Keeps that a probe text was right at some hooks."""
        self._proven.setdefault((way, probe.text.kind), []).append(_Proven(probe.text, frozenset(names)))

    def add_flaw(self, way: Hashable, kind: Kind, seen: str) -> None:
        """Keeps that a kind is not exact, and what was seen."""
        self._failed[way, kind] = seen


def texts_by_kind(plan: Plan, critical_lengths: Sequence[int]) -> dict[Kind, list[Placed]]:
    """The kinds of shortcut that a plan takes, each with the texts that take it, the longest first."""
    found: dict[Kind, list[Placed]] = {}
    for text in placed_texts(plan, critical_lengths):
        found.setdefault(text.kind, []).append(text)
    for texts in found.values():
        texts.sort(key=lambda text: (text.exposure.given, *text.exposure), reverse=True)
    return found


def most_exposed(texts: Iterable[Exposure]) -> Exposure:
    """The largest of each integer."""
    return Exposure(*map(max, zip(*texts, strict=True)))


_ROOM = 3
"""The pass of a probe may hold this many times what the largest of the plan holds, or what its budget allows."""


def probe_of(plan: Plan, text: Placed, others: Sequence[Exposure], critical_lengths: Sequence[int]) -> Probe:
    """A probe that stands for a text of a plan, and as far as that is possible for all others of its kind.

    Args:
        plan: What is to run.
        text: The text that is compared.
        others: How far other texts of its kind are exposed.
        critical_lengths: Lengths at which the model may start to treat a text differently.
    """
    alike = [each for each in others if each.rows == text.exposure.rows]
    room = _ROOM * max(plan.batch_tokens, *(each.tokens_run for each in plan.passes))
    # Few long rows in one pass and many short ones in another would make many long ones.
    for some in (others, alike):
        wanted = most_exposed([text.exposure, *some])
        for less in (wanted, wanted._replace(off=0)):
            made = _Arrangement(plan, text, less, critical_lengths).plan()
            if made is not None and made.passes[-1].tokens_run <= room:
                placed = placed_text(made, len(made.passes) - 1, 0, critical_lengths)
                if placed.kind == text.kind and placed.telling and stands_for(placed.exposure, text.exposure):
                    return Probe(made, placed)
    return Probe(plan, text)


@dataclass
class _Arrangement:
    """One text, number 0, and company around it."""

    text_plan: Plan
    text: Placed
    wanted: Exposure
    critical: Sequence[int]
    samples: list[Sample] = field(default_factory=list)
    given: list[Sample] = field(default_factory=list)

    def plan(self) -> Plan | None:
        """A plan whose last pass has the text as it is wanted; None where there is no such plan."""
        if self.text.kind.kept:
            return None  # it lies in a pass by itself
        self.samples = [self.text_plan.samples[self.text.member]]
        self.given = [self.text_plan.given[self.text.member]]
        self._stream = _Stream(self.text_plan, self.text)
        rows = self._masked_rows() if self.text.kind.masked else self._plain_rows()
        if rows is None:
            return None
        passes = [Pass(tuple(rows))]
        if self.text.kind.continues:
            context = Segment(tuple(range(len(self.samples))), 0, self.text.exposure.context)
            passes = [Pass((Row((context,)),), kept=True), replace(passes[0], context=0)]
        return replace(self.text_plan, samples=tuple(self.samples), given=tuple(self.given), passes=tuple(passes))

    def _plain_rows(self) -> list[Row] | None:
        """The text in a row of its own, the last, and others as long as padding wants."""
        start, stop = self.text.exposure.context, self.text.exposure.stop
        limit = self._furthest(stop + self.wanted.padding)
        if limit is None or limit < stop:
            return None
        others = self.wanted.rows - 1
        length = limit - start if others else 0
        rows = [Row(tuple(self._company(length, start, limit, start))) for _ in range(others)]
        return [*rows, Row((Segment((0,), start, stop),))]

    def _masked_rows(self) -> list[Row] | None:
        """The text in pieces, its company before and behind it and, where there is padding, in a longer row above."""
        start, stop = self.text.exposure.context, self.text.exposure.stop
        limit = self._furthest(max(stop, self.text.exposure.given + self.wanted.off))
        bounds = self._bounds(start, stop)
        # A prefix is what comes before the branch, or else the text's own first piece.
        branch = start or (bounds[1] if len(bounds) > 2 else start)
        if limit is None or limit < stop:
            return None
        gaps = range(self.wanted.gap, self.wanted.gap + branch + 2)
        gap = next((gap for gap in gaps if is_telling(gap, branch)), self.wanted.gap)
        before = list(self._company(gap, branch, limit, branch))
        behind = list(self._company(self.wanted.followers, branch, limit, stop))
        in_row = tuple(sorted({member for part in (*before, *behind) for member in part.members}))
        own = [Segment((0,), first, last) for first, last in pairwise(bounds)]
        above = []
        if branch > start:
            above = [replace(own.pop(0), members=(0, *in_row))]
        # Before all that follows the branch, so that every one of these tokens is out of its place.
        row = Row((*above, *before, *own, *behind))
        rows = []
        for number in range(1, self.wanted.rows):
            tokens = len(row) + self.wanted.padding if number == 1 else min(len(row), len(own[-1]))
            rows.append(Row(tuple(self._company(tokens, start, limit, start))))
        return [*rows, row]

    def _bounds(self, start: int, stop: int) -> list[int]:
        """Where the text's pieces begin, as in the plan and with as many more cuts as wanted, and where they end."""
        cuts = {segment.start for _, segment in Probe(self.text_plan, self.text).pieces}
        free = [cut for cut in range(stop - 1, start, -1) if cut not in cuts]
        cuts |= set(free[: max(0, self.wanted.pieces - len(cuts))])
        return [*sorted(cuts), stop]

    def _furthest(self, length: int) -> int | None:
        """The largest number up to a length that is on the same sides as the longest text of the plan's pass."""
        each = self.text_plan.passes[self.text.at]
        context = 0 if each.context is None else self.text_plan.passes[each.context].width
        masked = self.text.kind.masked
        there = max(part.stop for row in each.rows for part in row.segments) if masked else context + each.width
        if sides(self.critical, there) == sides(self.critical, length):
            return length
        bounds = [bound for limit in self.critical for bound in (limit - 1, limit) if bound <= length]
        same = [bound for bound in bounds if sides(self.critical, bound) == sides(self.critical, there)]
        return max(same, default=None)

    def _company(self, tokens: int, start: int, limit: int, instead: int) -> Iterator[Segment]:
        """Segments of other texts that share the text's beginning up to `start` and end at `limit` at the latest.

        They lie where the text would go on from `instead`. None of their tokens is the text's own at its position or
        its place: who took one for the other would be right by chance.
        """
        shared, own = self.samples[0].input_ids[:start], self.given[0].input_ids.tolist()
        while tokens > 0:
            length = min(tokens, limit - start)
            ids = torch.cat(
                [shared, self._stream.take(length, own[start : start + length], own[instead : instead + length])]
            )
            mask = torch.zeros((1, len(ids)), dtype=torch.bool)
            mask[0, -1] = True
            each = Sample("company", ids, mask)
            self.samples.append(each)
            self.given.append(each)
            yield Segment((len(self.samples) - 1,), start, start + length)
            tokens, instead = tokens - length, instead + length


class _Stream:
    """Tokens of other texts, those of the text itself where there is no other, over and over."""

    def __init__(self, plan: Plan, text: Placed) -> None:
        start, own = text.exposure.context, plan.given[text.member].input_ids.tolist()
        others = [each for index, each in enumerate(plan.given) if index != text.member][:_COMPANY]
        tokens = [token for each in others for token in each.input_ids[start:].tolist()] or own[::-1]
        self._tokens, self._distinct = cycle(tokens), list(dict.fromkeys([*tokens, *own]))

    def take(self, count: int, *avoided: Sequence[int]) -> Int[Tensor, "pos"]:
        """The next tokens, each another than those that stand at its place in any of some lists."""
        taken = []
        for place in range(count):
            unwanted = {tokens[place] for tokens in avoided if place < len(tokens)}
            token = next(self._tokens)
            if token in unwanted:
                token = next((other for other in self._distinct if other not in unwanted), token)
            taken.append(token)
        return torch.tensor(taken)
