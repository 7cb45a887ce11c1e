"""A model's sizes come from its own files or a checked table, never from a name that looks alike."""

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_persona.errors import ModelError
from tl_persona.models.configs import MODEL_CONFIGS, ModelConfig, RecommendedLayers, get_model_config

KNOWN_NAMES = st.sampled_from(sorted(MODEL_CONFIGS))


def _sizes(config: ModelConfig) -> tuple[int, int]:
    return config.n_layers, config.d_model


# What follows was copied by hand from the models' cards or config.json files, not from the table.
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("Qwen/Qwen3-8B", (36, 4096)),
        ("Qwen/Qwen3-14B", (40, 5120)),  # a published table says 48, which is Qwen2.5's
        ("Qwen/Qwen2.5-14B-Instruct", (48, 5120)),
        ("meta-llama/Llama-3.1-70B-Instruct", (80, 8192)),
        ("mistralai/Mistral-7B-Instruct-v0.2", (32, 4096)),
        ("google/gemma-2-9b-it", (42, 3584)),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", (30, 576)),
        ("allenai/OLMo-2-0325-32B-Instruct", (64, 5120)),
        ("EleutherAI/pythia-1.4b-deduped", (24, 2048)),
    ],
)
def test_known_models_have_the_sizes_on_their_cards(name: str, sizes: tuple[int, int]) -> None:
    config = get_model_config(name)
    assert (config.name, config.source) == (name, "table")
    assert _sizes(config) == sizes == (config.num_layers, config.hidden_size)


def test_the_table_agrees_with_the_models_that_transformers_takes_its_defaults_from() -> None:
    import transformers

    defaults = {
        "meta-llama/Llama-2-7b-hf": transformers.LlamaConfig(),
        "openai-community/gpt2": transformers.GPT2Config(),
        "mistralai/Mistral-7B-v0.1": transformers.MistralConfig(),
        "mistralai/Mixtral-8x7B-v0.1": transformers.MixtralConfig(),
        "microsoft/Phi-3-mini-4k-instruct": transformers.Phi3Config(),
        "google/gemma-7b": transformers.GemmaConfig(),
        "google/gemma-2-2b": transformers.Gemma2Config(),
        "allenai/OLMo-2-1124-7B": transformers.Olmo2Config(),
        "openai/gpt-oss-120b": transformers.GptOssConfig(),
    }
    for name, default in defaults.items():
        config = MODEL_CONFIGS[name]
        assert _sizes(config) == (default.num_hidden_layers, default.hidden_size), name
        assert config.family == default.model_type, name


@pytest.mark.hooked
def test_the_table_agrees_with_the_sizes_written_down_in_transformer_lens() -> None:
    from transformer_lens.loading_from_pretrained import OFFICIAL_MODEL_NAMES, convert_hf_model_config

    # Of these organisations it reads nothing from the hub.
    shared = [name for name in OFFICIAL_MODEL_NAMES if name in MODEL_CONFIGS and name.startswith(("meta-", "google/"))]
    assert len(shared) > 30
    for name in shared:
        theirs = convert_hf_model_config(name)
        assert _sizes(MODEL_CONFIGS[name]) == (theirs["n_layers"], theirs["d_model"]), name


@given(KNOWN_NAMES, st.booleans(), st.sampled_from([str.lower, str.upper, str.title, str]))
def test_case_and_organisation_do_not_matter(name: str, short: bool, spell: Callable[[str], str]) -> None:
    written = spell(name.partition("/")[2] if short else name)
    assert get_model_config(written) is MODEL_CONFIGS[name]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("llama-3-8b-instruct", "meta-llama/Meta-Llama-3-8B-Instruct"),
        ("Llama-2-7b-chat", "meta-llama/Llama-2-7b-chat-hf"),
        ("gpt2-small", "openai-community/gpt2"),
        ("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ],
)
def test_other_names_in_use_mean_the_same_model(written: str, meant: str) -> None:
    assert get_model_config(written).name == meant


