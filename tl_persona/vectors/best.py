"""Which layer of a set is best by one measure, what decided, which layers come as near, and what to be wary of.

Statistics are read, as `table` has them, and nothing is computed. A choice that cannot be made raises an `InputError`,
a layer that is not there a `HookError`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tl_persona.errors import InputError
from tl_persona.files import Fields
from tl_persona.models.hooks import LayerSelection, resid_post, resolve_hooks
from tl_persona.vectors.table import METRICS, row_of, score_of

_SPOKEN = {"auc": "held-out AUC", "d_prime": "d'", "split_half": "split-half cosine", "norm": "norm"}


@dataclass(frozen=True)
class BestLayer:
    """The choice of a layer.

    Attributes:
        layer: The layer chosen.
        metric: What was asked for or, by default, found: `separation`, `split_half` or `norm`.
        decided_by: The statistic that told this layer from the next: `auc`, `d_prime`, `split_half` or `norm`.
        ties: The other layers that tie with it: their 95 % intervals overlap with its own, of d' too where d' decided.
            A statistic without interval ties where it is equal.
        compared: How many layers there were to choose from.
        n_layers: Number of the model's blocks; where no vector says it, of those up to the deepest vector.
        caution: What to be wary of; empty for nothing.

    Example:
        >>> print(BestLayer(18, "separation", "auc", (14, 22), 30, 30))
        layer 18 by held-out AUC; 2 of the 29 others tie with it within their 95 % intervals
    """

    layer: int
    metric: str
    decided_by: str
    ties: tuple[int, ...]
    compared: int
    n_layers: int
    caution: str = ""

    @property
    def reason(self) -> str:
        """What decided, and how many layers tie."""
        why = f"by {_SPOKEN[self.decided_by]}"
        if self.decided_by == "d_prime":
            why += ", as other layers have the same held-out AUC"
        within = " within their 95 % intervals" if self.metric == "separation" else ""
        others = self.compared - 1
        return f"{why}; {len(self.ties) or 'none'} of the {others} others tie with it{within}" if others else why

    def __str__(self) -> str:
        return f"layer {self.layer} {self.reason}"


def best_of(behavior: str, vectors: Sequence[Fields], metric: str | None, among: LayerSelection) -> BestLayer:
    """The best layer by one measure; among equals, the lowest.

    Args:
        behavior: For messages.
        vectors: One a layer, by ascending layer.
        metric: One of `METRICS`; None is `separation`, or `norm` where no vector has that.
        among: The layers to choose from, as `models.hooks.resolve_hooks` has them; those without a vector are left out.
            None is all.

    Raises:
        InputError: There is no vector, or not among these layers; the metric is unknown or missing at a layer.
        HookError: `among` names a layer that the model does not have.
    """
    if not vectors:
        raise InputError(f"the set for {behavior!r} is empty: there is no best vector")
    depth = _depth(vectors)
    candidates = list(vectors) if among is None else _among(vectors, among, depth)
    cautions = []
    if metric is None:
        metric = "separation"
        if all(score_of(vector, metric) is None for vector in candidates):
            metric = "norm"
            cautions.append(
                f"the vectors for {behavior!r} have no held-out separation, so the best is taken by norm, "
                "which mostly finds the deepest layer; extract with 4 or more pairs to have it"
            )
    scores = _scores(candidates, metric)
    layer = max(scores, key=lambda layer: (scores[layer], -layer))
    rows = {vector["layer_index"]: row_of(vector) for vector in candidates}
    decided_by, ties = _ties(rows, layer, metric)
    choice = BestLayer(layer, metric, decided_by, ties, len(candidates), depth)
    if _is_late(layer, depth) and not all(_is_late(other, depth) for other in scores):
        cautions.append(
            f"the best layer for {behavior!r} lies in the last tenth of {depth} layers ({choice}). There a model has "
            "often made up its mind: texts are told apart, and steering does little. Look at summary(), try earlier "
            "layers too, or limit the choice with among="
        )
    return BestLayer(layer, metric, decided_by, ties, len(candidates), depth, "; ".join(cautions))


def _depth(vectors: Sequence[Fields]) -> int:
    noted = [vector["provenance"].notes.get("n_layers") for vector in vectors if vector["provenance"] is not None]
    lowest: int = 1 + max(vector["layer_index"] for vector in vectors)
    return max([lowest, *(number for number in noted if isinstance(number, int))])


def _is_late(layer: int, depth: int) -> bool:
    """Whether a layer lies in the last tenth; fewer than ten layers have none."""
    return 10 * layer >= 9 * depth


def _among(vectors: Sequence[Fields], among: LayerSelection, depth: int) -> list[Fields]:
    outputs = {resid_post(layer): layer for layer in range(depth)}
    names = outputs | {vector["hook_name"]: vector["layer_index"] for vector in vectors}
    layers = {names[name] for name in resolve_hooks(among, names, depth)}
    chosen = [vector for vector in vectors if vector["layer_index"] in layers]
    if not chosen:
        there = [vector["layer_index"] for vector in vectors]
        raise InputError(f"among={among!r} means none of the layers {there} that have a vector")
    return chosen


def _scores(vectors: Sequence[Fields], metric: str) -> dict[int, tuple[float, ...]]:
    if metric not in METRICS:
        raise InputError(f"unknown metric {metric!r}; there are {', '.join(METRICS)}")
    found = {vector["layer_index"]: score_of(vector, metric) for vector in vectors}
    missing = [layer for layer, score in found.items() if score is None]
    if missing:
        available = [name for name in METRICS if all(score_of(vector, name) is not None for vector in vectors)]
        raise InputError(f"no {metric} at layers {missing}; available at all layers: {', '.join(available)}")
    return {layer: score for layer, score in found.items() if score is not None}


def _ties(rows: dict[int, dict[str, Any]], best: int, metric: str) -> tuple[str, tuple[int, ...]]:
    """What decided, and the layers that tie with the best one."""
    names = [metric]
    if metric == "separation":
        same = [layer for layer, row in rows.items() if row["auc"] == rows[best]["auc"]]
        names = ["auc", "d_prime"] if len(same) > 1 and rows[best]["d_prime"] is not None else ["auc"]
    others = [layer for layer in rows if layer != best]
    ties = [layer for layer in others if all(_overlap(rows[layer], rows[best], name) for name in names)]
    return names[-1], tuple(ties)


def _overlap(one: dict[str, Any], other: dict[str, Any], name: str) -> bool:
    if one[name] is None or other[name] is None:
        return False
    (low, high), (other_low, other_high) = (_interval(row, name) for row in (one, other))
    return low <= other_high and other_low <= high


def _interval(row: dict[str, Any], name: str) -> tuple[float, float]:
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    return (row[name] if low is None else low), (row[name] if high is None else high)
