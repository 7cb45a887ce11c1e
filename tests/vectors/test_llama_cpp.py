"""Exported control vectors in the real llama.cpp, its loader and arithmetic, beside steering on TransformerLens.

Both run SmolLM2 in float32 from the same weights: the GGUF file that transformers dequantizes is dequantized here into
another GGUF file. What is left between the two is rounding, so shifts of logits are compared number by number.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from tl_persona import SteeringVector, SteeringVectorSet
from tl_persona.models.checkpoints import find_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.tl]

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(os.environ.get("TL_PERSONA_LLAMA", ROOT / ".venv" / "llama"))
"""Where `requirements/llama.txt` is installed."""

WORKER = ROOT / "tests" / "support" / "llama_worker.py"
PROMPT = "The old lighthouse keeper told them"
N_LAYERS, D_MODEL = 30, 576
EXPORTED = (1, 2, 9, 16, 23, 28, 29)
COMPARED = sorted({near for layer in EXPORTED for near in (layer - 1, layer, layer + 1)} - {N_LAYERS})
"""With their neighbours."""
LENGTH = 20.0
"""About what a vector of SmolLM2's middle layers has: see the table in docs/concepts/steering-vectors.md."""


def a_vector(layer: int, seed: int) -> SteeringVector:
    direction = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))
    return SteeringVector("any", layer, LENGTH * direction / direction.norm(), "SmolLM2-135M-Instruct")


def same_direction_at(layer: int) -> SteeringVector:
    """One direction for all layers, so that nothing but the place tells them apart."""
    return a_vector(layer, seed=0)


SEVERAL = SteeringVectorSet("any", [a_vector(layer, seed=layer) for layer in (2, 9, 21)])


def without_quantization(source: Path, target: Path) -> Path:
    """The same GGUF model with every tensor in float32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.get_field("general.architecture").contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            item_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], item_type)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def with_a_direction_0(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_tensor("direction.0", np.ones(D_MODEL, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def bridge(smollm2_hooked: Callable[[str], Any]) -> Any:
    return smollm2_hooked("bridge")


@pytest.fixture(scope="module")
def ids(bridge: Any) -> list[int]:
    found: list[int] = bridge.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    return found


@pytest.fixture(scope="module")
def in_llama_cpp(ids: list[int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, np.ndarray]]:
    """Logits in llama.cpp: `plain`, each layer of `EXPORTED` under its file, `several` under one of three."""
    assert SITE.is_dir(), f"llama-cpp-python is not in {SITE}: `make test` puts it there, or set TL_PERSONA_LLAMA"
    folder = tmp_path_factory.mktemp("llama")
    found = find_checkpoint("smollm2")
    model = without_quantization(Path(found.location, str(found.gguf_file)), folder / "model.gguf")
    files = {
        str(layer): SteeringVectorSet("any", [same_direction_at(layer)]).export_gguf(folder / str(layer))
        for layer in EXPORTED
    }
    files["several"] = SEVERAL.export_gguf(folder / "several.gguf")
    files["direction 0"] = with_a_direction_0(folder / "zero.gguf")
    request = json.dumps({"ids": ids, "files": [str(file) for file in files.values()]})
    output = folder / "logits.npz"
    command = [sys.executable, str(WORKER), str(SITE), str(model), str(output)]
    try:
        done = subprocess.run(command, input=request, text=True, capture_output=True, check=False)
    finally:
        model.unlink()  # half a gigabyte
    assert done.returncode == 0, done.stderr[-2000:]
    logits = dict(np.load(output))
    names = {f"steered_{place}": name for place, name in enumerate(files)}
    yield {names.get(key, key): value for key, value in logits.items()}


@pytest.fixture(scope="module")
def own_logits(bridge: Any, ids: list[int]) -> Callable[..., np.ndarray]:
    """Logits on TransformerLens, steered by a vector or a set, or plain."""
    tokens = torch.tensor([ids])

    def logits(vectors: SteeringVector | SteeringVectorSet | None = None) -> np.ndarray:
        with torch.no_grad():
            if vectors is None:
                found: np.ndarray = bridge(tokens)[0].numpy()
                return found
            with vectors.steer(bridge):
                steered: np.ndarray = bridge(tokens)[0].numpy()
                return steered

    return logits


@pytest.fixture(scope="module")
def own_shifts(own_logits: Callable[..., np.ndarray]) -> dict[int, np.ndarray]:
    """For each layer of `COMPARED`, how the direction there shifts TransformerLens's logits."""
    plain = own_logits()
    return {layer: own_logits(same_direction_at(layer)) - plain for layer in COMPARED}


def test_llama_cpp_and_transformers_agree_on_the_model(
    in_llama_cpp: dict[str, np.ndarray], own_logits: Callable[..., np.ndarray]
) -> None:
    plain = own_logits()
    assert np.linalg.norm(in_llama_cpp["plain"] - plain) < 1e-5 * np.linalg.norm(plain)


def test_each_layers_file_shifts_the_logits_of_llama_cpp_as_steering_shifts_ours(
    in_llama_cpp: dict[str, np.ndarray], own_shifts: dict[int, np.ndarray], own_logits: Callable[..., np.ndarray]
) -> None:
    # A shift is the difference of two runs, each with the rounding by which the programs differ when nothing steers.
    # Ten times that covers what steering adds to it (measured: 1 to 3 times); a wrong layer misses by thousands.
    rounding = np.linalg.norm(in_llama_cpp["plain"] - own_logits())
    for layer in EXPORTED:
        shift = in_llama_cpp[str(layer)] - in_llama_cpp["plain"]
        assert np.linalg.norm(own_shifts[layer]) > 1000 * rounding, f"layer {layer}: too little to compare"
        assert np.linalg.norm(shift - own_shifts[layer]) < 10 * rounding, f"layer {layer}"
        assert np.corrcoef(shift.ravel(), own_shifts[layer].ravel())[0, 1] > 0.99999, f"layer {layer}"


def test_a_direction_acts_on_the_block_of_its_number_and_on_no_neighbour(
    in_llama_cpp: dict[str, np.ndarray], own_shifts: dict[int, np.ndarray]
) -> None:
    some = (slice(None), slice(None, None, 16))  # every 16th token of the vocabulary: thousands of numbers still
    for layer in EXPORTED:
        shift = (in_llama_cpp[str(layer)] - in_llama_cpp["plain"])[some].ravel()
        correlations = {at: np.corrcoef(shift, own[some].ravel())[0, 1] for at, own in own_shifts.items()}
        right = correlations.pop(layer)
        assert right > 0.99999 and max(correlations.values()) < 0.98, (
            f"layer {layer}: {right}, elsewhere {correlations}"
        )


def test_a_file_of_several_layers_acts_as_the_set_does(
    in_llama_cpp: dict[str, np.ndarray], own_logits: Callable[..., np.ndarray]
) -> None:
    plain = own_logits()
    rounding = np.linalg.norm(in_llama_cpp["plain"] - plain)
    shift = in_llama_cpp["several"] - in_llama_cpp["plain"]
    assert np.linalg.norm(shift - (own_logits(SEVERAL) - plain)) < 10 * rounding


def test_llama_cpp_takes_every_file_of_ours_and_none_with_a_direction_0(in_llama_cpp: dict[str, np.ndarray]) -> None:
    assert in_llama_cpp["taken"].tolist() == [True] * (len(EXPORTED) + 1) + [False]
