"""What a model says to prompts, with or without interventions: greedy, one prompt after another.

Prompts are raw texts, chats or token ids. Sampling, batches and servers are not here.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from tl_persona.backends.choice import open_backend
from tl_persona.errors import InputError, PromptError
from tl_persona.prompts.inputs import raw_token_ids
from tl_persona.prompts.template import require_chat_tokenizer
from tl_persona.steering.interventions import Intervention, attach

GenerationPrompt: TypeAlias = str | Sequence[Mapping[str, str]] | Tensor
"""A raw text, the messages of a chat, or token ids as they are: a 1-D tensor of integers."""


@dataclass(frozen=True, eq=False)
class Generation:
    """What was generated for one prompt.

    Attributes:
        prompt: The prompt's place in the list.
        sample: Which of the prompt's samples it is; 0, as generation is greedy.
        ids: The new tokens only, with the one that ended the text.
        text: They as text, without special tokens.
        stopped: `eos` where a token ended the text, `length` where `max_new_tokens` did.

    Example:
        >>> said = Generation(prompt=0, sample=0, ids=torch.tensor([5, 2]), text="Hi", stopped="eos")
        >>> said.text, len(said.ids)
        ('Hi', 2)
    """

    prompt: int
    sample: int
    ids: Int[Tensor, "new"]
    text: str
    stopped: Literal["eos", "length"]


def generate(
    model: Any,
    prompts: Sequence[GenerationPrompt],
    *,
    tokenizer: Any = None,
    template_kwargs: Mapping[str, Any] | None = None,
    max_new_tokens: int,
    interventions: Iterable[Intervention] = (),
) -> list[Generation]:
    """Generate greedily, and alike on every release of TransformerLens and transformers.

    Inside a `steer`, `attach` or `monitor` block, these act. A bridge's own `generate` loses what it has read where
    TransformerLens and transformers do not agree on the name of the cache; this does not.

    Args:
        model: A `HookedTransformer`, a `TransformerBridge` or a transformers model.
        prompts: A `str` is raw text, which the tokenizer gives its special tokens, but never a second BOS. A list of
            messages is a chat, which the template renders up to where the answer begins; one that ends with an
            assistant's message is continued. A tensor of shape (pos,) has the ids themselves.
        tokenizer: Used in place of the model's own.
        template_kwargs: Passed to the chat template, such as `{"enable_thinking": False}`.
        max_new_tokens: The most tokens that are generated for a prompt. A text ends before at a token that the
            checkpoint's generation settings, or its tokenizer, name as its end; other settings are not applied.
        interventions: Edits that act while it runs; see `tl_persona.steering.Intervention`.

    Returns:
        One for each prompt, in order.

    Raises:
        InputError: A prompt is none of these, empty, or with the new tokens longer than the model's context.
        PromptError: The template cannot render a chat.
        ModelError: The model cannot be used.
    """
    from tl_persona.backends.local.backend import LocalBackend
    from tl_persona.backends.local.decoding import continue_greedily, stop_ids_of

    if isinstance(prompts, str | Tensor | Mapping):
        raise InputError(f"prompts must be a list of prompts, got one {type(prompts).__name__}: pass [prompt]")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    backend = open_backend(model, tokenizer=tokenizer)
    if not isinstance(backend, LocalBackend):
        raise InputError("generation on a server is not possible: load the model on this machine")
    rendered = [_ids(place, prompt, backend.tokenizer, template_kwargs or {}) for place, prompt in enumerate(prompts)]
    for place, ids in enumerate(rendered):
        _check(place, ids, max_new_tokens, backend)
    stop_ids = stop_ids_of(backend.model, backend.tokenizer)
    edits = list(interventions)
    found = []
    with attach(backend.model, edits) if edits else nullcontext(), backend.evaluating():
        for place, ids in enumerate(rendered):
            new = continue_greedily(backend.model, ids, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
            ended = len(new) > 0 and int(new[-1]) in stop_ids
            text = backend.tokenizer.decode(new.tolist(), skip_special_tokens=True)
            found.append(Generation(place, 0, new, text, "eos" if ended else "length"))
    return found


def _ids(place: int, prompt: GenerationPrompt, tokenizer: Any, template_kwargs: Mapping[str, Any]) -> Tensor:
    if isinstance(prompt, Tensor):
        if prompt.ndim != 1 or prompt.is_floating_point() or prompt.dtype == torch.bool:
            seen = f"{prompt.dtype} of shape {tuple(prompt.shape)}"
            raise InputError(f"prompt {place}: token ids must be a 1-D tensor of integers, got {seen}")
        return prompt.cpu()
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InputError(f"prompt {place} is a text and the model has no tokenizer: pass tokenizer=")
        return torch.tensor(raw_token_ids(tokenizer, [prompt])[0], dtype=torch.long)
    if not isinstance(prompt, Sequence) or not all(isinstance(turn, Mapping) for turn in prompt) or not prompt:
        raise InputError(f"prompt {place} must be a text, a list of messages or token ids, got {prompt!r}")
    checked: Any = require_chat_tokenizer(tokenizer)
    messages: list[Any] = list(prompt)
    goes_on = messages[-1].get("role") == "assistant"
    try:
        text = checked.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            **template_kwargs,
        )
    except Exception as error:  # a template may raise what it likes
        raise PromptError(f"prompt {place}: the chat template cannot render it: {error}") from error
    # The template has the special tokens already.
    return torch.tensor(checked(text, add_special_tokens=False)["input_ids"], dtype=torch.long)


def _check(place: int, ids: Tensor, max_new_tokens: int, backend: Any) -> None:
    n_ctx, vocabulary = backend.facts.n_ctx, backend.vocabulary
    if not len(ids):
        raise InputError(f"prompt {place} has no token")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise InputError(f"prompt {place} has ids outside the {vocabulary} of the model's vocabulary")
    if n_ctx is not None and len(ids) + max_new_tokens > n_ctx:
        raise InputError(
            f"prompt {place} has {len(ids)} tokens: with {max_new_tokens} new ones that is past the context of {n_ctx}"
        )
