"""Means of captured activations over token masks, put together from the passes that computed a sample's tokens.

Only positions that some mask selects are read, so padding cannot leak in, not even as 0 * infinity. Sums run in
float64 where the device has it: bfloat16 sums lose a mean past some 256 tokens.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_persona.backends import Pooled
from tl_persona.errors import NonFiniteError
from tl_persona.plan import Pass, Plan
from tl_persona.tensors import PooledMeans


class PoolingRun:
    """Follows a plan pass by pass; keeps sums only of samples that are not done.

    Args:
        plan: What is run.
        hook_names: The hooks, in the order of the results.
    """

    def __init__(self, plan: Plan, hook_names: Sequence[str]) -> None:
        self._samples = plan.samples
        self._hook_names = list(hook_names)
        self._sums: dict[int, PooledMeans] = {}
        self._segments_left = [0] * len(plan.samples)
        for each in plan.passes:
            for row in each.rows:
                for segment in row.segments:
                    for member in segment.members:
                        self._segments_left[member] += 1

    def add(self, each: Pass, captured: Mapping[str, Tensor]) -> list[Pooled]:
        """Adds what one pass captured, (row, pos, d_model) by hook, and gives the samples that are complete with it.

        Raises:
            NonFiniteError: A mean holds NaN or infinity; names the sample and the hook.
        """
        rows, positions, weights, owners = [], [], [], []
        done = []
        for row_index, row in enumerate(each.rows):
            offset = 0
            for segment in row.segments:
                for member in segment.members:
                    masks = self._samples[member].masks
                    part = masks[:, segment.start : segment.stop]
                    used = part.any(dim=0).nonzero()[:, 0]
                    if len(used):
                        rows.append(torch.full_like(used, row_index))
                        positions.append(offset + used)
                        weights.append(part[:, used].double() / masks.sum(dim=1, keepdim=True))
                        owners.append(member)
                    self._segments_left[member] -= 1
                    if not self._segments_left[member]:
                        done.append(member)
                offset += len(segment)
        if owners:
            pooled = self._weighted(captured, torch.cat(rows), torch.cat(positions), torch.block_diag(*weights))
            for member, part in zip(owners, pooled.split([len(block) for block in weights]), strict=True):
                self._check(member, part)
                self._sums[member] = self._sums[member] + part if member in self._sums else part
        return [Pooled(member, self._sums.pop(member)) for member in done]

    def _weighted(
        self, captured: Mapping[str, Tensor], rows: Tensor, positions: Tensor, weights: Float[Tensor, "slot selected"]
    ) -> Float[Tensor, "slot hook d_model"]:
        results = []
        for name in self._hook_names:
            activation = captured[name]
            device = activation.device
            accumulate = torch.float32 if device.type == "mps" else torch.float64
            selected = activation[rows.to(device), positions.to(device)].to(accumulate)
            results.append((weights.to(device, accumulate) @ selected).cpu())
        return torch.stack(results, dim=1)

    def _check(self, member: int, part: PooledMeans) -> None:
        if bool(torch.isfinite(part).all()):
            return
        _, hook, _ = (~torch.isfinite(part)).nonzero()[0].tolist()
        raise NonFiniteError(
            f"sample {self._samples[member].sample_id!r}: the activation at {self._hook_names[hook]} holds NaN or "
            "infinity: load the model in float32 or bfloat16, or leave the sample out"
        )
