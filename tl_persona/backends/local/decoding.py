"""Greedy generation with a model in this process, under whatever hooks are on it.

A bridge generates through the loop of the transformers model that it wraps, which knows its own cache; the bridge's
attentions are handed the cache under the name that they look for. Rendering prompts is the work of `generation`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_persona.backends.local.trial import trial_of
from tl_persona.models.facts import HookedModel


def continue_greedily(
    model: HookedModel, ids: Int[Tensor, "pos"], *, max_new_tokens: int, stop_ids: Sequence[int]
) -> Int[Tensor, "new"]:
    """The likeliest next tokens one after another, up to and with the first of `stop_ids`; on the CPU.

    Args:
        model: Runs with a key-value cache where it continues one.
        ids: The prompt.
        max_new_tokens: The most that are generated.
        stop_ids: Tokens that end the text.
    """
    prompt = ids[None].to(model.cfg.device)
    run = _by_the_wrapped_model if hasattr(model, "original_model") else _by_its_own_loop
    with torch.no_grad():
        tokens = run(model, prompt, max_new_tokens, list(stop_ids))
    new: Tensor = tokens[0, len(ids) :].cpu()
    return new


def stop_ids_of(model: HookedModel, tokenizer: Any) -> list[int]:
    """The tokens that end a text: those of the checkpoint's generation settings, and the tokenizer's own."""
    settings = getattr(getattr(model, "original_model", None), "generation_config", None)
    found = []
    for value in (getattr(settings, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        found += [value] if isinstance(value, int) else list(value or [])
    return sorted(set(found))


def _by_its_own_loop(model: Any, prompt: Tensor, max_new_tokens: int, stop_ids: list[int]) -> Tensor:
    stops = {"stop_at_eos": True, "eos_token_id": stop_ids} if stop_ids else {"stop_at_eos": False}
    tokens: Tensor = model.generate(
        prompt, max_new_tokens=max_new_tokens, do_sample=False, return_type="tokens", verbose=False, **stops
    )
    return tokens


def _by_the_wrapped_model(model: Any, prompt: Tensor, max_new_tokens: int, stop_ids: list[int]) -> Tensor:
    from transformers import GenerationConfig

    trial = trial_of(model)
    settings = GenerationConfig(  # type: ignore[no-untyped-call, unused-ignore]
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stop_ids or None,
        pad_token_id=stop_ids[0] if stop_ids else 0,  # one text has no padding, and none asks for the id to be set
        use_cache=trial.cache_name is not None,
    )
    with _settings_of(model.original_model, settings), trial.renamed(model):
        tokens: Tensor = model.original_model.generate(prompt, attention_mask=torch.ones_like(prompt))
    return tokens


@contextmanager
def _settings_of(original: Any, settings: Any) -> Iterator[None]:
    """The model's own settings, such as a repetition penalty, are away while the block runs."""
    before = original.generation_config
    original.generation_config = settings
    try:
        yield
    finally:
        original.generation_config = before
