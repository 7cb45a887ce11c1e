"""What all figures of the report share: fonts, grids, colours, and the check of what they are drawn from.

Names are data: `plain` and `labels_of` keep plotly from reading markup in them.
"""

from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from torch import Tensor

from tl_persona.errors import InputError, MissingDependencyError

FEW = 12
"""Lines that can be told apart: up to so many personas each have their own."""
NAMED = 40
"""Names that fit beside a heatmap, or on a map."""
LONGEST = 32  # characters of a name
GRID = {"gridcolor": "#e3e3e3", "zeroline": False, "linecolor": "#767676", "ticks": "outside"}
_FONT = {"family": "system-ui, sans-serif", "size": 13, "color": "#1b1b1b"}


def graph_objects() -> Any:
    """Plotly's `graph_objects`, loaded when the first figure is drawn.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    try:
        return import_module("plotly.graph_objects")
    except ImportError as error:
        raise MissingDependencyError('figures need plotly: pip install "tl-persona[plots]"') from error


def checked(vectors: Tensor, names: Sequence[str], layers: Sequence[int] | None) -> list[int]:
    """The layers' numbers, once everything fits together.

    Raises:
        InputError: The counts of names, layers and vectors differ.
    """
    if vectors.ndim != 3 or not vectors.numel():
        raise InputError(f"vectors have the shape {tuple(vectors.shape)}, not (persona, layer, d_model)")
    if isinstance(names, str) or len(names) != len(vectors):
        raise InputError(f"{len(names)} names for vectors of {len(vectors)} personas: give one name each")
    numbers = list(range(vectors.shape[1])) if layers is None else list(layers)
    if len(numbers) != vectors.shape[1]:
        raise InputError(f"{len(numbers)} layer numbers for vectors of {vectors.shape[1]} layers: give one each")
    return numbers


def layout(title: str, **others: Any) -> dict[str, Any]:
    """A layout in the common style, with more keys or other ones."""
    return {
        "template": "none",
        "font": _FONT,
        "title": {"text": title, "font": {"size": 15}, "x": 0.01, "xanchor": "left"},
        "margin": {"l": 70, "r": 20, "t": 50 if title else 20, "b": 60},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        **others,
    }


def faint(colour: str) -> str:
    """A colour `#rrggbb` as thin as a band is drawn."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.2)"


def plain(text: str) -> str:
    """Text that plotly draws as it stands; plotly reads a few HTML tags and entities in every label.

    Example:
        >>> plain("<b>Ada</b>")
        '&lt;b&gt;Ada&lt;/b&gt;'
    """
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def labels_of(names: Sequence[str]) -> list[str]:
    """One label a persona for plotly: shortened, and numbered where two would be the same.

    Example:
        >>> labels_of(["Ada", "Bo", "Ada"])
        ['Ada (1)', 'Bo', 'Ada (2)']
    """
    return [plain(name) for name in distinct(names)]


def distinct(names: Sequence[str]) -> list[str]:
    """Names shortened, and numbered where two would be the same."""
    short = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in names]
    counts, seen, found = Counter(short), Counter[str](), []
    taken = set(short)
    for name in short:
        label = name
        while counts[name] > 1 and (label == name or label in taken):
            seen[name] += 1
            label = f"{name} ({seen[name]})"
        taken.add(label)
        found.append(label)
    return found
