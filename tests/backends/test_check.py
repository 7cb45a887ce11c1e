"""A hooked model is the transformers model, or it is not used: compared at first use, and where texts grow longer."""

import copy
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from kinds import ALL_LAYERS, BOTH_KINDS, Boot
from oracle import oracle_means, relative_error
from sharing import persona, pool, samples_of, text
from tiny import SIZES, build_tiny

from tl_persona import check_model, load_model
from tl_persona.backends import open_backend
from tl_persona.backends.local import boot, check, reference, sums
from tl_persona.errors import InputError, ModelError, ModelMismatchError
from tl_persona.models.facts import source_of

pytestmark = pytest.mark.tl


@pytest.fixture
def windowed(tmp_path: Path) -> Path:
    """Qwen 2 with a sliding window of 600 tokens in some layers, past what is compared at loading."""
    folder = build_tiny("llama", tmp_path / "checkpoint")
    settings = {**SIZES, "use_sliding_window": True, "sliding_window": 600, "max_window_layers": 1}
    config = transformers.Qwen2Config(**settings, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


# --- on loading ----------------------------------------------------------------------------------------------------


def test_an_asked_for_class_that_differs_is_refused_with_block_size_and_release(unscaled_gpt2: Path) -> None:
    release = transformers.__version__.replace(".", r"\.")
    with pytest.raises(ModelMismatchError, match=rf"{release}: blocks\.\d\.hook_resid_post differs by 0\.\d+"):
        load_model(unscaled_gpt2, kind="bridge")


def test_a_transformers_model_whose_bridge_differs_is_run_as_it_is(
    unscaled_gpt2: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(unscaled_gpt2).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(unscaled_gpt2)
    assert open_backend(hf_model, tokenizer=tokenizer).facts.kind == "TransformersModel"
    assert "the TransformerBridge of GPT2LMHeadModel" in caplog.text
    assert "Taking the transformers model itself instead" in caplog.text
    said = len(caplog.records)
    open_backend(hf_model, tokenizer=tokenizer)
    assert len(caplog.records) == said, "told, and made, once"


def test_without_a_check_it_is_used_and_what_is_saved_says_so(unscaled_gpt2: Path) -> None:
    model = load_model(unscaled_gpt2, kind="bridge", check=False)
    _, notes = pool(model, persona())
    assert notes["check"] == "unchecked: check=False"


@BOTH_KINDS
def test_a_class_that_agrees_is_noted_as_compared(kind: str, tiny_hooked: Boot) -> None:
    _, notes = pool(tiny_hooked("llama", kind), persona())
    assert notes["check"] == "compared with transformers"


def test_nothing_is_loaded_twice(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, kind="bridge")
    reference = check.known_check(model).reference
    assert reference is not None
    theirs = {id(parameter) for parameter in reference.model.parameters()}
    assert theirs <= {id(parameter) for parameter in model.original_model.parameters()}


@pytest.mark.hooked
def test_auto_goes_on_to_the_bridge_where_a_hooked_transformer_differs(tmp_path: Path, caplog: Any) -> None:
    folder = build_tiny("llama", tmp_path / "checkpoint")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, attention_bias=True, bos_token_id=None, eos_token_id=1)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    with pytest.raises(ModelMismatchError, match="HookedTransformer of LlamaForCausalLM"):
        load_model(folder, kind="hooked")
    loaded = load_model(folder)
    assert type(loaded).__name__ == "TransformerBridge"
    assert "Taking a TransformerBridge instead" in caplog.text


@pytest.mark.hooked
@pytest.mark.parametrize("process_weights", [False, True])
def test_weights_that_were_centred_on_purpose_are_compared_all_the_same(tiny_gpt2: Path, process_weights: bool) -> None:
    model = load_model(tiny_gpt2, kind="hooked", process_weights=process_weights)
    assert check.check_note(model) == "compared with transformers"
    assert ("center_writing_weights" in open_backend(model).facts.weights) == process_weights


# --- longer texts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "n_ctx", "longest", "expected"),
    [
        ((), 2048, 4000, [64]),
        ((16, 2048), 2048, 0, [64]),  # the context cannot be crossed
        ((512,), 4096, 0, [520]),
        ((513,), 4096, 513, [64]),
        ((513,), 4096, 514, [64, 521]),
        ((64,), 100, 0, [72]),
        ((30,), 50, 0, [50]),
        ((300, 400, 4096), 8192, 500, [308, 408]),
        ((4096,), 0, 5000, [64, 4104]),  # no limit of its own
    ],
)
def test_the_texts_compared_go_just_past_what_the_configuration_names(
    lengths: tuple[int, ...], n_ctx: int, longest: int, expected: list[int]
) -> None:
    assert check.lengths_to_compare(lengths, n_ctx, longest) == expected


