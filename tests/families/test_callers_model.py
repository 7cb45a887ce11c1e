"""A model that is handed in comes back as it was: its weights to the last bit, its attributes, hooks and modes."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from decoders import DECODERS
from hooked_residuals import allowed, outcome
from kinds import BOTH_KINDS
from torch import Tensor

from tl_persona import extract_activations, extract_caa_vectors, load_model
from tl_persona.steering import Intervention, attach, monitor

pytestmark = pytest.mark.tl

PAIRS = [
    {"positive": "I read by the sea in the evening.", "negative": "There is wind from the west."},
    {"positive": "Tea, please.", "negative": "Give me the rain and the wind, and be quick about it today!"},
    {"positive": "You are kind, and you speak plainly.", "negative": "Mara kept the light."},
]

_STRUCTURE = {"_parameters", "_buffers", "_modules"}
_CONFIGURED = ("transformers.", "transformer_lens.")


def snapshot(model: torch.nn.Module) -> dict[str, Any]:
    """Everything that a model is made of, by name: what can be compared by its value, and the identity of the rest."""
    found: dict[str, Any] = {"modules": [(name, Same(module)) for name, module in model.named_modules()]}
    for name, module in model.named_modules():
        for kind in ("_parameters", "_buffers"):
            for key, tensor in getattr(module, kind).items():
                found[f"{name}.{kind}.{key}"] = _value(tensor)
        for key, value in vars(module).items():
            if key not in _STRUCTURE:
                found |= _plain(f"{name}.{key}", value)
    return found


class Same:
    """Equal to what holds the same object, which it keeps alive so that no other can take its address."""

    def __init__(self, held: Any) -> None:
        self._held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self._held is other._held

    def __repr__(self) -> str:
        return f"{type(self._held).__name__} at {id(self._held):#x}"


def _value(held: Any) -> Any:
    if isinstance(held, Tensor):
        content = held.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return Same(held), held.requires_grad, tuple(held.shape), content
    return held if isinstance(held, bool | int | float | str | None) else Same(held)


def _plain(name: str, held: Any) -> dict[str, Any]:
    """The entries of one attribute; containers and configurations are opened."""
    found: dict[str, Any] = {}
    if isinstance(held, Mapping):
        entries: Any = held.items()
    elif isinstance(held, list | tuple):
        entries = enumerate(held)
    elif "config" in type(held).__name__.lower() and type(held).__module__.startswith(_CONFIGURED):
        entries = vars(held).items()
    else:
        return {name: _value(held)}
    found[name] = type(held)
    for key, value in list(entries):
        if not isinstance(value, torch.nn.Module):
            found |= _plain(f"{name}.{key}", value)
    return found


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Names of what has come, gone or changed."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name, Same) != after.get(name, Same))


def use(model: Any, saved: Any, tokenizer: Any) -> list[Tensor]:
    """Steering vectors from pairs, and the mean of whole texts."""
    extract_caa_vectors(model, tokenizer, PAIRS, show_progress=False)
    return [extract_activations(model, saved.texts, [torch.ones_like(ids, dtype=torch.bool) for ids in saved.texts])]


def expected_means(saved: Any) -> list[Tensor]:
    return [torch.stack([residuals.mean(dim=1) for residuals in saved.expected]).mean(dim=0)]


@pytest.mark.parametrize("name", DECODERS)
def test_a_transformers_model_is_as_it_was_after_extraction(name: str, decoder: Callable[[str], Any]) -> None:
    saved = decoder(name)
    model = saved.load()
    before = snapshot(model)
    found = outcome(lambda: use(model, saved, saved.tokenizer), expected_means(saved))
    assert differences(before, snapshot(model)) == []
    assert found in allowed(saved.record, "auto")


@pytest.mark.parametrize("name", ["llama", "gpt2", "rwkv"])
def test_modes_and_hooks_of_the_callers_stay(name: str, decoder: Callable[[str], Any]) -> None:
    saved = decoder(name)
    model = saved.load().train()
    model.get_submodule(saved.record.layers)[1].eval()
    model.get_submodule(saved.record.layers)[0].register_forward_hook(lambda *_: None)
    before = snapshot(model)
    found = outcome(lambda: use(model, saved, saved.tokenizer), expected_means(saved))
    assert differences(before, snapshot(model)) == []
    assert found in allowed(saved.record, "auto")


@BOTH_KINDS
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "neox", "mixtral"])
def test_a_loaded_model_keeps_its_weights_hooks_modes_and_configuration(
    name: str, kind: str, decoder: Callable[[str], Any]
) -> None:
    _assert_kept(decoder(name), kind)


@pytest.mark.parametrize("name", ["falcon", "gemma3", "llama4", "mamba", "rwkv", "recurrentgemma"])
def test_a_bridge_that_was_loaded_keeps_its_weights_hooks_modes_and_configuration(
    name: str, decoder: Callable[[str], Any]
) -> None:
    _assert_kept(decoder(name), "bridge")


def _assert_kept(saved: Any, kind: str) -> None:
    model = load_model(saved.folder, kind=kind)
    model(saved.texts[2][None])  # RWKV scales its weights when it first runs, whoever runs it
    before = snapshot(model)
    use(model, saved, None)
    direction = torch.ones(model.cfg.d_model)
    steered = attach(model, [Intervention("blocks.1.hook_resid_post", direction, 4.0)])
    with monitor(model, {"seen": ("blocks.1.hook_resid_post", direction)}) as seen, steered:
        model(saved.texts[2][None])
    assert seen.projections["seen"]
    # What a class keeps of the last text that it ran is its own affair.
    kept = re.compile(r"^modules$|\._parameters\.|_hooks(\.|$)|\.training$|\.(config|cfg)\.")
    assert [name for name in differences(before, snapshot(model)) if kept.search(name)] == []
