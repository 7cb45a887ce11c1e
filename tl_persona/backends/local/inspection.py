"""What a booted model is: its sizes and names, its device and dtype, how its weights were processed."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tl_persona.backends.local.observers import modules_of
from tl_persona.backends.local.quantized import quantization_of
from tl_persona.models.configs import chosen_keys_named, critical_lengths_named, longest_text_named
from tl_persona.models.facts import HookedModel, ModelFacts, source_of
from tl_persona.models.offload import input_device


def facts_of(model: HookedModel) -> ModelFacts:
    """The facts of a booted model, read off the model itself."""
    cfg = model.cfg
    source = source_of(model)
    modules = modules_of(model)  # once: walking a bridge takes ten milliseconds
    return ModelFacts(
        name=source.name if source else name_of(model),
        revision=source.revision if source else None,
        kind=type(model).__name__,
        dtype=dtype_of(model),
        weights=weights_processing(model),
        n_layers=int(cfg.n_layers),
        d_model=int(cfg.d_model),
        n_ctx=longest_text(model),
        hook_names=tuple(model.hook_dict),
        weights_digest=source.weights_digest if source else None,
        architecture=source.architecture if source and source.architecture else _architecture(model),
        quantized=quantization_of(modules),
        adapters=adapters_in(modules),
    )


def adapters_in(modules: Iterable[torch.nn.Module]) -> str:
    """Which of peft's adapters are on, off and merged into the weights; empty where there are none.

    Example:
        >>> adapters_in([torch.nn.Linear(2, 2)])
        ''
    """
    states: dict[str, set[str]] = {"on": set(), "off": set(), "merged": set()}
    for module in modules:
        merged, active = getattr(module, "merged_adapters", None), getattr(module, "active_adapters", None)
        if not isinstance(merged, list) or not isinstance(active, list | str):
            continue
        on = set() if getattr(module, "disable_adapters", False) else {active} if isinstance(active, str) else {*active}
        known = {name for layer in module.children() if isinstance(layer, torch.nn.ModuleDict) for name in layer}
        states["merged"] |= set(merged)
        states["on"] |= (on & known) - set(merged)
        states["off"] |= known - on - set(merged)
    return "; ".join(f"{state}: {', '.join(sorted(names))}" for state, names in states.items() if names)


def _architecture(model: Any) -> str | None:
    """The class in transformers: the one that a bridge wraps, or that a HookedTransformer was read as."""
    original = getattr(model, "original_model", None)
    if original is not None:
        return type(original).__name__
    read_as = getattr(model.cfg, "original_architecture", None)
    return str(read_as) if read_as else None


def name_of(model: Any) -> str:
    """What the model calls itself."""
    return Path(str(getattr(model.cfg, "model_name", None) or "unknown")).name


def _parameter(model: Any) -> torch.Tensor:
    parameter: torch.Tensor = next(model.parameters())
    return parameter


def dtype_of(model: Any) -> str:
    """The dtype of the model's first parameter, such as `float32`."""
    return str(_parameter(model).dtype).removeprefix("torch.")


def device_of(model: HookedModel) -> torch.device:
    """Where the model takes its tokens."""
    device = _parameter(model).device
    return input_device(model.original_model) if device.type == "meta" else device  # type: ignore[attr-defined]


def weights_processing(model: Any) -> str:
    """Which processing was applied to the weights, read off the model itself.

    Folding the layer norm leaves residuals as they are; centring the writing weights does not.
    """
    applied = []
    normalization = str(getattr(model.cfg, "normalization_type", "") or "")
    if normalization.endswith("Pre") or bool(getattr(model, "compatibility_mode", False)):
        applied.append("fold_ln")
    embedding = getattr(model, "W_E", None)
    if isinstance(embedding, torch.Tensor) and embedding.ndim == 2:
        rows = embedding[:64].detach().float()  # centring acts on every row alike, a few show it
        if float(rows.mean(dim=-1).abs().max()) < 1e-6 * float(rows.abs().max() + 1e-30):
            applied.append("center_writing_weights")
    return "+".join(applied) or "unprocessed"


def longest_text(model: Any) -> int | None:
    """The longest text in tokens; None for a model that has no such limit, as with ALiBi or a recurrence.

    A HookedTransformer has masks and positions of its own up to a length that may be less than its checkpoint's.
    Of a bridge that number is TransformerLens's guess, and the wrapped model's configuration says it.
    """
    config = getattr(getattr(model, "original_model", None), "config", None)
    if config is not None:
        return longest_text_named(config.to_dict())
    n_ctx = getattr(model.cfg, "n_ctx", None)
    return int(n_ctx) if n_ctx else None


def n_embedded(model: Any) -> int:
    """Token ids that the model has an embedding of; a tokenizer may know fewer."""
    original = getattr(model, "original_model", None)
    weight = getattr(model, "W_E", None) if original is None else original.get_input_embeddings().weight
    return int(model.cfg.d_vocab if weight is None else weight.shape[0])


def chosen_keys(model: Any) -> int | None:
    """How many keys a token attends to, where this model chooses them by what they are; None where it does not."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    return None if config is None else min(chosen_keys_named(config.to_dict()), default=None)


def critical_lengths(model: Any) -> tuple[int, ...]:
    """Lengths at which this model may start to treat a text differently; see `models.configs`."""
    cfg = model.cfg
    found: set[int | None] = {longest_text(model)}
    config = getattr(getattr(model, "original_model", None), "config", None)
    if config is None:
        # TransformerLens fills in a window size where no layer uses one, too.
        found.add(cfg.window_size if getattr(cfg, "use_local_attn", False) else None)
    else:
        found |= critical_lengths_named(config.to_dict())
    return tuple(sorted(int(length) for length in found if isinstance(length, int) and length > 0))
