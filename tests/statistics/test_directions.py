"""Directions: against closed forms and scikit-learn's own answers, and the laws all of them obey."""

import inspect
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tl_persona.errors import InputError, MissingDependencyError
from tl_persona.statistics.directions import logistic_direction, mean_difference, pca_direction

EVERY_DIRECTION = pytest.mark.parametrize("direction", [mean_difference, pca_direction, logistic_direction])
FITTED = pytest.mark.parametrize("direction", [pca_direction, logistic_direction])
Function = Callable[[Tensor, Tensor], Tensor]


def noisy_pairs(seed: int, n_pairs: int = 12, d_model: int = 6, shift: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    topic = 3 * torch.randn(n_pairs, d_model, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, n_pairs, d_model, generator=generator, dtype=torch.float64) / 2
    towards = torch.zeros(d_model, dtype=torch.float64)
    towards[0] = shift
    return topic + noise[0] + towards, topic + noise[1] - towards


@EVERY_DIRECTION
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_swapping_the_sides_turns_the_direction_round(direction: Function, seed: int) -> None:
    pos, neg = noisy_pairs(seed)
    torch.testing.assert_close(direction(pos, neg), -direction(neg, pos), rtol=1e-4, atol=1e-4)


@EVERY_DIRECTION
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_the_order_of_the_pairs_does_not_matter(direction: Function, seed: int) -> None:
    pos, neg = noisy_pairs(seed)
    order = torch.randperm(len(pos), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(direction(pos[order], neg[order]), direction(pos, neg), rtol=1e-4, atol=1e-4)


@FITTED
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_a_fitted_direction_has_the_norm_and_the_side_of_the_mean_difference(direction: Function, seed: int) -> None:
    pos, neg = noisy_pairs(seed)
    found, mean = direction(pos, neg), mean_difference(pos, neg)
    assert found.norm().item() == pytest.approx(mean.norm().item(), rel=1e-9)
    assert found @ mean > 0


def test_the_mean_difference_is_the_difference_of_the_means() -> None:
    pos, neg = noisy_pairs(1)
    expected = np.mean(pos.numpy(), axis=0) - np.mean(neg.numpy(), axis=0)
    np.testing.assert_allclose(mean_difference(pos, neg).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_half_precision_is_summed_in_float64() -> None:
    pos = torch.full((3000, 1), 1.0, dtype=torch.bfloat16)
    pos[0] = 256.0
    found = mean_difference(pos, torch.zeros_like(pos))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(3255 / 3000, rel=1e-6)


def test_pca_is_the_top_right_singular_vector_of_the_differences() -> None:
    pos, neg = noisy_pairs(2)
    _, _, rows = np.linalg.svd((pos - neg).numpy())
    found = pca_direction(pos, neg).numpy()
    assert abs(found @ rows[0]) == pytest.approx(np.linalg.norm(found), rel=1e-9)


def test_pca_finds_the_shift_all_pairs_share_which_centring_would_remove() -> None:
    pos, neg = noisy_pairs(3, n_pairs=40, shift=4.0)
    found = pca_direction(pos, neg)
    assert (found[0] / found.norm()).item() > 0.99
    centred = np.linalg.svd((pos - neg - (pos - neg).mean(dim=0)).numpy())[2][0]
    assert abs(centred[0]) < 0.9


def test_pca_of_one_pair_is_its_difference() -> None:
    pos, neg = noisy_pairs(4, n_pairs=1)
    torch.testing.assert_close(pca_direction(pos, neg), (pos - neg)[0])


def test_the_logistic_direction_ranks_texts_as_the_classifier_does() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from tl_persona.statistics.directions import LOGISTIC_C

    pos, neg = noisy_pairs(5, n_pairs=20)
    texts = torch.cat([pos, neg]).numpy()
    labels = np.repeat([1, 0], 20)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=LOGISTIC_C, max_iter=1000)).fit(texts, labels)
    scores = classifier.decision_function(texts)
    projections = texts @ logistic_direction(pos, neg).numpy()
    assert np.corrcoef(scores, projections)[0, 1] == pytest.approx(1, abs=1e-9)


def test_the_logistic_direction_is_not_drawn_to_a_large_dimension_that_says_nothing() -> None:
    pos, neg = noisy_pairs(6, n_pairs=40)
    pos[:, 5] *= 500
    neg[:, 5] *= 500
    assert logistic_direction(pos, neg).abs().argmax() == 0
    assert mean_difference(pos, neg).abs().argmax() == 5


@EVERY_DIRECTION
def test_equal_sides_give_the_zero_vector(direction: Function) -> None:
    same = torch.arange(12.0).reshape(4, 3)
    assert direction(same, same.clone()).tolist() == [0, 0, 0]


@EVERY_DIRECTION
def test_sides_of_different_shape_or_without_pairs_are_refused(direction: Function) -> None:
    bare = inspect.unwrap(direction)  # where annotations are checked, they refuse these first
    with pytest.raises(InputError, match=r"positive activations are \(4, 3\), negative \(5, 3\)"):
        bare(torch.ones(4, 3), torch.ones(5, 3))
    with pytest.raises(InputError):
        bare(torch.ones(0, 3), torch.ones(0, 3))
    with pytest.raises(InputError):
        bare(torch.ones(3), torch.ones(3))


@FITTED
def test_without_scikit_learn_the_install_command_is_named(
    direction: Function, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sklearn", "sklearn.decomposition", "sklearn.linear_model", "sklearn.preprocessing"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r'pip install "tl-persona\[directions\]"'):
        direction(torch.ones(4, 3), torch.zeros(4, 3))
