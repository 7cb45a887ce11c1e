"""Peak memory above the loaded model, against the number of questions and of layers.

What the library itself holds does not grow with the questions (`tests/test_sharing.py` follows every captured tensor);
the peak of the process still does somewhat, so the figures are printed and only the ceiling is asserted.
"""

from typing import Any

from peer import Worker

CASES: dict[str, dict[str, Any]] = {
    "24 questions, all layers": {"questions": 24, "layers": None},
    "240 questions, all layers": {"questions": 240, "layers": None},
    "24 questions, one layer": {"questions": 24, "layers": "-1"},
}
CEILING = 400e6


def test_memory_stays_below_the_ceiling(benchmark: Any) -> None:
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
