"""A model that changes is noticed: by its parts, its settings, how often it was written, and its values."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tl_persona.models.state import identity_digest, state_of, values_digest


def build(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=False))


def weight(model: Any, path: str) -> Tensor:
    return model.get_parameter(path)


Change = Callable[[Any], object]

THROUGH_DATA: dict[str, Change] = {
    "a neuron's row": lambda model: weight(model, "model.layers.1.mlp.up_proj.weight").data[13].zero_(),
    "a column": lambda model: weight(model, "model.layers.0.mlp.down_proj.weight").data[:, 40].zero_(),
    "a head": lambda model: weight(model, "model.layers.1.self_attn.q_proj.weight").data[8:16].zero_(),
    "an embedding": lambda model: weight(model, "model.embed_tokens.weight").data[31].zero_(),
    "one number of a norm": lambda model: weight(model, "model.norm.weight").data[7].add_(1e-3),
    "a merged adapter": lambda model: weight(model, "model.layers.0.self_attn.v_proj.weight").data.add_(
        torch.ones(16, 1) @ torch.ones(1, 32) * 1e-3
    ),
}


@pytest.mark.parametrize("change", THROUGH_DATA.values(), ids=THROUGH_DATA)
def test_what_is_written_past_the_version_counters_shows(change: Change) -> None:
    model = build()
    before = state_of(model)
    change(model)
    now = state_of(model)
    assert now.versions == before.versions  # so nothing but the values can tell
    assert before.changes(now) == ["values"]


@given(n=st.integers(1, 70), m=st.integers(1, 70), data=st.data())
def test_every_row_and_every_column_of_a_matrix_is_looked_at(n: int, m: int, data: st.DataObject) -> None:
    layer = nn.Linear(m, n, bias=False)
    before = values_digest(layer)
    row = data.draw(st.integers(0, n - 1))
    kept = layer.weight.detach().clone()
    layer.weight.data[row] += 1
    assert values_digest(layer) != before
    layer.weight.data.copy_(kept)
    assert values_digest(layer) == before
    layer.weight.data[:, data.draw(st.integers(0, m - 1))] += 1
    assert values_digest(layer) != before


@given(shape=st.lists(st.integers(1, 6), min_size=3, max_size=4), data=st.data())
def test_every_row_of_a_stack_of_matrices_is_looked_at(shape: list[int], data: st.DataObject) -> None:
    module = nn.Module()
    module.experts = nn.Parameter(torch.randn(shape))
    before = values_digest(module)
    place = [data.draw(st.integers(0, size - 1)) for size in shape[:-1]]
    module.experts.data[tuple(place)] += 1
    assert values_digest(module) != before


def test_a_matrix_that_is_not_contiguous_has_the_digest_of_its_values() -> None:
    layer, turned = nn.Linear(5, 9, bias=False), nn.Linear(5, 9, bias=False)
    turned.weight.data = layer.weight.detach().t().contiguous().t()
    assert not turned.weight.is_contiguous()
    assert values_digest(layer) == values_digest(turned)


SETTINGS: dict[str, Change] = {
    "a scale": lambda model: setattr(model.model.layers[1].self_attn, "scaling", 0.5),
    "an epsilon": lambda model: setattr(model.model.norm, "variance_epsilon", 0.1),
    "rotary positions": lambda model: setattr(model.model.rotary_emb, "attention_scaling", 1.5),
    "a forward": lambda model: setattr(model.model.layers[0].mlp, "forward", lambda x: x),
    "the configuration": lambda model: setattr(model.config, "attention_dropout", 0.5),
    "an adapter's switches": lambda model: setattr(model.model.layers[0], "active_adapters", ["a"]),
}


@pytest.mark.parametrize("change", SETTINGS.values(), ids=SETTINGS)
def test_a_setting_shows(change: Change) -> None:
    model = build()
    before = state_of(model)
    change(model)
    (line,) = before.changes(state_of(model))
    assert line.startswith("settings (")


def test_a_part_that_is_replaced_shows_and_so_does_a_hook() -> None:
    model = build()
    before = state_of(model)
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert before.changes(state_of(model)) == [] and state_of(model) != before
    handle.remove()
    assert state_of(model) == before
    model.model.layers[1].mlp = copy.deepcopy(model.model.layers[1].mlp)
    assert before.changes(state_of(model))[0].startswith("parts (model.layers.1.mlp")


def test_running_a_model_changes_nothing_that_is_looked_at() -> None:
    model = build().eval()
    before = state_of(model)
    with torch.no_grad():
        model(torch.arange(20)[None], use_cache=True)
    assert state_of(model) == before


def test_models_made_alike_are_known_as_the_same_and_others_are_not() -> None:
    assert identity_digest(build()) == identity_digest(build())
    assert identity_digest(build()) != identity_digest(build(seed=1))
    scaled = build()
    scaled.model.layers[1].self_attn.scaling = 0.5
    assert identity_digest(scaled) != identity_digest(build())
    assert values_digest(scaled) == values_digest(build())


def test_where_a_model_came_from_is_no_part_of_what_it_is() -> None:
    moved = build()
    moved.config._name_or_path = moved.name_or_path = "elsewhere"
    assert identity_digest(moved) == identity_digest(build())


class Packed(Tensor):
    """A quantized weight as libraries make them: float32 to all who ask, without storage of its own, in two parts."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> "Packed":
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    def __deepcopy__(self, memo: Any) -> "Packed":
        raise AssertionError("a weight was copied")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} on a packed weight")


def packed(scale: float = 1.0, code: int = 3) -> nn.Module:
    module = nn.Module()
    codes = torch.full((4, 6), code, dtype=torch.int8)
    module.weight = nn.Parameter(Packed(codes, torch.tensor([scale])), requires_grad=False)
    return module


def test_a_quantized_weight_is_read_by_its_class_and_its_parts() -> None:
    plain = nn.Module()
    plain.weight = nn.Parameter(torch.full((4, 6), 3.0))
    assert packed().weight.dtype is plain.weight.dtype and packed().weight.numel() == plain.weight.numel()
    digests = [values_digest(model) for model in (packed(), packed(scale=2.0), packed(code=4), plain)]
    assert len(set(digests)) == 4
    assert values_digest(packed()) == digests[0]
    assert state_of(packed()).changes(state_of(packed(scale=2.0)))[-1] == "values"
