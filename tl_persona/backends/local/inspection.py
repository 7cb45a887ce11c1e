"""What a booted model is: its sizes and names, its device and dtype, how its weights were processed."""

from pathlib import Path
from typing import Any

import torch

from tl_persona.models.configs import chosen_keys_named, critical_lengths_named
from tl_persona.models.facts import HookedModel, ModelFacts, source_of


def facts_of(model: HookedModel) -> ModelFacts:
    """The facts of a booted model, read off the model itself."""
    cfg = model.cfg
    source = source_of(model)
    n_ctx = getattr(cfg, "n_ctx", None)
    return ModelFacts(
        name=source.name if source else name_of(model),
        revision=source.revision if source else None,
        kind=type(model).__name__,
        dtype=dtype_of(model),
        weights=weights_processing(model),
        n_layers=int(cfg.n_layers),
        d_model=int(cfg.d_model),
        n_ctx=int(n_ctx) if n_ctx else None,
        hook_names=tuple(model.hook_dict),
        weights_digest=source.weights_digest if source else None,
        architecture=source.architecture if source and source.architecture else _architecture(model),
    )


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
    """Where the model's first parameter lies."""
    return _parameter(model).device


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


def chosen_keys(model: Any) -> int | None:
    """How many keys a token attends to, where this model chooses them by what they are; None where it does not."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    return None if config is None else min(chosen_keys_named(config.to_dict()), default=None)


def critical_lengths(model: Any) -> tuple[int, ...]:
    """Lengths at which this model may start to treat a text differently; see `models.configs`."""
    cfg = model.cfg
    found = {getattr(cfg, "n_ctx", None)}
    config = getattr(getattr(model, "original_model", None), "config", None)
    if config is None:
        # TransformerLens fills in a window size where no layer uses one, too.
        found.add(cfg.window_size if getattr(cfg, "use_local_attn", False) else None)
    else:
        found |= critical_lengths_named(config.to_dict())
    return tuple(sorted(int(length) for length in found if isinstance(length, int) and length > 0))