@settings(deadline=None)  # the first example imports transformers
@given(KNOWN_NAMES, st.integers(0, 200), st.sampled_from("-x0"))
def test_a_name_changed_anywhere_is_no_longer_a_known_name(name: str, place: int, extra: str) -> None:
    changed = name[: place % (len(name) + 1)] + extra + name[place % (len(name) + 1) :]
    try:
        found = get_model_config(changed)
    except ModelError:
        return
    # Adding a letter can only give another model's own name.
    assert changed.lower() == found.name.lower()


@pytest.mark.parametrize(
    "name", ["llama-2-7b-finetuned-foo", "Qwen3", "someone/Qwen3-8B", "8b", "qwen", "mistral-7b", "gpt2.gguf"]
)
def test_an_unknown_name_is_refused_and_the_model_itself_asked_for(name: str) -> None:
    with pytest.raises(ModelError, match=r"not in the table .*pass it instead of its name") as caught:
        get_model_config(name)
    assert repr(name) in str(caught.value)


def test_the_refusal_of_a_mistyped_name_shows_the_nearest_known_ones() -> None:
    with pytest.raises(ModelError, match=r"nearest: .*Qwen/Qwen3-8B"):
        get_model_config("Qwen/Qwen3-8")


def test_a_name_with_a_cached_configuration_is_read_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def cached(location: str, **_: object) -> object:
        assert location == "someone/new-model"
        return transformers.LlamaConfig(num_hidden_layers=7, hidden_size=64)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", cached)
    assert get_model_config("someone/new-model") == ModelConfig("someone/new-model", 7, 64, "llama", "config")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "bloom"])
