"""Models whose weights are held otherwise: with adapters of peft, quantized, or brought from elsewhere as they run."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from kinds import ALL_LAYERS
from oracle import oracle_means, relative_error
from sharing import assert_nothing_is_lost_in_silence, pairs, persona
from tiny import build_tiny
from torch import Tensor

from tl_persona import load_model
from tl_persona.backends import open_backend
from tl_persona.errors import ModelError
from tl_persona.steering import Intervention, attach


@pytest.fixture
def fresh(tiny_model: Callable[[str], Path]) -> Callable[[str], Any]:
    """Give a transformers model that no other test sees."""
    return lambda family: transformers.AutoModelForCausalLM.from_pretrained(tiny_model(family)).eval()


def run(model: Any, samples: list[Any]) -> tuple[list[Tensor], Any]:
    """Means of samples, and the backend that they came from."""
    backend = open_backend(model)
    pooled = {each.sample: each.means for each in backend.pool(backend.plan(samples), ALL_LAYERS)}
    assert_nothing_is_lost_in_silence(backend.notes)
    return [pooled[index] for index in range(len(samples))], backend


def worst_error(model: Any, plain: Any | None = None) -> tuple[float, Any]:
    """The largest error of a mean, over two plans, and the backend of the last."""
    errors = []
    for samples in (persona(), pairs()):
        found, backend = run(model, samples)
        expected = [oracle_means(model if plain is None else plain, sample) for sample in samples]
        errors += [relative_error(got, wanted) for got, wanted in zip(found, expected, strict=True)]
    return max(errors), backend


# --- adapters ------------------------------------------------------------------------------------------------------


def adapted(base: Any, modules: list[str], **options: Any) -> Any:
    """A PeftModel whose two adapters, `first` and `second`, change it by much."""
    import peft

    config = peft.LoraConfig(r=4, target_modules=modules, **options)
    model = peft.get_peft_model(base, config, adapter_name="first")
    model.add_adapter("second", config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model.eval()


class _Inner:
    """A PeftModel for the oracle, which looks for decoder layers where transformers has them."""

    def __init__(self, model: Any) -> None:
        inner = model.get_base_model()
        self.transformer = getattr(inner, "transformer", None)
        if self.transformer is None:
            del self.transformer
        self.model = getattr(inner, "model", None)
        self._call = model

    def __call__(self, ids: Tensor) -> Any:
        return self._call(ids)


JOINT = [("llama", ["q_proj", "v_proj"]), ("gpt2", ["c_attn"]), ("llama", ["down_proj", "embed_tokens"])]


@pytest.mark.parametrize(("family", "modules"), JOINT)
def test_a_model_with_adapters_runs_as_they_are_and_says_which(
    family: str, modules: list[str], fresh: Callable[[str], Any]
) -> None:
    model = adapted(fresh(family), modules)
    digests = []
    for change, said in [
        (lambda: None, "on: first; off: second"),
        (lambda: model.set_adapter("second"), "on: second; off: first"),
        (lambda: model.base_model.disable_adapter_layers(), "off: first, second"),
        (lambda: model.base_model.enable_adapter_layers(), "on: second; off: first"),
        (lambda: model.merge_adapter(), "off: first; merged: second"),
        (lambda: model.unmerge_adapter(), "on: second; off: first"),
    ]:
        change()
        error, backend = worst_error(model, _Inner(model))
        assert error < 1e-5
        assert backend.notes["adapters"] == said
        digests.append(backend.facts.weights_digest)
    first, second, off, on, merged, again = digests
    assert len({first, second, off, merged}) == 4
    assert second == on
    assert again != merged


def test_a_merged_model_and_one_with_its_adapter_on_tied_embeddings_are_two(fresh: Callable[[str], Any]) -> None:
    model = adapted(fresh("gpt2"), ["wte"])
    base = model.get_base_model()
    assert base.lm_head.weight is base.transformer.wte.weight
    samples = persona()
    apart, backend = run(model, samples)
    expected = [oracle_means(_Inner(model), sample) for sample in samples]
    assert max(map(relative_error, apart, expected)) < 1e-5
    known = backend.facts.weights_digest
    merged = model.merge_and_unload()
    together, backend = run(merged, samples)
    assert max(map(relative_error, together, [oracle_means(merged, sample) for sample in samples])) < 1e-5
    assert backend.facts.weights_digest != known and "adapters" not in backend.notes


def test_adapters_in_a_transformers_model_and_edits_on_it_are_the_models(fresh: Callable[[str], Any]) -> None:
    import peft

    config = peft.LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, fresh("llama"), adapter_name="own").eval()
    error, backend = worst_error(model)
    assert error < 1e-5 and backend.notes["adapters"] == "on: own"
    with attach(model, [Intervention("blocks.1.hook_resid_post", torch.ones(model.config.hidden_size), 2.0)]):
        error, backend = worst_error(model)
        assert error < 1e-5 and backend.interventions


# --- quantized -----------------------------------------------------------------------------------------------------


def torchao_weights(model: Any) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def torchao_activations(model: Any) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())


def quanto_weights(model: Any) -> None:
    from optimum.quanto import freeze, qint8, quantize

    quantize(model, weights=qint8)
    freeze(model)


@pytest.mark.parametrize("quantize", [torchao_weights, quanto_weights])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_weights_in_int8_share_as_others_do_and_are_not_recorded_as_float32(
    family: str, quantize: Callable[[Any], None], fresh: Callable[[str], Any]
) -> None:
    model = fresh(family)
    quantize(model)
    error, backend = worst_error(model)
    assert error < 1e-5 and backend.notes["sharing"] == "packed"
    assert "int8" in backend.notes["quantized"] and backend.facts.held_in.startswith("float32, int8")
    other = open_backend(fresh(family))
    assert other.facts.held_in == "float32" and "quantized" not in other.notes
    assert other.facts.weights_digest != backend.facts.weights_digest


def test_where_activations_are_rounded_each_text_runs_by_itself_and_it_is_said(
    fresh: Callable[[str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = fresh("llama")
    torchao_activations(model)
    error, backend = worst_error(model)
    assert error == 0 and backend.notes["model_class"] == "TransformersModel"
    assert backend.notes["fallbacks"] == [
        "packed: activations are rounded as they come: its numbers are good to per cents, however it is run"
    ]
    assert caplog.text.count("Each text runs by itself") == 2  # once a backend


def test_a_checkpoint_that_was_saved_quantized_is_loaded_so(tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    folder = build_tiny("llama", tmp_path / "plain")
    config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).eval()
    for kind in ("auto", "transformers"):
        other = load_model(folder, kind=kind)
        assert "quantized" not in open_backend(other).notes
    error, backend = worst_error(model)
    assert error < 1e-5 and "int8" in backend.notes["quantized"]


def test_what_transformers_cannot_load_is_an_error_of_ours(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **_options: Any) -> None:
        raise AttributeError("'HqqHfQuantizer' object has no attribute 'using_multi_gpu'")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ModelError, match=r"cannot load the model of .* \(AttributeError: 'HqqHfQuantizer'"):
        load_model(tiny_llama)


# --- elsewhere -----------------------------------------------------------------------------------------------------


def in_memory(model: Any, folder: Path) -> Any:
    accelerate.cpu_offload(model, execution_device="cpu")
    return model


def on_disk(model: Any, folder: Path) -> Any:
    accelerate.disk_offload(model, str(folder), execution_device="cpu")
    return model


@pytest.mark.parametrize("bring", [in_memory, on_disk])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_weights_that_are_brought_layer_by_layer_run_as_they_are(
    family: str, bring: Callable[[Any, Path], Any], fresh: Callable[[str], Any], tmp_path: Path
) -> None:
    plain = fresh(family)
    known = open_backend(fresh(family)).facts.weights_digest
    model = bring(fresh(family), tmp_path)
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    error, backend = worst_error(model, plain)
    assert error < 1e-5 and backend.notes["model_class"] == "TransformersModel"
    if not plain.config.tie_word_embeddings:  # accelerate keeps tied weights twice
        assert backend.facts.weights_digest == known, "the same weights, wherever they are"


def test_other_weights_elsewhere_are_another_model(fresh: Callable[[str], Any], tmp_path: Path) -> None:
    digests = []
    for scale in (1.0, 1.01):
        model = fresh("llama")
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(scale)
        on_disk(model, tmp_path / str(scale))
        digests.append(open_backend(model).facts.weights_digest)
    assert digests[0] != digests[1]


@pytest.mark.parametrize("kind", ["auto", "transformers"])
def test_a_checkpoint_that_is_partly_on_disk_is_loaded_and_said_to_be_slow(
    kind: str, tiny_llama: Path, tiny_hf: Callable[[str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    parts = ["model.embed_tokens", "model.layers.0", "model.rotary_emb", "model.norm", "lm_head"]
    places = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk", "model.layers.2": "disk"}
    places |= {f"model.layers.{number}": "disk" for number in range(1, tiny_hf("llama").config.num_hidden_layers)}
    with caplog.at_level(logging.WARNING):
        model = load_model(tiny_llama, kind=kind, device_map=places)
    error, backend = worst_error(model, tiny_hf("llama"))
    assert error < 1e-5 and backend.notes["model_class"] == "TransformersModel"
    assert ("the transformers model itself runs, slowly" in caplog.text) == (kind == "auto")
