"""What a server's model makes of texts that share a pass is compared there, or else not used."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from decoders import DECODERS
from fakes import small_limits
from nnsight.modeling.transformers import TransformersModel
from oracle import block_outputs, relative_error
from tiny import FAMILIES, SIZES, build_tokenizer
from torch import Tensor

from tl_persona.backends import open_backend
from tl_persona.plan import Sample

pytestmark = pytest.mark.tl


def bidirectional() -> Any:
    """Gemma 3 as its embedding models have it: every token attends to those behind it, too."""
    sizes = {name: size for name, size in SIZES.items() if name != "initializer_range"}
    config = transformers.Gemma3TextConfig(**sizes, use_bidirectional_attention=True, query_pre_attn_scalar=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).float().eval()


MODELS = {
    "both directions": bidirectional,
    **{name: DECODERS[name].make for name in ("phi3 longrope", "mistral", "gemma2", "llama4", "lfm2", "llama")},
}
LESS = {
    "both directions": "batching",
    "phi3 longrope": "batching",
    "mistral": "packed",
    "gemma2": "packed",
    "llama4": "packed",
    "lfm2": "packed",
    "llama": None,
}
"""What each is not exact in, where texts lie on both sides of its lengths."""


def ids(length: int, seed: int) -> Tensor:
    return torch.randint(10, 300, (length,), generator=torch.Generator().manual_seed(seed))


def texts(*lengths: int, shared: int) -> list[Sample]:
    samples = []
    for index, length in enumerate(lengths):
        text = torch.cat([ids(shared, 99), ids(length, index)]) if length else ids(shared, 99)
        masks = torch.zeros((2, len(text)), dtype=torch.bool)
        masks[0, : max(1, shared)] = True
        masks[1, -1] = True
        samples.append(Sample(f"s{index}", text, masks if index % 2 else masks[:1]))
    return samples


def wrong(backend: Any, samples: Sequence[Sample], model: Any, where: str) -> float:
    """The largest error of a sample's means, extracted together, against each text alone."""
    hooks = [name for name in backend.facts.hook_names if name.endswith("hook_resid_post")]
    errors = []
    for each in backend.pool(backend.plan(samples), hooks):
        sample = samples[each.sample]
        outputs = block_outputs(model, sample.input_ids, where)
        errors += [
            relative_error(means, outputs[:, mask].mean(dim=1))
            for means, mask in zip(each.means, sample.masks, strict=True)
        ]
    return max(errors)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_not_exact_on_the_servers_model_is_not_used(name: str) -> None:
    model = MODELS[name]()
    where = "model.layers" if name not in DECODERS else DECODERS[name].layers
    remote = TransformersModel(model, tokenizer=build_tokenizer(FAMILIES["llama"]), task="text-generation")
    backend = open_backend(remote)
    plans = [texts(8, 30, 3, 20, 1, shared=12), texts(25, 4, 0, 50, 9, shared=24), texts(7, 45, 20, 33, shared=0)]
    with small_limits(min_shared=4, worth_caching=8, row_tokens=64, cached_rows=4):
        for samples in (*plans, *(each[::-1] for each in plans)):
            assert wrong(backend, samples, model, where) < 1e-5, backend.notes
    fallbacks = [note.split(":")[0] for note in backend.notes.get("fallbacks", ())]
    assert (LESS[name] in fallbacks) if LESS[name] else not fallbacks, backend.notes
