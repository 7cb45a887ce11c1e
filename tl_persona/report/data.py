"""What the page's script draws: figures and numbers of each collection, small enough to be written into the page.

Cosines are the one thing in a report that grows with the square of the personas. They are stored as 16-bit numbers, one
for each pair, to 0.00003; where there are more than a browser opens gladly, layers are left out first, evenly, then
personas.
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_persona.report.attributes import colourings
from tl_persona.report.geometry import cosines, principal_map, without_mean
from tl_persona.report.personas import heatmap_layout, heatmap_trace, map_layout, map_traces, norms_figure
from tl_persona.report.style import distinct, labels_of
from tl_persona.report.survey import Collection

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


Attributes = Mapping[str, Mapping[str, Any]]
"""By persona id what is known of her."""


def matrices_of(collections: Sequence[Collection]) -> int:
    """Heatmaps a layer of a page: each collection raw, and without its mean."""
    return 2 * len(collections)


def collection_data(collection: Collection, attributes: Attributes, matrices: int) -> dict[str, Any]:
    """Everything about one collection that is drawn.

    Args:
        collection: Which.
        attributes: Of its personas, as far as they are known.
        matrices: See `report.data.thinned`.

    Raises:
        StoreError: A file cannot be read or trusted.
    """
    vectors, counted = collection.vectors(), collection.counted
    keep = thinned(vectors.shape[0], vectors.shape[1], matrices)
    names = list(collection.names)
    few = [names[index] for index in keep.personas]
    recorded = collection.provenance(collection.persona_ids[0])
    hooks = ["" for _ in range(vectors.shape[1])] if recorded is None else list(recorded.hook_names)
    rest = without_mean(vectors, counted) if int(counted.sum()) > 1 else None
    return {
        "label": f"{collection.model} · {collection.strategy} · {collection.variant}",
        "names": distinct(names),
        "layers": [{"number": layer, "hook": hooks[layer]} for layer in keep.layers],
        "left_out": _left_out(vectors, keep),
        "similarity": {
            "names": distinct(few),
            "trace": heatmap_trace(labels_of(few)),
            "layout": heatmap_layout(len(few)),
            "raw": _matrices(vectors, keep),
            "centred": None if rest is None else _matrices(rest, keep),
        },
        "norms": _norms(vectors, collection),
        "map": _map(vectors, collection, keep, attributes),
    }


def figure_data(figure: Any) -> dict[str, Any]:
    """A plotly figure as plain data."""
    found = json.loads(figure.to_json())
    return {"data": found["data"], "layout": found["layout"]}


def _matrices(vectors: Float[Tensor, "persona layer d_model"], keep: Thinned) -> list[str]:
    chosen = vectors[list(keep.personas)]
    return [packed(cosines(chosen[:, layer])) for layer in keep.layers]


def _norms(vectors: Float[Tensor, "persona layer d_model"], collection: Collection) -> dict[str, Any]:
    counted = collection.counted
    whole = vectors.double().norm(dim=2)
    rest = without_mean(vectors, counted).norm(dim=2)
    table = [
        [layer, *(_short(value) for value in (column.min(), column.median(), column.max())), _short(left.median())]
        for layer, (column, left) in enumerate(zip(whole.T, rest.T, strict=True))
    ]
    figure = norms_figure(vectors, collection.names, counted=counted.tolist())
    figure.update_layout(title=None, margin={"t": 20})
    return {**figure_data(figure), "table": table}


def _map(
    vectors: Float[Tensor, "persona layer d_model"], collection: Collection, keep: Thinned, attributes: Attributes
) -> dict[str, Any] | None:
    if int(collection.counted.sum()) < 3:
        return None
    placed, shares = principal_map(vectors[:, list(keep.layers)], collection.counted)
    return {
        "layout": map_layout([0.0, 0.0]),
        "places": [[[_short(value) for value in axis] for axis in layer.T] for layer in placed],
        "shares": [[round(float(value), 4) for value in layer] for layer in shares],
        "colourings": [
            {
                "title": shown.title,
                "values": list(shown.values),
                "members": [list(group.members) for group in shown.groups],
                "traces": map_traces(shown, collection.names),
            }
            for shown in colourings(collection.persona_ids, attributes)
        ],
    }


def _left_out(vectors: Float[Tensor, "persona layer d_model"], keep: Thinned) -> str:
    parts = [
        f"{len(kept)} of {count} {what}"
        for kept, count, what in (
            (keep.personas, vectors.shape[0], "personas"),
            (keep.layers, vectors.shape[1], "layers"),
        )
        if len(kept) < count
    ]
    return f"To keep this page small, the heatmap has {' and '.join(parts)}, evenly chosen." if parts else ""


def _short(value: Any) -> float:
    return float(f"{float(value):.4g}")
