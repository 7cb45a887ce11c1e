"""Steering vectors by Contrastive Activation Addition, the recipe: pairs -> texts -> plan -> backend -> vectors.

Method: Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition" (2024): mean activation over texts that
show a behaviour minus the mean over texts that do not. All layers come out of one pass over the texts, and so do the
statistics that say which layer to trust.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from jaxtyping import Float
from torch import Tensor

from tl_persona.backends.base import Backend, OnStatus
from tl_persona.backends.choice import open_backend
from tl_persona.data.contrast import ContrastPairDataset, as_pairs
from tl_persona.display import token_progress
from tl_persona.errors import HookError, InputError
from tl_persona.models.hooks import LayerChoice, LayerSelection, layer_of, resolve_hooks
from tl_persona.prompts.inputs import ContrastTexts, TokenPosition, contrast_texts
from tl_persona.provenance import Provenance, software_versions, text_digest
from tl_persona.statistics.directions import Direction, mean_difference
from tl_persona.statistics.layers import layer_statistics
from tl_persona.statistics.means import ActivationSpool
from tl_persona.statistics.outliers import OUTLYING, OutlierTally
from tl_persona.tensors import Sample
from tl_persona.vectors.vector import SteeringVector
from tl_persona.vectors.vector_set import SteeringVectorSet

METHOD_NAMES = {"mean_difference": "caa", "pca_direction": "pca", "logistic_direction": "logistic"}
"""`extraction_method` of the bundled directions; another function's own name is taken as it is."""


def extract_caa_vector(
    model: Any,
    tokenizer: Any,
    contrast_pairs: ContrastPairDataset | Iterable[Any],
    layer_idx: LayerChoice,
    token_position: TokenPosition = "last",
    batch_size: int | None = None,
    show_progress: bool = True,
    **options: Any,
) -> SteeringVector:
    """The steering vector of one layer; `extract_caa_vectors` gives many at the price of one.

    Args:
        model: What `load_model` returns, or any model `open_backend` takes.
        tokenizer: None takes the model's own.
        contrast_pairs: See `extract_caa_vectors`.
        layer_idx: A layer, or the name of one hook.
        token_position: See `extract_caa_vectors`.
        batch_size: Rows a forward pass may have at most, a row being a text, or several packed into one where they
            share a prefix; None leaves it to the token budget.
        show_progress: Shows a bar on a terminal.
        **options: Any other argument of `extract_caa_vectors`.

    Raises:
        HookError: The model has no such layer, or the choice means several.
        InputError: See `extract_caa_vectors`.
    """
    facts = open_backend(model, tokenizer=tokenizer, remote=bool(options.get("remote"))).facts
    chosen = resolve_hooks(layer_idx, facts.hook_names, facts.n_layers)
    if len(chosen) != 1:
        raise HookError(f"{layer_idx!r} means {len(chosen)} layers: use extract_caa_vectors, at the same cost")
    (vector,) = extract_caa_vectors(
        model, tokenizer, contrast_pairs, chosen, token_position, show_progress, batch_size=batch_size, **options
    )
    return vector


