"""How well a direction tells apart the two sides of contrast pairs it was not fitted on.

Everything is computed in float64 for one hook at a time, from the activations of both sides. For the mean
difference, every fold, half and left-out mean is a sum of pair differences, so all statistics follow from two tables
of inner products (`PairProducts`): after those, the cost depends on the number of pairs alone, not on d_model. Other
directions are fitted anew in each fold.
"""

from typing import NamedTuple

import msgspec
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_persona.errors import InputError, NonFiniteError
from tl_persona.statistics.directions import Direction, mean_difference

MIN_PAIRS = 4
"""Two pairs a half: with fewer, a half is a single pair and a fold's training set is hardly more."""

MIN_RESAMPLES = 100
"""With fewer, the ends of an interval are hardly more than the extremes."""

NO_SPREAD = 1e-6
"""A spread below this share of the distance of the means is rounding: no d' beyond a million is believed."""

INTERVAL = (0.025, 0.975)
"""Quantiles of the bootstrap that bound an interval: 95 per cent."""


class PairProducts(NamedTuple):
    """All a mean difference needs to know of its pairs.

    Attributes:
        differences: Inner product of the differences (positive minus negative) of pairs i and j.
        midpoints: Inner product of the midpoint of pair i with the difference of pair j. Midpoints are taken
            relative to their mean: a common shift moves no statistic, and residuals share a large one.
    """

    differences: Float[Tensor, "pair pair"]
    midpoints: Float[Tensor, "pair pair"]


class Separation(msgspec.Struct, frozen=True):
    """How well a direction tells apart the two sides of pairs it was not fitted on, with 95 % intervals.

    Attributes:
        auc: Chance that a held-out positive text lies further along the direction than a held-out negative one.
        auc_low: Lower end of its interval.
        auc_high: Upper end of its interval.
        d_prime: Distance of the two sides' means in standard deviations.
        d_prime_low: Lower end of its interval.
        d_prime_high: Upper end of its interval.
    """

    auc: float
    auc_low: float
    auc_high: float
    d_prime: float | None
    d_prime_low: float | None
    d_prime_high: float | None


def held_out_separation(
    pos: Float[Tensor, "pair d_model"],
    neg: Float[Tensor, "pair d_model"],
    folds: int = 5,
    seed: int = 0,
    bootstrap: int = 1000,
    direction: Direction = mean_difference,
) -> Separation | None:
    """K-fold separation of the two sides: the direction never sees the pairs it is judged on.

    In each fold the direction comes from the training pairs. Held-out activations are projected on it at unit
    length, and measured from the midpoint of the two training means, so that the folds can be pooled. Over the
    pooled projections: `auc` and `d_prime`. The intervals are percentile bootstraps that resample whole *pairs*
    (the sides of a pair belong together) and keep each pair's projections, so they do not cover the variation
    of the fitted directions. A resample of one pair only is left out.

    Returns:
        None under four pairs, or if a fold's direction is zero.

    Example:
        >>> pos, neg = torch.eye(8) + 2, torch.eye(8)
        >>> held_out_separation(pos, neg).auc
        1.0
    """
    pos, neg = checked_sides(pos, neg)
    if len(pos) < MIN_PAIRS:
        return None
    sides = held_out_projections(pos, neg, pair_products(pos, neg), direction, folds, seed)
    return None if sides is None else separation_of(*sides, bootstrap, seed)


def auc(positive: Float[Tensor, "n_positive"], negative: Float[Tensor, "n_negative"]) -> float:
    """Area under the ROC curve: the share of (positive, negative) combinations in order, a tie counting half.

    This is the Mann-Whitney U statistic over the number of combinations: 0.5 is chance, 1 is full separation.

    Example:
        >>> auc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
        0.875
    """
    return _in_order(positive, negative).mean().item()


