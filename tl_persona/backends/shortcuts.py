"""Where a plan computes something otherwise than a text whole and by itself, and how far the two may lie apart.

To continue a prefix that ran before, to lie beside another text, to end after the last token that a mask selects: each
is right on most models, and on some it is not.
"""

from collections.abc import Sequence
from typing import NamedTuple

from tl_persona.plan.passes import needs_mask
from tl_persona.plan.plan import Plan, Sharing
from tl_persona.plan.rows import Segment


class Regime(NamedTuple):
    """Passes that a model can be expected to treat alike.

    Attributes:
        continues: Whether they continue a kept prefix.
        masked: Whether they need a mask and positions of their own.
        several: Whether they have more than one row.
        lengths: For each critical length of the model, whether prefix, longest and shortest text and number of keys are
            below (-1), at (0) or above (1) it.
    """

    continues: bool
    masked: bool
    several: bool
    lengths: tuple[int, ...]

    @property
    def shares(self) -> bool:
        """Whether tokens run once for several samples."""
        return self.continues or self.masked


class Shortcut(NamedTuple):
    """Where a plan takes a kind of shortcut.

    Attributes:
        passes: The one with the longest text, and the one with the most keys if that is another.
        text: Length of the longest text, as it was given.
        keys: The most keys that a row has before and beside it.
    """

    passes: tuple[int, ...]
    text: int
    keys: int


def shortcuts(plan: Plan, critical_lengths: Sequence[int]) -> dict[Regime, Shortcut]:
    """The kinds of shortcut that a plan takes, each with the passes that go furthest in it."""
    longest: dict[Regime, tuple[int, int, int]] = {}
    widest: dict[Regime, tuple[int, int, int]] = {}
    for index, each in enumerate(plan.passes):
        segments = [segment for row in each.rows for segment in row.segments]
        text = max(_given_length(plan, segment) for segment in segments)
        if each.kept or not (each.context is not None or len(segments) > 1 or text > segments[0].stop):
            continue  # a kept prefix is part of what continues it; a whole text by itself is what all is compared with
        context = 0 if each.context is None else plan.passes[each.context].width
        keys = context + each.width
        regime = Regime(
            continues=each.context is not None,
            masked=needs_mask(plan, each),
            several=len(each.rows) > 1,
            lengths=sides(critical_lengths, context, text, min(segment.stop for segment in segments), keys),
        )
        longest[regime] = max(longest.get(regime, (0, 0, 0)), (text, keys, index))
        widest[regime] = max(widest.get(regime, (0, 0, 0)), (keys, text, index))
    return {
        regime: Shortcut(tuple(dict.fromkeys((index, widest[regime][2]))), text, widest[regime][0])
        for regime, (text, _, index) in longest.items()
    }


def _given_length(plan: Plan, segment: Segment) -> int:
    """Length of the longest text that a segment is the last of; what it is where others go on."""
    ends = [member for member in segment.members if len(plan.samples[member].input_ids) == segment.stop]
    return max((len(plan.given[member].input_ids) for member in ends), default=segment.stop)


def sides(critical_lengths: Sequence[int], *lengths: int) -> tuple[int, ...]:
    """For each critical length, whether each of these is below (-1), at (0) or above (1) it."""
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
