"""A map of the personas: the first two principal components of a layer, coloured by what is known of them."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_persona.errors import InputError
from tl_persona.report.attributes import Colouring, Group, colouring
from tl_persona.report.geometry import principal_map
from tl_persona.report.style import GRID, NAMED, checked, graph_objects, labels_of, layout, plain


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
