"""Hook names as places in a Hugging Face model, family by family: each stands for what TransformerLens means by it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from nnsight.modeling.transformers import TransformersModel
from oracle import relative_error
from tiny import build_tiny

from tl_persona import load_model
from tl_persona.backends import open_backend
from tl_persona.backends.remote.sites import Sites
from tl_persona.errors import ModelError
from tl_persona.plan import Sample

_SIZES = dict(
    vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512,
)  # fmt: skip
_FALCON = {name: _SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
FURTHER: dict[str, Callable[[], Any]] = {
    "gemma-1": lambda: transformers.GemmaConfig(**_SIZES, head_dim=8),
    "qwen2": lambda: transformers.Qwen2Config(**_SIZES),
    "falcon": lambda: transformers.FalconConfig(**_FALCON),
    "falcon alibi": lambda: transformers.FalconConfig(**_FALCON, alibi=True, parallel_attn=False),
    "neox": lambda: transformers.GPTNeoXConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    ),
}
"""Families of the table that `tiny` does not build, without chat templates."""

INSIDE = {"hook_attn_out", "hook_mlp_out", "hook_resid_mid"}


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, 200, (length,), generator=generator) for length in (9, 20, 13)]
    return [Sample(str(i), ids, torch.rand((2, len(ids)), generator=generator) < 0.7) for i, ids in enumerate(texts)]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> Callable[[str], Path]:
    def folder(family: str) -> Path:
        if family not in FURTHER:
            return tiny_model(family)
        target = build_tiny("llama", tmp_path_factory.mktemp(family))  # for its tokenizer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            config = FURTHER[family]()
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(target)
        return target

    return folder


@pytest.mark.tl
@pytest.mark.parametrize(
    ("family", "inside"),
    [
        ("llama", INSIDE),
        ("mistral", INSIDE),
        ("mixtral", INSIDE),
        ("qwen2", INSIDE),
        ("qwen3", INSIDE),
        ("gemma-1", INSIDE),
        ("gemma", INSIDE),
        ("gemma3", INSIDE),
        ("gpt2", INSIDE),
        ("neox", INSIDE - {"hook_resid_mid"}),
        ("bloom", set()),
        ("falcon", set()),
        ("falcon alibi", set()),
    ],
)
def test_every_hook_of_a_family_is_that_of_transformer_lens(
    family: str, inside: set[str], folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of(family)
    weights = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    here = open_backend(TransformersModel(weights, tokenizer=copy.deepcopy(tokenizer), task="text-generation"))
    hooks = list(here.facts.hook_names)
    assert {name.rpartition(".")[2] for name in hooks} == inside | {"hook_resid_pre", "hook_resid_post"}
    # A bridge of Falcon with ALiBi is another function.
    lens = open_backend(load_model(folder, kind="transformers" if family == "falcon alibi" else "bridge"))
    texts = samples()
    expected = {each.sample: each.means for each in lens.pool(lens.plan(texts), hooks)}
    for index, means, _ in here.pool(here.plan(texts), hooks):
        for mine, theirs in zip(means, expected[index], strict=True):
            assert relative_error(mine, theirs) < 1e-5
        if inside:  # a mean of sums is the sum of means
            for block in range(3):
                names = [f"blocks.{block}.hook_{part}" for part in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
                before, attention, mlp, after = (means[:, hooks.index(name)] for name in names)
                assert relative_error(before + attention + mlp, after) < 1e-5


def test_a_model_whose_blocks_are_elsewhere_is_refused() -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.MambaConfig(vocab_size=100, hidden_size=16, num_hidden_layers=2)
        )
    with pytest.raises(ModelError, match=r"blocks of MambaForCausalLM .*run this model locally"):
        Sites(model)


def test_hooks_are_read_in_the_order_the_model_reaches_them() -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**_SIZES))
    sites = Sites(model)
    wanted = ["blocks.1.hook_resid_pre", "blocks.0.hook_mlp_out", "blocks.0.hook_attn_out", "blocks.0.hook_resid_post"]
    assert sites.in_order(wanted) == [2, 1, 3, 0]


@pytest.mark.tl
@pytest.mark.parametrize("known", ["past_key_values", "cache", None])
def test_the_name_that_a_server_has_for_a_cache_is_found_by_trying(
    known: str | None, tiny_model: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_model("llama")
    weights = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # What this release calls it, so that a made-up server can call it something else.
    own = "cache" if "cache" in weights(torch.tensor([[5, 6]]), use_cache=True) else "past_key_values"
    forward = weights.forward

    def renamed(*args: Any, **kwargs: Any) -> Any:
        caches = {name: kwargs.pop(name) for name in ("cache", "past_key_values") if kwargs.get(name) is not None}
        return forward(*args, **kwargs, **({own: caches[known]} if known in caches else {}))

    weights.forward = renamed
    here = open_backend(TransformersModel(weights, tokenizer=copy.deepcopy(tokenizer), task="text-generation"))
    beginning = torch.arange(20, 120)
    texts = [
        Sample(str(n), torch.cat([beginning, torch.arange(30 + n, 40 + n)]), torch.ones(1, 110).bool())
        for n in range(6)
    ]
    hooks = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]
    with caplog.at_level("WARNING", logger="tl_persona"):
        found = {each.sample: each.means for each in here.pool(here.plan(texts, batch_tokens=64), hooks)}
    lens = open_backend(load_model(folder, kind="bridge"))
    for index, means, _ in lens.pool(lens.plan(texts), hooks):
        assert relative_error(found[index], means) < 1e-5
    told = [record.getMessage() for record in caplog.records if "on the server" in record.getMessage()]
    if known is None:
        assert here.notes["sharing"] == "none" and len(told) == len(here.notes["fallbacks"]) == 2
    else:
        assert here.notes["sharing"] != "none" and not told and "fallbacks" not in here.notes