def spy_on_differences(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    compared: list[int] = []

    def spy(model: Any, reference: Any, n_tokens: int) -> Any:
        compared.append(n_tokens)
        return difference(model, reference, n_tokens)

    difference = check.difference
    monkeypatch.setattr(check, "difference", spy)
    return compared


def test_a_plan_that_crosses_a_longer_length_compares_there_once(
    windowed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = spy_on_differences(monkeypatch)
    model = load_model(windowed, kind="bridge")
    short, long = samples_of((text(40, 1),), prefix=4), samples_of((text(700, 2),), prefix=4)
    pool(model, short)
    assert compared == [64]
    means, _ = pool(model, long)
    pool(model, long)
    assert compared == [64, 608]
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(windowed).eval()
    assert relative_error(means[0], oracle_means(hf_model, long[0])) < 1e-5


@pytest.mark.hooked
def test_a_hooked_transformer_opens_its_checkpoint_again_once(
    windowed: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    loads = []
    load = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: loads.append(a) or load(*a, **k)
    )
    assert type(load_model(windowed)).__name__ == "TransformerBridge"  # from the start: it names 600 tokens
    model = load_model(windowed, kind="hooked")
    loads.clear()
    pool(model, samples_of((text(40, 1),), prefix=4))
    assert not loads
    with pytest.raises(ModelMismatchError, match="on 608 tokens"):
        pool(model, samples_of((text(700, 2),), prefix=4))
    assert len(loads) == 1 and "GB of memory more" in caplog.text


# --- kept verdicts -------------------------------------------------------------------------------------------------

COUNT = """
import sys
from tl_persona import load_model
from tl_persona.backends.local import check, reference
ran = []
run = reference.Reference.run
reference.Reference.run = lambda self, ids: (ran.append(ids.shape), run(self, ids))
model = load_model(sys.argv[1], kind=sys.argv[2])
print(len(ran), check.check_note(model))
"""


def count_passes(folder: Path, kind: str, cache: str) -> str:
    environment = {**os.environ, "TL_PERSONA_CACHE": cache}
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COUNT), folder, kind],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return ended.stdout.strip().splitlines()[-1]


@BOTH_KINDS
def test_another_process_runs_no_pass_for_a_verdict_that_is_kept(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert count_passes(tiny_llama, kind, str(cache)) == "2 compared with transformers"
    assert count_passes(tiny_llama, kind, str(cache)) == "0 compared with transformers"
    (kept,) = cache.rglob("*.json")
    kept.write_text("{")
    assert count_passes(tiny_llama, kind, str(cache)) == "2 compared with transformers"


def test_verdicts_can_be_kept_off_the_disk_and_need_not_be_writable(tiny_llama: Path, tmp_path: Path) -> None:
    assert count_passes(tiny_llama, "bridge", "off") == "2 compared with transformers"
    (tmp_path / "file").write_text("")
    assert count_passes(tiny_llama, "bridge", str(tmp_path / "file")) == "2 compared with transformers"


# --- models that were booted elsewhere -----------------------------------------------------------------------------


def booted(folder: Path) -> Any:
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return boot.bridge(hf_model, transformers.AutoTokenizer.from_pretrained(folder))


def test_a_model_booted_elsewhere_is_unchecked_until_it_is_compared(tiny_llama: Path) -> None:
    model = booted(tiny_llama)
    _, notes = pool(model, persona())
    assert notes["check"].startswith("unchecked: it was not made here")
    found = check_model(model, transformers.AutoModelForCausalLM.from_pretrained(tiny_llama))
    assert 0 < found.difference < found.allowed == 1e-5 and found.hook in ALL_LAYERS and found.n_tokens == (64,)
    assert pool(model, persona())[1]["check"] == "compared with transformers up to 64 tokens, unchecked past that"


def test_comparing_finds_another_model(tiny_llama: Path) -> None:
    other = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[3] *= 2
    with pytest.raises(ModelMismatchError, match=r"blocks\.[12]\.hook_resid_post differs by"):
        check_model(booted(tiny_llama), other, n_tokens=20)


def test_what_cannot_be_compared_is_refused(tiny_llama: Path, tiny_gpt2: Path) -> None:
    with pytest.raises(InputError, match="has no TransformerLens hooks"):
        check_model(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="is no transformers model"):
        check_model(booted(tiny_llama), torch.nn.Linear(2, 2))
    encoder = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ModelError, match="they cannot be compared: T5ForConditionalGeneration does not run on token"):
        check_model(booted(tiny_llama), encoder)


# --- models that change --------------------------------------------------------------------------------------------


@pytest.fixture
def llama(tiny_hf: Callable[[str], Any]) -> Any:
    return copy.deepcopy(tiny_hf("llama"))


def first_use(hf_model: Any, folder: Path) -> None:
    open_backend(hf_model, tokenizer=transformers.AutoTokenizer.from_pretrained(folder))


def test_a_transformers_model_that_was_trained_runs_as_it_is_and_is_known_by_its_values(
    llama: Any, tiny_llama: Path
) -> None:
    first_use(llama, tiny_llama)
    before = open_backend(llama).facts.weights_digest
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight.data[3] += 1.0
    samples = persona()
    means, _ = pool(llama, samples)
    assert relative_error(means[0], oracle_means(llama, samples[0])) < 1e-5
    now = open_backend(llama).facts
    assert now.revision is None and now.weights_digest not in (None, before)