def test_a_local_folder_is_read_from_its_own_config(family: str, tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model(family)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    expected = ModelConfig(folder.name, tiny.N_LAYERS, tiny.D_MODEL, written["model_type"], "config")
    assert get_model_config(folder) == get_model_config(str(folder)) == expected


def test_a_folder_is_read_even_where_its_name_is_in_the_table(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "google" / "gemma-2b-it"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    monkeypatch.chdir(tmp_path)
    config = get_model_config("google/gemma-2b-it")
    assert (_sizes(config), config.source) == ((tiny.N_LAYERS, tiny.D_MODEL), "config")
    assert "no measurement" in config.get_recommended_layers("refusal").reason


@pytest.mark.parametrize(
    "content",
    ["{", "{}", '{"model_type": "no-such-architecture"}', '{"model_type": "llama", "hidden_size": 48}'],
    ids=["truncated", "empty", "unknown", "contradictory"],
)
def test_a_folder_with_a_useless_config_is_refused_by_name(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=r"cannot read its config\.json") as caught:
        get_model_config(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_of_results_does_not_hide_a_known_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert get_model_config("gpt2").source == "table"


def test_a_transformers_model_is_read_off_itself(tiny_gpt2: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = get_model_config(AutoModelForCausalLM.from_pretrained(tiny_gpt2))
    assert config == ModelConfig(tiny_gpt2.name, tiny.N_LAYERS, tiny.D_MODEL, "gpt2", "model")


def test_the_sizes_of_a_model_that_also_sees_are_those_of_its_text_part() -> None:
    from transformers import Gemma3Config

    config = Gemma3Config(text_config={"num_hidden_layers": 5, "hidden_size": 24})
    assert config.vision_config.num_hidden_layers != 5
    read = get_model_config(SimpleNamespace(config=config))
    assert (_sizes(read), read.family) == ((5, 24), "gemma3")


@pytest.mark.tl
def test_a_bridge_is_read_off_its_own_configuration(tiny_llama: Path) -> None:
    from tl_persona.loading import load_model

    config = get_model_config(load_model(tiny_llama, "bridge"))
    assert (_sizes(config), config.source) == ((tiny.N_LAYERS, tiny.D_MODEL), "model")
    assert config.family == "LlamaForCausalLM"


@pytest.mark.hooked
def test_a_hooked_transformer_is_read_off_its_own_configuration(tiny_llama: Path) -> None:
    from tl_persona.loading import load_model

    config = get_model_config(load_model(tiny_llama, "hooked"))
    assert (_sizes(config), config.source) == ((tiny.N_LAYERS, tiny.D_MODEL), "model")
    assert config.family == "LlamaForCausalLM"


@pytest.mark.parametrize("model", [None, 3, object()])
def test_something_that_is_no_model_is_refused(model: object) -> None:
    with pytest.raises(ModelError, match=f"a {type(model).__name__} has neither `cfg` nor `config`"):
        get_model_config(model)


@pytest.mark.parametrize("sizes", [{}, {"n_layers": 0, "d_model": 8}, {"n_layers": 4, "d_model": [8, 16]}])
def test_a_model_that_tells_no_sizes_is_refused(sizes: dict[str, object]) -> None:
    with pytest.raises(ModelError, match=r"'odd' gives .* blocks of width"):
        get_model_config(SimpleNamespace(cfg=SimpleNamespace(model_name="odd", **sizes)))


@given(st.integers(1, 200))
def test_the_default_layers_are_the_blocks_of_the_middle_third(n_layers: int) -> None:
    layers = ModelConfig("m", n_layers, 8, "llama", "model").get_recommended_layers()
    assert layers
    assert list(layers) == list(range(layers[0], layers[-1] + 1))
    # As many blocks before as after, and a third in between, up to rounding.
    before, after = layers[0], n_layers - 1 - layers[-1]
    assert before >= 0 and abs(before - after) <= 1
    assert abs(len(layers) - n_layers / 3) < 1


def test_the_reference_call_gives_the_middle_third_and_says_that_nothing_was_measured() -> None:
    layers = get_model_config("Qwen/Qwen3-8B").get_recommended_layers("refusal")
    assert layers == [12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23]
    assert isinstance(layers, list)
    assert "middle third of 36 blocks" in layers.reason
    assert "no measurement for 'refusal' on Qwen/Qwen3-8B" in layers.reason


@given(KNOWN_NAMES, st.text())
def test_any_behaviour_gets_layers_the_model_has_and_a_reason(name: str, behavior: str) -> None:
    config = MODEL_CONFIGS[name]
    layers = config.get_recommended_layers(behavior)
    assert 0 <= min(layers) <= max(layers) < config.n_layers
    assert layers.reason


# The published runs count block inputs: 14, 12, 10 and 15. One less is the output of the block before.
@pytest.mark.parametrize(
    ("name", "best"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", 13),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 11),
        ("google/gemma-2b-it", 9),
        ("google/gemma-2-2b-it", 14),
    ],
)
def test_a_measured_behaviour_gives_a_narrow_range_and_cites_its_source(name: str, best: int) -> None:
    layers = get_model_config(name).get_recommended_layers("refusal")
    assert layers == [best - 2, best - 1, best, best + 1, best + 2]
    assert "arXiv:2406.11717" in layers.reason


def test_a_measurement_does_not_carry_over_to_the_base_model_or_another_behaviour() -> None:
    chat, base = get_model_config("Llama-2-7b-chat-hf"), get_model_config("Llama-2-7b-hf")
    middle = list(range(10, 21))
    assert base.get_recommended_layers("refusal") == middle
    assert chat.get_recommended_layers("formality") == chat.get_recommended_layers() == middle


def test_a_loaded_model_keeps_the_measurement_of_its_hub_id_only_in_its_own_shape() -> None:
    def loaded(n_layers: int) -> ModelConfig:
        cfg = SimpleNamespace(model_name="google/gemma-2b-it", n_layers=n_layers, d_model=2048)
        return get_model_config(SimpleNamespace(cfg=cfg))

    assert loaded(18).get_recommended_layers("refusal") == [7, 8, 9, 10, 11]
    assert loaded(12).get_recommended_layers("refusal") == [4, 5, 6, 7]  # cut down: the middle third of what is left


def test_recommended_layers_keep_their_reason_when_copied_or_pickled() -> None:
    layers = RecommendedLayers([2, 3], "because")
    for twin in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
        assert (twin, twin.reason) == ([2, 3], "because")


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        MODEL_CONFIGS["gpt2"] = MODEL_CONFIGS["openai-community/gpt2"]  # type: ignore[index]


def test_looking_up_a_known_name_loads_neither_torch_nor_transformers() -> None:
    program = (
        "import sys; from tl_persona.models.configs import get_model_config; "
        "get_model_config('gpt2').get_recommended_layers(); print({'torch', 'transformers'} & set(sys.modules))"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
