"""The layers of a set of steering vectors: how well each separates, how stable it is, how long, and which is chosen.

The statistics come with the vectors, and the choice of a layer is the set's own.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from tl_persona.errors import InputError
from tl_persona.report.attributes import COLOURS
from tl_persona.report.style import GRID, faint, graph_objects, layout
from tl_persona.vectors.vector import SteeringVector
from tl_persona.vectors.vector_set import SteeringVectorSet

CHOSEN = "#000000"
_ROWS = (
    ("AUC", (("auc", "held-out AUC", COLOURS[0]),)),
    ("d'", (("d_prime", "held-out d'", COLOURS[1]),)),
    ("share or cosine", (("split_half", "split-half cosine", COLOURS[2]), ("agreement", "agreeing pairs", COLOURS[3]))),
    ("norm", (("norm", "norm of the vector", COLOURS[6]),)),
)


def best_of(vectors: SteeringVectorSet) -> tuple[SteeringVector, str]:
    """The vector that `get_best` chooses, and by what measure.

    Raises:
        InputError: The set is empty, or some layers have statistics and others none.
    """
    choice = vectors.best_layer()
    measure = "norm, for want of a held-out separation" if choice.metric == "norm" else "held-out separation"
    return vectors[choice.layer], measure


def layer_profile_figure(vectors: SteeringVectorSet) -> Any:
    """What is known of a set's vectors by layer, with the layer that `get_best` chooses marked.

    From above: how well held-out pairs are told apart (AUC and d', each with its 95 % interval), the cosine between
    vectors of random halves and the share of pairs that point the vector's way, and the norms. A panel for which no
    vector has statistics is left out.

    Args:
        vectors: At least one.

    Returns:
        A `plotly.graph_objects.Figure`.

    Raises:
        InputError: The set is empty.
        MissingDependencyError: plotly is not installed.

    Example:
        >>> import torch
        >>> vectors = [SteeringVector("calm", i, torch.tensor([3.0, 4.0]) * (i + 1), "tiny") for i in (0, 1)]
        >>> [(trace.name, trace.y) for trace in layer_profile_figure(SteeringVectorSet("calm", vectors)).data]
        [('norm of the vector', (5.0, 10.0))]
    """
    graph_objects()
    rows = vectors.summary().rows
    if not rows:
        raise InputError(f"the set for {vectors.behavior!r} is empty: there is no layer to draw")
    panels = [panel for panel in _ROWS if any(row[name] is not None for name, _, _ in panel[1] for row in rows)]
    figure = import_module("plotly.subplots").make_subplots(len(panels), 1, shared_xaxes=True, vertical_spacing=0.05)
    layers = [row["layer"] for row in rows]
    for number, (title, measures) in enumerate(panels, 1):
        for name, label, colour in measures:
            for trace in _lines(rows, layers, name, label, colour):
                figure.add_trace(trace, row=number, col=1)
        kind = "log" if title == "norm" else "linear"
        figure.update_yaxes({**GRID, "title": {"text": title}, "type": kind, "automargin": True}, row=number, col=1)
    figure.update_xaxes(GRID)
    figure.update_xaxes(title={"text": "layer"}, row=len(panels), col=1)
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    figure.update_layout(layout("", height=140 + 155 * len(panels), legend=legend, hovermode="x unified"))
    _mark(figure, vectors)
    return figure


def _lines(rows: Sequence[Mapping[str, Any]], layers: Sequence[int], name: str, label: str, colour: str) -> list[Any]:
    go = graph_objects()
    values = [_short(row[name]) for row in rows]
    ends = [(_short(row.get(f"{name}_low")), _short(row.get(f"{name}_high"))) for row in rows]
    line = go.Scatter(
        x=layers,
        y=values,
        name=label,
        mode="lines+markers",
        line={"color": colour, "width": 2},
        marker={"size": 7},
        hovertemplate="%{y:.4g}",
    )
    if not any(None not in pair for pair in ends):
        return [line]
    # One closed outline: plotly would otherwise draw a band across layers that have no interval.
    whole = [(layer, *pair) for layer, pair in zip(layers, ends, strict=True) if None not in pair]
    outline = [(layer, low) for layer, low, _ in whole] + [(layer, high) for layer, _, high in reversed(whole)]
    band = go.Scatter(
        x=[layer for layer, _ in outline],
        y=[end for _, end in outline],
        fill="toself",
        fillcolor=faint(colour),
        line={"width": 0},
        mode="lines",
        name=f"95 % interval of the {label.removeprefix('held-out ')}",
        hoverinfo="skip",
    )
    return [band, line]


def _mark(figure: Any, vectors: SteeringVectorSet) -> None:
    try:
        best, why = best_of(vectors)
    except InputError:  # statistics at some layers only: nothing is chosen
        return
    figure.add_vline(x=best.layer_index, line={"color": CHOSEN, "width": 1.5, "dash": "dash"})
    figure.add_annotation(
        x=best.layer_index,
        y=0,
        yref="paper",
        yanchor="bottom",
        xanchor="left",
        xshift=4,
        showarrow=False,
        bgcolor="rgba(255,255,255,0.85)",
        text=f"chosen: layer {best.layer_index}",
        hovertext=f"by {why}",
    )


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
