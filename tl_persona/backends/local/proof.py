"""Whether a shortcut is exact on this model, found by running one real sample both ways.

Sliding windows, recurrent state, positions counted from the padding: an architecture has many ways to break a shared
prefix, and no list of them is complete. So none is trusted: the first sample that would take the shortcut also runs
whole and alone, and every captured position must agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tl_persona.backends.local.passes import Runner
from tl_persona.plan import Pass, Plan, Row, Segment, Sharing

TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "float16": 2e-2, "bfloat16": 5e-2}
"""Largest relative difference of a hook's residuals, by dtype: several roundings of a long sum, not more."""


@dataclass(frozen=True)
class Verdict:
    """What came of a proof.

    Attributes:
        error: Largest relative difference found; None where the shortcut could not run at all.
        holds: Whether it is within the tolerance.
        reason: What was seen, for people.
    """

    error: float | None
    holds: bool
    reason: str


def prove(runner: Runner, plan: Plan, names: Sequence[str], dtype: str) -> Verdict | None:
    """Compares the plan's shortcut with the plain path on the most exposed sample; None where it takes no shortcut."""
    chosen = _most_exposed(plan)
    if chosen is None:
        return None
    index, row_index, segment = chosen
    whole = Pass((Row((Segment(segment.members[:1], 0, segment.stop),)),))
    plain, _ = runner.run(plan, whole, names, None, 0)
    each = plan.passes[index]
    try:
        context: Any = None
        length = 0
        if each.context is not None:
            prefix = plan.passes[each.context]
            length = prefix.width
            _, context = runner.run(plan, prefix, names, None, 0)
        fast, _ = runner.run(plan, replace(each, kept=False), names, context, length)
    except Exception as error:  # an architecture may refuse in any way; plain passes do not depend on it
        return Verdict(None, False, f"it raised {type(error).__name__}: {error}")
    row = each.rows[row_index]
    begin = sum(len(part) for part in row.segments[: row.segments.index(segment)])
    errors = []
    for name in names:
        expected = plain[name][0, segment.start : segment.stop].double()
        got = fast[name][row_index, begin : begin + len(segment)].double()
        errors.append(float((got - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float64).tiny)))
    worst = max(errors)
    tolerance = TOLERANCE.get(dtype, TOLERANCE["float32"])
    # Written so that NaN does not hold.
    return Verdict(worst, worst <= tolerance, f"relative difference {worst:.1e}, allowed {tolerance:.0e}")


def _most_exposed(plan: Plan) -> tuple[int, int, Segment] | None:
    """The pass, row and segment furthest from plain: behind the longest context, with the most beside it."""
    best: tuple[tuple[int, int, int], tuple[int, int, Segment]] | None = None
    for index, each in enumerate(plan.passes):
        context = plan.passes[each.context].width if each.context is not None else 0
        if not context and not each.packed and len(each.rows) == 1:
            continue
        for row_index, row in enumerate(each.rows):
            segment = row.segments[-1]
            exposure = (context, len(row), segment.stop)
            if (context or each.packed) and (best is None or exposure > best[0]):
                best = (exposure, (index, row_index, segment))
    return best[1] if best else None


def next_best(sharing: Sharing) -> Sharing:
    """What to fall back to."""
    return Sharing.CACHED if sharing is Sharing.PACKED else Sharing.NONE
