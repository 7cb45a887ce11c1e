"""Which layer is chosen, by what, how many come as near, and when the choice is doubted."""

import logging
import warnings
from typing import Any

import msgspec
import pytest
import torch

from tl_persona.errors import HookError, InputError
from tl_persona.provenance import Provenance
from tl_persona.vectors import SteeringVector, SteeringVectorSet

PROVENANCE = Provenance(
    model_name="tiny",
    revision="abc",
    dtype="float32",
    weights="unprocessed",
    hook_names=("blocks.0.hook_resid_post",),
    strategy="mean",
    prompts_digest="d",
    sample_ids=("0", "1"),
)

Interval = tuple[float, float, float]
"""A value and the ends of its interval."""


def a_vector(layer: int, auc: Interval | None, d_prime: Interval | None = None, depth: int | None = None) -> Any:
    statistics = {}
    for name, found in (("auc", auc), ("d_prime", d_prime)):
        value, low, high = found or (None, None, None)
        statistics |= {name: value, f"{name}_low": low, f"{name}_high": high}
    notes = {} if depth is None else {"n_layers": depth}
    return SteeringVector(
        "calm",
        layer,
        torch.tensor([float(layer + 1), 0.0]),
        "tiny",
        metadata={"statistics": statistics},
        provenance=msgspec.structs.replace(PROVENANCE, notes=notes),
    )


def a_set(*vectors: SteeringVector) -> SteeringVectorSet:
    return SteeringVectorSet("calm", vectors)


def graded(layers: Any, best: int, depth: int | None = None) -> SteeringVectorSet:
    """A set whose AUC falls off from one layer on both sides, without intervals."""
    return a_set(*(a_vector(n, (1 - 0.01 * abs(n - best),) * 3, depth=depth) for n in layers))


def test_one_layer_with_the_largest_auc_is_chosen_by_it_and_ties_with_what_its_interval_reaches() -> None:
    vectors = a_set(
        a_vector(0, (0.80, 0.70, 0.89), (9.0, 8.0, 10.0)),
        a_vector(1, (0.95, 0.90, 0.99), (2.0, 1.0, 3.0)),
        a_vector(2, (0.85, 0.80, 0.90), (2.0, 1.0, 3.0)),
        a_vector(3, (0.94, 0.91, 0.98), (0.1, 0.0, 0.2)),
    )
    choice = vectors.best_layer()
    assert (choice.layer, choice.metric, choice.decided_by, choice.ties) == (1, "separation", "auc", (2, 3))
    assert str(choice) == "layer 1 by held-out AUC; 2 of the 3 others tie with it within their 95 % intervals"
    assert vectors.get_best() is vectors[1]


def test_equal_aucs_are_decided_by_d_prime_whose_intervals_then_count_too() -> None:
    full = (1.0, 1.0, 1.0)
    vectors = a_set(
        a_vector(0, full, (4.0, 3.0, 5.0)),
        a_vector(1, full, (2.0, 1.5, 2.9)),
        a_vector(2, (0.98, 0.96, 1.0), (3.5, 2.5, 4.5)),
        a_vector(3, (0.98, 0.96, 0.99), (4.5, 3.5, 5.5)),
        a_vector(4, full, None),
        a_vector(5, full, (3.9, 3.0, 4.8)),
    )
    choice = vectors.best_layer("separation")
    assert (choice.layer, choice.decided_by, choice.ties) == (0, "d_prime", (2, 5))
    assert choice.reason.startswith("by d', as other layers have the same held-out AUC; 2 of the 5 others tie")


def test_a_measure_without_an_interval_ties_where_it_is_equal() -> None:
    vectors = SteeringVectorSet("calm", [SteeringVector("calm", n, torch.tensor([x, 0.0]), "tiny")
                                         for n, x in ((0, 2.0), (1, 3.0), (2, -3.0))])  # fmt: skip
    choice = vectors.best_layer("norm")
    assert (choice.layer, choice.decided_by, choice.ties) == (1, "norm", (2,))
    assert str(choice) == "layer 1 by norm; 1 of the 2 others tie with it"


def test_the_choice_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    vectors = graded(range(3), best=1)
    with caplog.at_level(logging.INFO, logger="tl_persona"):
        vectors.get_best()
    assert caplog.messages == [f"the best vector for 'calm': {vectors.best_layer()}"]


@pytest.mark.parametrize(
    ("layers", "best", "depth", "late"),
    [
        (range(30), 29, 30, True),
        (range(30), 27, 30, True),
        (range(30), 26, 30, False),
        (range(12), 11, 12, True),
        (range(12), 10, 12, False),
        (range(12), 11, 30, False),  # the set is of the model's first layers
        (range(12), 11, None, True),
        (range(9), 8, 9, False),
        ([29], 29, 30, False),  # there was no choice
        ([27, 29], 29, 30, False),
        ([3, 29], 29, 30, True),
    ],
)
def test_a_choice_in_the_last_tenth_of_the_layers_comes_with_a_warning(
    layers: Any, best: int, depth: int | None, late: bool
) -> None:
    vectors = graded(layers, best, depth)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert vectors.get_best().layer_index == best
    assert len(said) == late
    if late:
        assert f"last tenth of {depth or 12} layers (layer {best} by held-out AUC" in str(said[0].message)


@pytest.mark.parametrize(
    "among",
    [
        "3:6",
        range(3, 6),
        slice(3, 6),
        [3, 4, 5],
        "-9:-6",
        ["blocks.5.hook_resid_post", 4],
        "blocks.[345].hook_resid_post",
        lambda name: name in {"blocks.3.hook_resid_post", "blocks.5.hook_resid_post"},
    ],
)
def test_the_choice_can_be_limited_to_some_layers(among: Any) -> None:
    vectors = graded(range(12), best=11, depth=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert vectors.get_best(among=among).layer_index == 5
    assert vectors.best_layer(among=among).compared == vectors.best_layer("separation", among=among).compared <= 3


def test_layers_without_a_vector_are_left_out_and_none_at_all_is_refused() -> None:
    vectors = graded([2, 4, 8], best=8, depth=12)
    assert vectors.get_best(among="0:7").layer_index == 4
    with pytest.raises(InputError, match=r"among='9:11' means none of the layers \[2, 4, 8\] that have a vector"):
        vectors.get_best(among="9:11")
    with pytest.raises(HookError, match="there is no layer 12: the model has layers 0 to 11"):
        vectors.get_best(among=12)


def test_a_hook_other_than_the_output_is_chosen_by_name_or_layer() -> None:
    vectors = SteeringVectorSet("calm", [SteeringVector("calm", n, torch.ones(2) * n, "tiny",
                                                        hook_name=f"blocks.{n}.hook_resid_mid")
                                         for n in (1, 2, 3)])  # fmt: skip
    for among in ([1, 2], "blocks.[12].hook_resid_mid", "1:3"):
        assert vectors.get_best("norm", among=among).layer_index == 2


def test_only_the_layers_to_choose_from_need_the_statistic() -> None:
    vectors = a_set(a_vector(0, None), a_vector(1, (0.9, 0.8, 1.0)), a_vector(2, (0.8, 0.7, 0.9)))
    with pytest.raises(InputError, match=r"no separation at layers \[0\]"):
        vectors.get_best()
    assert vectors.get_best(among="1:").layer_index == 1
    with pytest.warns(UserWarning, match="taken by norm"):
        assert vectors.get_best(among=0).layer_index == 0
