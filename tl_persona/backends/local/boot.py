"""Turns a transformers model into a TransformerLens model, and tells what a booted one is.

Works with TransformerLens 3.x (HookedTransformer and TransformerBridge) and 4.x (TransformerBridge only).
"""

import copy
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from tl_persona.backends.local.installs import install_advice, no_processes
from tl_persona.backends.local.observers import hooks_of
from tl_persona.backends.local.trial import mend
from tl_persona.errors import InputError, MissingDependencyError, ModelError
from tl_persona.models.facts import HookedModel, ModelFacts, source_of

_ADOPTED: "WeakKeyDictionary[Any, tuple[frozenset[Any], HookedModel]]" = WeakKeyDictionary()

_NAME_OF_A_LENGTH = re.compile("window|chunk|context|n_ctx|positions|position_embeddings|seq_len|floor_scale")


def _hooked_transformer_class() -> Any | None:
    """The class, or None on TransformerLens 4, where importing it raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from transformer_lens import HookedTransformer
    except ImportError:
        return None
    return HookedTransformer


def require_hooked_transformer() -> Any:
    """The HookedTransformer class.

    Raises:
        ModelError: The installed TransformerLens has none.
    """
    found = _hooked_transformer_class()
    if found is None:
        import importlib.metadata

        version = importlib.metadata.version("transformer-lens")
        raise ModelError(
            f"TransformerLens {version} has no HookedTransformer (removed in 4.0): use kind='bridge', "
            "or install transformer-lens<4"
        )
    return found


def hooked_transformer_supports(hf_model: Any) -> bool:
    """Whether this TransformerLens can make a HookedTransformer of the architecture."""
    if _hooked_transformer_class() is None:
        return False
    try:
        with _config_folder(hf_model) as folder, no_processes():
            _hooked_config(folder, None, torch.float32, False)
    except (NotImplementedError, KeyError, ValueError, AttributeError, TypeError) as error:
        logging.getLogger(__name__).info("no HookedTransformer for this architecture: %s", error)
        return False
    return True


def hooked_transformer(
    hf_model: Any, tokenizer: Any, *, device: Any = None, process_weights: bool = False
) -> HookedModel:
    """A HookedTransformer with the weights of a transformers model, unprocessed unless asked.

    Raises:
        ModelError: TransformerLens does not know the architecture, or is 4.x.
    """
    hooked_class = require_hooked_transformer()
    from transformer_lens.loading_from_pretrained import get_pretrained_state_dict

    dtype = hf_model.dtype
    with _config_folder(hf_model) as folder, _quiet_deprecations(), no_processes():
        try:
            cfg = _hooked_config(folder, device, dtype, process_weights)
            state_dict = get_pretrained_state_dict(folder, cfg, hf_model, dtype=dtype)
        except (NotImplementedError, KeyError, ValueError, AttributeError, TypeError) as error:
            raise ModelError(
                f"TransformerLens cannot make a HookedTransformer of {type(hf_model).__name__} ({error}): "
                "use kind='bridge'"
            ) from error
        cfg.model_name = Path(str(hf_model.config._name_or_path or type(hf_model).__name__)).name
        cfg.tokenizer_name = None
        model = hooked_class(cfg, tokenizer=tokenizer, move_to_device=False)
        model.load_and_process_state_dict(
            state_dict,
            fold_ln=process_weights,
            center_writing_weights=process_weights,
            center_unembed=process_weights,
            fold_value_biases=process_weights,
        )
        model.move_model_modules_to_device()
    # TransformerLens may have replaced the tokenizer by one that adds a BOS; the template writes its own.
    model.tokenizer = tokenizer
    booted: HookedModel = model.eval()
    return booted


def _hooked_config(folder: str, device: Any, dtype: torch.dtype, fold_ln: bool) -> Any:
    from transformer_lens.loading_from_pretrained import get_pretrained_model_config

    return get_pretrained_model_config(folder, fold_ln=fold_ln, device=device, dtype=dtype)


@contextmanager
def _config_folder(hf_model: Any) -> Iterator[str]:
    """A folder with just the config: TransformerLens 3 boots unlisted models from a path only.

    Its name is neutral, because TransformerLens reads the architecture off names such as 'llama' or 'gemma' first.
    """
    values = hf_model.config.to_dict()
    values.pop("quantization_config", None)
    values["architectures"] = [type(hf_model).__name__]  # a GGUF file's config names none
    with tempfile.TemporaryDirectory(prefix="cfg-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values, default=str))
        yield folder


@contextmanager
def _quiet_deprecations() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def bridge(hf_model: Any, tokenizer: Any, *, device: Any = None, process_weights: bool = False) -> HookedModel:
    """A TransformerBridge over a transformers model; the bridge takes the model over.

    Raises:
        ModelError: TransformerLens has no adapter for the architecture.
        MissingDependencyError: It needs a package for this architecture that is not installed.
    """
    from transformer_lens.model_bridge import TransformerBridge

    if not getattr(hf_model, "hf_device_map", None):
        hf_model = hf_model.to(device or _default_device())
    location = str(hf_model.config._name_or_path)
    try:
        with _quiet_deprecations(), no_processes():
            model = TransformerBridge.boot_transformers(
                location, hf_model=hf_model, tokenizer=tokenizer, dtype=hf_model.dtype
            )
            if process_weights:
                model.enable_compatibility_mode(disable_warnings=True)
    except (NotImplementedError, KeyError, ValueError, AttributeError) as error:
        raise ModelError(f"TransformerLens has no bridge for {type(hf_model).__name__}: {error}") from error
    except ImportError as error:
        raise MissingDependencyError(
            f"a bridge of {type(hf_model).__name__} needs a package that is missing or broken ({error}): "
            f"{install_advice(error)}"
        ) from error
    model.tokenizer = tokenizer
    booted: HookedModel = model.eval()
    mend(booted)
    return booted


def _default_device() -> str:
    """CUDA or the CPU; MPS only when asked for, as in TransformerLens, because its kernels have been wrong before."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def adopt(hf_model: Any, tokenizer: Any) -> HookedModel:
    """A bridge over a copy of the module tree that shares every parameter with the caller's model.

    Booting a bridge rewires the modules of the model it is given; the copy keeps the caller's model as it was. A model
    whose parts or hooks have changed since is adopted anew.
    """
    parts = _parts_of(hf_model)
    if hf_model not in _ADOPTED or _ADOPTED[hf_model][0] != parts:
        shared = {id(tensor): tensor for tensor in (*hf_model.parameters(), *hf_model.buffers())}
        twin = copy.deepcopy(hf_model, shared)
        # TransformerLens gives a tokenizer without a BOS one, in place: not the caller's.
        _ADOPTED[hf_model] = parts, bridge(twin, copy.deepcopy(tokenizer), device=hf_model.device)
    return _ADOPTED[hf_model][1]


