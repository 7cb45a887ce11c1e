"""What is known of a vector at each layer: as a table for people or pandas, and as scores to choose a layer by.

Nothing is computed here: statistics are read from a vector's metadata.
"""

import html
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tl_persona.errors import MissingDependencyError
from tl_persona.files import Fields
from tl_persona.vectors.files import norm_of

METRICS = ("separation", "split_half", "norm")
"""What a layer can be chosen by; see `SteeringVectorSet.get_best`."""


_STATISTICS = (
    "split_half",
    "agreement",
    "auc",
    "auc_low",
    "auc_high",
    "d_prime",
    "d_prime_low",
    "d_prime_high",
    "note",
)
_NORMS = ("pos_mean_norm", "neg_mean_norm")
_OUTLIERS = ("outliers", "largest_share")
_COLUMNS = ("layer", "hook_name", "num_pairs", "norm", *_NORMS, *_OUTLIERS, *_STATISTICS)
_HEADINGS = (
    "layer",
    "hook",
    "pairs",
    "norm",
    "split half",
    "agreement",
    "AUC",
    "d'",
    "outliers",
    "largest share",
    "note",
)


@dataclass(frozen=True)
class LayerTable:
    """What is known of the vectors of a set, one row a layer.

    Attributes:
        rows: Dicts with `layer`, `hook_name`, `norm`, the statistics, how many selected tokens are `outliers`, and the
            `largest_share` of one token in a mean; None where there is none.
    """

    rows: tuple[dict[str, Any], ...]

    def __str__(self) -> str:
        cells = [_HEADINGS, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        def line(tag: str, cells: Iterable[str]) -> str:
            return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

        return f"<table>{line('th', _HEADINGS)}{''.join(line('td', _cells(row)) for row in self.rows)}</table>"

    def to_pandas(self) -> Any:
        """The rows as a pandas DataFrame, indexed by layer.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingDependencyError("a frame needs pandas: pip install pandas") from error
        return pandas.DataFrame(list(self.rows), columns=list(_COLUMNS)).set_index("layer")


def row_of(vector: Fields) -> dict[str, Any]:
    """The row of one vector."""
    found = {"layer": vector["layer_index"], "hook_name": vector["hook_name"], "norm": norm_of(vector["vector"])}
    found |= {name: vector["metadata"].get(name) for name in ("num_pairs", *_NORMS)}
    found |= {name: _part(vector, "statistics").get(name) for name in _STATISTICS}
    outliers = _part(vector, "outliers")
    found |= {"outliers": outliers.get("tokens"), "largest_share": outliers.get("largest_share")}
    return {name: found[name] for name in _COLUMNS}


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    def number(name: str, form: str = ".2f") -> str:
        return "" if row[name] is None else format(row[name], form)

    def interval(name: str) -> str:
        low, high = number(f"{name}_low"), number(f"{name}_high")
        return f"{number(name)} [{low}, {high}]" if low and high else number(name)

    return (
        str(row["layer"]),
        row["hook_name"],
        number("num_pairs", "d"),
        number("norm", ".4g"),
        number("split_half"),
        number("agreement"),
        interval("auc"),
        interval("d_prime"),
        number("outliers", "d"),
        number("largest_share"),
        row["note"] or "",
    )


def _part(vector: Fields, name: str) -> Mapping[str, Any]:
    found = vector["metadata"].get(name)
    return found if isinstance(found, Mapping) else {}


def facts_of(vector: Fields) -> dict[str, str]:
    """What is known of one vector, in words; what is not known is left out.

    Example:
        >>> import torch
        >>> from tl_persona.vectors import SteeringVector
        >>> from tl_persona.vectors.vector import as_fields
        >>> facts_of(as_fields(SteeringVector("calm", 3, torch.tensor([3.0, 4.0]), "tiny")))["norm"]
        '5'
    """
    tensor, metadata = vector["vector"], vector["metadata"]
    told = dict(zip(_HEADINGS, _cells(row_of(vector)), strict=True))
    facts = {
        "hook": f"{vector['hook_name']} (layer {vector['layer_index']})",
        "model": vector["model_name"],
        "tensor": f"{len(tensor)} d_model, {str(tensor.dtype).removeprefix('torch.')}, {tensor.device}",
        "norm": told["norm"],
        "method": vector["extraction_method"],
        "token position": str(metadata.get("token_position", "")),
        **{name: told[name] for name in ("pairs", "split half", "agreement", "AUC", "d'")},
        "outliers": told["outliers"] or str(metadata.get("outliers") or ""),
        **{name: told[name] for name in ("largest share", "note")},
    }
    return {name: fact for name, fact in facts.items() if fact}


def score_of(vector: Fields, metric: str) -> tuple[float, ...] | None:
    """What a metric sorts by, larger being better; None where the vector lacks it."""
    found = _part(vector, "statistics")
    if metric == "norm":
        return (norm_of(vector["vector"]),)
    if metric == "split_half":
        return None if found.get("split_half") is None else (found["split_half"],)
    if found.get("auc") is None:
        return None
    return found["auc"], -math.inf if found.get("d_prime") is None else found["d_prime"]
