"""Means of captured activations over token masks, put together from the passes that computed a sample's tokens.

Means read only positions that some mask selects, so padding cannot leak in, not even as 0 * infinity. Sums run in
float64 where the device has it: bfloat16 sums lose a mean past some 256 tokens. Norms, where they are asked for, are
of every token of a text.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_persona.backends.base import Pooled
from tl_persona.backends.local.runners import capture_of
from tl_persona.errors import NonFiniteError
from tl_persona.plan.plan import Plan
from tl_persona.plan.rows import Pass, Segment
from tl_persona.tensors import PooledMeans, TokenNorms


class _Block(NamedTuple):
    """What is summed over one segment: each distinct mask once, for a persona's samples mask its prompt alike."""

    row: int
    positions: Int[Tensor, "selected"]
    masks: Bool[Tensor, "distinct selected"]
    takers: list[tuple[int, Int[Tensor, "slot"], Int[Tensor, "slot"]]]  # sample, its masks, which sum each of them gets


class PoolingRun:
    """Follows a plan pass by pass; keeps sums only of samples that are not done.

    Args:
        plan: What is run.
        hook_names: The hooks, in the order of the results.
        with_norms: Whether the results have the norms of all tokens.
    """

    def __init__(self, plan: Plan, hook_names: Sequence[str], with_norms: bool = False) -> None:
        self._samples = plan.samples
        self._hook_names = list(hook_names)
        # For each sample its masks' sums over earlier segments; one tensor serves all samples of a segment.
        self._earlier: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        # For each sample the norms over its segments so far, with where they start; shared in the same way.
        self._norms: dict[int, list[tuple[int, TokenNorms]]] = {}
        self._with_norms = with_norms
        self._segments_left = [0] * len(plan.samples)
        for each in plan.passes:
            for row in each.rows:
                for segment in row.segments:
                    for member in segment.members:
                        self._segments_left[member] += 1

    def add(self, each: Pass, captured: Mapping[str, Tensor]) -> list[Pooled]:
        """Adds what one pass captured, (row, pos, d_model) by hook, and gives the samples that are complete with it.

        Raises:
            HookError: A hook did not fire.
            NonFiniteError: A selected activation holds NaN or infinity; names the sample and the hook.
        """
        done: list[int] = []
        blocks = []
        norms = self._norms_of(captured) if self._with_norms else None
        for row_index, row in enumerate(each.rows):
            offset = 0
            for segment in row.segments:
                block = self._block(row_index, offset, segment)
                if block is not None:
                    blocks.append(block)
                if norms is not None:
                    # A copy, so that what waits for its samples does not hold the rest of the pass.
                    part = norms[:, row_index, offset : offset + len(segment)].clone()
                    for member in segment.members:
                        self._norms.setdefault(member, []).append((segment.start, part))
                offset += len(segment)
                for member in segment.members:
                    self._segments_left[member] -= 1
                    if not self._segments_left[member]:
                        done.append(member)
        if blocks:
            sums = self._sums(captured, blocks)
            if not bool(torch.isfinite(sums).all()):
                self._name_the_culprit(captured, blocks)
            for block, part in zip(blocks, sums.split([len(block.masks) for block in blocks]), strict=True):
                for member, slots, which in block.takers:
                    self._earlier.setdefault(member, []).append((slots, part, which))
        return [Pooled(member, self._mean(member), self._joined(member)) for member in done]

    def _block(self, row: int, offset: int, segment: Segment) -> _Block | None:
        """What the masks of a segment's samples select in it; None where that is nothing."""
        takers, selections = [], []
        n_selections = 0
        for member in segment.members:
            part = self._samples[member].masks[:, segment.start : segment.stop].cpu()
            slots = part.any(dim=1).nonzero()[:, 0]
            if len(slots):
                selections.append(part[slots])
                takers.append((member, slots, n_selections))
                n_selections += len(slots)
        if not takers:
            return None
        distinct, which = torch.unique(torch.cat(selections), dim=0, return_inverse=True)
        used = distinct.any(dim=0).nonzero()[:, 0]
        return _Block(
            row=row,
            positions=offset + used,
            masks=distinct[:, used],
            takers=[(member, slots, which[first : first + len(slots)]) for member, slots, first in takers],
        )

    def _sums(self, captured: Mapping[str, Tensor], blocks: Sequence[_Block]) -> Float[Tensor, "distinct hook d_model"]:
        rows = torch.cat([torch.full_like(block.positions, block.row) for block in blocks])
        positions = torch.cat([block.positions for block in blocks])
        sizes = [len(block.positions) for block in blocks]
        weights: dict[torch.device, list[Tensor]] = {}
        results = []
        for name in self._hook_names:
            activation = capture_of(captured, name)
            device = activation.device
            accumulate = torch.float32 if device.type == "mps" else torch.float64
            if device not in weights:
                rows, positions = rows.to(device), positions.to(device)  # once, for hooks mostly share a device
                weights[device] = [block.masks.to(device, accumulate) for block in blocks]
            selected = activation[rows.to(device), positions.to(device)].to(accumulate)
            # Block by block, so that NaN in one text does not reach another as 0 * NaN.
            parts = [mask @ part for mask, part in zip(weights[device], selected.split(sizes), strict=True)]
            results.append(torch.cat(parts).cpu())
        return torch.stack(results, dim=1)

    def _mean(self, member: int) -> PooledMeans:
        masks = self._samples[member].masks.cpu()
        earlier = self._earlier.pop(member)
        total = torch.zeros((len(masks), *earlier[0][1].shape[1:]), dtype=earlier[0][1].dtype)
        for slots, sums, which in earlier:
            total[slots] += sums[which]
        return total / masks.sum(dim=1)[:, None, None]

    def _norms_of(self, captured: Mapping[str, Tensor]) -> Float[Tensor, "hook row pos"]:
        norms: list[Tensor] = []
        for name in self._hook_names:
            activation = capture_of(captured, name)
            # The square of a float16 norm is beyond float16.
            wide = torch.promote_types(activation.dtype, torch.float32)
            norm = torch.linalg.vector_norm(activation, dim=-1, dtype=wide).float()
            norms.append(norm.to(norms[0].device) if norms else norm)
        return torch.stack(norms).cpu()

    def _joined(self, member: int) -> TokenNorms | None:
        if not self._with_norms:
            return None
        parts = sorted(self._norms.pop(member), key=lambda part: part[0])
        return torch.cat([norms for _, norms in parts], dim=1)

    def _name_the_culprit(self, captured: Mapping[str, Tensor], blocks: Sequence[_Block]) -> None:
        # Read off the activations: in the sums, 0 * NaN has spread it to every mask of a text.
        for name in self._hook_names:
            for block in blocks:
                selected = captured[name][block.row, block.positions.to(captured[name].device)]
                spoiled = ~torch.isfinite(selected).all(dim=-1).cpu()
                for member, _, which in block.takers:
                    if bool((block.masks[which] & spoiled).any()):
                        raise NonFiniteError(
                            f"sample {self._samples[member].sample_id!r}: the activation at {name} holds NaN or "
                            "infinity: load the model in float32 or bfloat16, or leave the sample out"
                        )
        raise NonFiniteError("a sum of finite activations overflowed: run on a device that has float64")
