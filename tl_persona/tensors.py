"""Names for the tensors that cross module borders; the axis words are TransformerLens's."""

from jaxtyping import Bool, Float, Int
from torch import Tensor

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

SlotSums = Float[Tensor, "slot hook d_model"]
"""For every slot, the sum of the means that were added to it."""
