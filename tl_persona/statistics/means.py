"""Activations collected while a run lasts: folded into means, or kept for statistics.

Means have running sums in float64. Statistics over folds need every sample's activation again after the last one has
been seen: up to a limit they stay in memory; past it they go to an unnamed temporary file, which the system removes
when the process ends, however it ends.
"""

import tempfile
from collections.abc import Sequence
from typing import IO

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_persona.errors import InputError
from tl_persona.tensors import LayerVectors, PooledMeans


class PersonaMean:
    """The mean over samples for each of several masks; every sample weighs the same, however long.

    Args:
        n_masks: How many results there are.

    Example:
        >>> mean = PersonaMean(1)
        >>> mean.add(torch.tensor([[[1.0, 2.0]]]), [0])
        >>> mean.add(torch.tensor([[[3.0, 6.0]]]), [0])
        >>> mean.results()[0]
        tensor([[2., 4.]])
    """

    def __init__(self, n_masks: int) -> None:
        self._sums: list[Float[Tensor, "hook d_model"] | None] = [None] * n_masks
        self._counts = [0] * n_masks

    def add(self, means: PooledMeans, masks: Sequence[int], counts: Sequence[int] | None = None) -> None:
        """Adds one sample, whose rows belong to the given masks; or sums over as many samples as `counts` says."""
        for row, mask, count in zip(means.double(), masks, counts or [1] * len(masks), strict=True):
            so_far = self._sums[mask]
            self._sums[mask] = row.clone() if so_far is None else so_far + row
            self._counts[mask] += count

    def results(self) -> list[LayerVectors]:
        """The mean of each mask in float32, shape (hook, d_model).

        Raises:
            InputError: A mask got no sample.
        """
        results = []
        for mask, (total, count) in enumerate(zip(self._sums, self._counts, strict=True)):
            if total is None:
                raise InputError(f"mask {mask} got no sample, so it has no mean")
            results.append((total / count).to(torch.float32))
        return results


IN_MEMORY_BYTES = 256 * 2**20
"""32 pairs of a 70B model's 80 layers fit; thousands of pairs do not."""


class ActivationSpool:
    """A writable table of shape (hook, row, d_model) in float32, read one hook at a time.

    Args:
        n_hooks: Number of hooks.
        n_rows: Number of samples.
        d_model: Width.
        in_memory_bytes: Above this size the table lies in a temporary file.

    Example:
        >>> spool = ActivationSpool(2, 3, 4)
        >>> spool.write(1, torch.ones(2, 4))
        >>> spool.read(0).sum(dim=1)
        tensor([0., 4., 0.])
        >>> spool.close()
    """

    def __init__(self, n_hooks: int, n_rows: int, d_model: int, *, in_memory_bytes: int = IN_MEMORY_BYTES) -> None:
        shape = (n_hooks, n_rows, d_model)
        self._file: IO[bytes] | None = None
        if n_hooks * n_rows * d_model * 4 <= in_memory_bytes:
            self._table = np.zeros(shape, np.float32)
        else:
            self._file = tempfile.TemporaryFile(prefix="tl_persona-")  # noqa: SIM115 - closed by close()
            self._table = np.memmap(self._file, np.float32, "w+", shape=shape)

    @property
    def on_disk(self) -> bool:
        """True where the table lies in a temporary file."""
        return self._file is not None

    def write(self, row: int, activations: Float[Tensor, "hook d_model"]) -> None:
        """Keeps one sample's activations."""
        self._table[:, row] = activations.to(torch.float32).numpy()

    def read(self, hook: int) -> Float[Tensor, "row d_model"]:
        """All samples' activations of one hook, copied."""
        return torch.from_numpy(np.array(self._table[hook]))

    def close(self) -> None:
        """Gives the memory or the file back."""
        del self._table
        if self._file is not None:
            self._file.close()
