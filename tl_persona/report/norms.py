"""Norms of persona vectors by layer, whole and without what all personas share."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_persona.report.attributes import COLOURS
from tl_persona.report.geometry import without_mean
from tl_persona.report.style import FEW, GRID, checked, faint, graph_objects, labels_of, layout

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
