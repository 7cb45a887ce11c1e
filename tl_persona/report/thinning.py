"""Keeps a page from growing past what a browser opens gladly: which layers and personas its heatmaps show.

Cosines are the one thing in a report that grows with the square of the personas. They are stored as 16-bit numbers, one
for each pair, to 0.00003; where there are too many, layers are left out first, evenly, then personas.
"""

import base64
import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

MAX_PAIRS = 2_000_000
"""Cosines a page may hold: 2 bytes each, a third more as text, so some 5 MB beside plotly's own 5 MB."""
FEWEST_LAYERS = 6
MOST_PERSONAS = 300
"""Rows and columns that a heatmap of a laptop's size has pixels for."""
NONE = -32768
STEPS = 32767


@dataclass(frozen=True)
class Thinned:
    """What a heatmap shows.

    Attributes:
        personas: Positions of the personas, ascending.
        layers: Positions of the layers, ascending.
    """

    personas: tuple[int, ...]
    layers: tuple[int, ...]


def thinned(n_personas: int, n_layers: int, matrices: int) -> Thinned:
    """Which personas and layers fit a page, both evenly spread, first and last among them.

    Args:
        n_personas: How many there are.
        n_layers: Likewise.
        matrices: How many heatmaps a layer the whole page has: one for each collection, and for each of its kinds.

    Example:
        >>> thinned(9, 30, 4) == Thinned(tuple(range(9)), tuple(range(30)))
        True
        >>> found = thinned(500, 30, 2)
        >>> len(found.personas), len(found.layers), found.layers[0], found.layers[-1]
        (300, 22, 0, 29)
    """
    share = MAX_PAIRS // max(1, matrices)
    personas = min(n_personas, MOST_PERSONAS)
    layers = min(n_layers, max(min(FEWEST_LAYERS, n_layers), share // max(1, pairs_of(personas))))
    while personas > 2 and layers * pairs_of(personas) > share:
        personas -= 1
    return Thinned(_spread(n_personas, personas), _spread(n_layers, layers))


def pairs_of(n_personas: int) -> int:
    """Pairs of different personas."""
    return n_personas * (n_personas - 1) // 2


def packed(similarity: Float[Tensor, "persona persona"]) -> str:
    """The part above the diagonal, row by row, as base64 of little-endian 16-bit numbers; `NONE` where it is NaN."""
    rows, columns = torch.triu_indices(len(similarity), len(similarity), offset=1)
    steps = (similarity[rows, columns] * STEPS).round().nan_to_num(nan=NONE)
    return base64.b64encode(steps.numpy().astype(np.dtype("<i2")).tobytes()).decode("ascii")


def _spread(count: int, kept: int) -> tuple[int, ...]:
    if kept >= count:
        return tuple(range(count))
    if kept == 1:
        return (0,)
    return tuple(math.floor(i * (count - 1) / (kept - 1) + 0.5) for i in range(kept))
