"""Peak memory above the loaded model, against the number of questions and of layers.

Ten times the questions may raise the peak of the process by a tenth, whatever its allocator keeps for itself, and it
stays below a ceiling.
"""

import sys
from typing import Any

import pytest
from peer import Worker

CASES: dict[str, dict[str, Any]] = {
    "24 questions, all layers": {"questions": 24, "layers": None},
    "240 questions, all layers": {"questions": 240, "layers": None},
    "24 questions, one layer": {"questions": 24, "layers": "-1"},
}
CEILING = 400e6
GROWTH = 1.1
"""How much higher the peak may be at ten times the questions."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's counters")
def test_memory_does_not_grow_with_the_questions(benchmark: Any) -> None:
    found = {}
    for name, request in CASES.items():
        with Worker("memory_worker.py") as worker:
            found[name] = worker.ask(**request)["bytes"]
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(found)
    print()
    for name, used in found.items():
        print(f"  {name:27} {used / 1e6:6.0f} MB")
    assert max(found.values()) < CEILING
    few, many, _ = found.values()
    assert many < GROWTH * few