def d_prime(positive: Float[Tensor, "n_positive"], negative: Float[Tensor, "n_negative"]) -> float | None:
    """Sensitivity index: the difference of the means over the root of the mean of the two unbiased variances.

    From signal detection theory (Green & Swets, "Signal Detection Theory and Psychophysics", 1966), in the form for
    unequal variances. Unlike the AUC it goes on growing once the sides are fully apart.

    Returns:
        None where neither side has any spread.

    Example:
        >>> round(d_prime(torch.tensor([3.0, 5.0]), torch.tensor([0.0, 2.0])), 4)
        2.1213
    """
    distance = positive.mean() - negative.mean()
    spread = ((positive.var() + negative.var()) / 2).sqrt()
    return (distance / spread).item() if spread > NO_SPREAD * distance.abs() else None


def pair_products(pos: Float[Tensor, "pair d_model"], neg: Float[Tensor, "pair d_model"]) -> PairProducts:
    """The inner products from which all statistics of the mean difference follow, in float64."""
    pos, neg = checked_sides(pos, neg)
    differences, midpoints = pos - neg, (pos + neg) / 2
    midpoints -= midpoints.mean(dim=0)
    return PairProducts(differences @ differences.T, midpoints @ differences.T)


def held_out_projections(
    pos: Float[Tensor, "pair d_model"],
    neg: Float[Tensor, "pair d_model"],
    products: PairProducts,
    direction: Direction,
    folds: int,
    seed: int,
) -> tuple[Float[Tensor, "pair"], Float[Tensor, "pair"]] | None:
    """Both sides of each pair, projected on the direction of the folds it is not in; None if one is zero."""
    fold_of = _folds(len(pos), folds, seed)
    if direction is mean_difference:
        return _project_by_products(products, fold_of)
    positive, negative = pos.new_empty(len(pos)), pos.new_empty(len(pos))
    for fold in range(int(fold_of.max()) + 1):
        held_out, training = fold_of == fold, fold_of != fold
        vector = direction(pos[training], neg[training]).to(pos)
        if vector.shape != pos.shape[1:]:
            raise InputError(f"the direction has shape {tuple(vector.shape)}, the activations {tuple(pos.shape[1:])}")
        if vector.norm() == 0:
            return None
        vector = vector / vector.norm()
        midpoint = (pos[training].mean(dim=0) + neg[training].mean(dim=0)) / 2
        positive[held_out] = (pos[held_out] - midpoint) @ vector
        negative[held_out] = (neg[held_out] - midpoint) @ vector
    return positive, negative


def _project_by_products(
    products: PairProducts, fold_of: Int[Tensor, "pair"]
) -> tuple[Float[Tensor, "pair"], Float[Tensor, "pair"]] | None:
    n_folds = int(fold_of.max()) + 1
    trains = (fold_of != torch.arange(n_folds)[:, None]).double()
    trains /= trains.sum(dim=1, keepdim=True)  # row f: the weights of the training mean of fold f
    norms = ((trains @ products.differences) * trains).sum(dim=1).clamp(min=0).sqrt()
    if (norms == 0).any():
        return None
    midpoint_by_fold = products.midpoints @ trains.T
    centres = (trains * midpoint_by_fold.T).sum(dim=1)
    fold = fold_of[:, None]
    midpoints = midpoint_by_fold.gather(1, fold)[:, 0] - centres[fold_of]
    differences = (products.differences @ trains.T).gather(1, fold)[:, 0]
    return (midpoints + differences / 2) / norms[fold_of], (midpoints - differences / 2) / norms[fold_of]


