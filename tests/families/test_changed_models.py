"""A model that changes between two runs runs as it is now, or is refused: never with the numbers of before.

The oracle is the caller's model itself, as it is at that moment. Changes are of all the ways that people and libraries
have: plain attributes, writes past autograd's version counters, new modules, adapters made as common ones are.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from decoders import load_decoder
from hooked_residuals import REFUSED, RIGHT, outcome, residuals
from oracle import relative_error, some
from torch import Tensor

from tl_persona import load_model

pytestmark = pytest.mark.tl


class Adapter(torch.nn.Module):
    """A low-rank one around a projection, with a plain flag; it passes for the projection, which it has inside."""

    def __init__(self, base: Any, n_in: int, n_out: int) -> None:
        super().__init__()
        self.base_layer, self.on = base, True
        self.down = torch.nn.Parameter(0.2 * some(0, n_in, 4))
        self.up = torch.nn.Parameter(0.2 * some(1, 4, n_out))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + (x @ self.down @ self.up if self.on else 0)


def _is_conv1d(module: Any) -> bool:
    """Whether it is GPT-2's kind of projection, whose weight lies the other way round."""
    return type(module).__name__ == "Conv1D"


def _adapt(model: Any, *names: str) -> None:
    for name in names:
        base = model.get_submodule(name)
        n_in, n_out = base.weight.shape if _is_conv1d(base) else base.weight.shape[::-1]
        model.set_submodule(name, Adapter(base, n_in, n_out))


def _adapters(model: Any) -> Iterator[Adapter]:
    return (module for module in model.modules() if isinstance(module, Adapter))


def _leave(model: Any) -> None:
    pass


@dataclass(frozen=True)
class Change:
    """What is done to a model between two runs.

    Attributes:
        apply: Does it.
        prepare: What is done before the first run.
        felt: False where the model computes the same after it as before, within rounding.
    """

    apply: Callable[[Any], None]
    prepare: Callable[[Any], None] = _leave
    felt: bool = True


# --- attributes and modules ----------------------------------------------------------------------------------------


