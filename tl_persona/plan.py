"""Cuts samples into batches under a token budget: pure, no model.

Samples of similar length share a batch, so that little is padded. Running a plan is the backends' work.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Int
from torch import Tensor

from tl_persona.errors import InputError, MaskError

DEFAULT_BATCH_TOKENS = 2048
"""Large enough to fill a matrix unit, small enough that all residuals of a batch fit beside the model."""


@dataclass(frozen=True)
class Sample:
    """One text to run and the masks to pool it with.

    Attributes:
        sample_id: For messages.
        input_ids: Token ids, shape (pos,).
        masks: One row a mask, shape (mask, pos); samples of one plan may have different numbers of rows.
    """

    sample_id: str
    input_ids: Int[Tensor, "pos"]
    masks: Bool[Tensor, "mask pos"]

    def check(self, n_ctx: int | None) -> None:
        """Refuses what no backend could run.

        Raises:
            InputError: Not 1-D, empty, ids and masks of different lengths, or longer than the model's context.
            MaskError: A mask selects nothing.
        """
        if self.input_ids.ndim != 1:
            raise InputError(
                f"sample {self.sample_id!r}: token ids must be 1-D, got shape {tuple(self.input_ids.shape)}: "
                "pass one sample an entry, without a batch axis"
            )
        n_pos = self.input_ids.shape[0]
        if self.masks.ndim != 2 or self.masks.shape[1] != n_pos:
            raise InputError(
                f"sample {self.sample_id!r}: {n_pos} token ids but a mask over {self.masks.shape[-1]} positions"
            )
        if n_pos == 0:
            raise InputError(f"sample {self.sample_id!r} has no tokens")
        if not bool(self.masks.any(dim=1).all()):
            raise MaskError(f"sample {self.sample_id!r}: a mask selects 0 of {n_pos} tokens")
        if n_ctx is not None and n_pos > n_ctx:
            raise InputError(
                f"sample {self.sample_id!r} has {n_pos} tokens, the model's context is {n_ctx}: shorten the persona "
                "or the answer, or load the model with a longer context"
            )


@dataclass(frozen=True)
class Batch:
    """Samples, by index, that run side by side, padded to the longest."""

    members: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What runs, in which order, and what it costs.

    Attributes:
        samples: All samples, in the caller's order.
        batches: What runs side by side; every sample is in exactly one batch.
        tokens: Tokens of all samples.
        tokens_run: Tokens that go through the model, padding included.
    """

    samples: tuple[Sample, ...]
    batches: tuple[Batch, ...]
    tokens: int
    tokens_run: int


def make_plan(samples: Sequence[Sample], *, n_ctx: int | None = None, batch_tokens: int = DEFAULT_BATCH_TOKENS) -> Plan:
    """Checks the samples and cuts them into batches of at most `batch_tokens` padded tokens.

    A sample longer than the budget runs alone. The longest batches come first, so that a budget that is too large
    fails at once.

    Raises:
        InputError: No sample, a budget below 1, or a sample that cannot run (see `Sample.check`).
    """
    if not samples:
        raise InputError("there is no sample to run: pass at least one")
    if batch_tokens < 1:
        raise InputError(f"batch_tokens must be at least 1, got {batch_tokens}")
    for sample in samples:
        sample.check(n_ctx)
    lengths = [sample.input_ids.shape[0] for sample in samples]
    batches: list[list[int]] = []
    for index in sorted(range(len(samples)), key=lambda index: -lengths[index]):
        # Sorted by falling length, so the first member of a batch is its width.
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return Plan(
        samples=tuple(samples),
        batches=tuple(Batch(tuple(batch)) for batch in batches),
        tokens=sum(lengths),
        tokens_run=sum(lengths[batch[0]] * len(batch) for batch in batches),
    )
