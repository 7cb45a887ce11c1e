"""What eight mask strategies cost beside one, and beside persona-vectors' eight runs, on SmolLM2, all layers.

Ours are whole runs of `run_extraction`, with rendering, masks and saving, in which the strategies share the forward
passes, so that eight may cost at most a fifth more than one. persona-vectors runs once for each strategy, of which the
persona-only ones ask one question; it is given ids and masks, and only its forward passes are timed. What every
strategy gives is first compared with the naive oracle; then all take turns, so that a busy machine slows each.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from machine import timed
from oracle import block_outputs, relative_error
from peer import Worker
from persona_samples import long_persona, questions_to_it
from runs import assert_all_took_the_shortcuts, watched_runs

from tl_persona import MaskStrategy, PersonaVectorStore, load_model, run_extraction
from tl_persona.data.personas import system_prompt
from tl_persona.models.checkpoints import find_checkpoint, load_hf_model
from tl_persona.prompts.inputs import MaskedPrompts, persona_prompts

QUESTIONS = 24
ALLOWED = 1.2
"""How much longer eight strategies may take than one."""
FULL = bool(os.environ.get("TL_PERSONA_BENCH_FULL"))
ASKED = tuple(MaskStrategy) if FULL else (MaskStrategy.PERSONA_MEAN, MaskStrategy.ANSWER_MEAN)
"""What persona-vectors runs. All eight take minutes, so one of each kind stands for its kind unless all are wanted."""


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("smollm2")


@pytest.fixture(scope="module")
def masked(model: Any) -> MaskedPrompts:
    system = system_prompt(long_persona(), "biography")
    return MaskedPrompts(persona_prompts(model.tokenizer, system, questions_to_it(QUESTIONS)), tuple(MaskStrategy))


@pytest.fixture(scope="module")
def oracle(masked: MaskedPrompts) -> dict[MaskStrategy, torch.Tensor]:
    """The vectors of every strategy, (layer, d_model), from one plain forward pass a question."""
    plain = load_hf_model(find_checkpoint("smollm2"), dtype=torch.float32)
    means: dict[MaskStrategy, list[torch.Tensor]] = {strategy: [] for strategy in MaskStrategy}
    for index, prompt in enumerate(masked.prompts_of(MaskStrategy.ANSWER_MEAN)):
        outputs = block_outputs(plain, prompt.input_ids)
        for strategy, found in means.items():
            if index < len(masked.prompts_of(strategy)):
                found.append(outputs[:, masked.mask_of(strategy, index)].mean(dim=1))
    return {strategy: torch.stack(found).mean(dim=0) for strategy, found in means.items()}


class Recipe:
    """Extracts the vectors of the long persona into a folder of its own, and remembers how long each run took."""

    def __init__(self, model: Any, root: Path, *strategies: MaskStrategy) -> None:
        self.model, self.root, self.strategies = model, root, strategies
        self.seconds: list[float] = []
        self.persona, self.questions = long_persona(), questions_to_it(QUESTIONS)

    def run(self) -> None:
        self.seconds.append(timed(self._extract))

    def check(self, oracle: dict[MaskStrategy, torch.Tensor]) -> None:
        """Runs once, compares every strategy with the oracle, and forgets how long that took."""
        self._extract()
        for strategy in self.strategies:
            vectors = PersonaVectorStore("smollm2", self.root, strategy).load("biography", self.persona.id)
            assert relative_error(vectors, oracle[strategy]) < 1e-5, strategy

    def _extract(self) -> None:
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


def test_eight_strategies_cost_little_more_than_one(
    model: Any, oracle: dict[MaskStrategy, torch.Tensor], tmp_path: Path, benchmark: Any
) -> None:
    eight = Recipe(model, tmp_path / "eight", *MaskStrategy)
    one = Recipe(model, tmp_path / "one", MaskStrategy.ANSWER_MEAN)
    for recipe in (eight, one):
        recipe.check(oracle)
    with watched_runs() as runs:
        benchmark.pedantic(eight.run, setup=one.run, rounds=3)
    assert_all_took_the_shortcuts(runs)
    ratio = min(eight.seconds) / min(one.seconds)
    benchmark.extra_info["ratio"] = ratio
    fastest = f"one strategy {min(one.seconds):.2f} s, eight {min(eight.seconds):.2f} s"
    print(f"\n{QUESTIONS} questions: {fastest}, x {ratio:.2f}")
    assert ratio <= ALLOWED


def test_the_sweep_beside_eight_runs_of_persona_vectors(
    model: Any, masked: MaskedPrompts, oracle: dict[MaskStrategy, torch.Tensor], tmp_path: Path, benchmark: Any
) -> None:
    ours = Recipe(model, tmp_path / "ours", *MaskStrategy)
    ours.check(oracle)
    inputs, output = tmp_path / "inputs.pt", tmp_path / "output.pt"
    theirs: dict[MaskStrategy, list[float]] = {strategy: [] for strategy in ASKED}
    with Worker("persona_vectors_worker.py", needs="persona_vectors") as worker, watched_runs() as runs:

        def run_theirs() -> None:
            for strategy, seconds in theirs.items():
                ids = [prompt.input_ids for prompt in masked.prompts_of(strategy)]
                torch.save(
                    {"ids": ids, "masks": [masked.mask_of(strategy, index) for index in range(len(ids))]}, inputs
                )
                seconds.append(worker.ask(inputs=str(inputs), output=str(output))["seconds"])
                assert relative_error(torch.load(output, weights_only=True), oracle[strategy]) < 1e-5, strategy

        benchmark.pedantic(ours.run, setup=run_theirs, rounds=1 if FULL else 2)
    assert_all_took_the_shortcuts(runs)
    if FULL:
        total, how = sum(min(seconds) for seconds in theirs.values()), "all of them timed"
    else:
        brief, long = (min(theirs[strategy]) for strategy in ASKED)
        n_brief = sum(strategy.persona_only for strategy in MaskStrategy)
        n_long = len(MaskStrategy) - n_brief
        total = n_brief * brief + n_long * long
        how = f"two timed and scaled: {n_long} of {long:.2f} s, {n_brief} persona-only ones of {brief:.2f} s"
    ratio = total / min(ours.seconds)
    benchmark.extra_info["persona_vectors"] = ratio
    print(
        f"\n{QUESTIONS} questions, {len(MaskStrategy)} strategies, all layers:"
        f"\n  ours, saving included       {min(ours.seconds):7.2f} s"
        f"\n  persona-vectors' eight runs {total:7.2f} s   x {ratio:.1f}   ({how})"
    )
