"""Persona extraction, the recipe: samples -> prompts -> masks -> plan -> backend -> mean -> store.

Method: the mean residual over chosen tokens of a persona's answers, one vector a layer, as persona-vectors 0.8 does
it; here all strategies and all layers come out of the same forward passes.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_persona.backends.base import JOURNAL_FOLDER, OnStatus
from tl_persona.backends.choice import open_backend
from tl_persona.data.personas import PersonaLike, QALike, system_prompt
from tl_persona.errors import InputError
from tl_persona.jobs import ExtractionResult, VariantJob, pooled_means, strategy_provenance
from tl_persona.models.hooks import LayerSelection, resolve_hooks
from tl_persona.prompts.inputs import MaskedPrompts, PreparedInput, persona_prompts, prepare_inputs
from tl_persona.prompts.masks import MaskStrategy, as_strategies
from tl_persona.prompts.preview import print_masks, print_plan
from tl_persona.store.store import PersonaVectorStore
from tl_persona.tensors import LayerVectors, Sample

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
) -> list[ExtractionResult]:
    """Extracts one persona's vectors for every variant and strategy, and saves them.

    All strategies of a variant share its forward passes. A persona-only strategy looks at the first question alone.
    A vector that is stored and would come out the same is not computed again.

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
        force: True computes what is stored again.
        batch_tokens: Padded tokens a forward pass may hold; None is the plan's default.
        show_progress: Shows a bar on a terminal.
        store: Where to save, in place of `activations_dir`; the caller flushes it. One store for many personas saves
            the bookkeeping that each call would do.
        tokenizer: Used in place of the model's own; a plain transformers model needs it.

    Returns:
        One result for each variant and strategy, in that order.

    Raises:
        InputError: Anything wrong with the samples, variants, strategies or layers; before the model runs.
        NonFiniteError: An activation holds NaN or infinity.
        StoreError: The vector cannot be saved.
        RemoteError: A remote run did not come to its end; run again to continue.
    """
    strategies = as_strategies(mask_strategy)
    if isinstance(variants, str):
        raise InputError(f"variants is the text {variants!r}: pass a sequence such as ({variants!r},)")
    if not variants:
        raise InputError("no prompt variant was given: pass at least one")
    if not qa_pairs:
        raise InputError(f"persona {persona.id!r}: no question is left to extract from: widen the selection")
    with ExitStack() as stack:
        target = store or stack.enter_context(PersonaVectorStore(model_name, activations_dir, variants=variants))
        backend = open_backend(
            model, tokenizer=tokenizer, remote=remote, on_status=on_status, journal=target.root_dir / JOURNAL_FOLDER
        )
        hook_names = resolve_hooks(layers, backend.facts.hook_names, backend.facts.n_layers)
        used = qa_pairs[:1] if all(strategy.persona_only for strategy in strategies) else qa_pairs
        jobs = []
        for variant in variants:
            system = system_prompt(persona, variant)
            prompts = persona_prompts(backend.tokenizer, system, used, template_kwargs=template_kwargs)
            masked = MaskedPrompts(prompts, strategies)
            if verbose:
                print_masks(masked, strategies, title=f"{persona.name} · {variant}")
            provenances = {
                name: strategy_provenance(backend, model_name, hook_names, name, masked) for name in strategies
            }
            job = VariantJob.prepare(
                backend, target, persona, variant, masked, provenances, force=force, batch_tokens=batch_tokens
            )
            if verbose and job.plan is not None:
                print_plan(job.plan, backend.facts, len(hook_names))
            jobs.append(job)
        results = []
        for job in jobs:
            results += job.run(backend, target, show_progress=show_progress, on_status=on_status)
            backend.saved()
        return results
