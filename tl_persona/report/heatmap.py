"""Cosine similarity between personas as a heatmap.

Cosines have a diverging scale with its middle at zero, even in brightness on both sides and safe for the colour-blind.
The numbers come from `geometry`.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_persona.errors import InputError
from tl_persona.report.geometry import cosines, without_mean
from tl_persona.report.style import NAMED, checked, graph_objects, labels_of, layout

DIVERGING = "balance"
"""Of cmocean (Thyng et al. 2016): even steps of brightness from a light middle to both ends."""


def similarity_figure(
    vectors: Float[Tensor, "persona layer d_model"],
    names: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    remove_mean: bool = False,
) -> Any:
    """Cosine similarity between personas as a heatmap, with a slider over the layers.

    Args:
        vectors: As from `PersonaVectorStore.load_matrix`.
        names: Of the personas, in the same order.
        layers: The numbers of the second axis, for the slider; None counts from 0.
        remove_mean: Subtract the mean persona first. What all personas share otherwise makes every cosine nearly 1.

    Returns:
        A `plotly.graph_objects.Figure`, one frame a layer.

    Raises:
        InputError: The counts of names, layers and vectors differ, or there is one persona and its mean is removed.
        MissingDependencyError: plotly is not installed.

    Example:
        >>> import torch
        >>> figure = similarity_figure(torch.eye(3)[:, None].repeat(1, 2, 1), ["Ada", "Bo", "Cy"])
        >>> figure.data[0].z[0].tolist(), len(figure.frames)
        ([1.0, 0.0, 0.0], 2)
    """
    go = graph_objects()
    numbers = checked(vectors, names, layers)
    if remove_mean and len(vectors) < 2:
        raise InputError("one persona is its own mean: nothing is left of it; leave remove_mean out")
    shown = without_mean(vectors) if remove_mean else vectors
    labels = labels_of(names)
    frames = [
        go.Frame(name=str(number), data=[_heatmap(go, cosines(shown[:, index]), labels)])
        for index, number in enumerate(numbers)
    ]
    title = f"cosine similarity between personas{', mean persona removed' if remove_mean else ''}"
    figure = go.Figure(data=frames[0].data, frames=frames, layout=heatmap_layout(len(labels), title))
    steps = [
        {
            "label": frame.name,
            "method": "animate",
            "args": [[frame.name], {"mode": "immediate", "frame": {"duration": 0}, "transition": {"duration": 0}}],
        }
        for frame in frames
    ]
    if len(steps) > 1:
        figure.update_layout(sliders=[{"steps": steps, "currentvalue": {"prefix": "layer "}, "pad": {"t": 90}}])
    return figure


def heatmap_layout(count: int, title: str = "") -> dict[str, Any]:
    """The layout of a heatmap of `count` personas; names are left out where they would not fit."""
    axis = {"type": "category", "constrain": "domain", "showticklabels": count <= NAMED, "automargin": True}
    return layout(
        title,
        height=min(760, 330 + 22 * min(count, NAMED)),
        xaxis={**axis, "tickangle": -45},
        yaxis={**axis, "autorange": "reversed", "scaleanchor": "x"},
    )


def _heatmap(go: Any, similarity: Float[Tensor, "persona persona"], labels: Sequence[str]) -> Any:
    return go.Heatmap(heatmap_trace(labels), z=similarity.numpy().round(4))


def heatmap_trace(labels: Sequence[str]) -> dict[str, Any]:
    """A heatmap of cosines, still without them."""
    return {
        "type": "heatmap",
        "x": list(labels),
        "y": list(labels),
        "colorscale": _scale(),
        "zmin": -1,
        "zmax": 1,
        "xgap": 1 if len(labels) <= NAMED else 0,
        "ygap": 1 if len(labels) <= NAMED else 0,
        "colorbar": {"title": {"text": "cosine"}},
        "hovertemplate": "%{y}<br>%{x}<br>cosine %{z:.3f}<extra></extra>",
    }


def _scale() -> list[list[Any]]:
    # Spelled out: plotly.js knows fewer scales by name than the Python package.
    graph_objects()
    return [list(step) for step in import_module("plotly.colors").get_colorscale(DIVERGING)]
