"""Persona extraction, the recipe: personas -> prompts -> masks -> plan -> backend -> mean -> store.

Method: the mean residual over chosen tokens of a persona's answers, one vector a layer, as persona-vectors 0.8 does
it; here all strategies and all layers come out of the same forward passes. What has to be computed is prepared for
every variant before any of them runs, so that bad input is found before the model works.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from tl_persona.backends.base import JOURNAL_FOLDER, Backend, OnStatus
from tl_persona.backends.choice import open_backend
from tl_persona.data.personas import PersonaLike, QALike, answer_text, check_variants, system_prompt
from tl_persona.display import token_progress
from tl_persona.errors import InputError
from tl_persona.models.hooks import LayerSelection, resolve_hooks
from tl_persona.plan.plan import Plan
from tl_persona.prompts.inputs import MaskedPrompts, PreparedInput, persona_prompts, prepare_inputs
from tl_persona.prompts.masks import MaskStrategy, as_strategies
from tl_persona.prompts.preview import print_masks, print_plan
from tl_persona.prompts.reasoning import Reasoning, block_of
from tl_persona.provenance import Provenance, provenance_of, software_versions
from tl_persona.statistics.means import PersonaMean
from tl_persona.store.store import PersonaVectorStore
from tl_persona.tensors import LayerVectors, Sample


@dataclass(frozen=True)
class ExtractionResult:
    """What `run_extraction` did for one prompt variant and one strategy.

    Attributes:
        variant: The prompt variant.
        output_dir: The folder the vector is stored in.
        n_questions: How many questions it is the mean of.
        persona_name: The persona's display name.
        strategy: The mask strategy.
        n_tokens: Tokens of all its prompts.
        extracted: False where the same vector was stored already.
        reasons: Why a stored vector was replaced, one line each.
    """

    variant: str
    output_dir: Path
    n_questions: int
    persona_name: str
    strategy: MaskStrategy
    n_tokens: int
    extracted: bool
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class VariantJob:
    """One variant, ready to run.

    Attributes:
        persona: Whose vectors.
        variant: Which view of the persona.
        masked: Its prompts and masks.
        provenances: For every strategy what decides its vector.
        reasons: For every strategy why what is stored cannot stay.
        todo: The strategies that are to be saved.
        computed: The strategies that are computed; those of `todo`, and stored ones that share their passes.
        plan: What computes them; None where there is nothing to do.
        rows: For each sample of the plan, which of `computed`, by index, its mask rows belong to.
        notes: What is noted of its prompts.
    """

    persona: PersonaLike
    variant: str
    masked: MaskedPrompts
    provenances: Mapping[MaskStrategy, Provenance]
    reasons: Mapping[MaskStrategy, tuple[str, ...]]
    todo: tuple[MaskStrategy, ...]
    computed: tuple[MaskStrategy, ...]
    plan: Plan | None
    rows: list[list[int]]
    notes: Mapping[str, Any]

    @classmethod
    def prepare(
        cls,
        backend: Backend,
        store: PersonaVectorStore,
        persona: PersonaLike,
        variant: str,
        masked: MaskedPrompts,
        provenances: Mapping[MaskStrategy, Provenance],
        *,
        force: bool,
        batch_tokens: int | None,
        notes: Mapping[str, Any],
    ) -> "VariantJob":
        """Compares with what is stored and plans the rest.

        Raises:
            InputError: A sample that the model cannot run.
            StoreMismatchError: A folder to be written holds vectors of other weights or under other interventions;
                never with `force`.
            StoreError: A stored file that cannot be read.
        """
        status = {name: store.status(variant, persona.id, provenances[name], name) for name in provenances}
        todo = tuple(name for name, found in status.items() if force or found.state != "same")
        for name in () if force else todo:
            store.refuse_conflict(variant, persona.id, provenances[name], name)
        # After a kill between two saves, the rest comes out of the passes it would have come out of, to the last byte.
        # Its questions run for any other strategy anyway; for persona-only ones, which ask one, they are not all run.
        wide = not all(name.persona_only for name in todo)
        computed = tuple(name for name in provenances if todo and (wide or name.persona_only))
        samples, rows = masked.samples(computed)
        plan = backend.plan(samples, batch_tokens=batch_tokens) if todo else None
        reasons = {name: found.reasons for name, found in status.items()}
        return cls(persona, variant, masked, provenances, reasons, todo, computed, plan, rows, notes)

    def run(
        self,
        backend: Backend,
        store: PersonaVectorStore,
        *,
        show_progress: bool,
        on_status: OnStatus | None,
    ) -> list[ExtractionResult]:
        """Computes and saves what is to be done; one result a strategy, in the order of the strategies.

        Raises:
            NonFiniteError: An activation holds NaN or infinity.
            StoreError: A vector cannot be saved.
        """
        vectors: dict[MaskStrategy, LayerVectors] = {}
        if self.plan is not None:
            hook_names = self.provenances[self.todo[0]].hook_names
            title = f"{self.persona.name} · {self.variant}"
            means = pooled_means(backend, self.plan, self.rows, len(self.computed), hook_names, title, show_progress)
            vectors = dict(zip(self.computed, means, strict=True))
        # Persona-only strategies first: what a kill leaves to do then has the wide passes in it (see `prepare`).
        for strategy in sorted(self.todo, key=lambda name: not name.persona_only):
            notes = {**backend.notes, **self.notes, **software_versions()}
            provenance = msgspec.structs.replace(self.provenances[strategy], notes=notes)
            store.save(
                self.variant,
                self.persona.id,
                self.persona.name,
                vectors[strategy],
                provenance.sample_ids,
                strategy,
                provenance=provenance,
            )
        results = []
        for strategy in self.provenances:
            prompts = self.masked.prompts_of(strategy)
            if on_status is not None:
                state = "COMPLETED" if strategy in self.todo else "SKIPPED"
                on_status("local", state, f"{self.persona.id} {self.variant} {strategy}")
            results.append(
                ExtractionResult(
                    variant=self.variant,
                    output_dir=store.path_of(self.variant, self.persona.id, strategy).parent,
                    n_questions=len(prompts),
                    persona_name=self.persona.name,
                    strategy=strategy,
                    n_tokens=sum(len(prompt.input_ids) for prompt in prompts),
                    extracted=strategy in self.todo,
                    reasons=self.reasons[strategy],
                )
            )
        return results


def pooled_means(
    backend: Backend,
    plan: Plan,
    rows: Sequence[Sequence[int]],
    n_masks: int,
    hook_names: Sequence[str],
    description: str,
    show_progress: bool,
) -> list[LayerVectors]:
    """The mean over samples of each mask; `rows[i]` says which masks the rows of sample i belong to."""
    mean = PersonaMean(n_masks)
    with token_progress(description, plan.tokens, computed=plan.tokens_distinct, show=show_progress) as advance:
        for total in backend.total(plan, hook_names, rows, n_masks):
            counts = Counter(mask for sample in total.samples for mask in rows[sample])
            masks = sorted(counts)
            mean.add(total.sums[masks], masks, [counts[mask] for mask in masks])
            advance(sum(len(plan.samples[sample].input_ids) for sample in total.samples))
    return mean.results()


def strategy_provenance(
    backend: Backend,
    model_name: str,
    hook_names: Sequence[str],
    strategy: MaskStrategy,
    masked: MaskedPrompts,
    interventions: str,
) -> Provenance:
    """What decides the vector of one strategy, under what acts on the model; how it ran is noted when it is saved."""
    prompts = masked.prompts_of(strategy)
    facts = backend.facts
    return provenance_of(
        model_name=model_name,
        revision=facts.revision,
        dtype=facts.held_in,
        weights=facts.weights,
        hook_names=hook_names,
        strategy=str(strategy),
        texts=[prompt.prompt_text for prompt in prompts],
        sample_ids=[prompt.sample_id for prompt in prompts],
        tokens=(
            (prompt.input_ids.numpy().astype("<i8").tobytes(), masked.mask_of(strategy, index).numpy().tobytes())
            for index, prompt in enumerate(prompts)
        ),
        template_digest=prompts[0].proof.template_digest,
        weights_digest=facts.weights_digest,
        interventions=interventions,
    )


__all__ = [
    "ExtractionResult",
    "MaskStrategy",
    "OnStatus",
    "PreparedInput",
    "extract_activations",
    "prepare_inputs",
    "run_extraction",
]


def extract_activations(
    model: Any,
    input_ids_list: Sequence[Tensor],
    token_masks: Sequence[Tensor],
    *,
    layers: LayerSelection = None,
    remote: bool = False,
    on_status: OnStatus | None = None,
    batch_tokens: int | None = None,
    show_progress: bool = False,
) -> LayerVectors:
    """Mean over the selected tokens of each sample, then over samples; every sample weighs the same.

    Args:
        model: What `load_model` returns, or any model `open_backend` takes.
        input_ids_list: Token ids of each sample, 1-D.
        token_masks: For each sample a mask of the same length, True where the token contributes.
        layers: Which hooks to read (see `models.hooks.resolve_hooks`); None is `resid_post` of every block.
        remote: True runs on NDIF; `model` may then be a name.
        on_status: Told how remote jobs are, and when the work is done (see `OnStatus`).
        batch_tokens: Padded tokens a forward pass may hold; None is the plan's default.
        show_progress: Shows a bar on a terminal.

    Returns:
        float32, shape (layer, d_model), one row a hook.

    Raises:
        InputError: No samples, or ids and masks that do not fit each other or the model (see `plan.Sample.check`).
        HookError: A layer the model does not have.
        NonFiniteError: An activation holds NaN or infinity.
        RemoteError: A remote run did not come to its end.
    """
    if len(input_ids_list) != len(token_masks):
        raise InputError(f"{len(input_ids_list)} samples but {len(token_masks)} masks: pass one mask a sample")
    samples = [
        Sample(str(index), torch.as_tensor(ids).cpu(), torch.as_tensor(mask, dtype=torch.bool).cpu()[None])
        for index, (ids, mask) in enumerate(zip(input_ids_list, token_masks, strict=True))
    ]
    backend = open_backend(model, remote=remote, on_status=on_status)
    hook_names = resolve_hooks(layers, backend.facts.hook_names, backend.facts.n_layers)
    plan = backend.plan(samples, batch_tokens=batch_tokens)
    (vectors,) = pooled_means(backend, plan, [[0]] * len(samples), 1, hook_names, "extracting", show_progress)
    if on_status is not None:
        on_status("local", "COMPLETED", f"{len(samples)} samples")
    return vectors


def run_extraction(
    model: Any,
    model_name: str,
    qa_pairs: Sequence[QALike],
    variants: Sequence[str],
    *,
    persona: PersonaLike,
    mask_strategy: str | Sequence[str] = MaskStrategy.ANSWER_MEAN,
    remote: bool = False,
    on_status: OnStatus | None = None,
    verbose: bool = False,
    activations_dir: str | Path | None = None,
    layers: LayerSelection = None,
    template_kwargs: Mapping[str, Any] | None = None,
    force: bool = False,
    batch_tokens: int | None = None,
    show_progress: bool = True,
    store: PersonaVectorStore | None = None,
    tokenizer: Any = None,
    reasoning: Reasoning = "include",
) -> list[ExtractionResult]:
    """Extracts one persona's vectors for every variant and strategy, and saves them.

    All strategies of a variant share its forward passes. A persona-only strategy looks at the first question alone.
    A vector that is stored and would come out the same is not computed again. One folder holds vectors of one model and
    of one set of interventions; where it is not known which they are of, they are computed again.

    Args:
        model: What `load_model` returns, or any model `open_backend` takes.
        model_name: Names the artifact folder and is recorded.
        qa_pairs: The persona's questions.
        variants: Which views of the persona to use, such as `("templated", "biography")`.
        persona: The persona; a record of any class with `id`, `name` and `<variant>_view`.
        mask_strategy: One strategy or several.
        remote: True runs on NDIF; `model` may then be a name.
        on_status: Told how remote jobs are, and of every vector saved or found (see `OnStatus`).
        verbose: Prints prompts with their masks in colour, and what the plan will cost.
        activations_dir: Root of the store; None is `artifacts/activations`.
        layers: Which hooks to read (see `models.hooks.resolve_hooks`); None is `resid_post` of every block.
        template_kwargs: Passed to the chat template.
        force: True computes what is stored again, and saves it also beside vectors of another model.
        batch_tokens: Padded tokens a forward pass may hold; None is the plan's default.
        show_progress: Shows a bar on a terminal.
        store: Where to save, in place of `activations_dir`; the caller flushes it. One store for many personas saves
            the bookkeeping that each call would do.
        tokenizer: Used in place of the model's own; a plain transformers model needs it.
        reasoning: Whether a block of reasoning that an answer begins with counts as answer (see `prepare_inputs`);
            recorded in the notes where an answer has one.

    Returns:
        One result for each variant and strategy, in that order.

    Raises:
        InputError: Anything wrong with the samples, variants, strategies or layers; before the model runs.
        StoreMismatchError: What is stored under the same names is of another model or under other interventions; before
            the model runs.
        NonFiniteError: An activation holds NaN or infinity.
        StoreError: The vector cannot be saved.
        RemoteError: A remote run did not come to its end; run again to continue.
    """
    strategies = as_strategies(mask_strategy)
    check_variants(variants)
    if not qa_pairs:
        raise InputError(f"persona {persona.id!r}: no question is left to extract from: widen the selection")
    with ExitStack() as stack:
        target = store or stack.enter_context(PersonaVectorStore(model_name, activations_dir, variants=variants))
        backend = open_backend(
            model, tokenizer=tokenizer, remote=remote, on_status=on_status, journal=target.root_dir / JOURNAL_FOLDER
        )
        hook_names = resolve_hooks(layers, backend.facts.hook_names, backend.facts.n_layers)
        used = qa_pairs[:1] if all(strategy.persona_only for strategy in strategies) else qa_pairs
        interventions = backend.interventions
        notes = {"reasoning": reasoning} if any(block_of(answer_text(qa)) for qa in used) else {}
        jobs = []
        for variant in variants:
            system, kwargs = system_prompt(persona, variant), template_kwargs
            prompts = persona_prompts(backend.tokenizer, system, used, template_kwargs=kwargs, reasoning=reasoning)
            masked = MaskedPrompts(prompts, strategies)
            if verbose:
                print_masks(masked, strategies, title=f"{persona.name} · {variant}")
            provenances = {
                name: strategy_provenance(backend, model_name, hook_names, name, masked, interventions)
                for name in strategies
            }
            job = VariantJob.prepare(
                backend,
                target,
                persona,
                variant,
                masked,
                provenances,
                force=force,
                batch_tokens=batch_tokens,
                notes=notes,
            )
            if verbose and job.plan is not None:
                print_plan(job.plan, backend.facts, len(hook_names))
            jobs.append(job)
        results = []
        for job in jobs:
            results += job.run(backend, target, show_progress=show_progress, on_status=on_status)
            backend.saved()
        return results
