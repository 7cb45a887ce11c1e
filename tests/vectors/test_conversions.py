"""Steering vectors in other libraries and back: each applies what it is given as we do, on the same weights.

The other libraries are the real ones. They steer a plain transformers model, we steer through TransformerLens hooks.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import logits_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from tl_persona.errors import HookError, InputError, MissingDependencyError
from tl_persona.store import PersonaVectorStore
from tl_persona.vectors import SteeringVector, SteeringVectorSet

ROOT = Path(__file__).resolve().parents[2]
PEERS = Path(os.environ.get("TL_PERSONA_PEERS", ROOT / ".venv" / "peers"))
"""Where `requirements/bench.txt` is installed: the other libraries, kept apart from the environment."""

IDS = torch.arange(20, 32)[None]
COEFFICIENT = -1.75
"""Negative and not whole: a lost sign or a normalized vector would show."""

on_both_architectures = pytest.mark.parametrize("family", ["llama", "gpt2"])


@pytest.fixture(scope="module", autouse=True)
def peers() -> Iterator[None]:
    assert (PEERS / "repeng").is_dir(), f"no repeng in {PEERS}: `make test` puts it there, or set TL_PERSONA_PEERS"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(PEERS)])  # last, so that none of our own packages is shadowed
        patch.setattr(np, "float_", np.float64, raising=False)  # repeng 0.4 is written for NumPy 1
        yield


@pytest.fixture
def plain_model(tiny_model: Callable[[str], Path]) -> Callable[[str], Any]:
    """Give a fresh transformers model of a family."""
    return lambda family: AutoModelForCausalLM.from_pretrained(tiny_model(family)).eval()


def a_vector(layer: int, model: Any = "tiny", **rest: Any) -> SteeringVector:
    direction = torch.randn(32, generator=torch.Generator().manual_seed(layer))
    name = model if isinstance(model, str) else model.cfg.model_name
    return SteeringVector("calm", layer, 2 * direction, name, metadata={"num_pairs": 2}, **rest)


def a_set(*layers: int, model: Any = "tiny") -> SteeringVectorSet:
    return SteeringVectorSet("calm", [a_vector(layer, model) for layer in layers])


def own_logits(
    model: Any, vectors: SteeringVectorSet | SteeringVector, coefficient: float, ids: Tensor = IDS
) -> Tensor:
    with vectors.steer(model, coefficient):
        return logits_of(model, ids)


def assert_same_logits(found: Tensor, expected: Tensor, unsteered: Tensor) -> None:
    """Equal but for rounding, and steered at all: both shifts are far above it."""
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 1e-5 * scale
    assert (expected - unsteered).abs().max() > 1e-2 * scale


def assert_same_directions(found: SteeringVectorSet, expected: SteeringVectorSet) -> None:
    assert (found.behavior, found.layers) == (expected.behavior, expected.layers)
    for vector in found:
        assert torch.equal(vector.vector, expected[vector.layer_index].vector)
        assert vector.hook_name == f"blocks.{vector.layer_index}.hook_resid_post"


# --- steering-vectors ----------------------------------------------------------------------------------------------


@pytest.mark.tl
@on_both_architectures
def test_steering_vectors_steers_with_our_set_as_we_do(
    family: str, plain_model: Callable[[str], Any], tiny_hooked: Callable[[str, str], Any]
) -> None:
    bridge, plain = tiny_hooked(family, "bridge"), plain_model(family)
    vectors = a_set(0, 2, model=bridge)
    unsteered = logits_of(plain, IDS)
    with vectors.to_steering_vectors().apply(plain, multiplier=COEFFICIENT):
        theirs = logits_of(plain, IDS)
    assert_same_logits(theirs, own_logits(bridge, vectors, COEFFICIENT), unsteered)


def test_a_set_goes_to_steering_vectors_and_back_unchanged() -> None:
    vectors = a_set(1, 4).to(torch.bfloat16)
    there = vectors.to_steering_vectors()
    assert (there.layer_type, list(there.layer_activations)) == ("decoder_block", [1, 4])
    back = SteeringVectorSet.from_steering_vectors(there, "calm", "tiny")
    assert_same_directions(back, vectors)
    assert {vector.extraction_method for vector in back} == {"steering-vectors"}
    there.layer_activations[1].zero_()
    assert vectors[1].norm > 1 and back[1].norm > 1  # neither shares memory with it


def test_a_steering_vector_of_theirs_that_is_no_block_output_is_refused() -> None:
    from steering_vectors import SteeringVector as Theirs

    for layer_type in ("self_attn", "mlp"):
        with pytest.raises(InputError, match=f"layer type '{layer_type}': only 'decoder_block'"):
            SteeringVectorSet.from_steering_vectors(Theirs({1: torch.ones(2)}, layer_type), "calm", "tiny")
    with pytest.raises(InputError, match="layer -1: number the blocks from 0"):
        SteeringVectorSet.from_steering_vectors(Theirs({-1: torch.ones(2)}), "calm", "tiny")
    with pytest.raises(InputError, match="got a int of layer type None"):
        SteeringVectorSet.from_steering_vectors(3, "calm", "tiny")


# --- repeng --------------------------------------------------------------------------------------------------------


@pytest.mark.tl
@on_both_architectures
def test_repeng_steers_with_our_set_as_we_do(
    family: str, plain_model: Callable[[str], Any], tiny_hooked: Callable[[str, str], Any]
) -> None:
    from repeng import ControlModel

    bridge, plain = tiny_hooked(family, "bridge"), plain_model(family)
    vectors = a_set(0, 2, model=bridge)
    unsteered = logits_of(plain, IDS)
    controlled = ControlModel(plain, vectors.layers)
    controlled.set_control(vectors.to_repeng(), COEFFICIENT)
    assert_same_logits(logits_of(controlled, IDS), own_logits(bridge, vectors, COEFFICIENT), unsteered)


def test_a_set_goes_to_repeng_and_back_unchanged() -> None:
    vectors = a_set(1, 4)
    there = vectors.to_repeng(model_type="llama")
    assert there.model_type == "llama" and there.directions[4].dtype == np.float32
    back = SteeringVectorSet.from_repeng(there, "calm")
    assert_same_directions(back, vectors)
    assert (back.model_name, back[1].extraction_method) == ("llama", "repeng")
    assert SteeringVectorSet.from_repeng(there, "calm", "org/tiny").model_name == "org/tiny"
    there.directions[1][:] = 0
    assert vectors[1].norm > 1 and back[1].norm > 1
    assert a_set(1).to(torch.bfloat16).to_repeng().directions[1].dtype == np.float32


def test_what_is_no_control_vector_is_refused() -> None:
    from repeng import ControlVector

    with pytest.raises(InputError, match="got a list without directions"):
        SteeringVectorSet.from_repeng([], "calm")
    with pytest.raises(InputError, match="layer -2: number the blocks from 0"):
        SteeringVectorSet.from_repeng(ControlVector("llama", {-2: np.ones(2)}), "calm")


def test_gguf_files_go_both_ways_between_repeng_and_us(tmp_path: Path) -> None:
    from repeng import ControlVector

    vectors = a_set(1, 4)
    theirs = ControlVector.import_gguf(vectors.export_gguf(tmp_path / "ours", model_hint="llama"))
    assert theirs == vectors.to_repeng(model_type="llama")
    theirs.export_gguf(tmp_path / "calm.gguf")
    assert_same_directions(SteeringVectorSet.import_gguf(tmp_path / "calm.gguf"), vectors)


# --- rotalabs-steer ------------------------------------------------------------------------------------------------


@pytest.mark.tl
@on_both_architectures
def test_rotalabs_steer_loads_our_folder_and_steers_as_we_do(
    family: str, plain_model: Callable[[str], Any], tiny_hooked: Callable[[str, str], Any], tmp_path: Path
) -> None:
    from rotalabs_steer import ActivationInjector
    from rotalabs_steer import SteeringVectorSet as Theirs

    bridge, plain = tiny_hooked(family, "bridge"), plain_model(family)
    vectors = a_set(0, 2, model=bridge)
    found = Theirs.load(vectors.export_rotalabs(tmp_path / "set"))
    assert (found.behavior, found.layers, found.model_name) == ("calm", [0, 2], bridge.cfg.model_name)
    assert found[2].metadata["num_pairs"] == 2
    unsteered = logits_of(plain, IDS)
    with ActivationInjector(plain, list(found), strength=COEFFICIENT):
        theirs = logits_of(plain, IDS)
    assert_same_logits(theirs, own_logits(bridge, vectors, COEFFICIENT), unsteered)


def test_a_folder_of_rotalabs_steer_comes_in(tmp_path: Path) -> None:
    from rotalabs_steer import SteeringVector as TheirVector
    from rotalabs_steer import SteeringVectorSet as Theirs

    expected = a_set(1, 4)
    Theirs("calm", [TheirVector("calm", v.layer_index, v.vector, "tiny") for v in expected]).save(tmp_path)
    found = SteeringVectorSet.load(tmp_path)
    assert_same_directions(found, expected)
    assert (found.model_name, list(found[1].metadata)) == ("tiny", ["created_at"])


def test_a_folder_for_rotalabs_steer_comes_back_and_holds_plain_tensors(tmp_path: Path) -> None:
    vectors = a_set(4, 1)
    folder = vectors.export_rotalabs(tmp_path / "set")
    assert sorted(os.listdir(folder)) == ["layer_1.json", "layer_1.pt", "layer_4.json", "layer_4.pt", "metadata.json"]
    back = SteeringVectorSet.load(folder)
    assert_same_directions(back, vectors)
    assert back[4].metadata == vectors[4].metadata
    assert torch.equal(torch.load(folder / "layer_4.pt", weights_only=True), vectors[4].vector)
    whole = torch.randn(100, 32)
    row = SteeringVectorSet("calm", [SteeringVector("calm", 1, whole[0], "tiny")]).export_rotalabs(tmp_path / "row")
    assert (row / "layer_1.pt").stat().st_size < 4096  # a row, without the matrix it is a view of


def test_a_folder_with_a_set_of_ours_is_not_mixed_with_theirs(tmp_path: Path) -> None:
    a_set(1).save(tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(InputError, match="holds a set of this package's own format: choose another folder"):
        a_set(1).export_rotalabs(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("found", ["[" * 100_000, "\xff", "[]", "a pipe"])
def test_a_folder_with_metadata_that_is_none_is_written_over(tmp_path: Path, found: str) -> None:
    if found == "a pipe":
        os.mkfifo(tmp_path / "metadata.json")
    else:
        (tmp_path / "metadata.json").write_text(found, encoding="latin-1")
    assert_same_directions(SteeringVectorSet.load(a_set(1).export_rotalabs(tmp_path)), a_set(1))


def test_metadata_without_a_json_form_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    vectors = SteeringVectorSet("calm", [SteeringVector("calm", 1, torch.ones(2), "tiny", metadata={"k": object()})])
    with pytest.raises(InputError, match="no JSON form"):
        vectors.export_rotalabs(tmp_path / "set")
    assert os.listdir(tmp_path) == []


# --- persona-vectors -----------------------------------------------------------------------------------------------


def test_the_store_of_persona_vectors_reads_ours(tmp_path: Path) -> None:
    from persona_vectors.artifacts import PersonaVectorStore as Theirs

    vectors = torch.randn(3, 4)
    with PersonaVectorStore("org/model", tmp_path) as store:
        for variant in ("templated", "biography"):
            store.save(variant, "p1", "Ada", vectors, ["q1", "q2"])
            store.save(variant, "baseline_assistant", "", 2 * vectors, ["q1"])
    theirs = Theirs("org/model", tmp_path)
    assert torch.equal(theirs.load("biography", "p1"), vectors)
    assert theirs.list_personas() == ["p1"]
    assert theirs.list_personas(include_baseline=True) == ["baseline_assistant", "p1"]
    assert theirs.persona_names(["p1"]) == {"p1": "Ada"}
    assert theirs.persona_sample_ids("templated", "p1") == ["q1", "q2"]
    assert theirs.list_layers(["templated"]) == [0, 1, 2]
    assert theirs.available_variants() == ["templated", "biography"]


def test_we_read_the_store_of_persona_vectors_and_both_write_into_one_folder(tmp_path: Path) -> None:
    from persona_vectors.artifacts import PersonaVectorStore as Theirs

    vectors = torch.randn(3, 4)
    theirs = Theirs("org/model", tmp_path)
    theirs.save("templated", "p1", "Ada", vectors, ["q1", "q2"])
    ours = PersonaVectorStore("org/model", tmp_path, variants=["templated"])
    assert torch.equal(ours.load("templated", "p1"), vectors)
    assert (ours.list_personas(), ours.persona_names(["p1"])) == (["p1"], {"p1": "Ada"})
    assert (ours.persona_sample_ids("templated", "p1"), ours.list_layers(["templated"])) == (["q1", "q2"], [0, 1, 2])
    with ours:
        ours.save("templated", "p2", "Bo", 2 * vectors, ["q3"])
    theirs.save("templated", "p3", "Cy", 3 * vectors, ["q4"])
    for store in (ours, theirs):
        assert store.list_personas(["templated"]) == ["p1", "p2", "p3"]
        assert torch.equal(store.load("templated", "p2"), 2 * vectors)
        assert store.persona_sample_ids("templated", "p3") == ["q4"]


# --- all of them ---------------------------------------------------------------------------------------------------

LEAVING: dict[str, Callable[[SteeringVectorSet, Path], Any]] = {
    "steering-vectors": lambda vectors, _: vectors.to_steering_vectors(),
    "repeng": lambda vectors, _: vectors.to_repeng(),
    "rotalabs-steer": lambda vectors, folder: vectors.export_rotalabs(folder / "set"),
}


@pytest.mark.parametrize("name", LEAVING)
def test_what_acts_elsewhere_than_on_the_output_of_a_block_does_not_leave(name: str, tmp_path: Path) -> None:
    vectors = SteeringVectorSet("calm", [a_vector(1, hook_name="blocks.1.hook_resid_mid")])
    with pytest.raises(InputError, match=f"hook_resid_mid has no counterpart in {name}, which knows the outputs"):
        LEAVING[name](vectors, tmp_path)
    with pytest.raises(InputError, match=f"there is no vector to hand to {name}"):
        LEAVING[name](SteeringVectorSet("calm"), tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("name", "module"), [("steering-vectors", "steering_vectors"), ("repeng", "repeng")])
def test_without_the_package_the_install_command_is_named(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=f"pip install {name}"):
        LEAVING[name](a_set(1), tmp_path)


def test_a_package_that_breaks_on_import_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "repeng.py").write_text("import numpy\nnumpy.gone_since_2\n")
    monkeypatch.delitem(sys.modules, "repeng", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match=r"repeng is installed and cannot be imported here: .*gone_"):
        a_set(1).to_repeng()


# --- a forward hook ------------------------------------------------------------------------------------------------


def decoder_layers(model: Any) -> Any:
    return model.model.layers if hasattr(model, "model") else model.transformer.h


@pytest.mark.tl
@on_both_architectures
@pytest.mark.parametrize(("mode", "coefficient"), [("add", COEFFICIENT), ("ablate", 1.0), ("clamp", 3.0)])
def test_a_forward_hook_steers_a_transformers_model_as_we_do(
    family: str,
    mode: Any,
    coefficient: float,
    plain_model: Callable[[str], Any],
    tiny_hooked: Callable[[str, str], Any],
) -> None:
    bridge, plain = tiny_hooked(family, "bridge"), plain_model(family)
    vector, unsteered = a_vector(1, bridge), logits_of(plain, IDS)
    with vector.steer(bridge, coefficient, mode=mode):
        expected = logits_of(bridge, IDS)
    handle = decoder_layers(plain)[1].register_forward_hook(vector.as_forward_hook(coefficient, mode=mode))
    assert_same_logits(logits_of(plain, IDS), expected, unsteered)
    handle.remove()
    assert torch.equal(logits_of(plain, IDS), unsteered)


@pytest.mark.tl
@pytest.mark.slow
def test_a_forward_hook_steers_smollm2_in_transformers_as_we_do(
    smollm2: tuple[Any, Any], smollm2_hooked: Callable[[str], Any]
) -> None:
    plain, tokenizer = smollm2
    ids = torch.tensor([tokenizer("The lighthouse keeper said", add_special_tokens=False)["input_ids"]])
    direction = torch.randn(576, generator=torch.Generator().manual_seed(0))
    vector = SteeringVector("any", 14, direction, "SmolLM2-135M-Instruct")
    unsteered = logits_of(plain, ids)
    handle = plain.model.layers[14].register_forward_hook(vector.as_forward_hook(COEFFICIENT))
    try:
        found = logits_of(plain, ids)
    finally:
        handle.remove()
    assert_same_logits(found, own_logits(smollm2_hooked("bridge"), vector, COEFFICIENT, ids), unsteered)


class _Returns(torch.nn.Module):
    """A module that returns what it was made with."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self) -> Any:
        return self.output


