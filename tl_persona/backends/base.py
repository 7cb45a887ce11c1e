"""What every backend offers, and what it gives.

A backend takes a plan and hook names and gives, for each sample, the mean of every hook over the tokens of every
mask. It declines to know what the samples mean: personas and contrast pairs look the same from here.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from tl_persona.models.facts import ModelFacts
from tl_persona.plan.plan import Plan
from tl_persona.tensors import PooledMeans, Sample, SlotSums, TokenNorms

JOURNAL_FOLDER = ".remote"
"""Below the root of a store, where a remote run keeps what it needs to continue after it was killed."""

OnStatus = Callable[[str, str, str], None]
"""Called with job id, status and description; the job id of local work is `local`."""


class Pooled(NamedTuple):
    """The pooled activations of one sample.

    Attributes:
        sample: Its index in the plan.
        means: Of shape (mask, hook, d_model).
        norms: Norms of shape (hook, pos) of all tokens of the plan's sample, selected or not; None where they are not
            known.
    """

    sample: int
    means: PooledMeans
    norms: TokenNorms | None = None


class Totals(NamedTuple):
    """Sums over some samples: their indices in the plan, and for every slot the sum of the means added to it."""

    samples: tuple[int, ...]
    sums: SlotSums


@runtime_checkable
class Backend(Protocol):
    """Something that can plan samples and run the plan.

    `plan` checks the samples and lays them out for what the model is capable of, without running it. `pool` yields
    each sample once, in any order, as soon as it is done, with the norms of its tokens where they are at hand; what it
    keeps does not grow with the number of samples.
    `total` adds the mean of every mask of every sample to the slot named for it (`slots[sample][mask]`) and yields
    sums over a few samples at a time, so that little comes back from a server. `notes` tells how the last plan ran,
    for provenance; `interventions` is what acts on the model at this moment, as `Provenance` has it: empty for nothing,
    `unknown` for a hook of somebody else's. `saved` is called once the results are: what was kept to continue a killed
    run is dropped.
    """

    @property
    def facts(self) -> ModelFacts: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def notes(self) -> dict[str, Any]: ...

    @property
    def interventions(self) -> str: ...

    def plan(
        self, samples: Sequence[Sample], *, batch_tokens: int | None = None, max_rows: int | None = None
    ) -> Plan: ...

    def pool(self, plan: Plan, hook_names: Sequence[str]) -> Iterator[Pooled]: ...

    def total(
        self, plan: Plan, hook_names: Sequence[str], slots: Sequence[Sequence[int]], n_slots: int
    ) -> Iterator[Totals]: ...

    def saved(self) -> None: ...


def totals_of(pooled: Iterable[Pooled], slots: Sequence[Sequence[int]], n_slots: int) -> Iterator[Totals]:
    """Samples one by one as totals, for a backend that has each of them at hand."""
    for sample, means, _ in pooled:
        sums = torch.zeros((n_slots, *means.shape[1:]), dtype=means.dtype)
        yield Totals((sample,), sums.index_add_(0, torch.tensor(slots[sample]), means))
