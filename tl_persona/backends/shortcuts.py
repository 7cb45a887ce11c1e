"""Where a plan computes something otherwise than a text whole and by itself, and which text speaks for which.

To continue a prefix that ran before, to lie beside another text, to end after the last token that a mask selects: each
is right on most models, and on some it is not. What may go wrong with a text follows from a few integers of the place
where it runs, and grows with each of them; so a text that was compared there, and whose integers are as large, stands
for it. `docs/decisions/0011-probe-texts.md` has the argument.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import gcd
from typing import NamedTuple

from tl_persona.plan.passes import needs_mask
from tl_persona.plan.plan import Plan, Sharing
from tl_persona.plan.rows import Pass, Row, Segment


class Kind(NamedTuple):
    """What must be the same of two texts if one is to stand for the other.

    Attributes:
        continues: Whether they continue a kept prefix.
        masked: Whether their passes need a mask and positions of their own.
        kept: Whether their passes are kept, to be continued.
        sides: For each critical length of the model, whether text, given text, prefix, the row up to the text's end,
            the longest text of the pass, its width and its keys are below (-1), at (0) or above (1) it.
        pieces: The same of each segment of the text in its row: its first position, and the places in the row where it
            begins and ends. Segments that lie alike count once.
    """

    continues: bool
    masked: bool
    kept: bool
    sides: tuple[int, ...]
    pieces: tuple[tuple[int, ...], ...] = ((),)

    @property
    def shares(self) -> bool:
        """Whether tokens run once for several samples."""
        return self.continues or self.masked or self.kept


class Exposure(NamedTuple):
    """How far a text is exposed to what a shortcut may disturb, in tokens if not said otherwise.

    Attributes:
        stop: Its tokens that run, up to the last that a mask selects.
        given: Its length as it was given.
        cut: What of it does not run.
        context: The kept prefix that it continues.
        own: Its tokens in its row.
        pieces: The segments of its row that are its, a count.
        gap: Tokens of others before its last token in the row: how far its place in the row is from its position.
        followers: Tokens of others behind it in its row.
        padding: Padding behind its row.
        off: How far the longest text of the pass is from its length as it was given, to either side.
        row: Rows before its own, a count.
        rows: Rows of the pass, a count.
    """

    stop: int
    given: int
    cut: int
    context: int
    own: int
    pieces: int
    gap: int
    followers: int
    padding: int
    off: int
    row: int
    rows: int


class Placed(NamedTuple):
    """A text where it runs.

    Attributes:
        kind: What it can be compared with.
        exposure: How far it is exposed there.
        at: The pass, by its index in the plan.
        row: The row of that pass.
        member: The sample.
        telling: Whether it speaks for other gaps than its own; see `is_telling`.
    """

    kind: Kind
    exposure: Exposure
    at: int
    row: int
    member: int
    telling: bool


def stands_for(one: Exposure, other: Exposure, telling: bool = True) -> bool:
    """Whether a text of the same kind that is exposed like `one`, and right at all its tokens, speaks for `other`.

    Args:
        one: Of the text that was compared.
        other: Of the text in question.
        telling: Whether `one` speaks for other gaps than its own.

    Example:
        >>> long = Exposure(90, 92, 2, 40, 50, 1, 31, 60, 0, 0, 0, 1)
        >>> stands_for(long, long._replace(stop=80, own=40)), stands_for(long, long._replace(gap=32))
        (True, False)
    """
    if not telling and (one.context, one.gap) != (other.context, other.gap):
        return False
    return all(mine >= others for mine, others in zip(one, other, strict=True))


def is_telling(gap: int, branch: int) -> bool:
    """Whether a text stands for others with its gap: no two mistakes of a place in the row can cancel out.

    A model that counts chunks, or positions, from the wrong place is right where the gap happens to be as long as
    some chunks, and what follows begins with one, or where the gap is as long as what is before it.

    Args:
        gap: Tokens of others before the text's last token in its row.
        branch: The position of its first token that has as many before it.
    """
    return gap == 0 or (gcd(gap, branch) == 1 and gap != branch)


def placed_texts(plan: Plan, critical_lengths: Sequence[int]) -> list[Placed]:
    """Every text of a plan that does not run whole and alone; of those that are exposed alike only the first.

    Args:
        plan: What is to run.
        critical_lengths: Lengths at which the model may start to treat a text differently.
    """
    found: dict[tuple[Kind, Exposure], Placed] = {}
    for index, each in enumerate(plan.passes):
        for text in _texts_of(plan, index, each, critical_lengths):
            alone = not text.kind.shares and text.exposure.rows == 1 and not text.exposure.cut
            if not alone:
                found.setdefault((text.kind, text.exposure), text)
    return list(found.values())


def _texts_of(plan: Plan, index: int, each: Pass, critical_lengths: Sequence[int]) -> Iterator[Placed]:
    """The texts that end in a pass."""
    context = 0 if each.context is None else plan.passes[each.context].width
    masked, width = needs_mask(plan, each), each.width
    # Without positions of their own all rows are as long as the longest for the model.
    ends = [segment.stop for row in each.rows for segment in row.segments]
    longest = max(ends) if masked else context + width
    for row_index, row in enumerate(each.rows):
        members = [frozenset(segment.members) for segment in row.segments]
        end = 0
        for place, segment in enumerate(row.segments):
            end += len(segment)
            ending: dict[int, int] = {}
            for member in segment.members:
                if len(plan.samples[member].input_ids) == segment.stop:
                    ending.setdefault(len(plan.given[member].input_ids), member)
            for given, member in ending.items():
                exposure = Exposure(
                    stop=segment.stop,
                    given=given,
                    cut=given - segment.stop,
                    context=context,
                    own=segment.stop - context,
                    pieces=sum(member in above for above in members[: place + 1]),
                    gap=context + end - segment.stop,
                    followers=len(row) - end,
                    padding=width - len(row),
                    off=abs(longest - given),
                    row=row_index,
                    rows=len(each.rows),
                )
                lengths = (segment.stop, given, context, context + end, longest, width, context + width)
                kind = Kind(
                    each.context is not None,
                    masked,
                    each.kept,
                    sides(critical_lengths, *lengths),
                    _sides_of_pieces(critical_lengths, row, place, member, context),
                )
                telling = is_telling(exposure.gap, _branch(row, place, member, context, exposure.gap))
                yield Placed(kind, exposure, index, row_index, member, telling)


def _pieces(row: Row, place: int, member: int, context: int) -> list[tuple[Segment, int]]:
    """The segments of a text that ends in one of them, each with the place in the row where it begins."""
    segments = row.segments[: place + 1]
    begins = accumulate(map(len, segments), initial=context)
    return [(part, begin) for part, begin in zip(segments, begins, strict=False) if member in part.members]


def _sides_of_pieces(
    critical_lengths: Sequence[int], row: Row, place: int, member: int, context: int
) -> tuple[tuple[int, ...], ...]:
    pieces = _pieces(row, place, member, context)
    return tuple(sorted({sides(critical_lengths, part.start, begin, begin + len(part)) for part, begin in pieces}))


def _branch(row: Row, place: int, member: int, context: int, gap: int) -> int:
    """The position of the first token of a text that is as far out of its place as the last."""
    pieces = _pieces(row, place, member, context)
    return min(part.start for part, begin in pieces if begin - part.start == gap)


def placed_text(plan: Plan, index: int, member: int, critical_lengths: Sequence[int]) -> Placed:
    """Where one sample ends in a pass."""
    texts = _texts_of(plan, index, plan.passes[index], critical_lengths)
    return next(text for text in texts if text.member == member)


def sides(critical_lengths: Sequence[int], *lengths: int) -> tuple[int, ...]:
    """For each critical length, whether each of these is below (-1), at (0) or above (1) it.

    Example:
        >>> sides([8, 16], 8, 20)
        (0, 1, -1, 1)
    """
    return tuple((length > limit) - (length < limit) for limit in critical_lengths for length in lengths)


TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "float16": 2e-2, "bfloat16": 5e-2}
"""Largest difference relative to the norm, by parameter dtype: several roundings of a long sum, not more."""


def tolerance_of(dtype: str) -> float:
    """The tolerance for a parameter dtype; a quantized one is held to that of float32.

    Example:
        >>> tolerance_of("bfloat16"), tolerance_of("int8")
        (0.05, 1e-05)
    """
    return TOLERANCE.get(dtype, TOLERANCE["float32"])


def next_best(plan: Plan) -> Plan:
    """The plan with less sharing, and in the end with none, every text whole and by itself."""
    if plan.sharing is Sharing.NONE:
        return plan.alone()
    return plan.with_sharing(Sharing.CACHED if plan.sharing is Sharing.PACKED else Sharing.NONE)


def choice_in(plan: Plan, chosen_keys: int | None) -> str | None:
    """Why no text of a plan can stand for another, where the model chooses keys by what they are; None where it can.

    Args:
        plan: What is to run.
        chosen_keys: How many keys a token attends to; None where it attends to all that it may.
    """
    if chosen_keys is None:
        return None
    prefixes = (0 if each.context is None else plan.passes[each.context].width for each in plan.passes)
    keys = max(prefix + each.width for prefix, each in zip(prefixes, plan.passes, strict=True))
    if keys <= chosen_keys:
        return None
    return f"of {keys} keys the model chooses {chosen_keys} by what they are: one text tells nothing of another"
