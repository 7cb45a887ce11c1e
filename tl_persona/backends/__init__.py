"""Running a plan: what every backend offers, and the choice between them.

A backend takes a plan and hook names and gives, for each sample, the mean of every hook over the tokens of every
mask. It declines to know what the samples mean: personas and contrast pairs look the same from here.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from tl_persona.errors import InputError
from tl_persona.models import ModelFacts
from tl_persona.plan import Plan, Sample
from tl_persona.tensors import PooledMeans


class Pooled(NamedTuple):
    """The pooled activations of one sample: its index in the plan, and means of shape (mask, hook, d_model)."""

    sample: int
    means: PooledMeans


@runtime_checkable
class Backend(Protocol):
    """Something that can plan samples and run the plan.

    `plan` checks the samples and lays them out for what the model is capable of, without running it. `pool` yields
    each sample once, in any order, as soon as it is done; what it keeps does not grow with the number of samples.
    `notes` tells how the last plan ran, for provenance.
    """

    @property
    def facts(self) -> ModelFacts: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def notes(self) -> dict[str, Any]: ...

    def plan(
        self, samples: Sequence[Sample], *, batch_tokens: int | None = None, max_rows: int | None = None
    ) -> Plan: ...

    def pool(self, plan: Plan, hook_names: Sequence[str]) -> Iterator[Pooled]: ...


def open_backend(model: Any, *, tokenizer: Any = None, remote: bool = False) -> Backend:
    """The backend that runs this model.

    Args:
        model: A `HookedTransformer`, a `TransformerBridge`, or a Hugging Face causal language model, which is wrapped
            without being changed.
        tokenizer: Used in place of the model's own.
        remote: True to run on NDIF.

    Raises:
        InputError: The model is none of these.
    """
    if remote:
        raise InputError("remote=True is not available in this version: run locally, with remote=False")
    from tl_persona.backends.local import LocalBackend

    return LocalBackend(model, tokenizer=tokenizer)