def extract_caa_vectors(
    model: Any,
    tokenizer: Any,
    contrast_pairs: ContrastPairDataset | Iterable[Any],
    layer_indices: LayerSelection = None,
    token_position: TokenPosition = "last",
    show_progress: bool = True,
    *,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    behavior: str | None = None,
    direction: Direction = mean_difference,
    include_first: bool = False,
    seed: int = 0,
    remote: bool = False,
    on_status: OnStatus | None = None,
    journal: Path | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    model_name: str | None = None,
) -> SteeringVectorSet:
    """Steering vectors of many layers out of one pass over the texts, with statistics for each.

    Args:
        model: What `load_model` returns, or any model `open_backend` takes.
        tokenizer: None takes the model's own.
        contrast_pairs: A `ContrastPairDataset`, or a list of `{"positive", "negative"}` or of records with these
            attributes; each side is raw text or chat messages.
        layer_indices: Which layers (see `models.hooks.resolve_hooks`); None is the output of every block.
        token_position: `"last"`, `"first"`, `"mean"` or an index: over the whole of a raw text, within the answer of a
            chat; or, for chats, a mask strategy. `"first"` and `"mean"` of a raw text leave its token 0 out.
        show_progress: Shows a bar on a terminal.
        batch_size: Rows a forward pass may have at most, a row being a text, or several packed into one where they
            share a prefix; None leaves it to the token budget.
        batch_tokens: Padded tokens a forward pass may hold; None is the plan's default.
        behavior: Name of the behaviour; None takes the data set's.
        direction: What turns both sides' activations into a direction (see `directions`), or a function of yours with
            that signature.
        include_first: Whether `"first"` and `"mean"` of a raw text take its token 0 in, BOS or not, whose activation is
            enormous in many models; no effect on chats and other positions.
        seed: Of the statistics' folds, halvings and resamples.
        remote: True runs on NDIF; `model` may then be a name.
        on_status: Told how remote jobs are (see `backends.OnStatus`).
        journal: Folder in which a remote run keeps what it needs to continue after it was killed; None keeps nothing.
        template_kwargs: Passed to the chat template.
        model_name: Recorded in place of the model's own name.

    Returns:
        One vector a layer, float32, with `num_pairs`, `token_position`, `pos_mean_norm`, `neg_mean_norm`,
        `vector_norm`, `statistics` and `outliers` in its metadata, and `include_first` where that decided which tokens
        count. Selected tokens of outlying norm (see `statistics.outliers`) are kept, and a warning names the worst.

    Raises:
        InputError: No pairs, a pair that cannot be used, a position outside a text or up to which both sides of every
            pair are the same, a raw text without a token after token 0, or a text longer than the model's context
            (nothing is truncated); before the model runs. Both sides of every pair have the same activation at a layer,
            so that its vector would be zero.
        HookError: A layer the model does not have, or two hooks of one block.
        NonFiniteError: An activation holds NaN or infinity.
        RemoteError: A remote run did not come to its end.
    """
    pairs = as_pairs(contrast_pairs, behavior)
    backend = open_backend(model, tokenizer=tokenizer, remote=remote, on_status=on_status, journal=journal)
    hook_names = resolve_hooks(layer_indices, backend.facts.hook_names, backend.facts.n_layers)
    layers = _layers(hook_names)
    inputs = contrast_texts(
        backend.tokenizer, list(pairs), token_position, include_first=include_first, template_kwargs=template_kwargs
    )
    # What acts on the model may look at a whole text, so that equal beginnings have other activations.
    if not backend.interventions and all(map(_begin_alike, inputs.samples[0::2], inputs.samples[1::2])):
        why = "the tokens up to there are the same, and a model sees no token that follows"
        raise _no_difference(pairs, token_position, f"every layer: {why}")
    plan = backend.plan(inputs.samples, batch_tokens=batch_tokens, max_rows=batch_size)
    tally = OutlierTally(len(hook_names), expects_first=bool(inputs.include_first))
    spool = ActivationSpool(len(hook_names), len(inputs.samples), backend.facts.d_model)
    try:
        title = f"{pairs.behavior}, {len(hook_names)} layers"
        with token_progress(title, plan.tokens, computed=plan.tokens_distinct, show=show_progress) as advance:
            for pooled in backend.pool(plan, hook_names):
                spool.write(pooled.sample, pooled.means[0].float())
                tally.add(pooled.sample, pooled.norms, plan.samples[pooled.sample].masks[0].cpu())
                advance(len(plan.samples[pooled.sample].input_ids))
        vectors = SteeringVectorSet(pairs.behavior)
        chosen: dict[str, Any] = {"token_position": token_position}
        if inputs.include_first is not None:
            chosen["include_first"] = inputs.include_first
        method = METHOD_NAMES.get(_name(direction), _name(direction))
        provenance = _provenance(backend, model_name, hook_names, token_position, pairs, inputs)
        same = [name for index, name in enumerate(hook_names) if _sides_are_equal(spool.read(index))]
        if same:
            advice = ", or leave these hooks out" if len(same) < len(hook_names) else ""
            raise _no_difference(pairs, token_position, ", ".join(same), advice)
        for index, (hook_name, layer) in enumerate(zip(hook_names, layers, strict=True)):
            activations = spool.read(index)
            pos, neg = activations[0::2], activations[1::2]
            statistics = layer_statistics(pos, neg, direction=direction, seed=seed)
            vectors.add(
                SteeringVector(
                    behavior=pairs.behavior,
                    layer_index=layer,
                    vector=direction(pos, neg).float(),
                    model_name=model_name or backend.facts.name,
                    extraction_method=method,
                    metadata={**chosen, **statistics.as_metadata(), "outliers": tally.as_metadata(index)},
                    hook_name=hook_name,
                    provenance=msgspec.structs.replace(provenance, hook_names=(hook_name,)),
                )
            )
    finally:
        spool.close()
    backend.saved()
    _warn_of(tally, pairs.behavior, layers, inputs, backend.tokenizer)
    return vectors


