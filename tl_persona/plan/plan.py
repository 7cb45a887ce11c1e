"""Decides what runs together: shared prefixes once, the rest in passes under a token budget.

Samples of one persona begin with the same system prompt, the two texts of a contrast pair with the same turns. The
plan has each such beginning computed once, and lays the rest out: one sample a row, or several side by side where the
model can be kept from mixing them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from tl_persona.errors import InputError
from tl_persona.plan.prefixes import MIN_SHARED, prefix_trees
from tl_persona.plan.rows import Layout, Pass
from tl_persona.tensors import Sample as Sample

DEFAULT_BATCH_TOKENS = 1024
"""Enough to fill a CPU's matrix units; backends that know their free memory set their own."""


class Sharing(StrEnum):
    """How far a model lets samples share their beginnings.

    `NONE`: every sample runs whole. `CACHED`: a prefix runs once and its keys and values are continued by rows of one
    sample each. `PACKED`: texts also lie side by side in one row, with a mask and positions of their own.
    """

    NONE = "none"
    CACHED = "cached"
    PACKED = "packed"


@dataclass(frozen=True)
class Plan:
    """What runs, in which order, and what it costs.

    Attributes:
        samples: All samples, in the caller's order, each up to the last position that a mask selects.
        given: The same samples as they were given.
        passes: In the order to run them.
        sharing: What the model was taken to be capable of.
        wanted: The same before anything was found out about the model.
        tokens: Tokens of all samples.
        tokens_distinct: Tokens that are computed, each shared one once.
        tokens_run: Tokens that go through the model, padding included.
        batch_tokens: The budget it was made with.
        max_rows: The limit on rows it was made with.
    """

    samples: tuple[Sample, ...]
    given: tuple[Sample, ...]
    passes: tuple[Pass, ...]
    sharing: Sharing
    wanted: Sharing
    tokens: int
    tokens_distinct: int
    tokens_run: int
    batch_tokens: int
    max_rows: int | None

    def with_sharing(self, sharing: Sharing) -> "Plan":
        """The same samples within the same limits, laid out for another kind of sharing."""
        plan = make_plan(self.given, batch_tokens=self.batch_tokens, max_rows=self.max_rows, sharing=sharing)
        return replace(plan, wanted=self.wanted)

    def alone(self) -> "Plan":
        """Every sample whole and by itself: right wherever what follows a text, or lies beside it, may change it."""
        layout = Layout(self.batch_tokens, 1, packs=False)
        for index, sample in enumerate(self.given):
            layout.add_sample(index, len(sample.input_ids))
        plan = _plan(self.given, self.given, layout, Sharing.NONE, self.batch_tokens, self.max_rows)
        return replace(plan, wanted=self.wanted)

    def peak_bytes(self, n_hooks: int, d_model: int, bytes_per_number: int = 4) -> int:
        """Bytes that the captured activations of the largest pass take."""
        return max(each.tokens_run for each in self.passes) * n_hooks * d_model * bytes_per_number


def make_plan(
    samples: Sequence[Sample],
    *,
    n_ctx: int | None = None,
    vocabulary: int | None = None,
    batch_tokens: int | None = None,
    max_rows: int | None = None,
    sharing: Sharing = Sharing.NONE,
) -> Plan:
    """Checks the samples and lays them out in passes.

    Args:
        samples: What to run.
        n_ctx: The model's context, which no sample may exceed.
        vocabulary: How many tokens the model has.
        batch_tokens: Padded tokens a pass may hold; None is `DEFAULT_BATCH_TOKENS`. A longer sample runs alone.
        max_rows: Rows a pass may hold; None sets no limit.
        sharing: What the model is capable of.

    Raises:
        InputError: No sample, a limit below 1, or a sample that cannot run (see `Sample.check`).
    """
    if not samples:
        raise InputError("there is no sample to run: pass at least one")
    budget = DEFAULT_BATCH_TOKENS if batch_tokens is None else batch_tokens
    for name, limit in (("batch_tokens", budget), ("the number of rows", max_rows)):
        if limit is not None and limit < 1:
            raise InputError(f"{name} must be at least 1, got {limit}")
    for sample in samples:
        sample.check(n_ctx, vocabulary)
    given, samples = samples, [sample.needed() for sample in samples]
    layout = Layout(budget, max_rows, packs=sharing is Sharing.PACKED)
    if sharing is Sharing.NONE:
        for index, sample in enumerate(samples):
            layout.add_sample(index, len(sample.input_ids))
    else:
        for tree in prefix_trees([each.input_ids.cpu().numpy() for each in samples], MIN_SHARED):
            layout.add_tree(tree)
    return _plan(given, samples, layout, sharing, budget, max_rows)


def _plan(
    given: Sequence[Sample],
    samples: Sequence[Sample],
    layout: Layout,
    sharing: Sharing,
    budget: int,
    max_rows: int | None,
) -> Plan:
    passes = layout.passes()
    return Plan(
        samples=tuple(samples),
        given=tuple(given),
        passes=passes,
        sharing=sharing,
        wanted=sharing,
        tokens=sum(len(sample.input_ids) for sample in samples),
        tokens_distinct=sum(len(row) for each in passes for row in each.rows),
        tokens_run=sum(each.tokens_run for each in passes),
        batch_tokens=budget,
        max_rows=max_rows,
    )
