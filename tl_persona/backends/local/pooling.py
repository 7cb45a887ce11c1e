"""Means of captured activations over token masks.

Only positions that some mask selects are read, so padding cannot leak in, not even as 0 * infinity. Sums run in
float64 where the device has it: bfloat16 sums lose a mean past some 256 tokens.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_persona.errors import NonFiniteError
from tl_persona.plan import Sample
from tl_persona.tensors import PooledMeans


class BatchPooler:
    """Pools one batch: rows of samples, padded on the right."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples
        self._counts = [sample.masks.shape[0] for sample in samples]
        rows, positions, weights = [], [], []
        for row, sample in enumerate(samples):
            used = sample.masks.any(dim=0).nonzero()[:, 0]
            rows.append(torch.full_like(used, row))
            positions.append(used)
            selected = sample.masks[:, used].double()
            weights.append(selected / selected.sum(dim=1, keepdim=True))
        self._rows = torch.cat(rows)
        self._positions = torch.cat(positions)
        self._weights: Float[Tensor, "slot selected"] = torch.block_diag(*weights)

    def means(self, cache: Mapping[str, Tensor], hook_names: Sequence[str]) -> list[PooledMeans]:
        """One tensor a sample, of shape (mask, hook, d_model), on the CPU.

        Raises:
            NonFiniteError: A mean holds NaN or infinity; names the sample and the hook.
        """
        pooled = torch.stack([self._pool(cache[name]) for name in hook_names], dim=1)
        if not bool(torch.isfinite(pooled).all()):
            self._name_the_culprit(pooled, hook_names)
        return list(pooled.split(self._counts))

    def _pool(self, activation: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "slot d_model"]:
        device = activation.device
        accumulate = torch.float32 if device.type == "mps" else torch.float64
        selected = activation[self._rows.to(device), self._positions.to(device)].to(accumulate)
        return (self._weights.to(device, accumulate) @ selected).cpu()

    def _name_the_culprit(self, pooled: Float[Tensor, "slot hook d_model"], hook_names: Sequence[str]) -> None:
        slot, hook, _ = (~torch.isfinite(pooled)).nonzero()[0].tolist()
        owners = [sample for sample, count in zip(self._samples, self._counts, strict=True) for _ in range(count)]
        raise NonFiniteError(
            f"sample {owners[slot].sample_id!r}: the activation at {hook_names[hook]} holds NaN or infinity: load the "
            "model in float32 or bfloat16, or leave the sample out"
        )
