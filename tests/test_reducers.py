"""The mean over samples: every sample weighs the same, and float32 noise does not pile up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tl_persona.errors import InputError
from tl_persona.statistics.means import PersonaMean


def pooled(*values: float) -> Tensor:
    """Means of shape (mask, 1, 1): one value a mask."""
    return torch.tensor(values)[:, None, None]


@settings(deadline=None)
@given(st.data())
def test_the_mean_of_each_mask_is_over_its_own_samples_in_any_order(data: st.DataObject) -> None:
    numbers = st.floats(-1e6, 1e6, width=32)
    rows = data.draw(st.lists(st.tuples(st.sampled_from([(0,), (1,), (0, 1), (1, 0)]), numbers, numbers), max_size=20))
    added = [((0, 1), 1.0, 2.0), *rows]
    mean = PersonaMean(2)
    for masks, first, second in data.draw(st.permutations(added)):
        mean.add(pooled(*(first, second)[: len(masks)]), masks)
    for mask, result in enumerate(mean.results()):
        mine = [values[masks.index(mask)] for masks, *values in added if mask in masks]
        expected = torch.tensor(mine, dtype=torch.float64).mean().float()
        assert result.dtype == torch.float32
        torch.testing.assert_close(result[0, 0], expected, rtol=1e-6, atol=1e-9)


def test_sums_run_in_float64() -> None:
    mean = PersonaMean(1)
    for value in (2.0**30, 1.0, -(2.0**30)):
        mean.add(pooled(value), [0])
    assert mean.results()[0].item() == pytest.approx(1 / 3)


def test_what_was_added_may_be_changed_afterwards() -> None:
    for dtype in (torch.float32, torch.float64):
        mean, reused = PersonaMean(1), pooled(4.0).to(dtype)
        for value in (4.0, 8.0):
            reused.fill_(value)
            mean.add(reused, [0])
        reused.fill_(100.0)
        assert mean.results()[0].item() == 6.0


def test_layers_and_dimensions_stay_apart() -> None:
    first = torch.arange(6.0).reshape(1, 2, 3)
    mean = PersonaMean(1)
    mean.add(first, [0])
    mean.add(10 * first, [0])
    assert torch.equal(mean.results()[0], 5.5 * first[0])


def test_a_mask_without_samples_has_no_mean() -> None:
    mean = PersonaMean(2)
    mean.add(pooled(1.0), [0])
    with pytest.raises(InputError, match="mask 1 got no sample"):
        mean.results()
