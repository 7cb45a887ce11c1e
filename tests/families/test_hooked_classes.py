"""Whatever class a model becomes, its residuals are those of the transformers model, or it is refused with a reason."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from decoder_record import CONTEXT
from decoders import DECODERS, FURTHER
from hooked_residuals import RIGHT, allowed, outcome, residuals
from kinds import HOOKED
from oracle import block_outputs, relative_error
from tiny import FAMILIES, build_tokenizer

from tl_persona import extract_caa_vectors, load_model
from tl_persona.backends import open_backend
from tl_persona.errors import InputError, ModelError

pytestmark = pytest.mark.tl

EVERY_DECODER = pytest.mark.parametrize("name", DECODERS)


@EVERY_DECODER
def test_a_model_in_memory_is_right_or_refused(name: str, decoder: Callable[[str], Any]) -> None:
    saved = decoder(name)
    found = outcome(lambda: residuals(saved.load(), saved.texts, saved.tokenizer), saved.expected)
    assert found in allowed(saved.record, "auto")


@pytest.mark.parametrize("kind", ["auto", "bridge", HOOKED])
@EVERY_DECODER
def test_a_loaded_model_is_right_or_refused(name: str, kind: str, decoder: Callable[[str], Any]) -> None:
    saved = decoder(name)
    found = outcome(lambda: residuals(load_model(saved.folder, kind=kind), saved.texts), saved.expected)
    assert found in allowed(saved.record, kind)


@pytest.mark.parametrize("name", ["mistral small 3", "qwen2.5 vl", "qwen3 vl", "llava", "smolvlm"])
def test_a_checkpoint_that_also_takes_pictures_is_its_text_model(name: str, decoder: Callable[[str], Any]) -> None:
    saved = decoder(name)
    assert FURTHER[name].settings["vision_config"]
    assert outcome(lambda: residuals(load_model(saved.folder), saved.texts), saved.expected) == RIGHT


@pytest.mark.parametrize("name", ["llama", "gemma2", "mamba", "falcon alibi"])
def test_ids_need_no_tokenizer_and_no_named_architecture(
    name: str, decoder: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = decoder(name)
    hf_model = saved.load()
    hf_model.config.architectures = None  # as a GGUF file has it, and a model made from a configuration

    def refuse(*_: Any, **_options: Any) -> None:
        raise AssertionError("a tokenizer was looked for")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    assert outcome(lambda: residuals(hf_model, saved.texts), saved.expected) == RIGHT
    assert hf_model.config.architectures is None
    with pytest.raises(InputError, match="no tokenizer: pass one"):
        extract_caa_vectors(hf_model, None, [{"positive": "Tea, please.", "negative": "Rain."}])


@pytest.mark.parametrize("name", ["bloom", "falcon alibi", "mamba", "rwkv"])
def test_what_has_no_longest_text_is_given_none(name: str, decoder: Callable[[str], Any]) -> None:
    saved = decoder(name)
    model = load_model(saved.folder)
    assert open_backend(model).facts.n_ctx is None
    ids = torch.arange(2300) % 200 + 10
    expected = block_outputs(saved.load(), ids, saved.record.layers)
    assert relative_error(residuals(model, [ids])[0], expected) < 1e-5


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gpt2"])
def test_the_longest_text_is_the_checkpoints_and_not_transformer_lenss(
    name: str, decoder: Callable[[str], Any]
) -> None:
    for kind in ("auto", "bridge"):
        assert open_backend(load_model(decoder(name).folder, kind=kind)).facts.n_ctx == CONTEXT


def test_a_longer_text_than_a_hooked_transformer_takes_is_a_bridges(tmp_path: Path) -> None:
    record = replace(DECODERS["qwen3"], settings=DECODERS["qwen3"].settings | {"max_position_embeddings": 4096})
    record.make().save_pretrained(tmp_path / "long")
    build_tokenizer(FAMILIES["llama"]).save_pretrained(tmp_path / "long")
    model = load_model(tmp_path / "long")
    assert type(model).__name__ == "TransformerBridge" and open_backend(model).facts.n_ctx == 4096


def test_ids_are_checked_by_the_embedding_and_not_by_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(FAMILIES["llama"])
    n_rows = len(tokenizer) + 100  # Qwen 2.5 has 151,936 rows, and its tokenizer 151,665 entries
    record = replace(DECODERS["qwen2"], settings=DECODERS["qwen2"].settings | {"vocab_size": n_rows})
    hf_model = record.make()
    hf_model.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    ids = torch.tensor([5, len(tokenizer) + 7, n_rows - 1])
    expected = block_outputs(hf_model, ids, record.layers)
    for kind in ("auto", "bridge", "transformers"):
        model = load_model(tmp_path / "wide", kind=kind)
        assert relative_error(residuals(model, [ids])[0], expected) < 1e-5
        with pytest.raises(InputError, match=f"{n_rows}"):
            residuals(model, [torch.tensor([5, n_rows])])


def test_a_text_that_the_model_itself_does_not_take_is_an_error_of_ours(tmp_path: Path) -> None:
    record = replace(FURTHER["roberta"], settings=FURTHER["roberta"].settings | {"max_position_embeddings": CONTEXT})
    record.make().save_pretrained(tmp_path / "short")  # positions are counted from the one past padding
    build_tokenizer(FAMILIES["llama"]).save_pretrained(tmp_path / "short")
    with pytest.raises(ModelError, match=r"RobertaForCausalLM cannot run a pass of 1 x 128 tokens \(.*out of bounds"):
        residuals(load_model(tmp_path / "short"), [torch.arange(CONTEXT) + 10])
