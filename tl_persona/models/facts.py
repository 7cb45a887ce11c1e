"""What the rest of the package needs to know of a model: one Protocol, a record of facts, a registry of sources.

Both TransformerLens classes satisfy `HookedModel`, and a transformers model as `backends.local.plain` has it; none is
imported here.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

from torch import Tensor


@runtime_checkable
class HookedModel(Protocol):
    """The common part of `HookedTransformer`, `TransformerBridge` and `TransformersModel` that this package uses."""

    cfg: Any
    tokenizer: Any

    @property
    def hook_dict(self) -> Mapping[str, Any]: ...
    def run_with_cache(self, *args: Any, **kwargs: Any) -> tuple[Any, Mapping[str, Tensor]]: ...
    def hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]: ...
    def generate(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class ModelFacts:
    """What decides how a model is run and what is written to provenance.

    Attributes:
        name: The model's name, for people and for artifact folders.
        revision: The checkpoint's commit or content fingerprint; None where it is not known.
        kind: `HookedTransformer`, `TransformerBridge` or a remote model class.
        dtype: Parameter dtype, such as `float32`.
        weights: `unprocessed`, or the processing that was applied.
        n_layers: Number of blocks.
        d_model: Width of the residual stream.
        n_ctx: Longest sequence in tokens the model was made for; None where it has no such limit.
        hook_names: All hooks, in the model's order.
        weights_digest: `<kind>:<hex>` of the weights that run, as `Provenance` has it: `values:3f...` of their numbers,
            `HookedTransformer values:3f...` where they compare within that class only, `served:3f...` of what a server
            calls the model. None where it is not known.
        architecture: The model's class in transformers, such as `LlamaForCausalLM`; None where it is not known.
        quantized: In what weights are held beside `dtype`, such as `int8 (Int8Tensor)`; empty where in nothing else.
        adapters: Adapters of peft in the model: which are on, off, and merged; empty without any.
    """

    name: str
    revision: str | None
    kind: str
    dtype: str
    weights: str
    n_layers: int
    d_model: int
    n_ctx: int | None
    hook_names: tuple[str, ...]
    weights_digest: str | None = None
    architecture: str | None = None
    quantized: str = ""
    adapters: str = ""

    @property
    def held_in(self) -> str:
        """In what the weights are held, for provenance: `dtype`, and what they are quantized to."""
        return f"{self.dtype}, {self.quantized}" if self.quantized else self.dtype


@dataclass(frozen=True)
class ModelSource:
    """Where a model came from, and what its weights are.

    Attributes:
        name: The model's name.
        revision: The checkpoint's commit or fingerprint; None for a model in memory, or one that has changed since.
        weights_digest: The digest of its values, after the kind of model it is comparable within; None where unknown.
        architecture: The class of the transformers model; None where that is not known.
    """

    name: str
    revision: str | None
    weights_digest: str | None = None
    architecture: str | None = None


@dataclass(frozen=True)
class ModelComparison:
    """What came of comparing a hooked model with a transformers model, where they agree.

    Attributes:
        hook: Where they differ most.
        difference: By how much there, relative to the norm of the residual.
        allowed: How much may be.
        n_tokens: Lengths of the texts.
    """

    hook: str
    difference: float
    allowed: float
    n_tokens: tuple[int, ...]


# A side table, so that no attribute of ours sits on somebody else's class.
_SOURCES: "WeakKeyDictionary[Any, ModelSource]" = WeakKeyDictionary()


def remember_source(model: Any, source: ModelSource) -> None:
    """Records where a loaded model came from, for as long as the model lives."""
    _SOURCES[model] = source


def source_of(model: Any) -> ModelSource | None:
    """Where the model came from, or None where this package did not load it."""
    try:
        return _SOURCES.get(model)
    except TypeError:  # not hashable or not weakly referable: somebody else's object
        return None


_INTERVENTION = "tl_persona_intervention"


def mark_intervention(hook: Any, hook_name: str, digest: str) -> None:
    """Says of a function that is put on a model which edit it makes, so that what is stored can tell."""
    setattr(hook, _INTERVENTION, (hook_name, digest))


def intervention_of(hook: Any) -> tuple[str, str] | None:
    """The hook's name and the digest of the edit that a function makes; None where it was not marked."""
    found: tuple[str, str] | None = getattr(hook, _INTERVENTION, None)
    return found
