"""Raw text on a real chat model: without token 0 it separates as well as the same answers in chats. Figures with `-s`."""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from kinds import HAS_HOOKED_TRANSFORMER
from oracle import block_outputs, relative_error

from tl_persona import ContrastPair, extract_caa_vectors, load_pairs
from tl_persona.vectors import SteeringVector, SteeringVectorSet

pytestmark = [pytest.mark.tl, pytest.mark.slow]

KIND = "hooked" if HAS_HOOKED_TRANSFORMER else "bridge"
EVERY_BEHAVIOR = pytest.mark.parametrize("behavior", ["refusal", "formality"])


def answers(behavior: str) -> list[ContrastPair]:
    """The assistant's answers of the bundled pairs, without the chats around them."""
    return [ContrastPair(*(side[-1]["content"] for side in (p.positive, p.negative))) for p in load_pairs(behavior)]


@pytest.fixture(scope="module")
def vectors(smollm2_hooked: Callable[[str], Any]) -> Callable[..., SteeringVectorSet]:
    @cache
    def of(behavior: str, *, raw: bool = True, **options: Any) -> SteeringVectorSet:
        pairs = answers(behavior) if raw else list(load_pairs(behavior))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*were not removed")  # a few tokens of blocks 2 and 3
            return extract_caa_vectors(smollm2_hooked(KIND), None, pairs, None, "mean", False, **options)

    return of


def auc(vector: SteeringVector) -> float:
    return float(vector.metadata["statistics"]["auc"])


@EVERY_BEHAVIOR
def test_the_mean_of_raw_text_is_that_of_tokens_1_and_on(
    behavior: str, smollm2: tuple[Any, Any], vectors: Callable[..., SteeringVectorSet]
) -> None:
    weights, tokenizer = smollm2
    sides: dict[str, list[torch.Tensor]] = {"positive": [], "negative": []}
    for pair in answers(behavior):
        for name, texts in sides.items():
            ids = torch.tensor(tokenizer(getattr(pair, name))["input_ids"])
            texts.append(block_outputs(weights, ids)[:, 1:].mean(dim=1))
    means = {name: torch.stack(texts).mean(dim=0) for name, texts in sides.items()}
    found = torch.stack([vector.vector for vector in vectors(behavior)])
    assert found.shape == (30, 576)
    assert relative_error(found, means["positive"] - means["negative"]) < 1e-5


@EVERY_BEHAVIOR
def test_raw_answers_separate_as_well_as_chats_do_and_better_than_with_token_0(
    behavior: str, vectors: Callable[..., SteeringVectorSet]
) -> None:
    raw, chats, as_before = vectors(behavior), vectors(behavior, raw=False), vectors(behavior, include_first=True)
    best, of_chats = raw.get_best("separation"), chats.get_best("separation")
    there = as_before[best.layer_index]
    print(
        f"\n{behavior}: raw AUC {auc(best):.3f} at layer {best.layer_index}, with token 0 {auc(there):.3f} there and "
        f"{auc(as_before.get_best('separation')):.3f} at layer {as_before.get_best('separation').layer_index}; "
        f"chats {auc(of_chats):.3f} at layer {of_chats.layer_index}"
    )
    assert auc(best) >= auc(of_chats) - 0.02
    assert auc(best) > auc(there)
    assert auc(best) >= auc(as_before.get_best("separation"))


def test_the_table_shows_how_much_of_a_mean_token_0_is(vectors: Callable[..., SteeringVectorSet]) -> None:
    without, as_before = (
        {row["layer"]: row for row in found.summary().rows}
        for found in (vectors("formality"), vectors("formality", include_first=True))
    )
    for layer in range(11, 28):
        assert (without[layer]["outliers"], as_before[layer]["outliers"]) == (0, 64)  # both sides of 32 pairs
        assert without[layer]["largest_share"] < 0.1 and as_before[layer]["largest_share"] > 0.5
