"""Whether a TransformerLens model is still what it was when it was last used here.

One that has changed is taken anew: what was tried, proven and compared is forgotten, and its checkpoint says no longer
what it is.
"""

import logging
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

from tl_persona.backends.local import check, proof, trial
from tl_persona.backends.local.inspection import name_of
from tl_persona.backends.local.plain import TransformersModel
from tl_persona.models.facts import HookedModel, ModelSource, remember_source, source_of
from tl_persona.models.state import ModelState, digest_beside, identity_digest, state_of

_STATES: "WeakKeyDictionary[Any, ModelState]" = WeakKeyDictionary()
_AS_LOADED: "WeakKeyDictionary[Any, _Loaded]" = WeakKeyDictionary()


class _Loaded(NamedTuple):
    """What a model was when it was loaded; `beside` are weights that its class has beyond the transformers model's."""

    state: ModelState
    source: ModelSource
    beside: str | None


def remember_loaded(model: HookedModel, source: ModelSource) -> None:
    """Remember what a model is that was just loaded, hooks and what it makes as it runs aside."""
    remember_source(model, source)
    _STATES[model] = _state(model)
    reference = check.known_check(model).reference
    beside = None if reference is None else digest_beside(cast(Any, model), reference.model)
    _AS_LOADED[model] = _Loaded(_STATES[model], source, beside)


def look_again(model: HookedModel) -> None:
    """Notice what has changed since the last look; at the first one, say what the model is."""
    before, now = _STATES.get(model), _state(model)
    _STATES[model] = now
    if before is None:
        if source_of(model) is None:
            remember_source(model, ModelSource(name_of(model), None, _digest(model, None), None))
        return
    changes = before.changes(now)
    if not changes:
        return
    source = source_of(model)
    logging.getLogger("tl_persona").warning(
        "%s has changed since it was last used, in its %s: it is taken anew", name_of(model), " and its ".join(changes)
    )
    trial.forget_trial(model)
    proof.forget_proofs(model)
    only_values = before.parts == now.parts and before.settings == now.settings
    reference = check.known_check(model).reference if only_values else None
    check.forget_comparisons(model, keep_reference=only_values)
    loaded = _AS_LOADED.get(model)
    if loaded is not None and loaded.state == now:  # a setting was put back
        remember_source(model, loaded.source)
        return
    name, architecture = (name_of(model), None) if source is None else (source.name, source.architecture)
    remember_source(model, ModelSource(name, None, _digest(model, reference), architecture))


def _state(model: Any) -> ModelState:
    return state_of(model)._replace(hooks=frozenset(), buffers="")


def _digest(model: Any, reference: Any) -> str | None:
    """The digest of a model's values: over those of the transformers model where all else is as it was loaded."""
    loaded = _AS_LOADED.get(model)
    if isinstance(model, TransformersModel):
        return identity_digest(model.original_model)
    if reference is not None and loaded is not None and digest_beside(model, reference.model) == loaded.beside:
        return identity_digest(reference.model)
    return identity_digest(model, f"{type(model).__name__} values")
