"""What a steering vector does to a real chat model, on pairs that had no part in making it. Figures with `-s`.

Choices, made once and not tuned per behaviour: 20 of the 32 bundled pairs are extracted from and 12 held out, drawn by
`split`'s default seed; the token position is `mean`, over the answer; the layer is `get_best("separation")`, which sees
the 20 pairs only; the coefficients are +1 and -1, so one mean difference is added or taken away, at every token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import pytest
import torch
from kinds import HAS_HOOKED_TRANSFORMER
from torch import Tensor

from tl_persona import extract_caa_vectors, load_pairs
from tl_persona.plan import Sample
from tl_persona.prompts.inputs import contrast_texts
from tl_persona.statistics.separation import Separation, separation_of
from tl_persona.vectors import SteeringVector, SteeringVectorSet

pytestmark = [pytest.mark.tl, pytest.mark.slow]

KIND = "hooked" if HAS_HOOKED_TRANSFORMER else "bridge"
HELD_OUT = 12
EVERY_BEHAVIOR = pytest.mark.parametrize("behavior", ["refusal", "formality"])


@dataclass
class Extracted:
    """Vectors of one behaviour, and the pairs that were kept from them: positive, negative, positive, ..."""

    model: Any
    vectors: SteeringVectorSet
    held_out: tuple[Sample, ...]

    @property
    def best(self) -> SteeringVector:
        return self.vectors.get_best("separation")

    def preference(self, direction: SteeringVector, coefficient: float) -> Tensor:
        """Log-probability of each held-out positive answer less that of the negative one, in nats, teacher-forced."""
        answers = []
        with direction.steer(self.model, coefficient):
            for sample in self.held_out:
                with torch.no_grad():
                    logits = self.model(sample.input_ids[None])[0, :-1]
                in_answer = sample.masks[0][1:]  # what follows a logit
                said = sample.input_ids[1:][in_answer, None]
                answers.append(logits[in_answer].log_softmax(dim=-1).gather(1, said).double().sum())
        nats = torch.stack(answers)
        return nats[0::2] - nats[1::2]

    @cached_property
    def unsteered(self) -> Tensor:
        return self.preference(self.best, 0.0)

    @cached_property
    def shifts(self) -> dict[float, Tensor]:
        """How far each coefficient moves the preference of each held-out pair."""
        return {coefficient: self.preference(self.best, coefficient) - self.unsteered for coefficient in (1.0, -1.0)}

    def separations(self, *layers: int) -> list[Separation]:
        """Of the held-out answers, by the mean projection of their tokens on the vector of each layer."""
        chosen = SteeringVectorSet(self.vectors.behavior, [self.vectors[layer] for layer in layers])
        names = [self.vectors[layer].hook_name for layer in layers]
        projections = []
        for sample in self.held_out:
            with torch.no_grad():
                _, cached = self.model.run_with_cache(sample.input_ids[None], names_filter=names)
            answer = torch.stack([cached[vector.hook_name][0][sample.masks[0]] for vector in chosen], dim=1)
            projections.append(chosen.project(answer).mean(dim=0).double())
        along = torch.stack(projections)
        return [
            separation_of(side[0::2], side[1::2], 1000, 0)
            for side in along[:, [chosen.layers.index(n) for n in layers]].T
        ]


@pytest.fixture(scope="module")
def extracted(smollm2_hooked: Callable[[str], Any]) -> Callable[[str], Extracted]:
    @cache
    def of(behavior: str) -> Extracted:
        model = smollm2_hooked(KIND)
        pairs, held_out = load_pairs(behavior).split(HELD_OUT)
        vectors = extract_caa_vectors(model, None, pairs, token_position="mean", show_progress=False)
        assert vectors.layers == list(range(30))
        samples = contrast_texts(model.tokenizer, list(held_out), "mean").samples  # masks: the answer's tokens
        return Extracted(model, vectors, samples)

    return of


@EVERY_BEHAVIOR
def test_held_out_pairs_are_told_apart_along_the_chosen_direction(
    behavior: str, extracted: Callable[[str], Extracted]
) -> None:
    found = extracted(behavior)
    layer, by_norm = found.best.layer_index, found.vectors.get_best("norm").layer_index
    held_out, there = found.separations(layer, by_norm)
    print(
        f"\n{behavior}: layer {layer}, AUC of {HELD_OUT} held-out pairs {held_out.auc:.3f} [{held_out.auc_low:.3f}, "
        f"{held_out.auc_high:.3f}], d' {held_out.d_prime:.2f}; at layer {by_norm}, of the largest norm: {there.auc:.3f}"
    )
    assert held_out.auc > 0.9 and held_out.auc_low > 0.75


@EVERY_BEHAVIOR
def test_a_coefficient_moves_the_log_probability_of_held_out_answers_its_own_way(
    behavior: str, extracted: Callable[[str], Extracted]
) -> None:
    found = extracted(behavior)
    for coefficient, shifts in found.shifts.items():
        its_way = int((shifts * coefficient > 0).sum())
        error = float(shifts.std()) / HELD_OUT**0.5
        print(
            f"\n{behavior}: layer {found.best.layer_index}, coefficient {coefficient:+g}: log p(positive) - "
            f"log p(negative) moves by {shifts.mean():+.2f} nats (standard error {error:.2f}), its own way in "
            f"{its_way} of {HELD_OUT}"
        )
        assert coefficient * float(shifts.mean()) > 2 * error
        assert its_way >= 9  # by chance: 7 in 100


def test_a_random_direction_of_the_same_length_does_much_less(extracted: Callable[[str], Extracted]) -> None:
    found = extracted("refusal")
    vector = found.best
    noise = torch.randn(vector.dim, generator=torch.Generator().manual_seed(0))
    random = SteeringVector("noise", vector.layer_index, noise * vector.norm / noise.norm(), vector.model_name)
    shift = float((found.preference(random, 1.0) - found.unsteered).mean())
    print(f"\nrefusal: noise {shift:+.2f} nats, the vector {found.shifts[1.0].mean():+.2f}")
    assert abs(shift) < found.shifts[1.0].mean() / 2
