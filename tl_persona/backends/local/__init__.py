"""Runs a plan on this machine: `run_with_cache` with a names filter, pooled pass by pass.

The only backend that imports `transformer_lens`. Nothing after the last needed block runs, and no shortcut is taken
that has not been proven on this model (`proof`).
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from tl_persona.backends import Pooled
from tl_persona.backends.local import boot
from tl_persona.backends.local.passes import Runner, runner_for
from tl_persona.backends.local.pooling import PoolingRun
from tl_persona.backends.local.proof import Verdict, next_best, prove
from tl_persona.errors import HookError
from tl_persona.models import HookedModel, ModelFacts
from tl_persona.plan import Pass, Plan, Row, Sample, Segment, Sharing, make_plan

_HAS_D_MODEL = re.compile(r"(blocks\.\d+\.)?hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out|embed)")

_Regime = tuple[Sharing, int]
_VERDICTS: "WeakKeyDictionary[Any, dict[_Regime, Verdict]]" = WeakKeyDictionary()


class LocalBackend:
    """The backend for a model in this process.

    Raises:
        InputError: The model cannot be used (see `boot.as_hooked_model`).
    """

    def __init__(self, model: Any, *, tokenizer: Any = None) -> None:
        self.model: HookedModel = boot.as_hooked_model(model, tokenizer)
        self.tokenizer: Any = tokenizer if tokenizer is not None else self.model.tokenizer
        self.facts: ModelFacts = boot.facts_of(self.model)
        self._runner: Runner = runner_for(self.model)
        self._windows = boot.attention_windows(self.model)
        self._path: dict[str, Any] = {}

    @property
    def notes(self) -> dict[str, Any]:
        """How the last plan ran, for provenance: the sharing, and what its proof found."""
        return {"backend": "local", "model_class": self.facts.kind, **self._path}

    def plan(self, samples: Sequence[Sample], *, batch_tokens: int | None = None, max_rows: int | None = None) -> Plan:
        """Checks samples and plans them for the most this model may be capable of.

        Raises:
            InputError: See `plan.make_plan`.
        """
        return make_plan(
            samples,
            n_ctx=self.facts.n_ctx,
            batch_tokens=batch_tokens,
            max_rows=max_rows,
            sharing=self._runner.sharing,
        )

    def pool(self, plan: Plan, hook_names: Sequence[str]) -> Iterator[Pooled]:
        """Yields the pooled activations of every sample of the plan, as soon as its last token has run.

        Raises:
            HookError: A hook does not fire, or does not end in `d_model`.
            NonFiniteError: A pooled activation holds NaN or infinity.
        """
        names = list(hook_names)
        with torch.no_grad(), evaluating(self.model):
            self._check_hooks([name for name in names if not _HAS_D_MODEL.fullmatch(name)])
            trusted = self._trusted(plan, names)
            run = PoolingRun(trusted, names)
            contexts: dict[int, Any] = {}
            for index, each in enumerate(trusted.passes):
                length = 0 if each.context is None else trusted.passes[each.context].width
                context = contexts.get(each.context) if each.context is not None else None
                captured, kept = self._runner.run(trusted, each, names, context, length)
                if each.kept:
                    contexts = {index: kept}  # a plan finishes one context before it starts the next
                yield from run.add(each, captured)

    def _trusted(self, plan: Plan, names: Sequence[str]) -> Plan:
        """The plan, or one with less sharing where its shortcut is not exact on this model."""
        verdicts = _VERDICTS.setdefault(self.model, {})
        fallbacks = []
        while plan.sharing is not Sharing.NONE:
            regime = (plan.sharing, sum(plan.longest_reach > window for window in self._windows))
            verdict = verdicts.get(regime)
            if verdict is None:
                verdict = prove(self._runner, plan, names, self.facts.dtype)
                if verdict is None:
                    break
                verdicts[regime] = verdict
                if not verdict.holds:
                    logging.getLogger("tl_persona").warning(
                        "%s does not allow %s prefixes (%s): samples run without, which is slower and exact",
                        self.facts.name,
                        plan.sharing,
                        verdict.reason,
                    )
            if verdict.holds:
                self._path = {"sharing": str(plan.sharing), "proof": verdict.reason}
                break
            fallbacks.append(f"{plan.sharing}: {verdict.reason}")
            plan = plan.with_sharing(next_best(plan.sharing))
        if plan.sharing is Sharing.NONE or not self._path:
            self._path = {"sharing": str(plan.sharing)}
        if fallbacks:
            self._path["fallbacks"] = fallbacks
        return plan

    def _check_hooks(self, names: list[str]) -> None:
        """Runs two tokens, so that an unsuitable hook is refused before the samples run."""
        if not names:
            return
        tokens = torch.zeros(2, dtype=torch.long)
        probe = make_plan([Sample("probe", tokens, torch.ones((1, 2), dtype=torch.bool))])
        captured, _ = self._runner.run(probe, Pass((Row((Segment((0,), 0, 2),)),)), names, None, 0)
        for name in names:
            if name not in captured:
                raise HookError(f"hook {name!r} did not fire on this model: choose a residual hook")
            shape = tuple(captured[name].shape)
            if shape != (1, 2, self.facts.d_model):
                raise HookError(
                    f"hook {name!r} gives shape {shape} for two tokens, not (1, 2, {self.facts.d_model}): choose a "
                    "hook whose last axis is d_model, such as blocks.0.hook_resid_post"
                )


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Dropout off while the model runs, and back as it was after."""
    was_training = bool(getattr(model, "training", False))
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()