def _double_the_scaling_of_attention(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 2


def _patch_a_forward(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    before = mlp.forward
    mlp.forward = lambda x: 0.5 * before(x)


def _raise_the_epsilon_of_norms(model: Any) -> None:
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon = 0.5


def _scale_rotary_positions(model: Any) -> None:
    model.model.rotary_emb.attention_scaling = 1.5


def _slow_rotary_positions(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def _replace_a_module(model: Any) -> None:
    old = model.model.layers[1].mlp.down_proj
    new = torch.nn.Linear(old.in_features, old.out_features, bias=False)
    with torch.no_grad():
        new.weight.copy_(old.weight.flip(0))
    model.model.layers[1].mlp.down_proj = new


# --- weights -------------------------------------------------------------------------------------------------------


def _train_a_step(model: Any) -> None:
    ids = torch.arange(20, 60)[None]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.enable_grad():
        model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _zero(name: str, *index: int | slice) -> Change:
    def apply(model: Any) -> None:
        model.get_parameter(name).data[index] = 0

    return Change(apply)


def _exchange(name: str) -> Change:
    def apply(model: Any) -> None:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.flip(0)

    return Change(apply)


# --- adapters ------------------------------------------------------------------------------------------------------


def _switch(model: Any) -> None:
    for adapter in _adapters(model):
        adapter.on = not adapter.on


def _merge(model: Any) -> None:
    for adapter in _adapters(model):
        product = adapter.down @ adapter.up
        adapter.weight.data += product if _is_conv1d(adapter.base_layer) else product.T
        adapter.on = False


def _write_to_adapters(model: Any) -> None:
    for adapter in _adapters(model):
        adapter.up.data *= -2


def _with_adapters(*names: str, off: bool = False) -> Callable[[Any], None]:
    def prepare(model: Any) -> None:
        _adapt(model, *names)
        if off:
            _switch(model)

    return prepare


_APART = ("model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj")
_OF_LLAMA = _with_adapters(*_APART)
_JOINT = {
    "gpt2": "transformer.h.1.attn.c_attn",
    "phi3": "model.layers.1.self_attn.qkv_proj",
    "neox": "gpt_neox.layers.1.attention.query_key_value",
    "falcon": "transformer.h.1.self_attention.query_key_value",
    "bloom": "transformer.h.1.self_attention.query_key_value",
}
"""A projection that gives queries, keys and values at once, of which a hooked class may keep a split copy."""

LLAMA = {
    "attention scaling": Change(_double_the_scaling_of_attention),
    "patched forward": Change(_patch_a_forward),
    "norm epsilon": Change(_raise_the_epsilon_of_norms),
    "rotary scaling": Change(_scale_rotary_positions),
    "rotary frequencies": Change(_slow_rotary_positions),
    "replaced module": Change(_replace_a_module),
    "trained a step": Change(_train_a_step),
    "row of a neuron": _zero("model.layers.1.mlp.up_proj.weight", 5),
    "column of a neuron": _zero("model.layers.1.mlp.down_proj.weight", slice(None), 5),
    "head": _zero("model.layers.1.self_attn.q_proj.weight", slice(0, 8)),
    "embedding row": _zero("model.embed_tokens.weight", 25),
    "other data": _exchange("model.layers.1.mlp.down_proj.weight"),
    "adapters switched off": Change(_switch, _OF_LLAMA),
    "adapters switched on": Change(_switch, _with_adapters(*_APART, off=True)),
    "adapters written to": Change(_write_to_adapters, _OF_LLAMA),
    "adapters merged": Change(_merge, _OF_LLAMA, felt=False),
}

CASES = {("llama", what): change for what, change in LLAMA.items()}
for _name, _projection in _JOINT.items():
    CASES |= {
        (_name, "trained a step"): Change(_train_a_step),
        (_name, "joint projection"): _exchange(f"{_projection}.weight"),
    }
for _name in ("gpt2", "phi3"):
    _projection = _JOINT[_name]
    CASES |= {
        (_name, "adapter switched off"): Change(_switch, _with_adapters(_projection)),
        (_name, "adapter switched on"): Change(_switch, _with_adapters(_projection, off=True)),
        (_name, "adapter merged"): Change(_merge, _with_adapters(_projection), felt=False),
    }
CASES |= {
    ("gpt2", "head"): _zero("transformer.h.1.attn.c_attn.weight", slice(None), slice(0, 8)),
    ("gpt2", "embedding row"): _zero("transformer.wte.weight", 25),
    ("phi3", "head"): _zero("model.layers.1.self_attn.qkv_proj.weight", slice(0, 8)),
}


def _error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(relative_error(got, wanted) for got, wanted in zip(found, expected, strict=True))


@pytest.mark.parametrize(("name", "what"), CASES)
def test_a_model_that_was_changed_runs_as_it_is_now(name: str, what: str, decoder: Callable[[str], Any]) -> None:
    saved, change = decoder(name), CASES[name, what]
    model, tokenizer = saved.load(), saved.tokenizer
    change.prepare(model)
    before = saved.oracle(model)
    first = outcome(lambda: residuals(model, saved.texts, tokenizer), before)
    with torch.no_grad():
        change.apply(model)
    expected = saved.oracle(model)
    assert (_error(before, expected) > 1e-2) == change.felt
    second = outcome(lambda: residuals(model, saved.texts, tokenizer), expected)
    assert first == RIGHT or any(_adapters(model))
    assert second in (RIGHT, REFUSED)


@pytest.mark.parametrize("name", _JOINT)
def test_an_adapter_on_a_joint_projection_is_not_left_out(name: str, decoder: Callable[[str], Any]) -> None:
    saved = decoder(name)
    model = saved.load()
    _adapt(model, _JOINT[name])
    expected = saved.oracle(model)
    assert _error(saved.expected, expected) > 1e-2
    assert outcome(lambda: residuals(model, saved.texts, saved.tokenizer), expected) in (RIGHT, REFUSED)


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("llama", "model.embed_tokens.weight"),
        ("llama", "model.layers.1.self_attn.q_proj.weight"),
        ("llama", "model.layers.1.mlp.down_proj.weight"),
        ("llama", "model.layers.1.input_layernorm.weight"),
        ("gpt2", "transformer.h.1.mlp.c_fc.weight"),
        ("gpt2", "transformer.h.1.attn.c_attn.weight"),
        ("phi3", "model.layers.1.self_attn.qkv_proj.weight"),
        ("neox", "gpt_neox.layers.1.attention.query_key_value.weight"),
    ],
)
def test_a_loaded_bridge_whose_weights_were_written_to_runs_as_it_is_now(
    name: str, parameter: str, decoder: Callable[[str], Any]
) -> None:
    saved = decoder(name)
    plain, bridge = load_decoder(saved.folder), load_model(saved.folder, kind="bridge")
    assert outcome(lambda: residuals(bridge, saved.texts), saved.expected) == RIGHT
    weight = plain.get_parameter(parameter)
    candidates = {id(each): each for root in (bridge, bridge.original_model) for each in root.parameters()}
    same = [each for each in candidates.values() if each.shape == weight.shape and torch.equal(each, weight)]
    assert same
    for each in (weight, *same):
        each.data[: len(each) // 2] = 0
    expected = saved.oracle(plain)
    assert _error(saved.expected, expected) > 1e-2
    assert outcome(lambda: residuals(bridge, saved.texts), expected) in (RIGHT, REFUSED)
