"""The recipes on the real server: the artifacts and numbers of a local HookedTransformer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import BOTH_KINDS
from oracle import relative_error
from safetensors.torch import load_file

from tl_persona import MaskStrategy, PersonaDataset, extract_caa_vectors, load_model, load_pairs, run_extraction
from tl_persona.backends import open_backend
from tl_persona.cli.main import main
from tl_persona.errors import RemoteRefusedError
from tl_persona.plan import Sample

RELATIVE = 1e-4
pytestmark = pytest.mark.timeout(300)  # the same model runs here too, next to the server


@pytest.fixture(autouse=True)
def host(ndif: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NDIF_HOST", ndif.url)
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture(scope="session")
def persona() -> Any:
    return next(persona for persona in PersonaDataset.bundled() if persona.id != "baseline_assistant")


@pytest.fixture(scope="session")
def extracted(ndif: Any, persona: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that the command line filled from the server: eight strategies, two variants, four questions."""
    root = tmp_path_factory.mktemp("remote")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NDIF_HOST", ndif.url)
        command = ["extract", "--backend", "remote", "--model", ndif.model_folder, "--persona-id", persona.id]
        options = ["--mask-strategy", "all", "--n-train", "4", "--activations-dir", str(root), "--timeout", "80"]
        assert main([*command, *options]) == 0
    return root


@BOTH_KINDS
def test_the_command_line_leaves_the_artifacts_of_a_local_run(
    kind: str, extracted: Path, persona: Any, smollm2_hooked: Callable[[str], Any], ndif: Any, tmp_path: Path
) -> None:
    questions, _ = PersonaDataset.bundled().train_test_split(persona.id, n_train=4)
    run_extraction(
        smollm2_hooked(kind),
        Path(ndif.model_folder).name,
        list(questions),
        ["templated", "biography"],
        persona=persona,
        mask_strategy=list(MaskStrategy),
        activations_dir=tmp_path,
        show_progress=False,
    )
    local = {path.relative_to(tmp_path): load_file(path)["activations"] for path in tmp_path.rglob("*.safetensors")}
    remote = {path.relative_to(extracted): load_file(path)["activations"] for path in extracted.rglob("*.safetensors")}
    assert sorted(local) == sorted(remote)
    assert len(local) == 2 * len(MaskStrategy)
    for name, vectors in local.items():
        assert relative_error(remote[name], vectors) < RELATIVE


@pytest.mark.usefixtures("extracted")
def test_a_second_run_computes_nothing(extracted: Path, ndif: Any, persona: Any, capsys: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in extracted.rglob("*.safetensors")}
    command = ["extract", "--backend", "remote", "--model", ndif.model_folder, "--persona-id", persona.id]
    assert main([*command, "--mask-strategy", "all", "--n-train", "4", "--activations-dir", str(extracted)]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in extracted.rglob("*.safetensors")}


@BOTH_KINDS
def test_steering_vectors_of_all_layers(kind: str, smollm2_hooked: Callable[[str], Any], ndif: Any) -> None:
    pairs = list(load_pairs("formality"))[:6]
    here = extract_caa_vectors(smollm2_hooked(kind), None, pairs, show_progress=False)
    there = extract_caa_vectors(load_model(ndif.model_folder, kind="remote"), None, pairs, show_progress=False)
    assert there.layers == here.layers == list(range(30))
    for vector in here:
        assert relative_error(there[vector.layer_index].vector, vector.vector) < RELATIVE


def test_sharing_is_proven_on_the_server_and_used(ndif: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randint(5, 5000, (280,), generator=generator)
    samples = []
    for index in range(4):
        ids = torch.cat([prefix, torch.randint(5, 5000, (20 + index,), generator=generator)])
        samples.append(Sample(str(index), ids, torch.ones((1, len(ids)), dtype=torch.bool)))
    backend = open_backend(load_model(ndif.model_folder, kind="remote"))
    assert len(list(backend.pool(backend.plan(samples), ["blocks.29.hook_resid_post"]))) == 4
    assert backend.notes["sharing"] == "packed"
    assert backend.facts.dtype == "float32"


def test_a_model_the_server_does_not_have(ndif: Any, tmp_path: Path) -> None:
    import shutil

    elsewhere = shutil.copytree(ndif.model_folder, tmp_path / "elsewhere")
    for weights in elsewhere.glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(RemoteRefusedError):
        open_backend(load_model(elsewhere, kind="remote", timeout=60))
