"""The spool gives back what it was given, from memory as from disk, and leaves nothing open."""

import gc
import tempfile
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tl_persona.statistics import means as spool_module
from tl_persona.statistics.means import ActivationSpool

BOTH_PLACES = pytest.mark.parametrize("in_memory_bytes", [2**20, 0], ids=["memory", "disk"])


def some(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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
