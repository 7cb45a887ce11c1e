"""Peak memory above the loaded model, against the number of questions and of layers.

Ten times the questions may raise by a tenth what the run holds, and the peak of an ordinary process stays below a
ceiling. What glibc's allocator keeps for itself differs by a hundred megabytes from run to run, so what is held is seen
with an allocator that gives everything back at once. What the measured runs of 24 questions gave is compared with the
naive oracle, here, where it takes nothing from what is measured.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import mean_activations, relative_error
from peer import Worker
from persona_samples import long_persona_inputs

from tl_persona.models.checkpoints import find_checkpoint, load_hf_model, load_tokenizer

FEW = 24
CASES: dict[str, dict[str, Any]] = {
    f"{FEW} questions, all layers": {"questions": FEW, "layers": None},
    f"{10 * FEW} questions, all layers": {"questions": 10 * FEW, "layers": None},
    f"{FEW} questions, one layer": {"questions": FEW, "layers": "-1"},
}
CEILING = 400e6
GROWTH = 1.1
"""How much more may be held at ten times the questions."""
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Has glibc give back every block of 64 kB or more as soon as it is freed."""


def oracle() -> torch.Tensor:
    """The vectors of the few questions, one plain forward pass each: (layer, d_model)."""
    checkpoint = find_checkpoint("smollm2")
    inputs = long_persona_inputs(load_tokenizer(checkpoint), FEW)
    plain = load_hf_model(checkpoint, dtype=torch.float32)
    return mean_activations(plain, zip(inputs.ids, inputs.masks, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's counters")
def test_memory_does_not_grow_with_the_questions(tmp_path: Path, benchmark: Any) -> None:
    expected = oracle()
    held, peaks = {}, {}
    for found, environment in ((held, AT_ONCE), (peaks, {})):
        for name, request in CASES.items():
            output = tmp_path / "vectors.pt"
            with Worker("memory_worker.py", environment=environment) as worker:
                found[name] = worker.ask(**request, output=str(output))["bytes"]
            if request["questions"] == FEW:
                wanted = expected if request["layers"] is None else expected[-1:]
                assert relative_error(torch.load(output, weights_only=True), wanted) < 1e-5, name
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update({f"{name}, held": used for name, used in held.items()}, **peaks)
    print()
    for name in CASES:
        print(f"  {name:27} {held[name] / 1e6:6.0f} MB held, {peaks[name] / 1e6:6.0f} MB with glibc as it is")
    assert max(peaks.values()) < CEILING
    few, many, _ = held.values()
    assert many < GROWTH * few