def _parts_of(model: torch.nn.Module) -> frozenset[Any]:
    """What a model is put together from: its modules, tensors and hooks, by name and identity."""
    modules = [(name, id(module)) for name, module in model.named_modules()]
    tensors = [(name, id(tensor)) for name, tensor in (*model.named_parameters(), *model.named_buffers())]
    hooks = [(name, id(hook)) for name, module in model.named_modules() for hook in hooks_of(module)]
    return frozenset((*modules, *tensors, *hooks))


def as_hooked_model(model: Any, tokenizer: Any) -> HookedModel:
    """The model as something with hooks.

    Raises:
        InputError: It is neither a TransformerLens model nor a transformers one, or a transformers one without
            tokenizer.
    """
    if hasattr(model, "run_with_cache") and hasattr(model, "hook_dict"):
        hooked: HookedModel = model
        return hooked
    if isinstance(model, torch.nn.Module) and hasattr(model, "config") and hasattr(model, "forward"):
        return adopt(model, tokenizer)
    raise InputError(
        f"a model of type {type(model).__name__} cannot be used: pass what tl_persona.load_model returns, a "
        "HookedTransformer, a TransformerBridge or a transformers model"
    )


def facts_of(model: HookedModel) -> ModelFacts:
    """The facts of a booted model, read off the model itself."""
    cfg = model.cfg
    source = source_of(model)
    n_ctx = getattr(cfg, "n_ctx", None)
    return ModelFacts(
        name=source.name if source else Path(str(getattr(cfg, "model_name", None) or "unknown")).name,
        revision=source.revision if source else _commit_hash(model),
        kind=type(model).__name__,
        dtype=str(_parameter(model).dtype).removeprefix("torch."),
        weights=weights_processing(model),
        n_layers=int(cfg.n_layers),
        d_model=int(cfg.d_model),
        n_ctx=int(n_ctx) if n_ctx else None,
        hook_names=tuple(model.hook_dict),
        architecture=_architecture(model),
    )


def _architecture(model: Any) -> str | None:
    """The class in transformers: the one that a bridge wraps, or that a HookedTransformer was read as."""
    original = getattr(model, "original_model", None)
    if original is not None:
        return type(original).__name__
    read_as = getattr(model.cfg, "original_architecture", None)
    return str(read_as) if read_as else None


def _commit_hash(model: Any) -> str | None:
    config = getattr(getattr(model, "original_model", None), "config", None)
    return getattr(config, "_commit_hash", None)


def _parameter(model: Any) -> torch.Tensor:
    parameter: torch.Tensor = next(model.parameters())
    return parameter


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


def critical_lengths(model: Any) -> tuple[int, ...]:
    """Lengths at which this model may start to treat a text differently.

    Sliding windows and chunks of attention, the length past which rotary positions are scaled, and the context.
    """
    cfg = model.cfg
    found = {getattr(cfg, "n_ctx", None)}
    config = getattr(getattr(model, "original_model", None), "config", None)
    if config is None:
        # TransformerLens fills in a window size where no layer uses one, too.
        found.add(cfg.window_size if getattr(cfg, "use_local_attn", False) else None)
    else:
        found |= set(_lengths_in(config.to_dict()))
    return tuple(sorted(int(length) for length in found if isinstance(length, int) and length > 0))


def _lengths_in(settings: Any, named: bool = False) -> Iterator[int]:
    """Every number in a configuration whose name speaks of a length, at any depth; one too many costs a proof."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            yield from _lengths_in(value, _NAME_OF_A_LENGTH.search(str(name)) is not None)
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from _lengths_in(value, named)
    elif named and isinstance(settings, int) and not isinstance(settings, bool):
        yield settings