def _warn_of(tally: OutlierTally, behavior: str, layers: Sequence[int], inputs: ContrastTexts, tokenizer: Any) -> None:
    if not tally.hooks or tally.worst is None:
        return
    worst, sample = tally.worst, inputs.samples[tally.worst.sample]
    token = tokenizer.decode([int(sample.input_ids[worst.position])])
    share = max((tally.largest_share(hook) or 0.0 for hook in tally.hooks), default=0.0)
    weight = f" One token is up to {share:.0%} of a mean." if share else ""
    warnings.warn(
        f"the vectors for {behavior!r}: at {len(tally.hooks)} of {len(layers)} layers, selected tokens have a norm at "
        f"least {OUTLYING:g} times the median of their text, up to {tally.most} at one layer; the worst is {token!r}, "
        f"token {worst.position} of {sample.sample_id}, {worst.ratio:.0f} times at layer {layers[worst.hook]}. They "
        f"were not removed.{weight} Look at the outliers of each layer in summary(), and choose a layer without them, "
        "or another token_position",
        stacklevel=3,
    )


def _begin_alike(one: Sample, other: Sample) -> bool:
    """Whether two samples have the same tokens up to the last that a mask selects, and the same of them selected."""
    end = 1 + max(int(selected) for sample in (one, other) for selected in (-1, *sample.masks.nonzero()[:, 1]))
    return torch.equal(one.input_ids[:end], other.input_ids[:end]) and torch.equal(
        one.masks[:, :end], other.masks[:, :end]
    )


def _sides_are_equal(activations: Float[Tensor, "row d_model"]) -> bool:
    return torch.equal(activations[0::2], activations[1::2])


def _no_difference(pairs: ContrastPairDataset, position: TokenPosition, where: str, advice: str = "") -> InputError:
    number = f"{len(pairs)} pair{'s' if len(pairs) > 1 else ''}"
    return InputError(
        f"both sides of every pair for {pairs.behavior!r} ({number}) have the same activation at token_position "
        f"{position!r}, at {where}. The vector would be zero: choose a position where they differ, such as 'mean', "
        f"within the answers of chats{advice}"
    )


def _name(direction: Direction) -> str:
    return getattr(direction, "__name__", type(direction).__name__)


def _layers(hook_names: tuple[str, ...]) -> list[int]:
    layers: list[int] = []
    for name in hook_names:
        layer = layer_of(name)
        if layer is None:
            raise HookError(f"hook {name!r} belongs to no block, so its vector has no layer: choose a hook of a block")
        if layer in layers:
            raise HookError(f"two hooks of block {layer} are chosen ({name!r} is the second): extract them apart")
        layers.append(layer)
    return layers


def _provenance(
    backend: Backend,
    model_name: str | None,
    hook_names: tuple[str, ...],
    token_position: TokenPosition,
    pairs: ContrastPairDataset,
    inputs: ContrastTexts,
) -> Provenance:
    facts = backend.facts
    return Provenance(
        model_name=model_name or facts.name,
        revision=facts.revision,
        dtype=facts.held_in,
        weights=facts.weights,
        hook_names=hook_names,
        strategy=str(token_position),
        prompts_digest=text_digest(inputs.texts),
        sample_ids=tuple(sample.sample_id for sample in inputs.samples),
        template_digest=inputs.template_digest,
        weights_digest=facts.weights_digest,
        interventions=backend.interventions,
        notes={"pairs_digest": pairs.digest(), "n_layers": facts.n_layers, **backend.notes, **software_versions()},
    )
