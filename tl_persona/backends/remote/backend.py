"""Runs a plan on an NDIF server through nnsight: masks are applied and means taken there, in float32.

Samples go in groups, so that a failure costs one; of each group come back a few sums. What the server has too little
memory for is asked for in chunks of layers. The same code runs an nnsight model in this process, without a server.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from tl_persona.backends.base import OnStatus, Pooled, Totals
from tl_persona.backends.remote.groups import Appetite, groups_of
from tl_persona.backends.remote.jobs import Journal
from tl_persona.backends.remote.model import RemoteModel, RemoteSettings, open_remote_model, running_here
from tl_persona.backends.remote.proof import Proof
from tl_persona.backends.remote.requests import Requests
from tl_persona.backends.remote.sites import Sites
from tl_persona.backends.remote.tracing import Chunk, Payload, Slots, payload_of
from tl_persona.backends.remote.transport import CapacityFailure
from tl_persona.backends.shortcuts import tolerance_of
from tl_persona.errors import HookError, InputError, NonFiniteError, RemoteMemoryError
from tl_persona.models.configs import chosen_keys_named, critical_lengths_named, longest_text_named
from tl_persona.models.facts import ModelFacts
from tl_persona.models.hooks import layer_of
from tl_persona.plan.plan import Plan, Sharing, make_plan
from tl_persona.tensors import Sample, SlotSums

BATCH_TOKENS = 4096
"""Padded tokens of a pass where the caller sets no budget: servers have more room than laptops."""


@dataclass
class _Learned:
    """What is known of a model on a server, for as long as the client's model lives."""

    facts: ModelFacts
    appetite: Appetite
    proof: Proof


_LEARNED: "WeakKeyDictionary[Any, _Learned]" = WeakKeyDictionary()


