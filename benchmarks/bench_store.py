"""What saving one more persona costs, when a store holds 10, 1,000 and 10,000 of them.

Beside it stands a writer that does what persona-vectors 0.8 does: it reads the whole `manifest.json`, adds one entry
and writes all of it again. Both write the same vectors; what both then hold is compared before any figure is printed.
Vectors are small and, where there is `/dev/shm`, lie in memory: what is measured is the bookkeeping. On a disk a save
also waits for two fsyncs, at any size the same; the writer beside it does without them.
"""

import gc
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tl_persona.store import PersonaVectorStore

MODEL = "org/model"
LAYERS, WIDTH = 30, 16
SAMPLE_IDS = [f"question-{number:03d}" for number in range(50)]
SIZES = (10, 1_000, 10_000)
NAIVE_SAVES = 8  # timed at each size; thousands of them would take the hour that this benchmark is about
SHARE = 5  # our saves that are timed: the last fifth, long enough to have the rewritings of the index in it


class NaiveStore:
    """One file a persona, and a manifest that is rewritten whole at every save."""

    def __init__(self, root: Path) -> None:
        self.folder = root / MODEL.replace("/", "__") / "answer_mean" / "templated"
        self.folder.mkdir(parents=True)
        self.manifest = self.folder / "manifest.json"

    def save(self, persona_id: str, vectors: torch.Tensor) -> None:
        self.write_vectors(persona_id, vectors)
        known = json.loads(self.manifest.read_text()) if self.manifest.exists() else {"personas": {}}
        known |= {"num_layers": vectors.shape[0], "hidden_size": vectors.shape[1]}
        known["personas"][persona_id] = entry_of(persona_id)
        self.manifest.write_text(json.dumps(known, indent=2))

    def write_vectors(self, persona_id: str, vectors: torch.Tensor) -> None:
        save_file({"activations": vectors}, str(self.folder / f"{persona_id}.safetensors"))

    def fill(self, count: int) -> None:
        """As `count` saves would leave it, with the manifest written once."""
        for index in range(count):
            self.write_vectors(id_of(index), vectors_of(index))
        personas = {id_of(index): entry_of(id_of(index)) for index in range(count)}
        self.manifest.write_text(
            json.dumps({"num_layers": LAYERS, "hidden_size": WIDTH, "personas": personas}, indent=2)
        )


def id_of(index: int) -> str:
    return f"persona-{index:05d}"


def entry_of(persona_id: str) -> dict[str, object]:
    return {"name": f"Name of {persona_id}", "sample_ids": SAMPLE_IDS}


def vectors_of(index: int) -> torch.Tensor:
    return torch.arange(LAYERS * WIDTH, dtype=torch.float32).reshape(LAYERS, WIDTH) + index


@pytest.fixture
def roots(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder, "ours"), Path(folder, "naive")


def save_ours(store: PersonaVectorStore, index: int) -> None:
    persona_id = id_of(index)
    store.save("templated", persona_id, f"Name of {persona_id}", vectors_of(index), SAMPLE_IDS)


def assert_both_hold_the_same(store: PersonaVectorStore, naive: NaiveStore, count: int) -> None:
    ids = [id_of(index) for index in range(count)]
    written = json.loads(naive.manifest.read_text())
    indexed = json.loads((store.path_of("templated", ids[0]).with_name("manifest.json")).read_text())
    assert (indexed["num_layers"], indexed["hidden_size"]) == (written["num_layers"], written["hidden_size"])
    assert list(indexed["personas"]) == list(written["personas"]) == ids
    for persona_id in ids:
        ours, theirs = indexed["personas"][persona_id], written["personas"][persona_id]
        assert (ours["name"], ours["sample_ids"]) == (theirs["name"], theirs["sample_ids"])
    for persona_id in ids[:: max(1, count // 500)]:
        theirs = load_file(str(naive.folder / f"{persona_id}.safetensors"))["activations"]
        assert torch.equal(store.load("templated", persona_id), theirs)


def test_a_save_costs_the_same_however_many_personas_are_stored(roots: tuple[Path, Path]) -> None:
    costs: dict[int, tuple[float, float]] = {}
    store, held = PersonaVectorStore(MODEL, roots[0]), 0
    for size in SIZES:
        timed_from = max(size - max(size // SHARE, NAIVE_SAVES), 0)
        for index in range(held, timed_from):
            save_ours(store, index)
        gc.collect()
        begin = time.perf_counter()
        for index in range(timed_from, size):
            save_ours(store, index)
        ours = (time.perf_counter() - begin) / (size - timed_from)

        naive = NaiveStore(roots[1] / str(size))
        naive.fill(size - NAIVE_SAVES)
        gc.collect()
        begin = time.perf_counter()
        for index in range(size - NAIVE_SAVES, size):
            naive.save(id_of(index), vectors_of(index))
        costs[size] = ours, (time.perf_counter() - begin) / NAIVE_SAVES

        store.flush()
        assert_both_hold_the_same(store, naive, size)
        held = size

    print(f"\n{'personas':>9} {'ours, a save':>13} {'whole rewrite':>14} {'ratio':>7}")
    for size, (ours, theirs) in costs.items():
        print(f"{size:>9,} {1e3 * ours:>10.2f} ms {1e3 * theirs:>11.2f} ms {theirs / ours:>6.1f}x")
    # Linear in all, so constant for each; a factor of four leaves room for a busy machine and a larger folder.
    assert costs[10_000][0] < 4 * costs[1_000][0]
