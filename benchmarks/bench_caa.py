"""Steering vectors of every layer beside rotalabs-steer, steering-vectors and repeng, on SmolLM2 in float32.

Sixteen refusal pairs, rendered once by the chat template and given to everybody as raw text with the last token read;
token 0 counts, as it does with the others. Ours must be the naive oracle's, and the two that take mean differences
must agree with it; repeng takes a principal component, so only its time is told. Every run of ours that is timed must
have taken the shortcuts of its model's class.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from machine import matmul_share, timed
from oracle import mean_activations, relative_error
from peer import Worker
from runs import assert_all_took_the_shortcuts, watched_runs

from tl_persona import extract_caa_vectors, load_model, load_pairs
from tl_persona.models.checkpoints import find_checkpoint, load_hf_model

N_PAIRS = 16
ROUNDS = 3
ROTALABS_LAYERS = 30 if os.environ.get("TL_PERSONA_BENCH_FULL") else 2
"""rotalabs-steer runs every text again for every layer, so its time for these is scaled up to all."""


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("smollm2")


def difference_of_means(tokenizer: Any, pairs: list[dict[str, str]]) -> torch.Tensor:
    """The oracle's vectors, one text at a time: (layer, d_model)."""
    plain = load_hf_model(find_checkpoint("smollm2"), dtype=torch.float32)

    def mean(side: str) -> torch.Tensor:
        texts = [tokenizer(pair[side], return_tensors="pt")["input_ids"][0] for pair in pairs]
        return mean_activations(plain, [(ids, torch.arange(len(ids)) == len(ids) - 1) for ids in texts])

    return mean("positive") - mean("negative")


def test_all_layers_of_a_steering_vector(model: Any, tmp_path: Path, benchmark: Any) -> None:
    render = model.tokenizer.apply_chat_template
    pairs = [
        {side: render(list(getattr(pair, side)), tokenize=False) for side in ("positive", "negative")}
        for pair in list(load_pairs("refusal"))[:N_PAIRS]
    ]
    found = extract_caa_vectors(model, None, pairs, include_first=True, show_progress=False)
    vectors = torch.stack([vector.vector for vector in found])
    assert relative_error(vectors, difference_of_means(model.tokenizer, pairs)) < 1e-5
    own: list[float] = []
    times: dict[str, list[float]] = {}
    output = str(tmp_path / "directions.pt")
    contenders: dict[str, dict[str, Any]] = {
        "rotalabs-steer": {"peer": "rotalabs", "layers": list(range(ROTALABS_LAYERS))},
        "steering-vectors, batch 1": {"peer": "steering_vectors", "batch_size": 1},
        "steering-vectors, batch 4": {"peer": "steering_vectors", "batch_size": 4},
        "steering-vectors, batch 16": {"peer": "steering_vectors", "batch_size": 16},
        "repeng (with its PCA)": {"peer": "repeng"},
    }
    with Worker("caa_worker.py", needs="rotalabs_steer") as worker, watched_runs() as runs:

        def run_ours() -> None:
            own.append(timed(lambda: extract_caa_vectors(model, None, pairs, include_first=True, show_progress=False)))

        def run_the_others() -> None:
            for name, request in contenders.items():
                seconds = worker.ask(pairs=pairs, output=output, **request)["seconds"]
                if name == "rotalabs-steer":
                    seconds *= 30 / ROTALABS_LAYERS
                times.setdefault(name, []).append(seconds)
                if name != "repeng (with its PCA)":
                    theirs = torch.load(output, weights_only=True)
                    assert relative_error(vectors[: len(theirs)], theirs) < 1e-4, name

        benchmark.pedantic(run_ours, setup=run_the_others, rounds=ROUNDS)
    assert len(runs) == len(own)
    assert_all_took_the_shortcuts(runs)
    tokens, computed = runs[-1].plan.tokens, runs[-1].plan.tokens_distinct
    share = matmul_share(model, computed, min(own))
    print(
        f"\n{N_PAIRS} pairs, {len(vectors)} layers, {tokens:,} tokens of which {computed:,} are computed:"
        f"\n  {'ours, statistics included':27} {min(own):7.2f} s   ({share:.0%} of the matmul speed)"
    )
    for name, seconds in times.items():
        print(f"  {name:27} {min(seconds):7.2f} s   x {min(seconds) / min(own):.1f}")
        benchmark.extra_info[name] = min(seconds) / min(own)