class RemoteBackend:
    """The backend for a model on a server.

    Args:
        model: A `RemoteModel`; with `remote`, a name; or an nnsight model with weights, which runs here.
        tokenizer: Used in place of the model's own.
        remote: True where `model` may be a name.
        on_status: Told of every change of a job's status, and of every retry.
        journal: Folder for what is needed to continue after the client was killed; None keeps nothing.

    Raises:
        InputError: The model is none of these, or the server's address is not safe.
        ModelError: The model cannot be laid out.
        RemoteError: The server does not answer, or will not run the model.
    """

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any = None,
        remote: bool = False,
        on_status: OnStatus | None = None,
        journal: Path | None = None,
    ) -> None:
        self.model = _as_remote_model(model, tokenizer, remote)
        self.tokenizer: Any = tokenizer if tokenizer is not None else self.model.tokenizer
        self._sites = Sites(self.model.nnsight_model._module)
        self._journal = Journal(journal)
        self._requests = Requests(self.model, self._sites, self._journal, on_status)
        key = self.model.nnsight_model
        if key not in _LEARNED:
            facts = _facts_of(self.model, self._sites, self._requests.dtype())
            settings = key._module.config.to_dict()
            proof = Proof(
                tolerance_of(facts.dtype),
                sorted(critical_lengths_named(settings)),
                min(chosen_keys_named(settings), default=None),
            )
            _LEARNED[key] = _Learned(facts, Appetite(facts.n_layers), proof)
        self._learned = _LEARNED[key]
        self.facts: ModelFacts = self._learned.facts
        self._path: dict[str, Any] = {}
        self._shared = False  # whether anything of the last plan was run once for several samples

    @property
    def notes(self) -> dict[str, Any]:
        """How the last plan ran, for provenance: the server, the sharing, and what the server had no room for."""
        settings = self.model.settings
        where = {"host": settings.host} if settings else {}
        known = {"model_class": self.facts.kind, "architecture": self.facts.architecture}
        return {"backend": "remote" if settings else "nnsight", **known, **where, **self._path}

    @property
    def interventions(self) -> str:
        """What acts on the model, for provenance: nothing, as requests carry none."""
        return ""

    def plan(self, samples: Sequence[Sample], *, batch_tokens: int | None = None, max_rows: int | None = None) -> Plan:
        """Checks samples and plans them as if they went in one request.

        Args:
            samples: What to run.
            batch_tokens: Padded tokens a pass may hold; None is `BATCH_TOKENS`.
            max_rows: Rows a pass may hold; None sets no limit.

        Raises:
            InputError: See `plan.make_plan`.
        """
        return make_plan(
            samples,
            n_ctx=self.facts.n_ctx,
            vocabulary=int(self.model.nnsight_model._module.config.get_text_config().vocab_size),
            batch_tokens=BATCH_TOKENS if batch_tokens is None else batch_tokens,
            max_rows=max_rows,
            sharing=self._learned.proof.sharing,
        )

    def pool(self, plan: Plan, hook_names: Sequence[str]) -> Iterator[Pooled]:
        """Yields the pooled activations of every sample of the plan, group by group.

        Raises:
            HookError: A hook that has no place in the model, as nnsight sees it.
            NonFiniteError: A pooled activation holds NaN or infinity.
            RemoteError: The server did not bring the work to its end.
        """
        first, slots = 0, []
        for sample in plan.samples:
            slots.append(range(first, first + len(sample.masks)))
            first += len(sample.masks)
        for group, sums in self._run(plan, hook_names, slots):
            for index in group:
                yield Pooled(index, torch.stack([sums[slot] for slot in slots[index]]))

    def total(
        self, plan: Plan, hook_names: Sequence[str], slots: Sequence[Sequence[int]], n_slots: int
    ) -> Iterator[Totals]:
        """Yields sums over the samples of each group; see `pool` for what is raised."""
        for group, sums in self._run(plan, hook_names, slots):
            some = next(iter(sums.values()))
            yield Totals(tuple(group), torch.stack([sums.get(s, torch.zeros_like(some)) for s in range(n_slots)]))

    def saved(self) -> None:
        """Drops what was kept to continue a killed run."""
        self._journal.clear()

    def _run(
        self, plan: Plan, hook_names: Sequence[str], slots: Slots
    ) -> Iterator[tuple[list[int], dict[int, Float[Tensor, "hook d_model"]]]]:
        """For every group of samples the sums of the slots it has."""
        for name in hook_names:
            if name not in self._sites.hook_names:
                raise HookError(
                    f"hook {name!r} has no counterpart in {self.facts.kind} as nnsight sees it: choose a residual hook "
                    "of a block, such as blocks.0.hook_resid_post"
                )
        appetite = self._learned.appetite
        self._shared = False
        limit = self.model.settings.group_tokens if self.model.settings else plan.tokens
        waiting = list(reversed(groups_of(plan, limit)))
        while waiting:
            whole = waiting.pop()
            group, *rest = appetite.groups(whole)
            waiting += reversed(rest)
            used = sorted({slot for index in group for slot in slots[index]})
            place = {slot: index for index, slot in enumerate(used)}
            local = [[place[slot] for slot in slots[index]] for index in group]
            samples, given = ([side[index] for index in group] for side in (plan.samples, plan.given))
            part = replace(plan, samples=tuple(samples), given=tuple(given))
            try:
                sums = self._sums(part, hook_names, local, len(used))
            except CapacityFailure as failure:
                before = appetite.layers, appetite.samples
                if not appetite.shrink(failure, len(group)):
                    raise RemoteMemoryError(
                        f"the server cannot run sample {part.samples[0].sample_id!r}, whatever is asked for at once; "
                        f"tried: {'; '.join(appetite.tried)}"
                    ) from failure
                if before == (appetite.n_layers, None):
                    logging.getLogger("tl_persona").warning(
                        "%s: the server cannot run all at once (%s): asking for less at a time, which is slower",
                        self.facts.name,
                        failure,
                    )
                waiting.append(group)
                continue
            self._check_finite(sums, part, hook_names, local)
            yield group, {slot: sums[index] for slot, index in place.items()}
        self._path = self._noted()

    def _sums(self, part: Plan, hook_names: Sequence[str], slots: Slots, n_slots: int) -> SlotSums:
        """The sums of one group, in as many requests as the server's memory asks for."""
        appetite = self._learned.appetite
        if not appetite.whole:
            return self._chunked(payload_of(self._learned.proof.known(part, hook_names), slots, n_slots), hook_names)

        def run(payload: Payload) -> SlotSums:
            return self._requests.run(payload, hook_names, Chunk(0, _stop(hook_names)))[0]

        shared = self._learned.proof.proven(part, hook_names, run)
        self._shared |= any(each.context is not None or each.packed for each in shared.passes)
        return run(payload_of(shared, slots, n_slots, self._learned.proof.cache_name))

    def _chunked(self, payload: Payload, hook_names: Sequence[str]) -> SlotSums:
        """The blocks a few at a time, each request entering with the residual that the one before it left."""
        size = self._learned.appetite.layers
        last = _stop(hook_names)
        sums = torch.zeros(payload.n_slots, len(hook_names), self.facts.d_model)
        entries: tuple[Tensor, ...] = ()
        for start in range(0, last, size):
            stop = min(start + size, last)
            mine = [index for index, name in enumerate(hook_names) if start <= _layer(name) < stop]
            chunk = Chunk(start, stop, entries, leave=stop < last)
            sums[:, mine], entries = self._requests.run(payload, [hook_names[index] for index in mine], chunk)
        return sums

    def _check_finite(self, sums: SlotSums, part: Plan, hook_names: Sequence[str], slots: Slots) -> None:
        wrong = (~torch.isfinite(sums)).any(dim=-1).nonzero()
        if not len(wrong):
            return
        slot, hook = (int(index) for index in wrong[0])
        samples = [each.sample_id for each, mine in zip(part.samples, slots, strict=True) if slot in mine]
        more = f" and {len(samples) - 3} more" if len(samples) > 3 else ""
        raise NonFiniteError(
            f"hook {hook_names[hook]!r} holds NaN or infinity for sample {', '.join(map(repr, samples[:3]))}{more}: "
            "the model overflows on the server in its dtype, or the result was damaged on its way"
        )

    def _noted(self) -> dict[str, Any]:
        appetite, proof = self._learned.appetite, self._learned.proof
        shares = self._shared and appetite.whole
        notes: dict[str, Any] = {"sharing": str(proof.sharing if shares else Sharing.NONE)}
        if shares:
            notes["proof"] = f"within {proof.tolerance:.0e}"
        fallbacks = list(proof.fallbacks)
        if appetite.tried:
            fallbacks.append(f"all at once: {appetite.tried[0]}")
        if not shares and not fallbacks:
            notes["why"] = "no two texts share a beginning that is worth a pass"
        if fallbacks:
            notes["fallbacks"] = fallbacks
        if not appetite.whole:
            notes["layers_per_request"] = appetite.layers
        if appetite.samples is not None:
            notes["samples_per_request"] = appetite.samples
        return notes


