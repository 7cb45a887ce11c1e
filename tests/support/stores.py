"""Stores of a tiny model: what is saved in them, and how the published library reads and writes its own."""

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tl_persona.errors import StoreError
from tl_persona.provenance import Provenance, text_digest
from tl_persona.store import PersonaVectorStore

MODEL = "org/tiny"


VECTORS = torch.tensor([[1.0, 2.0, 2.0], [-3.0, 0.0, 4.0]])


PROVENANCE = Provenance(
    model_name=MODEL,
    revision="abc",
    dtype="float32",
    weights="unprocessed",
    hook_names=("blocks.0.hook_resid_post", "blocks.1.hook_resid_post"),
    strategy="answer_mean",
    prompts_digest=text_digest(["one", "two"]),
    sample_ids=("q1", "q2"),
    notes={"backend": "local", "path": ["prefix", "packed"]},
)


def save(store: PersonaVectorStore, persona_id: str = "p1", variant: str = "templated", **changes: object) -> Path:
    arguments = {"persona_name": "Ada", "vectors": VECTORS, "sample_ids": ["q1", "q2"], "provenance": PROVENANCE}
    return store.save(variant, persona_id, **(arguments | changes))


def read_as_the_reference_does(folder: Path) -> dict[str, tuple[str, list[str], torch.Tensor]]:
    """The published layout, read with nothing but json and safetensors."""
    index = json.loads((folder / "manifest.json").read_text(encoding="ascii"))
    found = {}
    for persona_id, entry in index["personas"].items():
        vectors = load_file(str(folder / f"{persona_id}.safetensors"))["activations"]
        assert list(vectors.shape) == [index["num_layers"], index["hidden_size"]]
        found[persona_id] = (entry["name"], entry["sample_ids"], vectors)
    return found


def write_as_the_reference_does(folder: Path, personas: dict[str, tuple[str, list[str], torch.Tensor]]) -> None:
    folder.mkdir(parents=True)
    index: dict[str, object] = {"num_layers": 2, "hidden_size": 3, "personas": {}}
    for persona_id, (name, sample_ids, vectors) in personas.items():
        save_file({"activations": vectors}, str(folder / f"{persona_id}.safetensors"))
        index["personas"] |= {persona_id: {"name": name, "sample_ids": sample_ids}}  # type: ignore[operator]
    (folder / "manifest.json").write_text(json.dumps(index, indent=2))


def folder_of(store: PersonaVectorStore) -> Path:
    return store.path_of("templated", "any").parent


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process and return its exit code."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def expect_store_error(call: Callable[[], object], words: str) -> None:
    with pytest.raises(StoreError, match=words):
        call()
