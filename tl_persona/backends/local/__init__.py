"""Runs a plan on this machine: `run_with_cache` with a names filter, pooled batch by batch.

The only backend that imports `transformer_lens` (in `boot`). Nothing after the last needed block runs.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_persona.backends import Pooled
from tl_persona.backends.local import boot
from tl_persona.backends.local.pooling import BatchPooler
from tl_persona.errors import HookError
from tl_persona.hooks import layer_of
from tl_persona.models import HookedModel, ModelFacts
from tl_persona.plan import Batch, Plan

_PAD_ID = 0  # any valid id does: what follows a text cannot change it, and padding is never pooled
_HAS_D_MODEL = re.compile(r"(blocks\.\d+\.)?hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out|embed)")


class LocalBackend:
    """The backend for a model in this process.

    Raises:
        InputError: The model cannot be used (see `boot.as_hooked_model`).
    """

    def __init__(self, model: Any, *, tokenizer: Any = None) -> None:
        self.model: HookedModel = boot.as_hooked_model(model, tokenizer)
        self.tokenizer: Any = tokenizer if tokenizer is not None else self.model.tokenizer
        self.facts: ModelFacts = boot.facts_of(self.model)
        self._arguments = boot.shortest_pass(self.model)

    def pool(self, plan: Plan, hook_names: Sequence[str]) -> Iterator[Pooled]:
        """Yields the pooled activations of every sample of the plan, batch by batch.

        Raises:
            HookError: A hook does not fire, or does not end in `d_model`.
            NonFiniteError: A pooled activation holds NaN or infinity.
        """
        names = list(hook_names)
        with torch.no_grad(), evaluating(self.model):
            self._check_hooks([name for name in names if not _HAS_D_MODEL.fullmatch(name)])
            for batch in plan.batches:
                yield from self._pool_batch(plan, batch, names)

    def _pool_batch(self, plan: Plan, batch: Batch, names: list[str]) -> list[Pooled]:
        samples = [plan.samples[index] for index in batch.members]
        pooler = BatchPooler(samples)
        cache = self._run(_padded([sample.input_ids for sample in samples]), names)
        means = pooler.means(cache, names)
        return [Pooled(index, mean) for index, mean in zip(batch.members, means, strict=True)]

    def _run(self, tokens: Int[Tensor, "batch pos"], names: list[str]) -> Mapping[str, Tensor]:
        layers = [layer_of(name) for name in names]
        needed = [layer + 1 for layer in layers if layer is not None]
        stop = max(needed, default=0) if len(needed) == len(names) else None
        _, cache = self.model.run_with_cache(
            tokens.to(self.model.cfg.device),
            names_filter=names,
            stop_at_layer=stop,
            return_cache_object=False,
            **self._arguments,
        )
        return cache

    def _check_hooks(self, names: list[str]) -> None:
        """Runs two tokens, so that an unsuitable hook is refused before the samples run."""
        if not names:
            return
        cache = self._run(torch.zeros((1, 2), dtype=torch.long), names)
        for name in names:
            if name not in cache:
                raise HookError(f"hook {name!r} did not fire on this model: choose a residual hook")
            shape = tuple(cache[name].shape)
            if shape != (1, 2, self.facts.d_model):
                raise HookError(
                    f"hook {name!r} gives shape {shape} for two tokens, not (1, 2, {self.facts.d_model}): choose a "
                    "hook whose last axis is d_model, such as blocks.0.hook_resid_post"
                )


def _padded(rows: Sequence[Int[Tensor, "pos"]]) -> Int[Tensor, "batch pos"]:
    """Rows padded on the right, which needs no attention mask in a causal model."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=_PAD_ID)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Dropout off while the model runs, and back as it was after."""
    was_training = bool(getattr(model, "training", False))
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()
