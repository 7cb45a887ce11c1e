"""What eight mask strategies cost beside one, on SmolLM2: they share the forward passes, so at most a fifth more.

Both are whole runs of `run_extraction`, with rendering, masks and saving, on a bundled persona. What the shared passes
give is first compared with what each strategy gives by itself; then one and eight are timed in turn, so that a busy
machine slows both.
"""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tl_persona import MaskStrategy, PersonaDataset, PersonaVectorStore, load_model, run_extraction

QUESTIONS = 8
ROUNDS = 3
ALLOWED = 1.2
"""How much longer eight strategies may take than one."""


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("smollm2")


class Recipe:
    """Extracts the vectors of one persona into a folder of its own, and remembers how long each run took."""

    def __init__(self, model: Any, root: Path, *strategies: MaskStrategy) -> None:
        self.model, self.root, self.strategies = model, root, strategies
        self.seconds: list[float] = []
        dataset = PersonaDataset.bundled()
        self.persona = dataset[0]
        self.questions = dataset.get_qa(self.persona.id)[:QUESTIONS]

    def run(self) -> None:
        start = time.perf_counter()
        run_extraction(
            self.model,
            "smollm2",
            self.questions,
            ["biography"],
            persona=self.persona,
            mask_strategy=self.strategies,
            activations_dir=self.root,
            force=True,
            show_progress=False,
        )
        self.seconds.append(time.perf_counter() - start)

    def vectors(self, strategy: MaskStrategy) -> torch.Tensor:
        return PersonaVectorStore("smollm2", self.root, strategy).load("biography", self.persona.id)


def test_eight_strategies_cost_little_more_than_one(model: Any, tmp_path: Path, benchmark: Any) -> None:
    eight = Recipe(model, tmp_path / "eight", *MaskStrategy)
    some = (
        MaskStrategy.ANSWER_MEAN,
        MaskStrategy.QUESTION_LAST,
        MaskStrategy.PERSONA_MEAN,
    )
    alone = {strategy: Recipe(model, tmp_path / strategy, strategy) for strategy in some}
    for recipe in (eight, *alone.values()):
        recipe.run()
    for strategy, recipe in alone.items():
        expected, shared = recipe.vectors(strategy).double(), eight.vectors(strategy).double()
        assert float(((shared - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 1e-5, strategy

    one = alone[MaskStrategy.ANSWER_MEAN]
    one.seconds.clear()
    eight.seconds.clear()
    benchmark.pedantic(eight.run, setup=one.run, rounds=ROUNDS)
    ratio = min(eight.seconds) / min(one.seconds)
    benchmark.extra_info["ratio"] = ratio
    fastest = f"one strategy {min(one.seconds):.2f} s, eight {min(eight.seconds):.2f} s"
    print(f"\n{QUESTIONS} questions: {fastest}, x {ratio:.2f}")
    assert ratio <= ALLOWED
