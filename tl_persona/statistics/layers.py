"""How much a steering direction can be trusted, measured on the contrast pairs it comes from.

Everything is computed in float64 for one hook at a time, from the activations of both sides.

Nothing is invented: under four pairs, or where both sides are equal, a statistic is None and a note says why.
"""

from typing import Any

import msgspec
import torch
from jaxtyping import Float
from torch import Tensor

from tl_persona.errors import InputError
from tl_persona.statistics.directions import Direction, mean_difference
from tl_persona.statistics.separation import (
    MIN_PAIRS,
    checked_sides,
    finite_rows,
    generator_of,
    held_out_projections,
    pair_products,
    separation_of,
)


class LayerStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one hook's direction; see the functions of this module for each definition.

    Attributes:
        n_pairs: Number of pairs.
        pos_mean_norm: L2 norm of the mean positive activation.
        neg_mean_norm: L2 norm of the mean negative activation.
        vector_norm: L2 norm of the direction.
        split_half: `split_half_cosine`.
        agreement: `agreement`.
        auc: Of `held_out_separation`, like the five fields that follow.
        auc_low: Lower end of its interval.
        auc_high: Upper end of its interval.
        d_prime: Distance of the two sides' means in standard deviations.
        d_prime_low: Lower end of its interval.
        d_prime_high: Upper end of its interval.
        note: Why statistics are None; None where none is.
    """

    n_pairs: int
    pos_mean_norm: float
    neg_mean_norm: float
    vector_norm: float
    split_half: float | None = None
    agreement: float | None = None
    auc: float | None = None
    auc_low: float | None = None
    auc_high: float | None = None
    d_prime: float | None = None
    d_prime_low: float | None = None
    d_prime_high: float | None = None
    note: str | None = None

    def as_metadata(self) -> dict[str, Any]:
        """A steering vector's metadata: the count and norms by name, the rest under `statistics`."""
        fields = msgspec.structs.asdict(self)
        named = {"num_pairs": fields.pop("n_pairs")}
        named |= {name: fields.pop(name) for name in ("pos_mean_norm", "neg_mean_norm", "vector_norm")}
        return {**named, "statistics": fields}


def layer_statistics(
    pos: Float[Tensor, "pair d_model"],
    neg: Float[Tensor, "pair d_model"],
    *,
    direction: Direction = mean_difference,
    folds: int = 5,
    repeats: int = 100,
    bootstrap: int = 1000,
    seed: int = 0,
) -> LayerStatistics:
    """All statistics of one hook.

    Args:
        pos: Activations of the positive sides.
        neg: Activations of the negative sides, in the same order.
        direction: What is fitted in every fold; its norm on all pairs is `vector_norm`.
        folds: Number of folds of `held_out_separation`.
        repeats: Number of random halvings of `split_half_cosine`.
        bootstrap: Number of resamples behind the intervals.
        seed: Decides folds, halvings and resamples; the global generator is left alone.

    Raises:
        InputError: The sides differ in shape, there is no pair, or a count is too small.
        NonFiniteError: An activation is NaN or infinite.

    Example:
        >>> pos, neg = torch.eye(8) + 2, torch.eye(8)
        >>> found = layer_statistics(pos, neg)
        >>> round(found.vector_norm, 3), round(found.split_half, 3), found.agreement, found.auc
        (5.657, 1.0, 1.0, 1.0)
        >>> layer_statistics(pos[:1], neg[:1]).note
        '1 pair: statistics need at least 4'
    """
    pos, neg = checked_sides(pos, neg)
    vector_norm = direction(pos, neg).to(pos).norm().item()
    norms = {
        "n_pairs": len(pos),
        "pos_mean_norm": pos.mean(dim=0).norm().item(),
        "neg_mean_norm": neg.mean(dim=0).norm().item(),
        "vector_norm": vector_norm,
    }
    if len(pos) < MIN_PAIRS:
        plural = "s" if len(pos) > 1 else ""
        return LayerStatistics(**norms, note=f"{len(pos)} pair{plural}: statistics need at least {MIN_PAIRS}")
    if not (pos - neg).any():
        return LayerStatistics(**norms, note="both sides of every pair have the same activation here")
    products = pair_products(pos, neg)
    half = _split_half(products.differences, seed, repeats)
    agreeing = _agreement(products.differences)
    sides = held_out_projections(pos, neg, products, direction, folds, seed)
    if sides is None:
        return LayerStatistics(**norms, split_half=half, agreement=agreeing, note="the direction of a fold is zero")
    separation = msgspec.structs.asdict(separation_of(*sides, bootstrap, seed))
    note = "the held-out projections have no spread" if separation["d_prime"] is None else None
    return LayerStatistics(**norms, split_half=half, agreement=agreeing, **separation, note=note)


def split_half_cosine(diffs: Float[Tensor, "pair d_model"], seed: int = 0, repeats: int = 100) -> float | None:
    """Cosine between the mean differences of two random halves of the pairs, averaged over `repeats` halvings.

    Near 1 the direction does not hang on which pairs were taken; near 0 it is noise. Each half has half the pairs,
    so this understates how well a second set of the full size would agree.

    Returns:
        None under four pairs, or if the mean of a half is zero in every halving.

    Example:
        >>> split_half_cosine(torch.tensor([[1.0, 0.0]] * 6))
        1.0
    """
    rows = finite_rows("differences", diffs)
    return _split_half(rows @ rows.T, seed, repeats) if len(rows) >= MIN_PAIRS else None


def agreement(diffs: Float[Tensor, "pair d_model"]) -> float | None:
    """Share of pairs whose difference points the way the *other* pairs' mean difference points.

    Each pair is compared with a mean it has no part in (leave-one-out); against the mean of all, a pair would agree
    with itself, and most of pure noise would too.

    Returns:
        None under four pairs.

    Example:
        >>> agreement(torch.tensor([[1.0], [2.0], [1.0], [-1.0]]))
        0.75
    """
    rows = finite_rows("differences", diffs)
    return _agreement(rows @ rows.T) if len(rows) >= MIN_PAIRS else None


def _split_half(products: Float[Tensor, "pair pair"], seed: int, repeats: int) -> float | None:
    if repeats < 1:
        raise InputError(f"repeats is {repeats}; give at least 1")
    n_pairs = len(products)
    ranks = torch.rand(repeats, n_pairs, generator=generator_of(seed), dtype=torch.float64).argsort(dim=1)
    first = (ranks < n_pairs // 2).double()
    second = 1 - first
    across = ((first @ products) * second).sum(dim=1)
    squares = ((first @ products) * first).sum(dim=1) * ((second @ products) * second).sum(dim=1)
    cosines = (across / squares.sqrt())[squares > 0]  # sums serve as well as means: a cosine has no length
    return cosines.mean().item() if len(cosines) else None


def _agreement(products: Float[Tensor, "pair pair"]) -> float:
    with_the_others = products.sum(dim=1) - products.diagonal()
    return (with_the_others > 0).double().mean().item()