def hooked_output(output: Any, **arguments: Any) -> Any:
    module = _Returns(output)
    vector = SteeringVector("calm", 1, torch.tensor([3.0, 4.0]), "tiny")
    module.register_forward_hook(vector.as_forward_hook(**arguments))
    return module()


def test_the_rest_of_a_tuple_stays_as_it_is() -> None:
    cache = object()
    hidden, rest = hooked_output((torch.ones(1, 2, 2), cache), coefficient=2.0)
    assert hidden.tolist() == [[[7.0, 9.0], [7.0, 9.0]]]
    assert rest is cache


def test_a_stream_in_two_parts_is_added_to_in_one_and_never_set() -> None:
    parts = torch.ones(5, 2), torch.zeros(5, 2)  # as vLLM's layers return it: tokens in one row, the sum is the stream
    hidden, residual = hooked_output(parts)
    assert torch.equal(hidden, torch.tensor([4.0, 5.0]).expand(5, 2)) and torch.equal(residual, parts[1])
    with pytest.raises(HookError, match="returned its stream in two parts, and mode 'ablate' would set only one"):
        hooked_output(parts, mode="ablate")


@pytest.mark.parametrize("output", [torch.ones(1, 2, 3), {"hidden": torch.ones(2)}, (), (None,)])
def test_a_module_that_returns_no_hidden_states_is_refused(output: Any) -> None:
    with pytest.raises(HookError, match=r"_Returns returned .*, not hidden states of width 2: put the hook"):
        hooked_output(output)


def test_a_hook_on_anything_but_a_block_output_is_refused() -> None:
    with pytest.raises(InputError, match="hook_resid_pre has no counterpart in a decoder layer"):
        a_vector(1, hook_name="blocks.1.hook_resid_pre").as_forward_hook()


def test_the_json_for_rotalabs_steer_has_its_fields(tmp_path: Path) -> None:
    folder = a_set(1).export_rotalabs(tmp_path)
    fields = json.loads((folder / "layer_1.json").read_text())
    assert fields == {
        "behavior": "calm",
        "layer_index": 1,
        "model_name": "tiny",
        "extraction_method": "caa",
        "metadata": {"num_pairs": 2},
        "vector_shape": [32],
    }
    assert json.loads((folder / "metadata.json").read_text()) == {
        "behavior": "calm",
        "layers": [1],
        "model_name": "tiny",
    }
