"""Steering by hand, the oracle: plain PyTorch hooks on a transformers model, without any cache."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from oracle import some
from tiny import D_MODEL, VOCAB_SIZE
from torch import Tensor
from transformers import PreTrainedModel

Edit = Callable[[Tensor], Tensor]
NEW_TOKENS = 5
V, W = some(1, D_MODEL), some(2, D_MODEL)


def some_ids(length: int, batch: int = 1, seed: int = 1) -> Tensor:
    return torch.randint(10, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))


@contextmanager
def by_hand(model: PreTrainedModel, edits: dict[int, Edit]) -> Iterator[None]:
    """The oracle: plain PyTorch hooks that edit the outputs of decoder layers."""
    body = model.base_model
    blocks = body.layers if hasattr(body, "layers") else body.h

    def editing(edit: Edit) -> Callable[[Any, Any, Any], Any]:
        return lambda _m, _a, out: (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out)

    handles = [blocks[layer].register_forward_hook(editing(edit)) for layer, edit in edits.items()]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def at(positions: Iterable[int], edit: Edit) -> Edit:
    """The edit at some columns of a whole text only."""

    def edited(x: Tensor) -> Tensor:
        out = x.clone()
        columns = [position for position in positions if position < x.shape[1]]
        out[:, columns] = edit(x)[:, columns]
        return out

    return edited


def adding(coefficient: float, direction: Tensor = V) -> Edit:
    return lambda x: x + coefficient * direction


def setting(target: float, direction: Tensor = V) -> Edit:
    def edit(x: Tensor) -> Tensor:
        unit = direction / (direction**2).sum().sqrt()
        along = (x * unit).sum(dim=-1, keepdim=True)
        return x - along * unit + target * unit

    return edit


def generated_by_hand(model: PreTrainedModel, ids: Tensor, edits: dict[int, Edit], steps: int = NEW_TOKENS) -> Tensor:
    """Greedy, the whole text anew at every step: no cache whose handling could be wrong."""
    with by_hand(model, edits):
        for _ in range(steps):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(dim=-1)], dim=1)
    return ids
