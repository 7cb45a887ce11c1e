"""What the page's script draws: figures and numbers of each collection, small enough to be written into the page."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_persona.report.attributes import colourings
from tl_persona.report.geometry import cosines, principal_map, without_mean
from tl_persona.report.heatmap import heatmap_layout, heatmap_trace
from tl_persona.report.maps import map_layout, map_traces
from tl_persona.report.norms import norms_figure
from tl_persona.report.style import distinct, labels_of
from tl_persona.report.survey import Collection
from tl_persona.report.thinning import Thinned, packed, thinned

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
        matrices: See `report.thinning.thinned`.

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