def test_a_loaded_bridge_that_changes_is_known_as_the_same_plain_model_would_be(
    llama: Any, tiny_llama: Path, caplog: Any
) -> None:
    model = load_model(tiny_llama, kind="bridge")
    assert open_backend(model).facts.revision is not None
    for each in (model.original_model, llama):
        each.get_parameter("lm_head.weight").data[5] += 1.0
    first_use(llama, tiny_llama)
    changed, plain = open_backend(model).facts, open_backend(llama).facts
    assert "has changed since it was last used, in its values" in caplog.text
    assert changed.revision is None and changed.weights_digest == plain.weights_digest
    assert open_backend(model).facts.weights_digest == plain.weights_digest


def test_a_setting_that_is_put_back_gives_a_loaded_model_its_checkpoint_back(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, kind="bridge")
    loaded = open_backend(model).facts
    norm = model.original_model.model.layers[0].input_layernorm._original_component
    epsilon = norm.variance_epsilon
    norm.variance_epsilon = 0.5
    changed = open_backend(model).facts
    assert changed.revision is None and changed.weights_digest.startswith("TransformerBridge values:")
    norm.variance_epsilon = epsilon
    assert open_backend(model).facts == loaded


def test_proofs_and_trials_do_not_outlive_a_change(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tl_persona.backends.local import proof

    model = load_model(tiny_llama, kind="bridge")
    pool(model, persona())
    ran = []
    compared = proof.compared
    monkeypatch.setattr(proof, "compared", lambda *a, **k: ran.append(1) or compared(*a, **k))
    pool(model, persona())
    assert not ran
    model.original_model.get_parameter("lm_head.weight").data[5] += 1.0
    pool(model, persona())
    assert ran


def test_a_hooked_transformer_and_its_bridge_have_one_digest(tiny_llama: Path) -> None:
    from kinds import HAS_HOOKED_TRANSFORMER

    kinds = ["bridge", "hooked"] if HAS_HOOKED_TRANSFORMER else ["bridge"]
    digests = {source_of(load_model(tiny_llama, kind=kind)).weights_digest for kind in kinds}
    assert len(digests) == 1 and next(iter(digests)).startswith("values:")


# --- other hooks ---------------------------------------------------------------------------------------------------


def hook_of_block(name: str) -> list[str]:
    return [f"blocks.1.{name}"]


@pytest.mark.parametrize("name", ["hook_resid_pre", "hook_resid_mid", "hook_attn_out", "hook_mlp_out"])
def test_a_hook_inside_a_block_is_compared_when_it_is_first_asked_for(
    name: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []
    compare, add_up = check.site_differences, sums.captured
    monkeypatch.setattr(check, "site_differences", lambda *a: compared.append(a[3]) or compare(*a))
    monkeypatch.setattr(sums, "captured", lambda *a: compared.append(a[2]) or add_up(*a))
    model = load_model(tiny_llama, kind="bridge")
    pool(model, persona())
    assert not compared
    pool(model, persona(), hook_of_block(name))
    pool(model, persona(), hook_of_block(name))
    (names,) = compared
    assert f"blocks.1.{name}" in names


@pytest.fixture
def granite(tmp_path: Path) -> Path:
    """What attention and MLP add is multiplied, and a bridge's hooks lie behind the multiplication."""
    folder = build_tiny("llama", tmp_path / "checkpoint")
    config = transformers.GraniteConfig(**SIZES, residual_multiplier=0.5, bos_token_id=None, eos_token_id=1)
    torch.manual_seed(0)
    transformers.GraniteForCausalLM(config).save_pretrained(folder)
    return folder


def test_what_a_bridge_multiplies_before_its_hook_is_what_is_added(granite: Path) -> None:
    names = ["blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"]
    bridged, _ = pool(load_model(granite, kind="bridge"), persona(), names)
    itself, _ = pool(load_model(granite, kind="transformers"), persona(), names)
    for one, other in zip(bridged, itself, strict=True):
        assert relative_error(one, other) < 1e-5
        assert relative_error(one[:, :3].sum(dim=1), one[:, 3]) < 1e-5


def test_a_hook_that_stands_for_no_value_in_transformers_is_refused_and_the_others_are_not(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inside = load_model(tiny_llama, kind="bridge"), reference.Reference.values_inside

    def other_values(*asked: Any) -> Any:
        return {layer: [0.99 * value for value in values] for layer, values in inside(*asked).items()}

    monkeypatch.setattr(reference.Reference, "values_inside", other_values)
    pool(model, persona())
    with pytest.raises(ModelMismatchError, match=r"blocks\.1\.hook_resid_mid differs by 0\.01"):
        pool(model, persona(), hook_of_block("hook_resid_mid"))
    pool(model, persona(), hook_of_block("hook_mlp_out"))
