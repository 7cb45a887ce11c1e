"""Which selected tokens stand out of their text, counted by hand."""

import statistics
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tl_persona.statistics.outliers import NOT_CHECKED, OutlierTally

ORDINARY = [1.0, 2.0, 3.0, 2.0, 1.0]


def mask(*places: int, length: int = 6) -> Tensor:
    return torch.isin(torch.arange(length), torch.tensor(places))


def tally_of(norms: list[list[float]], *masks: Tensor, **options: Any) -> OutlierTally:
    tally = OutlierTally(len(norms), **options)
    for index, each in enumerate(masks):
        tally.add(index, torch.tensor(norms), each)
    return tally


@pytest.mark.parametrize(("norm", "tokens"), [(19.9, 0), (20.0, 1), (1e6, 1)])
def test_a_selected_token_of_ten_medians_is_outlying(norm: float, tokens: int) -> None:
    tally = tally_of([[*ORDINARY, norm]], mask(1, 5))
    found = tally.as_metadata(0)
    assert found == {"tokens": tokens, "texts": tokens, "largest_share": pytest.approx(norm / (norm + 2.0))}
    assert tally.hooks == ([0] if tokens else [])


def test_a_token_that_no_mask_selects_is_not_counted_and_makes_no_share() -> None:
    tally = tally_of([[1000.0, *ORDINARY]], mask(1, 2))
    assert tally.as_metadata(0) == {"tokens": 0, "texts": 0, "largest_share": pytest.approx(2 / 3)}
    assert tally.hooks == [] and tally.worst is None


def test_tokens_after_the_last_selected_one_have_no_part_in_the_median() -> None:
    # Up to the selected token the median is 1, over everything it would be 100.
    norms = [[1.0, 1.0, 30.0, 100.0, 100.0, 100.0]]
    assert tally_of(norms, mask(2)).as_metadata(0)["tokens"] == 1
    assert tally_of(norms, mask(2, 5)).as_metadata(0)["tokens"] == 0


def test_each_hook_and_each_text_is_counted_by_itself() -> None:
    one, other = [*ORDINARY, 50.0], [70.0, *ORDINARY]
    tally = tally_of([one, other, [*ORDINARY, 1.0]], mask(0, 5), mask(5), mask(1, 2))
    counts = [tally.as_metadata(hook) for hook in range(3)]
    assert [(found["tokens"], found["texts"]) for found in counts] == [(2, 2), (1, 1), (0, 0)]
    assert (tally.hooks, tally.most) == ([0, 1], 2)
    assert (tally.worst.sample, tally.worst.position, tally.worst.hook) == (0, 0, 1)
    assert tally.worst.ratio == pytest.approx(35.0)


def test_one_token_alone_has_no_share() -> None:
    assert tally_of([[*ORDINARY, 1.0]], mask(3)).as_metadata(0) == {"tokens": 0, "texts": 0, "largest_share": None}


def test_token_0_is_counted_and_no_reason_to_warn_where_it_was_asked_for() -> None:
    norms = [[700.0, *ORDINARY]]
    asked = tally_of(norms, mask(0, 1), expects_first=True)
    assert asked.as_metadata(0) == tally_of(norms, mask(0, 1)).as_metadata(0)
    assert asked.as_metadata(0)["tokens"] == 1
    assert asked.hooks == [] and asked.worst is None
    assert tally_of(norms, mask(0, 1)).hooks == [0]
    assert tally_of([[700.0, *ORDINARY[:-1], 90.0]], mask(0, 5), expects_first=True).worst.position == 5


def test_norms_that_are_not_known_of_one_text_leave_all_unchecked() -> None:
    tally = tally_of([[*ORDINARY, 900.0]], mask(5))
    tally.add(1, None, mask(5))
    assert tally.as_metadata(0) == NOT_CHECKED == "not checked"
    assert tally.hooks == []


def test_zeros_are_not_outlying_beside_zeros_and_nan_elsewhere_hides_nothing() -> None:
    assert tally_of([[0.0] * 6], mask(1, 5)).as_metadata(0)["tokens"] == 0
    assert tally_of([[torch.nan, *ORDINARY[1:], 900.0]], mask(1, 5)).as_metadata(0)["tokens"] == 1


@given(st.lists(st.tuples(st.floats(0.01, 1e5), st.booleans()), min_size=1, max_size=9))
def test_counts_and_shares_are_those_of_a_loop(tokens: list[tuple[float, bool]]) -> None:
    tokens = [*tokens, (3.0, True)]
    norms = torch.tensor([[norm for norm, _ in tokens]])
    chosen = [norm for norm, (_, selected) in zip(norms[0].tolist(), tokens, strict=True) if selected]
    median = statistics.median_low(norms[0].tolist())
    tally = OutlierTally(1)
    tally.add(0, norms, torch.tensor([selected for _, selected in tokens]))
    outlying = sum(norm >= 10 * median for norm in chosen)
    share = max(chosen) / sum(chosen) if len(chosen) > 1 else None
    expected = {"tokens": outlying, "texts": int(outlying > 0), "largest_share": share}
    assert tally.as_metadata(0) == (expected if share is None else pytest.approx(expected))
