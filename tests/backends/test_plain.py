"""A transformers model itself, under TransformerLens's hook names: the same numbers, edits and texts as any other."""

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from kinds import ALL_LAYERS
from oracle import block_outputs, oracle_means, relative_error
from sharing import pairs, persona, pool
from tiny import D_MODEL, FAMILIES, N_LAYERS
from torch import Tensor

from tl_persona import extract_caa_vectors, generate, load_model
from tl_persona.backends import open_backend
from tl_persona.backends.local.check import check_note
from tl_persona.backends.local.plain import TransformersModel, plain_model
from tl_persona.errors import HookError, InputError, ModelError
from tl_persona.models.facts import HookedModel
from tl_persona.steering import Intervention, attach, monitor

pytestmark = pytest.mark.tl

PAIRS = [
    {"positive": "I read by the sea in the evening.", "negative": "There is wind from the west."},
    {"positive": "Tea, please.", "negative": "Give me the rain and the wind, and be quick about it today!"},
]


UNMASKED = ("bloom", "mistral", "gemma3")
"""Families that read ALiBi, or the border of a window, off the mask that they make themselves."""


def some_direction() -> Tensor:
    return torch.randn(D_MODEL, generator=torch.Generator().manual_seed(5))


def hooks_on(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture
def fresh_hf(tiny_model: Callable[[str], Path]) -> Callable[[str], Any]:
    """Give a transformers model that no other test sees."""
    return lambda family: transformers.AutoModelForCausalLM.from_pretrained(tiny_model(family)).eval()


# --- what is read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("samples", [persona, pairs])
def test_shared_passes_have_the_means_of_each_text_alone(
    family: str, samples: Callable[[], list[Any]], tiny_model: Callable[[str], Path], tiny_hf: Callable[[str], Any]
) -> None:
    model = load_model(tiny_model(family), kind="transformers")
    assert isinstance(model, TransformersModel) and isinstance(model, HookedModel)
    means, notes = pool(model, samples())
    assert notes["sharing"] == "packed" or family in UNMASKED
    assert notes["model_class"] == "TransformersModel"
    assert notes["check"] == check_note(model) == "the transformers model itself"
    for found, sample in zip(means, samples(), strict=True):
        assert relative_error(found, oracle_means(tiny_hf(family), sample)) < 1e-5


def test_the_stream_before_a_block_is_what_the_one_above_gave(tiny_llama: Path) -> None:
    model: Any = load_model(tiny_llama, kind="transformers")
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        logits, kept = model.run_with_cache(ids)
        expected = model.original_model(ids, output_hidden_states=True)
    assert torch.equal(logits, expected.logits)
    assert torch.equal(kept["blocks.0.hook_resid_pre"], expected.hidden_states[0])
    for layer in range(1, N_LAYERS):
        assert torch.equal(kept[f"blocks.{layer}.hook_resid_pre"], kept[f"blocks.{layer - 1}.hook_resid_post"])
        assert torch.equal(kept[f"blocks.{layer}.hook_resid_pre"], expected.hidden_states[layer])


def test_no_block_runs_that_is_not_needed(tiny_llama: Path) -> None:
    model: Any = load_model(tiny_llama, kind="transformers")
    ran = []
    handle = model.blocks[2].register_forward_hook(lambda *_: ran.append(2))
    logits, kept = model.run_with_cache(
        torch.arange(3, 12)[None], names_filter="blocks.1.hook_resid_post", stop_at_layer=2
    )
    handle.remove()
    assert logits is None and list(kept) == ["blocks.1.hook_resid_post"] and not ran
    assert hooks_on(model) == hooks_on(transformers.AutoModelForCausalLM.from_pretrained(tiny_llama))


def test_a_hook_that_is_not_there_is_refused_with_what_is(tiny_llama: Path) -> None:
    model: Any = load_model(tiny_llama, kind="transformers")
    with pytest.raises(HookError, match=r"no hook 'blocks\.0\.hook_q'.*: it has resid_pre, attn_out, resid_mid"):
        model.run_with_cache(torch.arange(3)[None], names_filter=["blocks.0.hook_q"])
    with pytest.raises(HookError):
        open_backend(model).pool(open_backend(model).plan(persona()), ["blocks.0.attn.hook_z"]).__next__()


def test_steering_vectors_are_those_of_a_bridge(tiny_llama: Path) -> None:
    sets = [
        extract_caa_vectors(load_model(tiny_llama, kind=kind), None, PAIRS, show_progress=False)
        for kind in ("transformers", "bridge")
    ]
    for one, other in zip(*sets, strict=True):
        assert one.hook_name == other.hook_name
        assert relative_error(one.vector[None], other.vector[None]) < 1e-5


# --- what is edited ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook_name", ["blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"])
@pytest.mark.parametrize("positions", [None, "last", "generated", 2, slice(1, 4)])
def test_what_it_generates_and_shows_under_an_edit_is_what_a_bridge_does(
    hook_name: str, positions: Any, tiny_llama: Path
) -> None:
    direction, prompt = some_direction(), torch.arange(5, 14)
    edit = Intervention(hook_name, direction, 3.0, positions=positions)
    said, shown = [], []
    for kind in ("transformers", "bridge"):
        model = load_model(tiny_llama, kind=kind)
        with attach(model, [edit]), monitor(model, {"seen": ("blocks.2.hook_resid_post", direction)}) as seen:
            (text,) = generate(model, [prompt], max_new_tokens=8)
        said.append(text.ids.tolist())
        shown.append(torch.cat(seen.projections["seen"], dim=1))
        assert not any(site.fwd_hooks for name, site in model.hook_dict.items() if name == hook_name)
    assert said[0] == said[1]
    assert torch.allclose(shown[0], shown[1], rtol=1e-4, atol=1e-4)


def test_an_edit_on_a_callers_model_acts_on_it_and_on_what_is_extracted_meanwhile(
    fresh_hf: Callable[[str], Any], tiny_model: Callable[[str], Path]
) -> None:
    model, direction, samples = fresh_hf("llama"), some_direction(), persona()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model("llama"))
    expected = fresh_hf("llama")
    expected.model.layers[1].register_forward_hook(
        lambda _m, _a, out: out + 2 * direction if isinstance(out, Tensor) else (out[0] + 2 * direction, *out[1:])
    )
    before = hooks_on(model)
    edit = Intervention("blocks.1.hook_resid_post", direction, 2.0)
    with attach(model, [edit]):
        assert torch.equal(block_outputs(model, samples[0].input_ids), block_outputs(expected, samples[0].input_ids))
        backend = open_backend(model, tokenizer=tokenizer)
        plan = backend.plan(samples)
        found = {each.sample: each.means for each in backend.pool(plan, ALL_LAYERS)}
        assert backend.notes["hooks"] == "of the caller" and backend.notes["model_class"] == "TransformersModel"
        digest = backend.interventions
    assert hooks_on(model) == before
    for index, sample in enumerate(samples):
        assert relative_error(found[index], oracle_means(expected, sample)) < 1e-5
    bridge = load_model(tiny_model("llama"), kind="bridge")
    with attach(bridge, [edit]):
        assert open_backend(bridge).interventions == digest
    assert open_backend(model, tokenizer=tokenizer).interventions == ""


