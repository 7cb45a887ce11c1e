"""How much a steering direction can be trusted, measured on the contrast pairs it comes from.

Everything is computed in float64 for one hook at a time, from the activations of both sides. For the mean
difference, every fold, half and left-out mean is a sum of pair differences, so all statistics follow from two tables
of inner products (`PairProducts`): after those, the cost depends on the number of pairs alone, not on d_model. Other
directions are fitted anew in each fold. Choosing a layer by these numbers is `vectors`' work.

Nothing is invented: under four pairs, or where both sides are equal, a statistic is None and a note says why.
"""

from typing import Any, NamedTuple

import msgspec
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_persona.directions import Direction, mean_difference
from tl_persona.errors import InputError, NonFiniteError

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
    pos, neg = _checked(pos, neg)
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
    sides = _held_out_projections(pos, neg, products, direction, folds, seed)
    if sides is None:
        return LayerStatistics(**norms, split_half=half, agreement=agreeing, note="the direction of a fold is zero")
    separation = msgspec.structs.asdict(_separation(*sides, bootstrap, seed))
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
    rows = _finite("differences", diffs)
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
    rows = _finite("differences", diffs)
    return _agreement(rows @ rows.T) if len(rows) >= MIN_PAIRS else None


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
    pos, neg = _checked(pos, neg)
    if len(pos) < MIN_PAIRS:
        return None
    sides = _held_out_projections(pos, neg, pair_products(pos, neg), direction, folds, seed)
    return None if sides is None else _separation(*sides, bootstrap, seed)


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
    pos, neg = _checked(pos, neg)
    differences, midpoints = pos - neg, (pos + neg) / 2
    midpoints -= midpoints.mean(dim=0)
    return PairProducts(differences @ differences.T, midpoints @ differences.T)


def _split_half(products: Float[Tensor, "pair pair"], seed: int, repeats: int) -> float | None:
    if repeats < 1:
        raise InputError(f"repeats is {repeats}; give at least 1")
    n_pairs = len(products)
    ranks = torch.rand(repeats, n_pairs, generator=_generator(seed), dtype=torch.float64).argsort(dim=1)
    first = (ranks < n_pairs // 2).double()
    second = 1 - first
    across = ((first @ products) * second).sum(dim=1)
    squares = ((first @ products) * first).sum(dim=1) * ((second @ products) * second).sum(dim=1)
    cosines = (across / squares.sqrt())[squares > 0]  # sums serve as well as means: a cosine has no length
    return cosines.mean().item() if len(cosines) else None


def _agreement(products: Float[Tensor, "pair pair"]) -> float:
    with_the_others = products.sum(dim=1) - products.diagonal()
    return (with_the_others > 0).double().mean().item()


def _held_out_projections(
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


def _separation(
    positive: Float[Tensor, "pair"], negative: Float[Tensor, "pair"], bootstrap: int, seed: int
) -> Separation:
    if bootstrap < MIN_RESAMPLES:
        raise InputError(f"bootstrap is {bootstrap}; give at least {MIN_RESAMPLES} resamples")
    n_pairs = len(positive)
    drawn = torch.randint(n_pairs, (bootstrap, n_pairs), generator=_generator(seed))
    counts = torch.zeros(bootstrap, n_pairs, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones(1, dtype=torch.float64).expand_as(drawn))
    aucs = _resampled_auc(_in_order(positive, negative), counts)
    centre = (positive.mean() + negative.mean()) / 2  # keeps the sums of squares below small, and so exact
    sides = torch.stack([positive - centre, negative - centre], dim=1)
    means = counts @ sides / n_pairs
    variances = (counts @ sides.square() / n_pairs - means.square()) * n_pairs / (n_pairs - 1)
    spreads = (variances.sum(dim=1) / 2).clamp(min=0).sqrt()
    distances = means[:, 0] - means[:, 1]
    d_primes = (distances / spreads)[spreads > NO_SPREAD * distances.abs()]
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
    order = torch.randperm(n_pairs, generator=_generator(seed))
    return order % min(folds, n_pairs)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _checked(pos: Tensor, neg: Tensor) -> tuple[Float[Tensor, "pair d_model"], Float[Tensor, "pair d_model"]]:
    if pos.ndim != 2 or pos.shape != neg.shape or not len(pos):
        raise InputError(
            f"positive activations are {tuple(pos.shape)}, negative {tuple(neg.shape)}; "
            "give both as (pair, d_model) with the same pairs in the same order"
        )
    return _finite("positive activations", pos), _finite("negative activations", neg)


def _finite(name: str, activations: Tensor) -> Tensor:
    rows = activations.detach().to("cpu", torch.float64)  # not on the device: not all have float64
    bad = rows.isfinite().all(dim=1).logical_not().nonzero()
    if len(bad):
        raise NonFiniteError(f"{name}: pair {int(bad[0])} holds NaN or infinity; was it computed in half precision?")
    return rows