def _layer(hook_name: str) -> int:
    layer = layer_of(hook_name)
    assert layer is not None, hook_name  # `Sites` has hooks of blocks only
    return layer


def _stop(hook_names: Sequence[str]) -> int:
    """The first block that need not run."""
    return 1 + max(_layer(name) for name in hook_names)


def _as_remote_model(model: Any, tokenizer: Any, remote: bool) -> RemoteModel:
    if isinstance(model, RemoteModel):
        return model
    if isinstance(model, str | Path):
        return open_remote_model(model, RemoteSettings.from_environment())
    if hasattr(model, "_module") and not remote:
        return running_here(model, tokenizer)
    raise InputError(
        f"remote=True takes a name or what load_model(name, kind='remote') returns, not a {type(model).__name__}"
    )


def _facts_of(model: RemoteModel, sites: Sites, dtype: str) -> ModelFacts:
    whole = model.nnsight_model._module
    config = whole.config.get_text_config()
    return ModelFacts(
        name=model.name,
        revision=model.revision,
        kind=type(whole).__name__,
        dtype=dtype,
        weights="unprocessed",
        n_layers=sites.n_layers,
        d_model=int(config.hidden_size),
        n_ctx=longest_text_named(config.to_dict()),
        hook_names=sites.hook_names,
        weights_digest=model.served_digest,
        architecture=type(whole).__name__,
    )
