"""The numbers behind the pictures of persona vectors: cosines, what is left without the mean persona, two components.

All in float64.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_persona.errors import InputError

ROUNDING = 1e-9
"""Of the largest norm at a layer. float32 tells vectors apart down to 1e-7: what is shorter than this is nothing."""


def without_mean(
    vectors: Float[Tensor, "persona layer d_model"], counted: Bool[Tensor, "persona"] | None = None
) -> Float[Tensor, "persona layer d_model"]:
    """Vectors less the mean persona's, layer by layer.

    What all personas share (being an answer in this chat, mostly) is far longer than what tells them apart.

    Args:
        vectors: Of every persona.
        counted: Which of them make up the mean; None is all. The plain assistant is compared with it, say, and no part
            of it.

    Raises:
        InputError: No persona counts.

    Example:
        >>> without_mean(torch.tensor([[[1.0, 5.0]], [[3.0, 5.0]]])).tolist()
        [[[-1.0, 0.0]], [[1.0, 0.0]]]
    """
    exact = vectors.double()
    chosen = exact if counted is None else exact[counted]
    if not len(chosen):
        raise InputError("no persona counts, so there is no mean persona")
    rest = exact - chosen.mean(dim=0)
    is_rounding = rest.norm(dim=2) <= ROUNDING * exact.norm(dim=2).amax(dim=0)
    return rest.masked_fill(is_rounding[:, :, None], 0.0)


def cosines(vectors: Float[Tensor, "persona d_model"]) -> Float[Tensor, "persona persona"]:
    """Cosine similarity of every two vectors; NaN where one of them is zero.

    Example:
        >>> cosines(torch.tensor([[2.0, 0.0], [3.0, 4.0], [0.0, 0.0]])).round(decimals=3).tolist()
        [[1.0, 0.6, nan], [0.6, 1.0, nan], [nan, nan, nan]]
    """
    exact = vectors.double()
    norms = exact.norm(dim=1)
    units = exact / norms.where(norms > 0, torch.nan)[:, None]
    similarity: Tensor = units @ units.T
    return similarity.clamp(-1, 1)


def principal_map(
    vectors: Float[Tensor, "persona layer d_model"], counted: Bool[Tensor, "persona"] | None = None
) -> tuple[Float[Tensor, "layer persona 2"], Float[Tensor, "layer 2"]]:
    """Coordinates of every persona on the first two principal components of each layer (PCA, Pearson 1901).

    Components have no sign of their own: each is turned so that a map does not flip from one layer to the next.

    Args:
        vectors: Of every persona.
        counted: Which of them the components are fitted to; the others are projected on them. None is all.

    Returns:
        The coordinates, in the activations' units, and each component's share of the variance of those counted.

    Raises:
        InputError: Fewer than three personas count, so that two components would show nothing but their number.
    """
    chosen = torch.ones(len(vectors), dtype=torch.bool) if counted is None else counted
    if int(chosen.sum()) < 3:
        raise InputError(f"{int(chosen.sum())} personas: a map needs at least 3")
    maps: list[Tensor] = []
    shares = []
    for layer in without_mean(vectors, chosen).unbind(dim=1):
        # Through the small Gram matrix: a layer has fewer personas than dimensions.
        values, sides = torch.linalg.eigh(layer[chosen] @ layer[chosen].T)
        values, sides = values.flip(0)[:2], sides.flip(1)[:, :2]
        present = values > ROUNDING * values[0]
        axes = torch.where(present, layer[chosen].T @ sides / values.sqrt(), 0.0)
        placed = layer @ axes
        if maps:
            flipped = (placed * maps[-1]).sum(dim=0) < 0
            placed = torch.where(flipped, -placed, placed)
        maps.append(placed)
        total = layer[chosen].square().sum()
        shares.append(torch.where(present, values / total, 0.0))
    return torch.stack(maps), torch.stack(shares)
