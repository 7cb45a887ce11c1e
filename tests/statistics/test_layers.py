"""Layer statistics: against naive definitions, closed forms and scikit-learn, and the laws they obey."""

import inspect
from itertools import combinations

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import Tensor

from tl_persona.errors import InputError, NonFiniteError
from tl_persona.statistics.directions import mean_difference, pca_direction
from tl_persona.statistics.layers import LayerStatistics, agreement, layer_statistics, split_half_cosine
from tl_persona.statistics.separation import auc, d_prime, held_out_separation, pair_products

seeds = st.integers(0, 2**31)
scores = st.lists(st.integers(-20, 20), min_size=1, max_size=12).map(lambda values: torch.tensor(values).double())


def noisy_pairs(seed: int, n_pairs: int = 12, d_model: int = 30, shift: float = 0.5) -> tuple[Tensor, Tensor]:
    """Pairs that share a topic and a large common offset, as residuals do, and differ by a shift in dimension 0."""
    generator = torch.Generator().manual_seed(seed)
    topic = torch.randn(n_pairs, d_model, generator=generator, dtype=torch.float64) + 50
    noise = torch.randn(2, n_pairs, d_model, generator=generator, dtype=torch.float64) / 2
    noise[0, :, 0] += shift
    return topic + noise[0], topic + noise[1]