def test_what_a_callers_hook_records_stays_with_it(
    fresh_hf: Callable[[str], Any], tiny_model: Callable[[str], Path]
) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def look(self, _module: Any, _args: Any, output: Any) -> None:
            self.seen.append((output if isinstance(output, Tensor) else output[0]).shape[1])

    model, recorder, samples = fresh_hf("llama"), Recorder(), persona()
    handle = model.model.layers[0].register_forward_hook(recorder.look)
    backend = open_backend(model, tokenizer=transformers.AutoTokenizer.from_pretrained(tiny_model("llama")))
    list(backend.pool(backend.plan(samples), ALL_LAYERS))
    assert backend.interventions == "unknown"
    assert sorted(recorder.seen[-len(samples) :]) == sorted(len(sample.input_ids) for sample in samples)
    handle.remove()


# --- where TransformerLens has none --------------------------------------------------------------------------------


def test_a_model_whose_hooked_classes_differ_is_taken_as_it_is_and_the_user_told(
    unscaled_gpt2: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of this configuration a HookedTransformer is right, where there is one.
    monkeypatch.setattr("tl_persona.backends.local.boot.hooked_transformer_supports", lambda _hf_model: False)
    with caplog.at_level(logging.WARNING):
        model = load_model(unscaled_gpt2)
    assert isinstance(model, TransformersModel)
    assert "is another function" in caplog.text and "Taking the transformers model itself" in caplog.text
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(unscaled_gpt2).eval()
    means, _ = pool(model, persona())
    for found, sample in zip(means, persona(), strict=True):
        assert relative_error(found, oracle_means(hf_model, sample)) < 1e-5
    loaded, handed = open_backend(model).facts, open_backend(hf_model, tokenizer=model.tokenizer).facts
    assert loaded.weights_digest == handed.weights_digest and loaded.kind == handed.kind == "TransformersModel"


def test_a_compiled_model_is_taken_as_it_was_before(fresh_hf: Callable[[str], Any]) -> None:
    model = fresh_hf("llama")
    assert plain_model(torch.compile(model), None).original_model is model
    backend = open_backend(torch.compile(model))
    (means,) = (each.means for each in backend.pool(backend.plan(persona()[:1]), ALL_LAYERS))
    assert relative_error(means, oracle_means(model, persona()[0])) < 1e-5


def test_what_has_no_decoder_layers_is_refused() -> None:
    class Bag(transformers.PreTrainedModel):
        config_class = transformers.LlamaConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.embed = torch.nn.Embedding(10, 4)

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.embed

        def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
            return self.embed(input_ids)

    with pytest.raises(ModelError, match="Bag cannot be read as plain transformers: the decoder layers"):
        plain_model(Bag(transformers.LlamaConfig(vocab_size=10, hidden_size=32)), None)


def test_it_needs_no_transformer_lens(tiny_llama: Path) -> None:
    code = (
        "import sys, torch, transformers\n"
        "from tl_persona import extract_activations, load_model\n"
        f"model = load_model({str(tiny_llama)!r}, kind='transformers')\n"
        "extract_activations(model, [torch.arange(3, 9)], [torch.ones(6, dtype=torch.bool)])\n"
        "assert 'transformer_lens' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_processed_weights_are_transformer_lens_own(tiny_llama: Path) -> None:
    with pytest.raises(InputError, match="process_weights is TransformerLens's"):
        load_model(tiny_llama, kind="transformers", process_weights=True)
