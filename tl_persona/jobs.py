"""One variant of one persona: what has to be computed, and computing it.

A job is prepared for every variant before any of them runs, so that bad input is found before the model works.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tl_persona.backends.base import Backend, OnStatus
from tl_persona.data.personas import PersonaLike
from tl_persona.display import token_progress
from tl_persona.plan.plan import Plan
from tl_persona.prompts.inputs import MaskedPrompts
from tl_persona.prompts.masks import MaskStrategy
from tl_persona.provenance import Provenance, provenance_of, software_versions
from tl_persona.statistics.means import PersonaMean
from tl_persona.store.store import PersonaVectorStore
from tl_persona.tensors import LayerVectors


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
    ) -> "VariantJob":
        """Compares with what is stored and plans the rest.

        Raises:
            InputError: A sample that the model cannot run.
            StoreError: A stored file that cannot be read.
        """
        status = {name: store.status(variant, persona.id, provenances[name], name) for name in provenances}
        todo = tuple(name for name, found in status.items() if force or found.state != "same")
        # After a kill between two saves, the rest comes out of the passes it would have come out of, to the last byte.
        # Its questions run for any other strategy anyway; for persona-only ones, which ask one, they are not all run.
        wide = not all(name.persona_only for name in todo)
        computed = tuple(name for name in provenances if todo and (wide or name.persona_only))
        samples, rows = masked.samples(computed)
        plan = backend.plan(samples, batch_tokens=batch_tokens) if todo else None
        reasons = {name: found.reasons for name, found in status.items()}
        return cls(persona, variant, masked, provenances, reasons, todo, computed, plan, rows)

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
            notes = {**backend.notes, **software_versions()}
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
    backend: Backend, model_name: str, hook_names: Sequence[str], strategy: MaskStrategy, masked: MaskedPrompts
) -> Provenance:
    """What decides the vector of one strategy; how it ran is noted when it is saved."""
    prompts = masked.prompts_of(strategy)
    facts = backend.facts
    return provenance_of(
        model_name=model_name,
        revision=facts.revision,
        dtype=facts.dtype,
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
    )
