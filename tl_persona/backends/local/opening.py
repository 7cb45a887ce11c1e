"""A transformers model that was loaded, in the hooked form that equals it: made, compared, and known by its checkpoint.

Raises `ModelMismatchError` where an asked-for class is another function than the model; without one, the next class is
taken, and the user is told.
"""

import logging
from collections.abc import Callable
from typing import Any, Literal, cast

import torch

from tl_persona.backends.local import boot, inspection
from tl_persona.backends.local.check import (
    LONGEST_AT_ONCE,
    Check,
    checked,
    lengths_to_compare,
    mismatch,
    remember_check,
)
from tl_persona.backends.local.differences import difference
from tl_persona.backends.local.reference import NoReferenceError, Reference, reference_to
from tl_persona.backends.local.verdicts import VerdictFile
from tl_persona.backends.local.watch import remember_loaded
from tl_persona.errors import InputError, MissingDependencyError, ModelError
from tl_persona.models.configs import lengths_named
from tl_persona.models.facts import HookedModel, ModelComparison, ModelSource
from tl_persona.models.offload import is_offloaded
from tl_persona.models.state import identity_digest
from tl_persona.provenance import software_versions

_WORTH_COMPARING = 4096
"""Up to this length `check_model` goes by itself."""


def opened(
    hf_model: Any,
    tokenizer: Any,
    kind: Literal["auto", "hooked", "bridge", "transformers"],
    *,
    name: str,
    revision: str | None,
    reopen: Callable[[], Any],
    device: Any = None,
    process_weights: bool = False,
    check: bool = True,
) -> HookedModel:
    """A hooked model with the weights of a transformers model, which it takes over.

    Args:
        hf_model: As it was loaded.
        tokenizer: The checkpoint's.
        kind: As `load_model` has it.
        name: Of the checkpoint.
        revision: Its commit or fingerprint.
        reopen: Loads it again.
        device: Where to put it.
        process_weights: Whether TransformerLens's default processing is applied.
        check: Whether it is compared before its first use.

    Raises:
        ModelMismatchError: It differs from the transformers model.
        ModelError: It cannot be made.
    """
    source = ModelSource(name, revision, identity_digest(hf_model), type(hf_model).__name__)
    if not getattr(hf_model, "hf_device_map", None):
        hf_model = hf_model.to(device or boot.default_device())
    options = {"device": device, "process_weights": process_weights}
    if kind == "transformers":
        return _itself(hf_model, tokenizer, source)
    if kind == "auto" and is_offloaded(hf_model):
        logging.getLogger("tl_persona").warning(
            "%s has weights in memory or on disk that are brought layer by layer: the transformers model itself runs, "
            "slowly",
            name,
        )
        return _itself(hf_model, tokenizer, source)
    if kind == "hooked" or (kind == "auto" and _may_be_hooked_transformer(hf_model)):
        try:
            verdicts = _verdicts(hf_model, source, "HookedTransformer", process_weights)
            reference, reason = _reference(hf_model, verdicts) if check else (None, "check=False")
            model = boot.hooked_transformer(hf_model, tokenizer, **options)
            again = None if reference is None else _reopening(reopen, name, hf_model)
            checked(model, reference, reason, verdicts=verdicts, reopen=again, keep=False)
        except ModelError as error:
            if kind == "hooked":
                raise
            logging.getLogger("tl_persona").warning("%s. Taking a TransformerBridge instead", error)
        else:
            remember_loaded(model, source)
            return model
    verdicts = _verdicts(hf_model, source, "TransformerBridge", process_weights)
    reference, reason = _reference(hf_model, verdicts) if check else (None, "check=False")
    try:
        model = boot.bridge(hf_model, tokenizer, **options)
        checked(model, reference, reason, verdicts=verdicts)
    except (ModelError, MissingDependencyError) as error:
        if kind == "bridge" or process_weights:
            raise
        logging.getLogger("tl_persona").warning("%s. Taking the transformers model itself instead", error)
        # Booting rewires modules: a tree that was made before has them as they were.
        untouched = reopen() if reference is None else reference.model
        return _itself(untouched, tokenizer, source, reference)
    remember_loaded(model, source)
    return model


def _itself(hf_model: Any, tokenizer: Any, source: ModelSource, found_on: Reference | None = None) -> HookedModel:
    model: Any = boot.itself(hf_model, tokenizer, found_on=found_on)
    remember_loaded(model, source)
    return cast(HookedModel, model)


def _verdicts(hf_model: Any, source: ModelSource, kind: str, processed: bool) -> VerdictFile | None:
    """What is kept of a checkpoint in one form; None where nothing says which checkpoint it is."""
    if source.revision is None:
        return None
    parameter = next(hf_model.parameters())
    return VerdictFile(
        {
            **software_versions(),
            "checkpoint": source.revision,
            "class": kind,
            "dtype": str(parameter.dtype),
            "device": parameter.device.type,
            "weights": "processed" if processed else "unprocessed",
        }
    )


def _reference(hf_model: Any, verdicts: VerdictFile | None) -> tuple[Reference | None, str]:
    """What to compare with; where verdicts are known it need not run, as far as is known."""
    if verdicts is None or not verdicts.is_known:
        return reference_to(hf_model)
    try:
        return Reference(hf_model), ""
    except NoReferenceError as error:
        return None, str(error)


def _may_be_hooked_transformer(hf_model: Any) -> bool:
    """Whether the class is worth trying: past the first comparison it is compared at the price of loading again."""
    lengths = sorted(set(lengths_named(hf_model.config.to_dict())))
    beyond = any(length > LONGEST_AT_ONCE for length in lengths[:-1])
    spread = bool(getattr(hf_model, "hf_device_map", None))
    return not spread and not beyond and boot.hooked_transformer_supports(hf_model)


def _reopening(load: Callable[[], Any], name: str, hf_model: Any) -> Callable[[], Any]:
    size = sum(parameter.numel() * parameter.element_size() for parameter in hf_model.parameters())

    def reopen() -> Any:
        logging.getLogger("tl_persona").warning(
            "%s is opened again, once, to compare it on a longer text: %.1f GB of memory more until that is done, and "
            "the time that loading takes",
            name,
            size / 1e9,
        )
        return load()

    return reopen


def compare_with(model: Any, reference: Any, n_tokens: int | None) -> ModelComparison:
    """See `loading.check_model`."""
    if not (hasattr(model, "run_with_cache") and hasattr(model, "hook_dict")):
        raise InputError(f"a model of type {type(model).__name__} has no TransformerLens hooks: pass a hooked model")
    if not (isinstance(reference, torch.nn.Module) and hasattr(reference, "config")):
        raise InputError(f"a reference of type {type(reference).__name__} is no transformers model")
    found, reason = reference_to(reference)
    if found is None:
        raise ModelError(f"they cannot be compared: {reason}")
    longest = inspection.longest_text(model) or 0
    lengths = [n_tokens] if n_tokens else lengths_to_compare(found.lengths, longest, _WORTH_COMPARING)
    try:
        seen = [difference(model, found, length) for length in lengths]
    except NoReferenceError as error:
        raise ModelError(f"they cannot be compared: {error}") from error
    worst = max(seen, key=lambda one: one.worst / one.allowed)
    if not worst.holds:
        raise mismatch(model, worst)
    remember_check(model, Check(lengths=found.lengths, compared=[one.n_tokens for one in seen]))
    return ModelComparison(worst.hook, worst.worst, worst.allowed, tuple(one.n_tokens for one in seen))
