"""The mean over samples: every sample weighs the same, and float32 noise does not pile up."""

import gc
import tempfile
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import some
from torch import Tensor

from tl_persona.errors import InputError
from tl_persona.statistics import means as spool_module
from tl_persona.statistics.means import ActivationSpool, PersonaMean


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


BOTH_PLACES = pytest.mark.parametrize("in_memory_bytes", [2**20, 0], ids=["memory", "disk"])


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every temporary file that is opened."""
    opened: list[Any] = []
    real = tempfile.TemporaryFile

    def recorded(*args: Any, **kwargs: Any) -> Any:
        opened.append(real(*args, **kwargs))
        return opened[-1]

    monkeypatch.setattr(spool_module.tempfile, "TemporaryFile", recorded)
    return opened


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5)),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 1000),
    on_disk=st.booleans(),
)
def test_what_is_written_in_any_order_is_read_back_bit_for_bit(
    shape: tuple[int, int, int], order: Any, seed: int, on_disk: bool
) -> None:
    hooks, rows, d_model = shape
    activations = some(seed, rows, hooks, d_model)
    spool = ActivationSpool(hooks, rows, d_model, in_memory_bytes=0 if on_disk else 2**20)
    assert spool.on_disk is on_disk
    try:
        for row in order.sample(range(rows), rows):
            spool.write(row, activations[row])
        for hook in range(hooks):
            assert torch.equal(spool.read(hook), activations[:, hook])
    finally:
        spool.close()


def test_a_table_goes_to_disk_when_it_is_larger_than_the_limit_and_not_before() -> None:
    at_the_limit = ActivationSpool(2, 3, 5, in_memory_bytes=2 * 3 * 5 * 4)
    beyond = ActivationSpool(2, 3, 5, in_memory_bytes=2 * 3 * 5 * 4 - 1)
    assert (at_the_limit.on_disk, beyond.on_disk) == (False, True)
    at_the_limit.close()
    beyond.close()


@BOTH_PLACES
def test_a_table_keeps_no_half_precision_and_no_reference(in_memory_bytes: int) -> None:
    spool = ActivationSpool(1, 1, 4, in_memory_bytes=in_memory_bytes)
    written = some(0, 1, 4).to(torch.bfloat16)
    spool.write(0, written)
    expected = written.float()
    written.zero_()
    first = spool.read(0)
    assert first.dtype == torch.float32 and torch.equal(first, expected)
    first.zero_()
    assert torch.equal(spool.read(0), expected)
    spool.close()


@BOTH_PLACES
def test_closing_gives_the_table_and_the_file_back(in_memory_bytes: int, files: list[Any]) -> None:
    spool = ActivationSpool(3, 4, 5, in_memory_bytes=in_memory_bytes)
    assert len(files) == (in_memory_bytes == 0) and not any(file.closed for file in files)
    table = weakref.ref(spool._table)
    spool.close()
    gc.collect()
    assert table() is None and all(file.closed for file in files)
