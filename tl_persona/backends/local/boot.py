"""Turns a transformers model into a TransformerLens model.

Works with TransformerLens 3.x (HookedTransformer and TransformerBridge) and 4.x (TransformerBridge only).
"""

import copy
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch

from tl_persona.backends.local import inspection
from tl_persona.backends.local.check import Check, checked, remember_check
from tl_persona.backends.local.installs import install_advice, no_processes
from tl_persona.backends.local.observers import is_observed
from tl_persona.backends.local.plain import TransformersModel, plain_model, reference_on, uncompiled
from tl_persona.backends.local.reference import NoReferenceError, Reference, reference_to, twin_of
from tl_persona.backends.local.trial import mend
from tl_persona.backends.local.watch import look_again
from tl_persona.errors import InputError, MissingDependencyError, ModelError
from tl_persona.models.configs import longest_text_named
from tl_persona.models.facts import HookedModel, ModelSource, remember_source
from tl_persona.models.offload import is_offloaded
from tl_persona.models.state import ModelState, identity_digest, state_of


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
    """Whether this TransformerLens can make a HookedTransformer of the architecture, for texts as long as its own."""
    if _hooked_transformer_class() is None:
        return False
    try:
        with _config_folder(hf_model) as folder, no_processes():
            n_ctx = int(_hooked_config(folder, None, torch.float32, False).n_ctx)
    except (NotImplementedError, KeyError, ValueError, AttributeError, TypeError) as error:
        logging.getLogger(__name__).info("no HookedTransformer for this architecture: %s", error)
        return False
    # For some it stops at 2,048 tokens, since each of its layers holds a mask of n_ctx times n_ctx.
    return n_ctx >= (longest_text_named(hf_model.config.to_dict()) or sys.maxsize)


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
        cfg.n_ctx = min(int(cfg.n_ctx), longest_text_named(hf_model.config.to_dict()) or int(cfg.n_ctx))
        model = hooked_class(cfg, move_to_device=False)
        model.load_and_process_state_dict(
            state_dict,
            fold_ln=process_weights,
            center_writing_weights=process_weights,
            center_unembed=process_weights,
            fold_value_biases=process_weights,
        )
        model.move_model_modules_to_device()
    _give(model, tokenizer)
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
        hf_model = hf_model.to(device or default_device())
    location = str(hf_model.config._name_or_path)
    if not getattr(hf_model.config, "architectures", None):  # of a GGUF file, or made from a configuration
        hf_model.config.architectures = [type(hf_model).__name__]
    try:
        with _quiet_deprecations(), no_processes():
            model = TransformerBridge.boot_transformers(
                location, hf_model=hf_model, tokenizer=_lent(tokenizer), dtype=hf_model.dtype
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
    _give(model, tokenizer)
    booted: HookedModel = model.eval()
    mend(booted)
    return booted


def itself(hf_model: Any, tokenizer: Any, *, found_on: Reference | None = None) -> TransformersModel:
    """A transformers model with hooks on its own decoder layers; there is nothing to compare it with.

    Args:
        hf_model: The model.
        tokenizer: The checkpoint's.
        found_on: A reference made of this model, where there is one.

    Raises:
        ModelError: Its decoder layers cannot be told.
    """
    model = plain_model(hf_model, tokenizer, found_on=found_on)
    remember_check(cast(Any, model), Check(reason="it is the transformers model", itself=True))
    return model


def _lent(tokenizer: Any) -> Any:
    """A copy to boot with: TransformerLens gives a tokenizer a BOS and an end of text that it has not, in place.

    Without one it would load one by the model's name, which ids do not need: it gets one that knows nothing.
    """
    lent = _blank_tokenizer() if tokenizer is None else copy.deepcopy(tokenizer)
    if hasattr(lent, "init_kwargs"):
        # One that says that it adds a BOS is taken as it is; for others a second one is loaded by name.
        lent.init_kwargs = {"name_or_path": "", **lent.init_kwargs, "add_bos_token": True}
    return lent


def _blank_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1}, unk_token="<unk>"))
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<s>")
    return fast(tokenizer_object=backend, unk_token="<unk>", **ends)


