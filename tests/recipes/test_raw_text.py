"""Raw text on a real chat model: without token 0 it separates as well as the same answers in chats; figures with -s."""

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


NEUTRAL = [
    "The river rises in the hills to the north of the town and runs for forty miles before it reaches the sea. In "
    "spring the water is high, and the lower fields are sometimes under it for a week. Most of the bridges were "
    "built of stone in the eighteenth century, and three of them still carry traffic.",
    "Bread is made from flour, water, salt and yeast. The dough is kneaded until it is smooth, left in a warm "
    "place until it has doubled in size, shaped into a loaf and baked in a hot oven for about forty minutes. It "
    "is done when it sounds hollow if you tap it underneath.",
    "The library opens at nine in the morning and closes at six in the evening, except on Thursdays, when it "
    "stays open until eight. Books may be borrowed for three weeks. The reading room is on the second floor, next "
    "to the map collection, and has space for about sixty people.",
    "A train leaves the main station every half hour. The journey to the coast takes a little less than two hours "
    "and passes through five small towns. Tickets can be bought from the machines on the platform or from the "
    "conductor on board.",
]


def surprise(model: Any) -> float:
    """Negative log-likelihood of neutral text, in nats a token."""
    nats = []
    for text in NEUTRAL:
        ids = torch.tensor(model.tokenizer(text)["input_ids"])
        with torch.no_grad():
            logits = model(ids[None])[0, :-1].double()
        nats.append(-logits.log_softmax(dim=-1).gather(1, ids[1:, None])[:, 0])
    return float(torch.cat(nats).mean())


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


@pytest.mark.parametrize(("behavior", "layer"), [("refusal", 18), ("formality", 14)])
def test_coefficient_1_costs_neutral_text_less_without_token_0(
    behavior: str, layer: int, vectors: Callable[..., SteeringVectorSet], smollm2_hooked: Callable[[str], Any]
) -> None:
    model = smollm2_hooked(KIND)
    without, as_before = vectors(behavior)[layer], vectors(behavior, include_first=True)[layer]
    unsteered = surprise(model)
    costs = {}
    for name, vector in (("without", without), ("with", as_before)):
        with vector.steer(model, 1.0):
            costs[name] = surprise(model) - unsteered
    cosine = float(torch.cosine_similarity(without.vector, as_before.vector, dim=0))
    print(
        f"\n{behavior}: {unsteered:.2f} nats a token, steered {unsteered + costs['without']:.2f}, with token 0 "
        f"{unsteered + costs['with']:.2f}; norms {without.norm:.1f} and {as_before.norm:.1f}, cosine {cosine:.2f}"
    )
    assert costs["without"] < costs["with"]
    assert costs["without"] < 0.3


def test_the_table_shows_how_much_of_a_mean_token_0_is(vectors: Callable[..., SteeringVectorSet]) -> None:
    without, as_before = (
        {row["layer"]: row for row in found.summary().rows}
        for found in (vectors("formality"), vectors("formality", include_first=True))
    )
    for layer in range(11, 28):
        assert (without[layer]["outliers"], as_before[layer]["outliers"]) == (0, 64)  # both sides of 32 pairs
        assert without[layer]["largest_share"] < 0.1 and as_before[layer]["largest_share"] > 0.5
