"""Runs a plan on this machine: `run_with_cache` with a names filter, pooled pass by pass.

Nothing after the last needed block runs, and no shortcut is taken that has not been proven on this model. How many
tokens a pass may hold follows from the device's free memory.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import psutil
import torch

from tl_persona.backends.base import Pooled, Totals, totals_of
from tl_persona.backends.local import boot, inspection
from tl_persona.backends.local.check import check_note, require_same
from tl_persona.backends.local.observers import evaluating, interventions_on, is_observed, modules_of
from tl_persona.backends.local.pooling import PoolingRun
from tl_persona.backends.local.proof import ProvenPlan, Prover
from tl_persona.backends.local.quantized import rounds_activations
from tl_persona.backends.local.runners import Runner, capture_of, runners_for
from tl_persona.backends.local.sums import require_added
from tl_persona.errors import HookError, ModelError, NonFiniteError, TLPersonaError
from tl_persona.models.facts import HookedModel, ModelFacts
from tl_persona.plan.plan import Plan, Sharing, make_plan
from tl_persona.plan.rows import Pass, Row, Segment
from tl_persona.tensors import Sample

SHARE = 0.25
"""Of the free memory: what a model needs beside the captured activations is an estimate."""

CEILINGS = {"cpu": 512, "cuda": 16384, "mps": 4096}
"""Past these a pass gains no speed: on a CPU larger ones leave the caches."""

WORKSPACE = 32
"""Activations of d_model numbers that a block holds at once for each token, its MLP and scores included."""


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, in bytes; that of the host for devices that share it."""
    if device.type == "cuda":
        # What torch holds and nobody uses is free to the next pass, though not to other processes.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    return int(psutil.virtual_memory().available)


def default_batch_tokens(facts: ModelFacts, device: torch.device, free: int | None = None) -> int:
    """Padded tokens a pass may hold where the caller sets no budget.

    Args:
        facts: Of the model.
        device: Where it runs.
        free: Free bytes; None asks the device.

    Example:
        >>> facts = ModelFacts(name="m", revision=None, kind="k", dtype="bfloat16", weights="unprocessed",
        ...                    n_layers=80, d_model=8192, n_ctx=None, hook_names=())
        >>> default_batch_tokens(facts, torch.device("cuda"), free=8 * 2**30)
        1170
    """
    itemsize = getattr(torch, facts.dtype).itemsize
    per_token = (facts.n_layers + WORKSPACE) * facts.d_model * itemsize
    available = free_bytes(device) if free is None else free
    ceiling = CEILINGS.get(device.type, CEILINGS["cpu"])
    return max(1, min(ceiling, int(SHARE * available / per_token)))


_HAS_D_MODEL = re.compile(r"(blocks\.\d+\.)?hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out|embed)")


