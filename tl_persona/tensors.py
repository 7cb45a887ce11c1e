"""Names for the tensors that cross module borders, and the sample that a plan is made of.

The axis words are TransformerLens's.
"""

from dataclasses import dataclass, replace

from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_persona.errors import InputError, MaskError


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

    def check(self, n_ctx: int | None, vocabulary: int | None = None) -> None:
        """Refuses what no backend could run.

        Raises:
            InputError: Not 1-D, empty, ids and masks of different lengths, an id outside the vocabulary, or longer than
                the model's context.
            MaskError: A mask selects nothing.
        """
        if self.input_ids.ndim != 1:
            raise InputError(
                f"sample {self.sample_id!r}: token ids must be 1-D, got shape {tuple(self.input_ids.shape)}: "
                "pass one sample an entry, without a batch axis"
            )
        if self.input_ids.is_floating_point():
            raise InputError(
                f"sample {self.sample_id!r}: token ids must be integers, got {self.input_ids.dtype}: pass what the "
                "tokenizer returns"
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
        lowest, highest = int(self.input_ids.min()), int(self.input_ids.max())
        if vocabulary is not None and not 0 <= lowest <= highest < vocabulary:
            raise InputError(
                f"sample {self.sample_id!r}: token ids from {lowest} to {highest}, but the model has {vocabulary} "
                "tokens: use its own tokenizer"
            )
        if n_ctx is not None and n_pos > n_ctx:
            raise InputError(
                f"sample {self.sample_id!r} has {n_pos} tokens, the model's context is {n_ctx}: shorten the persona "
                "or the answer, or load the model with a longer context"
            )

    def needed(self) -> "Sample":
        """The sample up to the last position that a mask selects: what follows cannot change it, and need not run."""
        stop = int(self.masks.any(dim=0).nonzero()[-1]) + 1
        if stop == len(self.input_ids):
            return self
        return replace(self, input_ids=self.input_ids[:stop], masks=self.masks[:, :stop])


TokenIds = Int[Tensor, "pos"]
"""Token ids of one sample."""

TokenMask = Bool[Tensor, "pos"]
"""True where the token contributes."""

BatchMask = Bool[Tensor, "batch pos"]
"""One `TokenMask` a row; padding is always False."""

MaskStack = Bool[Tensor, "mask pos"]
"""Several masks over one sample."""

Residual = Float[Tensor, "batch pos d_model"]
"""What a residual hook captures."""

LayerVectors = Float[Tensor, "layer d_model"]
"""One vector a hook, in hook order; with the default hooks index i is the output of block i."""

PooledMeans = Float[Tensor, "mask hook d_model"]
"""For one sample, the mean of every hook over the tokens of every mask, in float32."""

TokenNorms = Float[Tensor, "hook pos"]
"""For one sample, the L2 norm of every hook's activation at every token."""

SlotSums = Float[Tensor, "slot hook d_model"]
"""For every slot, the sum of the means that were added to it."""
