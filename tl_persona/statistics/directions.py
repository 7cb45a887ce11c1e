"""Directions from contrast pairs: functions of the activations of both sides at one hook.

Each takes `(pos, neg)`, row i of both being pair i, and returns one vector that points from negative to positive.
Wherever a direction is asked for, a function of your own with that signature will do. The mean difference is the
default everywhere; the others need scikit-learn. They are given the mean difference's norm, so that a steering
coefficient means the same for all of them.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from tl_persona.errors import InputError, MissingDependencyError

Direction: TypeAlias = Callable[
    [Float[Tensor, "pair d_model"], Float[Tensor, "pair d_model"]],
    Float[Tensor, "d_model"],
]
"""What turns the activations of both sides into one direction."""

LOGISTIC_C = 0.1
"""Inverse strength of the logistic direction's L2 penalty: there are more dimensions than pairs, so the sides can
always be separated, and a tenth of scikit-learn's default keeps the fit from chasing single pairs."""


def mean_difference(pos: Float[Tensor, "pair d_model"], neg: Float[Tensor, "pair d_model"]) -> Float[Tensor, "d_model"]:
    """Mean of the positive side minus mean of the negative side, summed in float64.

    This is Contrastive Activation Addition (Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition",
    2023).

    Returns:
        The direction in the dtype of `pos`, at least float32, on its device.

    Raises:
        InputError: The two sides differ in shape, or there is no pair.

    Example:
        >>> pos, neg = torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([[0.0, 5.0], [1.0, 5.0]])
        >>> mean_difference(pos, neg)
        tensor([1.5000, 0.0000])
    """
    return _like(_differences(pos, neg).mean(dim=0), pos)


def pca_direction(pos: Float[Tensor, "pair d_model"], neg: Float[Tensor, "pair d_model"]) -> Float[Tensor, "d_model"]:
    """First principal component of the pair differences, signed and scaled by their mean.

    The differences are not centred: centring would take away the shift all pairs share, which is what is looked
    for. Each difference enters with both signs, which is the same thing said to scikit-learn's centred PCA, and the
    sign that comes out is the one on which the mean difference projects positively. Pairs with a large difference
    weigh more here than in the mean.

    Raises:
        InputError: The two sides differ in shape, or there is no pair.
        MissingDependencyError: scikit-learn is not installed.

    Example:
        >>> pos, neg = torch.tensor([[3.0, 0.1], [4.0, -0.1]]), torch.zeros(2, 2)
        >>> pca_direction(pos, neg).round(decimals=1)
        tensor([3.5000, -0.0000])
    """
    try:
        from sklearn.decomposition import PCA
    except ImportError as error:
        raise _missing("pca_direction") from error
    differences = _differences(pos, neg)
    mean = differences.mean(dim=0)
    if not differences.any():
        return _like(mean, pos)
    both_signs = torch.cat([differences, -differences]).numpy()
    component = torch.from_numpy(PCA(n_components=1, svd_solver="full").fit(both_signs).components_[0].copy())
    return _like(_oriented(component, mean), pos)


def logistic_direction(
    pos: Float[Tensor, "pair d_model"], neg: Float[Tensor, "pair d_model"]
) -> Float[Tensor, "d_model"]:
    """Weights of an L2-regularised logistic regression that tells positive from negative, scaled like the mean.

    Dimensions are standardised for the fit, because a few dimensions of a residual stream are some hundred times
    larger than the rest, and the weights are mapped back: the result's projection of raw activations is the
    classifier's score up to a constant and a factor.

    Raises:
        InputError: The two sides differ in shape, or there is no pair.
        MissingDependencyError: scikit-learn is not installed.

    Example:
        >>> pos, neg = torch.tensor([[2.0, 1.0], [2.0, -1.0]]), torch.tensor([[0.0, 1.0], [0.0, -1.0]])
        >>> logistic_direction(pos, neg).round(decimals=3)
        tensor([2., 0.])
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise _missing("logistic_direction") from error
    mean = _differences(pos, neg).mean(dim=0)
    texts = torch.cat([_float64(pos), _float64(neg)]).numpy()
    is_positive = [True] * len(pos) + [False] * len(neg)
    scaler = StandardScaler().fit(texts)
    classifier = LogisticRegression(C=LOGISTIC_C, max_iter=1000).fit(scaler.transform(texts), is_positive)
    return _like(_oriented(torch.from_numpy(classifier.coef_[0] / scaler.scale_), mean), pos)


def _differences(pos: Tensor, neg: Tensor) -> Tensor:
    if pos.ndim != 2 or pos.shape != neg.shape or not len(pos):
        raise InputError(
            f"positive activations are {tuple(pos.shape)}, negative {tuple(neg.shape)}; "
            "give both as (pair, d_model) with the same pairs in the same order"
        )
    return _float64(pos) - _float64(neg)


def _float64(activations: Tensor) -> Tensor:
    return activations.detach().to("cpu", torch.float64)  # not on the device: not all have float64


def _oriented(direction: Tensor, mean: Tensor) -> Tensor:
    """`direction` with the norm of `mean`, on its side; the zero vector stays zero."""
    norm = direction.norm()
    if norm == 0:
        return direction
    length = float(mean.norm() / norm)
    return direction * (-length if direction @ mean < 0 else length)


def _like(direction: Tensor, activations: Tensor) -> Tensor:
    dtype = torch.promote_types(activations.dtype, torch.float32)
    return direction.to(activations.device, dtype)


def _missing(name: str) -> MissingDependencyError:
    return MissingDependencyError(f'{name} needs scikit-learn: pip install "tl-persona[directions]"')