def separation_of(
    positive: Float[Tensor, "pair"], negative: Float[Tensor, "pair"], bootstrap: int, seed: int
) -> Separation:
    """Separation of projections that are there already, row i of both being pair i.

    Raises:
        InputError: Too few resamples for an interval.
    """
    if bootstrap < MIN_RESAMPLES:
        raise InputError(f"bootstrap is {bootstrap}; give at least {MIN_RESAMPLES} resamples")
    n_pairs = len(positive)
    drawn = torch.randint(n_pairs, (bootstrap, n_pairs), generator=generator_of(seed))
    counts = torch.zeros(bootstrap, n_pairs, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones(1, dtype=torch.float64).expand_as(drawn))
    aucs = _resampled_auc(_in_order(positive, negative), counts)
    centre = (positive.mean() + negative.mean()) / 2  # keeps the sums of squares below small, and so exact
    sides = torch.stack([positive - centre, negative - centre], dim=1)
    means = counts @ sides / n_pairs
    variances = (counts @ sides.square() / n_pairs - means.square()) * n_pairs / (n_pairs - 1)
    spreads = (variances.sum(dim=1) / 2).clamp(min=0).sqrt()
    distances = means[:, 0] - means[:, 1]
    several = (counts > 0).sum(dim=1) > 1  # one pair over and over has no spread, and rounding would give it one
    d_primes = (distances / spreads)[several & (spreads > NO_SPREAD * distances.abs())]
    found = d_prime(positive, negative)
    low, high = _interval(aucs)
    d_low, d_high = _interval(d_primes) if found is not None and len(d_primes) else (None, None)
    return Separation(auc(positive, negative), low, high, found, d_low, d_high)


def _resampled_auc(in_order: Float[Tensor, "pair pair"], counts: Float[Tensor, "resample pair"]) -> Tensor:
    """The AUC of each resample, its diagonal (the sides of one pair) at the weight it has in the full sample.

    A pair drawn twice would otherwise be compared with its own copy, and as the sides of one pair are mostly in
    order, every resample would look better than the sample it comes from.
    """
    n_pairs = len(in_order)
    own, squares = in_order.diagonal(), counts.square()
    n_across = n_pairs**2 - squares.sum(dim=1)
    several = n_across > 0  # else one pair over and over: nothing to compare it with
    across = ((counts @ in_order) * counts).sum(dim=1) - squares @ own
    within = counts @ own / n_pairs
    return ((within + (n_pairs - 1) * across / n_across) / n_pairs)[several]


def _interval(values: Float[Tensor, "resample"]) -> tuple[float, float]:
    low, high = values.quantile(torch.tensor(INTERVAL, dtype=values.dtype)).tolist()
    return low, high


def _in_order(
    positive: Float[Tensor, "n_positive"], negative: Float[Tensor, "n_negative"]
) -> Float[Tensor, "n_positive n_negative"]:
    return ((positive[:, None] > negative).double() + (positive[:, None] >= negative).double()) / 2


def _folds(n_pairs: int, folds: int, seed: int) -> Int[Tensor, "pair"]:
    """The fold of each pair: sizes differ by one at most."""
    if folds < 2:
        raise InputError(f"folds is {folds}; give at least 2, or nothing is held out")
    order = torch.randperm(n_pairs, generator=generator_of(seed))
    return order % min(folds, n_pairs)


def generator_of(seed: int) -> torch.Generator:
    """A generator of its own, so that the global one is left alone."""
    return torch.Generator().manual_seed(seed)


def checked_sides(pos: Tensor, neg: Tensor) -> tuple[Float[Tensor, "pair d_model"], Float[Tensor, "pair d_model"]]:
    """Both sides in float64 on the CPU.

    Raises:
        InputError: They differ in shape, or there is no pair.
        NonFiniteError: An activation is NaN or infinite.
    """
    if pos.ndim != 2 or pos.shape != neg.shape or not len(pos):
        raise InputError(
            f"positive activations are {tuple(pos.shape)}, negative {tuple(neg.shape)}; "
            "give both as (pair, d_model) with the same pairs in the same order"
        )
    return finite_rows("positive activations", pos), finite_rows("negative activations", neg)


def finite_rows(name: str, activations: Tensor) -> Float[Tensor, "pair d_model"]:
    """Activations in float64 on the CPU.

    Raises:
        NonFiniteError: One is NaN or infinite; the message has `name` and the pair.
    """
    rows = activations.detach().to("cpu", torch.float64)  # not on the device: not all have float64
    bad = rows.isfinite().all(dim=1).logical_not().nonzero()
    if len(bad):
        raise NonFiniteError(f"{name}: pair {int(bad[0])} holds NaN or infinity; was it computed in half precision?")
    return rows