def _give(model: Any, tokenizer: Any) -> None:
    """Sets the checkpoint's own tokenizer, and what TransformerLens notes of one as it is of this one."""
    model.tokenizer = None  # a bridge changes a tokenizer that takes the place of another
    model.tokenizer = tokenizer
    if tokenizer is None:
        return
    if tokenizer.pad_token is None:
        # `to_tokens` pads, also a single text. No text's tokens change.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
    own = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    added = len(whole) > len(own)
    heads = {tokenizer.bos_token_id, getattr(tokenizer, "cls_token_id", None)} - {None}
    model.cfg.tokenizer_prepends_bos = added and whole[0] in heads
    if hasattr(model.cfg, "tokenizer_appends_eos"):
        model.cfg.tokenizer_appends_eos = added and whole[-1] == tokenizer.eos_token_id


def default_device() -> str:
    """CUDA or the CPU; MPS only when asked for, as in TransformerLens, because its kernels have been wrong before."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class _Adopted(NamedTuple):
    """A bridge over a twin of a caller's model, and what the model was then."""

    state: ModelState
    model: HookedModel


_ADOPTED: "WeakKeyDictionary[Any, _Adopted]" = WeakKeyDictionary()


def adopt(hf_model: Any, tokenizer: Any) -> HookedModel:
    """A bridge over a twin of the module tree that shares every parameter with the caller's model.

    Booting a bridge rewires the modules of the model it is given; the twin keeps the caller's model as it was. A model
    that writes into its weights as it runs gives a twin with weights of its own. A model that has changed since is
    adopted anew.

    Raises:
        ModelMismatchError: The bridge is another function than the model.
        ModelError: It cannot be made.
    """
    state = state_of(hf_model)
    known = _ADOPTED.get(hf_model)
    if known is not None and known.state == state:
        return known.model
    reference, reason = reference_to(hf_model)
    try:
        twin = twin_of(hf_model, own_weights=reference is not None and reference.owns_weights)
    except NoReferenceError as error:
        raise ModelError(str(error)) from error
    digest = identity_digest(hf_model)
    same_function = known is not None and known.state.parts == state.parts and known.state.settings == state.settings
    try:
        # A copy, since `to_tokens` needs padding that the caller's may lack.
        model = bridge(twin, copy.deepcopy(tokenizer), device=hf_model.device)
        _say_what_it_is(model, digest, hf_model)
        checked(model, reference, reason, after=known.model if known is not None and same_function else None)
    except (ModelError, MissingDependencyError) as error:
        if reference is None:
            raise
        logging.getLogger("tl_persona").warning("%s. Taking the transformers model itself instead", error)
        model = cast(Any, itself(reference.model, tokenizer, found_on=reference))
        _say_what_it_is(model, digest, hf_model)
    _ADOPTED[hf_model] = _Adopted(state, model)
    return model


def _say_what_it_is(model: Any, digest: str | None, hf_model: Any) -> None:
    remember_source(model, ModelSource(inspection.name_of(model), None, digest, type(hf_model).__name__))


def with_hooks(model: Any, tokenizer: Any = None, *, found_on: Reference | None = None) -> Any:
    """A model that has hooks, as it is; a transformers model with hooks on its own layers, which then act on it."""
    if hasattr(model, "hook_dict") or not (isinstance(model, torch.nn.Module) and hasattr(model, "config")):
        return model
    found = itself(model, tokenizer, found_on=found_on)
    _say_what_it_is(found, identity_digest(model), model)
    return found


def as_hooked_model(model: Any, tokenizer: Any) -> HookedModel:
    """The model as something with hooks.

    Raises:
        InputError: It is neither a TransformerLens model nor a transformers one.
    """
    if hasattr(model, "run_with_cache") and hasattr(model, "hook_dict"):
        hooked: HookedModel = model
        look_again(hooked)
        return hooked
    model = uncompiled(model)
    if isinstance(model, torch.nn.Module) and hasattr(model, "config") and hasattr(model, "forward"):
        if not is_observed(model.modules()) and not is_offloaded(model):
            return adopt(model, tokenizer)
        # Hooks of anybody's act on the model that they were put on, and may keep what they see.
        reference = reference_on(model)
        if reference.owns_weights:
            return adopt(model, tokenizer)
        return cast(HookedModel, with_hooks(model, tokenizer, found_on=reference))
    raise InputError(
        f"a model of type {type(model).__name__} cannot be used: pass what tl_persona.load_model returns, a "
        "HookedTransformer, a TransformerBridge or a transformers model"
    )
