"""Persona extraction beside what a user would run instead, on SmolLM2 in float32, all layers.

Compared with persona-vectors (a trace a sample) and with one `run_with_cache` a sample on our own model. All three must
give the naive oracle's vectors, and every run of ours that is timed must have taken the shortcuts of its model's class.
`TL_PERSONA_BENCH_FULL=1` asks for the long runs too: half an hour.
"""

import importlib.metadata
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from machine import matmul_share, timed
from oracle import mean_activations, relative_error
from peer import Worker
from persona_samples import PersonaInputs, long_persona_inputs
from runs import assert_all_took_the_shortcuts, watched_runs

from tl_persona import extract_activations, load_model
from tl_persona.loading import ModelKind
from tl_persona.models.checkpoints import find_checkpoint, load_hf_model

CASES: list[tuple[int | None, int]] = [(100, 24), (None, 24)]
"""Tokens of the persona's description, None for all of it, and questions."""
if os.environ.get("TL_PERSONA_BENCH_FULL"):
    CASES += [(2000, 24), (None, 200)]
LONG = 50_000
"""Tokens from which one round is enough: the others take minutes."""
IS_3 = importlib.metadata.version("transformer-lens").startswith("3.")
KINDS: list[ModelKind] = ["hooked", "bridge"] if IS_3 else ["bridge"]


def one_run_with_cache_a_sample(model: Any, inputs: PersonaInputs) -> torch.Tensor:
    """What a user of TransformerLens writes by hand: a names filter, and means over the mask."""
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    means = []
    with torch.no_grad():
        for ids, mask in zip(inputs.ids, inputs.masks, strict=True):
            _, cache = model.run_with_cache(ids[None], names_filter=names)
            means.append(torch.stack([cache[name][0, mask].mean(dim=0) for name in names]))
    return torch.stack(means).mean(dim=0)


@pytest.mark.parametrize(("persona_tokens", "questions"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_persona_extraction(
    kind: ModelKind, persona_tokens: int | None, questions: int, tmp_path: Path, benchmark: Any
) -> None:
    model = load_model("smollm2", kind)
    inputs = long_persona_inputs(model.tokenizer, questions, persona_tokens)
    oracle = mean_activations(
        load_hf_model(find_checkpoint("smollm2"), dtype=torch.float32), zip(inputs.ids, inputs.masks, strict=True)
    )
    ours = extract_activations(model, inputs.ids, inputs.masks)
    assert relative_error(ours, oracle) < 1e-5

    by_hand: list[float] = []
    peer: list[float] = []
    own: list[float] = []
    theirs: dict[str, torch.Tensor] = {}
    with Worker("persona_vectors_worker.py", needs="persona_vectors") as worker, watched_runs() as runs:
        torch.save({"ids": inputs.ids, "masks": inputs.masks}, tmp_path / "inputs.pt")
        request = {"inputs": str(tmp_path / "inputs.pt"), "output": str(tmp_path / "output.pt")}

        def run_by_hand() -> None:
            theirs["run_with_cache"] = one_run_with_cache_a_sample(model, inputs)

        def run_the_others() -> None:
            by_hand.append(timed(run_by_hand))
            peer.append(worker.ask(**request)["seconds"])
            theirs["persona-vectors"] = torch.load(tmp_path / "output.pt", weights_only=True)
            for name, vectors in theirs.items():
                assert relative_error(vectors, oracle) < 1e-5, name

        def run_ours() -> None:
            own.append(timed(lambda: extract_activations(model, inputs.ids, inputs.masks)))

        benchmark.pedantic(run_ours, setup=run_the_others, rounds=1 if inputs.tokens > LONG else 2)

    assert len(runs) == len(own)
    assert_all_took_the_shortcuts(runs)
    computed = runs[-1].plan.tokens_distinct
    share = matmul_share(model, computed, min(own))
    print(
        f"\n{kind}, {questions} questions that share {inputs.shared:,} tokens, {inputs.tokens:,} tokens of which "
        f"{computed:,} are computed:"
        f"\n  ours                        {min(own):7.2f} s   ({share:.0%} of the matmul speed)"
        f"\n  one run_with_cache a sample {min(by_hand):7.2f} s   x {min(by_hand) / min(own):.1f}"
        f"\n  persona-vectors             {min(peer):7.2f} s   x {min(peer) / min(own):.1f}"
    )
    benchmark.extra_info.update(by_hand=min(by_hand) / min(own), persona_vectors=min(peer) / min(own))
