"""The figures of persona vectors: cosines as a heatmap, norms by layer, a map of the first two principal components.

Cosines have a diverging scale with its middle at zero, even in brightness on both sides and safe for the colour-blind.
Norms are shown whole and without what all personas share. The map is coloured by what is known of the personas.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_persona.errors import InputError
from tl_persona.report.attributes import COLOURS, Colouring, Group, colouring
from tl_persona.report.geometry import cosines, principal_map, without_mean
from tl_persona.report.style import FEW, GRID, NAMED, checked, faint, graph_objects, labels_of, layout, plain

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


def persona_map_figure(
    vectors: Float[Tensor, "persona layer d_model"],
    names: Sequence[str],
    *,
    layer: int,
    attribute: Sequence[Any] | None = None,
    title: str = "attribute",
) -> Any:
    """The personas on the first two principal components of one layer, coloured by an attribute.

    Args:
        vectors: As from `PersonaVectorStore.load_matrix`.
        names: Of the personas, in the same order.
        layer: Which position of the second axis.
        attribute: That of each persona, None where it is not known: five or more numbers give a scale, else groups.
        title: What the attribute is called.

    Returns:
        A `plotly.graph_objects.Figure`.

    Raises:
        InputError: The counts differ, there are fewer than three personas, or no such layer.
        MissingDependencyError: plotly is not installed.

    Example:
        >>> import torch
        >>> homes = ["sea", "hill", "sea"]
        >>> figure = persona_map_figure(torch.rand(3, 2, 4), ["Ada", "Bo", "Cy"], layer=1, attribute=homes)
        >>> [(trace.name, len(trace.x)) for trace in figure.data]
        [('sea', 2), ('hill', 1)]
    """
    go = graph_objects()
    checked(vectors, names, None)
    if not -vectors.shape[1] <= layer < vectors.shape[1]:
        raise InputError(f"there is no layer {layer}: the vectors have {vectors.shape[1]}")
    if attribute is not None and len(attribute) != len(names):
        raise InputError(f"{len(attribute)} attributes for {len(names)} personas: give one each, None if not known")
    ((placed,), (shares,)) = principal_map(vectors[:, layer, None])
    if attribute is None:
        shown = Colouring("", (Group("persona", tuple(range(len(names)))),), ("",) * len(names))
    else:
        shown = colouring(title, attribute)
    traces = []
    for trace, group in zip(map_traces(shown, names), shown.groups, strict=True):
        points = placed[list(group.members)]
        traces.append(go.Scatter(trace, x=points[:, 0].tolist(), y=points[:, 1].tolist()))
    return go.Figure(data=traces, layout=map_layout(shares.tolist(), title if attribute is not None else ""))


def map_traces(shown: Colouring, names: Sequence[str]) -> list[dict[str, Any]]:
    """One trace a group, still without coordinates."""
    labels, traces = labels_of(names), []
    for group in shown.groups:
        marker: dict[str, Any] = {"size": 12, "color": group.colour, "symbol": group.shape, "opacity": 0.9}
        numbers = [shown.scale[index] if shown.scale else None for index in group.members]
        if None not in numbers:
            marker |= {"color": numbers, "colorscale": "Cividis", "showscale": True}
            marker |= {"colorbar": {"title": {"text": plain(shown.title)}}}
        traces.append(
            {
                "type": "scatter",
                "mode": "markers+text" if len(names) <= NAMED else "markers",
                "name": plain(group.label),
                "showlegend": None in numbers and len(shown.groups) > 1,
                "marker": marker,
                "text": [labels[index] for index in group.members],
                "textposition": "top center",
                "cliponaxis": False,
                "customdata": [plain(shown.values[index]) for index in group.members],
                "hovertemplate": "%{text}<br>%{customdata}<extra></extra>",
            }
        )
    return traces


def map_layout(shares: Sequence[float], title: str = "") -> dict[str, Any]:
    """The layout of a map whose axes have these shares of the variance."""
    axes = [
        {**GRID, "title": {"text": f"component {i + 1} ({share:.0%} of variance)"}} for i, share in enumerate(shares)
    ]
    legend = {"orientation": "h", "y": -0.15, "yanchor": "top", "title": {"text": f"{plain(title)} " if title else ""}}
    return layout("", height=560, xaxis=axes[0], yaxis=axes[1], legend=legend)


LOW, HIGH = 0.1, 0.9  # the band that stands for many personas


def norms_figure(
    vectors: Float[Tensor, "persona layer d_model"],
    names: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    counted: Sequence[bool] | None = None,
) -> Any:
    """Norms by layer on a logarithmic axis: of whole vectors, and of what is left without the mean persona.

    Up to twelve personas each have two lines, solid and dotted; more are drawn as their median and the band between the
    10th and the 90th percentile.

    Args:
        vectors: As from `PersonaVectorStore.load_matrix`.
        names: Of the personas, in the same order.
        layers: The numbers of the second axis; None counts from 0.
        counted: Which personas make up the mean; None is all.

    Returns:
        A `plotly.graph_objects.Figure`.

    Raises:
        InputError: The counts of names, layers and vectors differ, or no persona counts.
        MissingDependencyError: plotly is not installed.

    Example:
        >>> figure = norms_figure(torch.tensor([[[3.0, 4.0]], [[3.0, 2.0]]]), ["Ada", "Bo"])
        >>> [(trace.name, trace.y) for trace in figure.data if trace.name.startswith("Ada")]
        [('Ada', (5.0,)), ('Ada, without the mean persona', (1.0,))]
    """
    go = graph_objects()
    numbers = checked(vectors, names, layers)
    chosen = torch.ones(len(vectors), dtype=torch.bool) if counted is None else torch.tensor(list(counted))
    whole = vectors.double().norm(dim=2)
    kinds = [("", "solid", COLOURS[0], whole)]
    if int(chosen.sum()) > 1:
        kinds.append((", without the mean persona", "dot", COLOURS[1], without_mean(vectors, chosen).norm(dim=2)))
    traces = []
    for suffix, dash, colour, norms in kinds:
        if len(names) <= FEW:
            for row, label in enumerate(labels_of(names)):
                line = {"dash": dash, "width": 1.5, "color": COLOURS[row % len(COLOURS)]}
                named = {"legendgroup": label, "showlegend": not suffix}
                traces.append(_line(go, numbers, norms[row], f"{label}{suffix}", line=line, **named))
            continue
        low, middle, high = (norms.quantile(share, dim=0) for share in (LOW, 0.5, HIGH))
        traces.append(_line(go, numbers, low, f"10 %{suffix}", line={"width": 0}, showlegend=False))
        band = {"fill": "tonexty", "fillcolor": faint(colour), "line": {"width": 0}}
        traces.append(_line(go, numbers, high, f"10 % to 90 % of personas{suffix}", **band))
        traces.append(_line(go, numbers, middle, f"median persona{suffix}", line={"dash": dash, "color": colour}))
    drawn = layout(
        "norm by layer",
        height=420,
        xaxis={**GRID, "title": {"text": "layer"}},
        yaxis={**GRID, "type": "log", "title": {"text": "norm (activation units)"}, "exponentformat": "power"},
    )
    return go.Figure(data=traces, layout=drawn)


def _line(go: Any, layers: Sequence[int], values: Float[Tensor, "layer"], name: str, **style: Any) -> Any:
    return go.Scatter(
        x=list(layers),
        y=[float(f"{value:.5g}") for value in values.tolist()],
        name=name,
        mode="lines+markers" if len(layers) == 1 else "lines",
        hovertemplate="layer %{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
        **style,
    )