class LocalBackend:
    """The backend for a model in this process.

    Raises:
        InputError: The model cannot be used (see `backends.local.boot.as_hooked_model`).
    """

    def __init__(self, model: Any, *, tokenizer: Any = None) -> None:
        self.model: HookedModel = boot.as_hooked_model(model, tokenizer)
        self.tokenizer: Any = tokenizer if tokenizer is not None else self.model.tokenizer
        self.facts: ModelFacts = inspection.facts_of(self.model)
        self._runners = runners_for(self.model)
        self._plain = self._runners[-1]
        self._prover = Prover(
            self.model,
            self._runners,
            self.facts,
            inspection.device_of(self.model),
            inspection.critical_lengths(self.model),
            inspection.chosen_keys(self.model),
        )
        self._rounds = bool(self.facts.quantized) and rounds_activations(modules_of(self.model))
        self._path: dict[str, Any] = {}

    @property
    def notes(self) -> dict[str, Any]:
        """How the last plan ran, for provenance: the sharing, and what its proof found."""
        architecture = {"architecture": self.facts.architecture} if self.facts.architecture else {}
        about = {"model_class": self.facts.kind, "check": check_note(self.model), **architecture}
        held = {"quantized": self.facts.quantized, "adapters": self.facts.adapters}
        return {"backend": "local", **about, **{name: what for name, what in held.items() if what}, **self._path}

    @property
    def vocabulary(self) -> int:
        """Token ids that the model has an embedding of."""
        return inspection.n_embedded(self.model)

    @property
    def interventions(self) -> str:
        """What acts on the model now, for provenance; it takes a walk over all modules."""
        return interventions_on(modules_of(self.model))

    def plan(self, samples: Sequence[Sample], *, batch_tokens: int | None = None, max_rows: int | None = None) -> Plan:
        """Checks samples and plans them for the most this model may be capable of, as far as that is known.

        Args:
            samples: What to run.
            batch_tokens: Padded tokens a pass may hold; None lets the free memory decide.
            max_rows: Rows a pass may hold; None sets no limit.

        Raises:
            InputError: See `plan.make_plan`.
        """
        if batch_tokens is None:
            batch_tokens = default_batch_tokens(self.facts, inspection.device_of(self.model))
        plan = make_plan(
            samples,
            n_ctx=self.facts.n_ctx,
            vocabulary=self.vocabulary,
            batch_tokens=batch_tokens,
            max_rows=max_rows,
            sharing=self._plain.sharing,
        )
        return self._prover.foreseen(plan)

    def pool(self, plan: Plan, hook_names: Sequence[str]) -> Iterator[Pooled]:
        """Yields the pooled activations of every sample of the plan, and its norms, as soon as its last token has run.

        Raises:
            HookError: A hook does not fire, or does not end in `d_model`.
            NonFiniteError: A pooled activation holds NaN or infinity.
        """
        return self._pooled(plan, hook_names, with_norms=True)

    def _pooled(self, plan: Plan, hook_names: Sequence[str], *, with_norms: bool) -> Iterator[Pooled]:
        names = list(hook_names)
        require_same(self.model, max((len(sample.input_ids) for sample in plan.given), default=0), names)
        require_added(self.model, names)
        modules = modules_of(self.model)  # once a run: walking a bridge takes ten milliseconds
        with torch.no_grad(), evaluating(modules):
            self._check_hooks([name for name in names if not _HAS_D_MODEL.fullmatch(name)])
            trusted, runner, self._path = self._proven(plan, names, modules)
        done = set()
        try:
            for pooled in self._run(trusted, runner, names, modules, with_norms):
                done.add(pooled.sample)
                yield _of_plan(pooled, plan)
        except NonFiniteError:
            if trusted.sharing is Sharing.NONE:
                raise
            # NaN spreads to everything beside it in a packed row: the plain path tells whose it is.
            with torch.no_grad(), evaluating(modules):
                plain, _, _ = self._prover.prove(trusted.with_sharing(Sharing.NONE), names)
            for pooled in self._run(plain, self._plain, names, modules, with_norms):
                if pooled.sample not in done:
                    yield _of_plan(pooled, plan)
            reason = f"{trusted.sharing}: NaN or infinity, which the same texts alone do not have"
            logging.getLogger("tl_persona").warning("%s: %s: they ran alone", self.facts.name, reason)
            self._path = {"sharing": str(Sharing.NONE), "fallbacks": [*self._path.get("fallbacks", []), reason]}

    def total(
        self, plan: Plan, hook_names: Sequence[str], slots: Sequence[Sequence[int]], n_slots: int
    ) -> Iterator[Totals]:
        """Yields every sample's means added to their slots; see `pool` for what is raised."""
        return totals_of(self._pooled(plan, hook_names, with_norms=False), slots, n_slots)

    def saved(self) -> None:
        """Nothing was kept."""

    def evaluating(self) -> AbstractContextManager[None]:
        """A block in which the whole model is in evaluation mode, and as it was after."""
        return evaluating(modules_of(self.model))

    def _proven(self, plan: Plan, names: Sequence[str], modules: Sequence[torch.nn.Module]) -> ProvenPlan:
        if is_observed(modules):
            # A hook may act on the last position, or on whatever it finds there: no text beside or after another.
            return ProvenPlan(plan.alone(), self._plain, {"sharing": str(Sharing.NONE), "hooks": "of the caller"})
        if self._rounds:
            reason = "activations are rounded as they come: its numbers are good to per cents, however it is run"
            if not self._path:
                logging.getLogger("tl_persona").warning("%s: %s. Each text runs by itself", self.facts.name, reason)
            return ProvenPlan(
                plan.alone(), self._plain, {"sharing": str(Sharing.NONE), "fallbacks": [f"packed: {reason}"]}
            )
        # From the most sharing on, so that whatever is given up is noted, also where it was foreseen.
        untouched = plan.sharing is plan.wanted is not Sharing.NONE
        return self._prover.prove(plan if untouched else plan.with_sharing(plan.wanted), names)

    def _run(
        self, plan: Plan, runner: Runner, names: Sequence[str], modules: Sequence[torch.nn.Module], with_norms: bool
    ) -> Iterator[Pooled]:
        run = PoolingRun(plan, names, with_norms)
        last_use = {each.context: index for index, each in enumerate(plan.passes)}
        contexts: dict[int, Any] = {}
        for index, each in enumerate(plan.passes):
            context, length = None, 0
            if each.context is not None:
                length = plan.passes[each.context].width
                # Let go before the next prefix runs: two of them need not fit.
                context = contexts.pop(each.context) if last_use[each.context] == index else contexts[each.context]
            # Not around the yield: whoever takes the samples one by one has the model and torch as they were.
            with torch.no_grad(), evaluating(modules):
                captured, kept = self._passed(runner, plan, each, names, context, length)
                complete = run.add(each, captured)
            if each.kept:
                contexts[index] = kept
            del captured, kept, context
            yield from complete

    def _passed(self, runner: Runner, plan: Plan, each: Pass, names: Sequence[str], context: Any, length: int) -> Any:
        """One pass; what the model itself raises is one of our errors, and what somebody's hook raises is as it was."""
        try:
            return runner.run(plan, each, names, context, length)
        except (TLPersonaError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # an architecture may refuse in any way
            if is_observed(modules_of(self.model)):
                raise
            unknown = next((name for name in names if name not in self.facts.hook_names), None)
            if unknown is not None:
                raise HookError(f"hook {unknown!r} did not fire on this model: choose a residual hook") from error
            raise ModelError(
                f"{self.facts.architecture or self.facts.name} cannot run a pass of {len(each.rows)} x {each.width} "
                f"tokens ({type(error).__name__}: {error}): is a text longer than it takes?"
            ) from error

    def _check_hooks(self, names: list[str]) -> None:
        """Runs two tokens, so that an unsuitable hook is refused before the samples run."""
        if not names:
            return
        tokens = torch.zeros(2, dtype=torch.long)
        probe = make_plan([Sample("probe", tokens, torch.ones((1, 2), dtype=torch.bool))])
        captured, _ = self._plain.run(probe, Pass((Row((Segment((0,), 0, 2),)),)), names, None, 0)
        for name in names:
            shape = tuple(capture_of(captured, name).shape)
            if shape != (1, 2, self.facts.d_model):
                raise HookError(
                    f"hook {name!r} gives shape {shape} for two tokens, not (1, 2, {self.facts.d_model}): choose a "
                    "hook whose last axis is d_model, such as blocks.0.hook_resid_post"
                )


def _of_plan(pooled: Pooled, plan: Plan) -> Pooled:
    """Norms of the tokens that the plan's sample has, where the whole text ran."""
    if pooled.norms is None:
        return pooled
    return pooled._replace(norms=pooled.norms[:, : len(plan.samples[pooled.sample].input_ids)])
