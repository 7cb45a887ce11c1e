"""The tiny models are what the other tests take them for: families that TransformerLens runs as Hugging Face does."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, GPT2_CONTEXT, N_LAYERS, VOCAB_SIZE, WINDOW, build_tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

EVERY_FAMILY = pytest.mark.parametrize("family", sorted(FAMILIES))
CHAT = [
    {"role": "user", "content": "Where do you live? Tell me.\n\nIt is 3 o'clock."},
    {"role": "assistant", "content": "I live by the sea, in a café."},
]


def _load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def _some_ids(length: int) -> torch.Tensor:
    return torch.randint(10, VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(1))


def _block_outputs(model: PreTrainedModel, ids: torch.Tensor) -> Sequence[torch.Tensor]:
    body = model.base_model
    captured: list[torch.Tensor] = []
    blocks = body.layers if hasattr(body, "layers") else body.h
    handles = [
        block.register_forward_hook(lambda _m, _a, out: captured.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks
    ]
    try:
        with torch.no_grad():
            model(ids)
    finally:
        for handle in handles:
            handle.remove()
    return captured


@pytest.mark.tl
@EVERY_FAMILY
def test_a_bridge_has_the_block_outputs_of_the_hugging_face_model(
    family: str, tiny_model: Callable[[str], Path]
) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    folder = tiny_model(family)
    ids = _some_ids(3 * WINDOW)
    expected = _block_outputs(_load(folder), ids)
    bridge = TransformerBridge.boot_transformers(
        str(folder), hf_model=_load(folder), tokenizer=AutoTokenizer.from_pretrained(folder), dtype=torch.float32
    )
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids, names_filter=names)
    assert len(expected) == N_LAYERS
    for name, block_output in zip(names, expected, strict=True):
        torch.testing.assert_close(cache[name], block_output, rtol=1e-5, atol=1e-5)


@EVERY_FAMILY
def test_every_block_changes_the_stream_by_more_than_a_tenth(family: str, tiny_model: Callable[[str], Path]) -> None:
    outputs = _block_outputs(_load(tiny_model(family)), _some_ids(3 * WINDOW))
    for before, after in itertools.pairwise(outputs):
        assert (after - before).norm() > 0.1 * before.norm()


@EVERY_FAMILY
def test_the_last_token_feels_the_first_only_where_attention_reaches(
    family: str, tiny_model: Callable[[str], Path]
) -> None:
    model, length = _load(tiny_model(family)), (N_LAYERS + 1) * WINDOW
    ids = _some_ids(length)
    changed = ids.clone()
    changed[0, 0] = ids[0, 0] - 1
    last, last_changed = (_block_outputs(model, each)[-1][0, -1] for each in (ids, changed))
    windowed_everywhere = family == "mistral"
    assert torch.equal(last, last_changed) == windowed_everywhere


@EVERY_FAMILY
def test_a_rendered_chat_survives_the_tokenizer(family: str, tiny_model: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(family))
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert tokenizer.is_fast
    assert max(encoded["input_ids"]) < VOCAB_SIZE
    assert tokenizer.decode(encoded["input_ids"]) == text
    assert encoded["offset_mapping"][-1][1] == len(text)


def test_a_line_break_joins_the_full_stop_before_it(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    assert ".\n\n" in [tokenizer.decode([token]) for token in tokenizer("the sea.\n\nWhat")["input_ids"]]


@pytest.mark.parametrize("family", ["gemma", "gemma3", "mistral", "mixtral"])
def test_these_templates_refuse_a_system_role(family: str, tiny_model: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(family))
    with pytest.raises(Exception, match=r"System role not supported|Only user and assistant"):
        tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, *CHAT], tokenize=False)


def test_encoding_a_rendered_chat_as_plain_text_would_add_a_second_bos(tiny_gemma: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_gemma)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer(text)["input_ids"][:2] == [tokenizer.bos_token_id] * 2
    assert tokenizer(text, add_special_tokens=False)["input_ids"].count(tokenizer.bos_token_id) == 1


def test_gpt2_knows_no_position_past_its_context(tiny_gpt2: Path) -> None:
    assert AutoConfig.from_pretrained(tiny_gpt2).n_positions == GPT2_CONTEXT
    with pytest.raises(IndexError):
        _load(tiny_gpt2)(_some_ids(GPT2_CONTEXT + 1))


def test_a_family_has_the_same_weights_and_tokenizer_every_time(tiny_llama: Path, tmp_path: Path) -> None:
    again = build_tiny("llama", tmp_path / "again")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (again / name).read_bytes() == (tiny_llama / name).read_bytes()
