"""What a plan refuses before any model runs, and what it never loses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tl_persona.errors import InputError, MaskError
from tl_persona.plan import Sample, make_plan


def sample(*ids: int, sample_id: str = "q7") -> Sample:
    return Sample(sample_id, torch.tensor(ids, dtype=torch.long), torch.ones(1, len(ids), dtype=torch.bool))


IDS, MASK = torch.tensor([4, 5, 6]), torch.tensor([[True, False, True]])


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (Sample("q7", IDS[None], MASK), InputError, r"'q7'.*1-D.*\(1, 3\)"),
        (Sample("q7", IDS, MASK[0]), InputError, "'q7'.*3 token ids"),
        (Sample("q7", IDS, MASK[:, :2]), InputError, "'q7'.*3 token ids but a mask over 2 positions"),
        (Sample("q7", IDS[:0], MASK[:, :0]), InputError, "'q7' has no tokens"),
        (Sample("q7", IDS.float(), MASK), InputError, "'q7'.*integers.*float32"),
        (Sample("q7", IDS, torch.cat([MASK, ~MASK & False])), MaskError, "'q7': a mask selects 0 of 3 tokens"),
        (sample(*range(9)), InputError, "'q7' has 9 tokens, the model's context is 8"),
    ],
)
def test_a_sample_that_cannot_run_is_named(bad: Sample, kind: type[InputError], message: str) -> None:
    with pytest.raises(kind, match=message):
        make_plan([sample(1, 2, sample_id="good"), bad], n_ctx=8)


def test_a_sample_may_fill_the_context_and_exceed_the_budget() -> None:
    assert make_plan([sample(*range(8))], n_ctx=8, batch_tokens=2).tokens == 8


def test_a_model_without_a_context_limit_takes_any_length() -> None:
    assert make_plan([sample(*range(5000))], n_ctx=None).tokens == 5000


def test_nothing_to_run_and_no_budget_are_refused() -> None:
    with pytest.raises(InputError, match="no sample to run"):
        make_plan([])
    with pytest.raises(InputError, match="batch_tokens must be at least 1, got 0"):
        make_plan([sample(1)], batch_tokens=0)


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=12), st.integers(1, 60))
def test_a_plan_keeps_the_callers_samples_and_counts_their_tokens(texts: list[list[int]], budget: int) -> None:
    samples = [sample(*ids, sample_id=str(index)) for index, ids in enumerate(texts)]
    plan = make_plan(samples, batch_tokens=budget)
    assert [one.sample_id for one in plan.samples] == [str(index) for index in range(len(texts))]
    assert plan.tokens == sum(map(len, texts))
