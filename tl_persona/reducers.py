"""Folds pooled samples into one result, one sample at a time, with running sums in float64."""

from collections.abc import Sequence

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
