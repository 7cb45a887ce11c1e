"""docs/reference/file-formats.md lists the keys that are written, every one and no other."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors import safe_open

from tl_persona import (
    ContrastPairDataset,
    Persona,
    PersonaDataset,
    PersonaVectorStore,
    QAPair,
    extract_caa_vectors,
    load_pairs,
    run_extraction,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "file-formats.md"


def _listed(heading: str) -> set[str]:
    """The keys in the table below a heading of the page."""
    text = PAGE.read_text(encoding="utf-8")
    section = re.search(rf"^### {re.escape(heading)}$(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, f"{PAGE.name} has no section {heading!r}"
    cells = re.findall(r"^\| (`[^|]*`) \|", section[1], re.MULTILINE)
    return {key for cell in cells for key in re.findall(r"`([^`]+)`", cell)}


def _text_entries(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def stored(tiny_hooked: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of persona vectors, as the recipe writes it."""
    data = PersonaDataset.bundled()
    persona = data.get_persona(data.persona_ids[0])
    model, root = tiny_hooked("llama", "bridge"), tmp_path_factory.mktemp("store")
    questions = data.get_qa(persona.id)[:2]
    (done,) = run_extraction(model, "m", questions, ["templated"], persona=persona, activations_dir=root)
    return done.output_dir / f"{persona.id}.safetensors"


@pytest.fixture(scope="module")
def steering(tiny_hooked: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a set of steering vectors, as the recipe writes it."""
    folder = tmp_path_factory.mktemp("vectors") / "formality"
    extract_caa_vectors(tiny_hooked("llama", "bridge"), None, load_pairs("formality"), show_progress=False).save(folder)
    return folder


def test_the_header_of_a_persona_vector(stored: Path) -> None:
    assert set(_text_entries(stored)) == _listed("Header of a persona vector")


def test_what_a_persona_vector_was_computed_from(stored: Path) -> None:
    assert set(json.loads(_text_entries(stored)["provenance"])) == _listed("Provenance")


def test_the_notes_of_both_kinds_of_vectors(stored: Path, steering: Path) -> None:
    persona_notes = set(json.loads(_text_entries(stored)["provenance"])["notes"])
    steering_notes = set(json.loads(_text_entries(steering / "layer_1.safetensors")["contents"])["provenance"]["notes"])
    always = {"backend", "model_class", "sharing", "tl-persona", "torch", "transformer-lens", "transformers"}
    assert always | {"pairs_digest", "n_layers"} <= steering_notes <= _listed("Notes")
    assert always <= persona_notes <= _listed("Notes") - {"pairs_digest", "n_layers"}


def test_the_manifest(stored: Path) -> None:
    manifest = json.loads((stored.parent / "manifest.json").read_bytes())
    assert set(manifest) == _listed("manifest.json")
    assert set(manifest["personas"][stored.stem]) == _listed("An entry of personas")


def test_the_pending_entries(tmp_path: Path) -> None:
    with PersonaVectorStore("m", tmp_path) as store:
        pending: list[Path] = []
        for number in range(1000):  # a small manifest is rewritten at once, so nothing is pending before it has grown
            folder = store.save("templated", f"p{number}", "Ada", torch.ones(1, 1), ["q" * 200])
            pending = list(folder.glob("manifest.pending"))
            if pending and pending[0].stat().st_size:
                break
        line = json.loads(pending[0].read_text(encoding="utf-8").splitlines()[0])
    assert set(line) == _listed("A line of manifest.pending")


def test_a_steering_vector(steering: Path) -> None:
    header = _text_entries(steering / "layer_1.safetensors")
    contents = json.loads(header["contents"])
    assert set(header) == _listed("Header of a steering vector")
    assert set(contents) == _listed("Contents")
    assert set(contents["metadata"]) == _listed("Metadata of an extracted vector")
    assert set(contents["metadata"]["statistics"]) == _listed("Statistics")
    assert set(contents["metadata"]["outliers"]) == _listed("Outliers")


def test_a_set_of_steering_vectors(steering: Path) -> None:
    assert set(json.loads((steering / "metadata.json").read_bytes())) == _listed("metadata.json of a set")


def test_personas_and_questions() -> None:
    assert {field.encode_name for field in msgspec.structs.fields(Persona)} == _listed("A persona")
    assert {field.encode_name for field in msgspec.structs.fields(QAPair)} == _listed("A question")


def test_contrast_pairs(tmp_path: Path) -> None:
    pairs = ContrastPairDataset("politeness", [{"positive": "Please.", "negative": "Now.", "metadata": {"topic": "a"}}])
    pairs.save(tmp_path / "pairs.json")
    written: Mapping[str, Any] = json.loads((tmp_path / "pairs.json").read_bytes())
    assert set(written) == _listed("A file of pairs")
    assert set(written["pairs"][0]) == _listed("A pair")