def naive_leave_one_out(pos: np.ndarray, neg: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Projections of each pair on the mean difference of all other pairs, one pair at a time."""
    positive, negative = [], []
    for held_out in range(len(pos)):
        training = [index for index in range(len(pos)) if index != held_out]
        pos_mean, neg_mean = pos[training].mean(axis=0), neg[training].mean(axis=0)
        unit = (pos_mean - neg_mean) / np.linalg.norm(pos_mean - neg_mean)
        middle = (pos_mean + neg_mean) / 2
        positive.append((pos[held_out] - middle) @ unit)
        negative.append((neg[held_out] - middle) @ unit)
    return np.array(positive), np.array(negative)


def naive_auc(positive: np.ndarray, negative: np.ndarray) -> float:
    return float(roc_auc_score([1] * len(positive) + [0] * len(negative), [*positive, *negative]))


def naive_d_prime(positive: np.ndarray, negative: np.ndarray) -> float:
    spread = np.sqrt((positive.var(ddof=1) + negative.var(ddof=1)) / 2)
    return float((positive.mean() - negative.mean()) / spread)


def numbers(found: msgspec.Struct) -> list[float]:
    return [value for value in msgspec.structs.astuple(found) if isinstance(value, float)]


@settings(deadline=None)
@given(scores, scores)
def test_auc_is_what_scikit_learn_says_with_ties(positive: Tensor, negative: Tensor) -> None:
    assert auc(positive, negative) == pytest.approx(naive_auc(positive.numpy(), negative.numpy()), abs=1e-12)


@settings(deadline=None)
@given(scores, scores)
def test_auc_of_swapped_sides_is_the_complement(positive: Tensor, negative: Tensor) -> None:
    assert auc(positive, negative) == pytest.approx(1 - auc(negative, positive), abs=1e-12)


@settings(deadline=None)
@given(scores, scores)
def test_auc_does_not_change_under_monotone_scaling(positive: Tensor, negative: Tensor) -> None:
    for scaled in (lambda x: 3 * x + 7, lambda x: x**3, lambda x: torch.exp(x / 4)):
        assert auc(scaled(positive), scaled(negative)) == auc(positive, negative)


def test_d_prime_is_the_distance_in_standard_deviations() -> None:
    generator = np.random.default_rng(0)
    positive, negative = generator.normal(2, 1, 9), generator.normal(0, 3, 14)
    found = d_prime(torch.tensor(positive), torch.tensor(negative))
    assert found == pytest.approx(naive_d_prime(positive, negative), rel=1e-12)


def test_d_prime_without_spread_is_none() -> None:
    assert d_prime(torch.tensor([0.3, 0.3, 0.3]), torch.tensor([0.1, 0.1, 0.1])) is None


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(4, 14))
def test_separation_equals_the_naive_leave_one_out_definition(seed: int, n_pairs: int) -> None:
    pos, neg = noisy_pairs(seed, n_pairs)
    positive, negative = naive_leave_one_out(pos.numpy(), neg.numpy())
    found = held_out_separation(pos, neg, folds=n_pairs)
    assert found is not None
    assert found.auc == pytest.approx(naive_auc(positive, negative), abs=1e-12)
    assert found.d_prime == pytest.approx(naive_d_prime(positive, negative), rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(4, 14), st.integers(2, 6))
@example(3401, 5, 4)  # a resample of one pair over and over, whose spread is rounding
def test_inner_products_give_what_fitting_every_fold_gives(seed: int, n_pairs: int, folds: int) -> None:
    pos, neg = noisy_pairs(seed, n_pairs)
    fast = held_out_separation(pos, neg, folds=folds, seed=seed)
    fitted = held_out_separation(pos, neg, folds=folds, seed=seed, direction=lambda p, n: p.mean(0) - n.mean(0))
    assert fast is not None and fitted is not None
    assert numbers(fast) == pytest.approx(numbers(fitted), rel=1e-8)


def test_pair_products_are_the_inner_products_of_differences_and_centred_midpoints() -> None:
    pos, neg = (side.numpy() for side in noisy_pairs(0, n_pairs=5))
    middles = (pos + neg) / 2 - ((pos + neg) / 2).mean(axis=0)
    found = pair_products(torch.tensor(pos), torch.tensor(neg))
    for i in range(5):
        for j in range(5):
            assert found.differences[i, j].item() == pytest.approx((pos[i] - neg[i]) @ (pos[j] - neg[j]), rel=1e-10)
            assert found.midpoints[i, j].item() == pytest.approx(middles[i] @ (pos[j] - neg[j]), rel=1e-8, abs=1e-8)


def test_every_pair_is_held_out_once_and_never_in_its_own_training_set() -> None:
    n_pairs, folds = 11, 4
    pos = torch.arange(float(n_pairs))[:, None].repeat(1, 2) + torch.tensor([1.0, 0.0])
    neg = torch.arange(float(n_pairs))[:, None].repeat(1, 2)
    seen: list[set[float]] = []

    def spy(p: Tensor, n: Tensor) -> Tensor:
        seen.append(set(n[:, 0].tolist()))
        return mean_difference(p, n)

    held_out_separation(pos, neg, folds=folds, direction=spy)
    left_out = [set(map(float, range(n_pairs))) - training for training in seen]
    assert sorted(len(fold) for fold in left_out) == [2, 3, 3, 3]
    assert sorted(index for fold in left_out for index in fold) == list(map(float, range(n_pairs)))


def test_noise_is_not_separated_on_held_out_pairs_though_it_is_on_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    pos, neg = torch.randn(2, 40, 400, generator=generator, dtype=torch.float64)
    direction = mean_difference(pos, neg)
    assert auc(pos @ direction, neg @ direction) > 0.95
    found = held_out_separation(pos, neg)
    assert found is not None
    assert found.auc_low < 0.5 < found.auc_high
    assert abs(found.auc - 0.5) < 0.2


def test_separation_of_gaussians_is_near_its_closed_form() -> None:
    generator = torch.Generator().manual_seed(1)
    pos, neg = torch.randn(2, 600, 3, generator=generator, dtype=torch.float64)
    pos[:, 1] += 2.0  # d' = 2, and then the AUC is Phi(2 / sqrt 2) = 0.9214
    found = held_out_separation(pos, neg)
    assert found is not None and found.d_prime is not None
    assert found.auc == pytest.approx(0.9214, abs=0.02)
    assert found.d_prime == pytest.approx(2.0, abs=0.15)


def test_the_interval_is_that_of_a_naive_bootstrap_over_pairs() -> None:
    pos, neg = noisy_pairs(3, n_pairs=16, shift=1.0)
    positive, negative = naive_leave_one_out(pos.numpy(), neg.numpy())
    in_order = (positive[:, None] > negative).astype(float)
    generator = np.random.default_rng(5)
    aucs, d_primes = [], []
    for _ in range(4000):
        drawn = generator.integers(16, size=16)
        across = [in_order[i, j] for i in drawn for j in drawn if i != j]  # no pair against its own copy
        within = [in_order[i, i] for i in drawn]
        aucs.append((np.mean(within) + 15 * np.mean(across)) / 16)
        d_primes.append(naive_d_prime(positive[drawn], negative[drawn]))
    found = held_out_separation(pos, neg, folds=16, bootstrap=4000)
    assert found is not None
    assert [found.auc_low, found.auc_high] == pytest.approx(np.quantile(aucs, [0.025, 0.975]), abs=0.015)
    expected = np.quantile(d_primes, [0.025, 0.975])
    assert [found.d_prime_low, found.d_prime_high] == pytest.approx(expected, rel=0.05)


def test_more_pairs_make_the_interval_narrower() -> None:
    widths = []
    for n_pairs in (10, 200):
        found = held_out_separation(*noisy_pairs(7, n_pairs))
        assert found is not None
        assert found.auc_low <= found.auc <= found.auc_high
        widths.append(found.auc_high - found.auc_low)
    assert widths[1] < widths[0] / 2


@given(seeds, st.integers(4, 12))
@settings(deadline=None, max_examples=50)
def test_agreement_equals_the_naive_leave_one_out_definition(seed: int, n_pairs: int) -> None:
    diffs = np.random.default_rng(seed).normal(0.3, 1, (n_pairs, 4))
    agreeing = [diffs[i] @ np.delete(diffs, i, axis=0).mean(axis=0) > 0 for i in range(n_pairs)]
    assert agreement(torch.tensor(diffs)) == pytest.approx(np.mean(agreeing), abs=1e-12)


@settings(deadline=None)
@given(seeds)
def test_agreement_ignores_the_order_of_the_pairs(seed: int) -> None:
    diffs = torch.randn(9, 4, generator=torch.Generator().manual_seed(seed))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed + 1))
    assert agreement(diffs[order]) == agreement(diffs)


def test_split_halves_of_orthogonal_deviations_have_a_closed_form() -> None:
    # Differences u + e_i: two halves of m pairs have cosine |u|^2 / (|u|^2 + 1/m), whatever the halving.
    diffs = torch.cat([torch.eye(8), torch.full((8, 1), 1.5)], dim=1)
    assert split_half_cosine(diffs) == pytest.approx(1.5**2 / (1.5**2 + 1 / 4), rel=1e-12)


@pytest.mark.parametrize("n_pairs", [6, 7])
def test_split_half_is_the_mean_over_all_halvings(n_pairs: int) -> None:
    diffs = np.random.default_rng(2).normal(0.5, 1, (n_pairs, 5))
    cosines = []
    for half in combinations(range(n_pairs), n_pairs // 2):
        one, other = diffs[list(half)].mean(axis=0), np.delete(diffs, half, axis=0).mean(axis=0)
        cosines.append(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
    assert split_half_cosine(torch.tensor(diffs), repeats=5000) == pytest.approx(np.mean(cosines), abs=0.02)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_statistics_do_not_change_under_rotation_shift_and_scale(seed: int) -> None:
    pos, neg = noisy_pairs(seed)
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(30, 30)))
    turned = [3 * (side @ torch.tensor(rotation)) for side in (pos, neg)]
    before, after = layer_statistics(pos, neg), layer_statistics(*turned)
    names = ("split_half", "agreement", "auc", "auc_low", "auc_high", "d_prime", "d_prime_low", "d_prime_high")
    for name in names:
        assert getattr(after, name) == pytest.approx(getattr(before, name), rel=1e-8), name
    assert after.vector_norm == pytest.approx(3 * before.vector_norm, rel=1e-9)
    moved = layer_statistics(pos + 1000, neg + 1000)
    for name in names:
        assert getattr(moved, name) == pytest.approx(getattr(before, name), rel=1e-6), name


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_swapping_the_sides_of_all_pairs_separates_them_as_well(seed: int) -> None:
    pos, neg = noisy_pairs(seed)
    one, other = layer_statistics(pos, neg), layer_statistics(neg, pos)
    assert other.auc == pytest.approx(one.auc, abs=1e-12)
    assert other.d_prime == pytest.approx(one.d_prime, rel=1e-9)
    assert (other.split_half, other.agreement) == (one.split_half, one.agreement)
    assert (other.pos_mean_norm, other.neg_mean_norm) == (one.neg_mean_norm, one.pos_mean_norm)


def test_the_norms_are_those_of_both_means_and_of_the_direction() -> None:
    pos, neg = noisy_pairs(8)
    found = layer_statistics(pos.float(), neg.float())
    means = pos.numpy().mean(axis=0), neg.numpy().mean(axis=0)
    assert found.pos_mean_norm == pytest.approx(np.linalg.norm(means[0]), rel=1e-6)
    assert found.neg_mean_norm == pytest.approx(np.linalg.norm(means[1]), rel=1e-6)
    assert found.vector_norm == pytest.approx(np.linalg.norm(means[0] - means[1]), rel=1e-5)
    twos = layer_statistics(pos, neg, direction=lambda p, n: torch.full((30,), 2.0))
    assert twos.vector_norm == pytest.approx(2 * 30**0.5, rel=1e-12)


def test_layer_statistics_are_those_of_the_single_functions() -> None:
    pos, neg = noisy_pairs(9)
    found = layer_statistics(pos, neg, seed=3, folds=4)
    separation = held_out_separation(pos, neg, folds=4, seed=3)
    assert separation is not None
    for name, value in msgspec.structs.asdict(separation).items():
        assert getattr(found, name) == value
    assert found.split_half == split_half_cosine(pos - neg, seed=3)
    assert found.agreement == agreement(pos - neg)
    assert (found.n_pairs, found.note) == (12, None)


def test_another_direction_is_judged_on_its_own() -> None:
    pos, neg = noisy_pairs(10, n_pairs=30, shift=3.0)
    neg[:, 1] += 30 * torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    useful = layer_statistics(pos, neg, direction=lambda p, n: torch.eye(30)[0])
    useless = layer_statistics(pos, neg, direction=pca_direction)
    assert useful.auc is not None and useless.auc is not None
    assert useful.auc > 0.9
    assert abs(useless.auc - 0.5) < 0.2


@pytest.mark.parametrize("n_pairs", [1, 2, 3])
def test_too_few_pairs_have_norms_and_a_note_but_no_statistics(n_pairs: int) -> None:
    pos, neg = noisy_pairs(0, n_pairs)
    found = layer_statistics(pos, neg)
    expected = (pos.mean(dim=0) - neg.mean(dim=0)).norm().item()
    assert found == LayerStatistics(
        n_pairs=n_pairs,
        pos_mean_norm=found.pos_mean_norm,
        neg_mean_norm=found.neg_mean_norm,
        vector_norm=found.vector_norm,
        note=f"{n_pairs} pair{'s' if n_pairs > 1 else ''}: statistics need at least 4",
    )
    assert found.vector_norm == pytest.approx(expected, rel=1e-12)
    assert held_out_separation(pos, neg) is None
    assert split_half_cosine(pos - neg) is None
    assert agreement(pos - neg) is None


def test_equal_sides_have_a_note_and_no_statistics() -> None:
    same = torch.arange(20.0).reshape(5, 4)
    found = layer_statistics(same, same.clone())
    assert (found.auc, found.split_half, found.vector_norm) == (None, None, 0.0)
    assert found.note == "both sides of every pair have the same activation here"
    assert held_out_separation(same, same) is None


def test_a_direction_that_is_zero_in_a_fold_has_a_note_and_no_separation() -> None:
    pos, neg = noisy_pairs(0)
    found = layer_statistics(pos, neg, direction=lambda p, n: torch.zeros(30))
    assert (found.auc, found.d_prime, found.note) == (None, None, "the direction of a fold is zero")
    assert found.agreement is not None


def test_projections_without_spread_have_an_auc_and_a_note_instead_of_an_endless_d_prime() -> None:
    found = layer_statistics(torch.ones(6, 3), torch.zeros(6, 3))
    assert (found.auc, found.auc_low, found.d_prime, found.d_prime_high) == (1.0, 1.0, None, None)
    assert found.note == "the held-out projections have no spread"


def test_the_same_seed_gives_the_same_numbers_and_leaves_the_global_generator_alone() -> None:
    pos, neg = noisy_pairs(4)
    state = torch.get_rng_state()
    first = layer_statistics(pos, neg, seed=1)
    assert layer_statistics(pos, neg, seed=1) == first
    assert layer_statistics(pos, neg, seed=2) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_the_metadata_has_the_reference_keys_and_the_rest_under_statistics() -> None:
    pos, neg = noisy_pairs(5)
    found = layer_statistics(pos, neg)
    metadata = found.as_metadata()
    statistics = metadata.pop("statistics")
    assert metadata == {
        "num_pairs": 12,
        "pos_mean_norm": found.pos_mean_norm,
        "neg_mean_norm": found.neg_mean_norm,
        "vector_norm": found.vector_norm,
    }
    assert statistics["auc"] == found.auc and statistics["note"] is None
    assert msgspec.json.decode(msgspec.json.encode(statistics)) == statistics


def test_activations_that_are_not_finite_are_refused_by_pair() -> None:
    pos, neg = noisy_pairs(6)
    neg[3, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="negative activations: pair 3"):
        layer_statistics(pos, neg)
    with pytest.raises(NonFiniteError, match="differences: pair 3"):
        agreement(pos - neg)


@pytest.mark.parametrize(
    ("option", "message"),
    [({"folds": 1}, "folds is 1"), ({"repeats": 0}, "repeats is 0"), ({"bootstrap": 99}, "bootstrap is 99")],
)
def test_counts_that_make_no_sense_are_refused(option: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        layer_statistics(*noisy_pairs(0), **option)  # type: ignore[arg-type]


def test_sides_or_directions_of_another_shape_are_refused() -> None:
    bare = inspect.unwrap(layer_statistics)  # where annotations are checked, they refuse these first
    with pytest.raises(InputError, match=r"positive activations are \(5, 3\), negative \(4, 3\)"):
        bare(torch.ones(5, 3), torch.ones(4, 3))
    pos, neg = noisy_pairs(0)
    with pytest.raises(InputError, match=r"the direction has shape \(2,\), the activations \(30,\)"):
        layer_statistics(pos, neg, direction=lambda p, n: torch.ones(2))
