"""Turns contrast pairs into samples: two texts a pair, and the tokens of each that count.

A pair is raw text or a chat. In raw text a position counts over the whole text, the tokenizer's BOS included; in a
chat it counts within the last answer, because the turns before it are the same on both sides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from tl_persona.data.contrast import ContrastPair
from tl_persona.errors import InputError
from tl_persona.masks import MaskStrategy, SpanBatch, build_masks
from tl_persona.prompts import Prompt, prepare_messages
from tl_persona.tensors import Sample, TokenMask

TokenPosition: TypeAlias = int | str
"""`"last"`, `"first"`, `"mean"`, an index (negative: from the end), or for chats a mask strategy's name."""

_WORDS = ("last", "first", "mean")


@dataclass(frozen=True)
class ContrastTexts:
    """Contrast pairs ready for a plan.

    Attributes:
        samples: Positive and negative of the first pair, of the second, and so on; one mask row each.
        texts: What was tokenized, in the same order.
        template_digest: Of the chat template in use; None where all texts are raw.
    """

    samples: tuple[Sample, ...]
    texts: tuple[str, ...]
    template_digest: str | None


def contrast_texts(
    tokenizer: Any,
    pairs: Sequence[ContrastPair],
    token_position: TokenPosition = "last",
    *,
    template_kwargs: Mapping[str, Any] | None = None,
) -> ContrastTexts:
    """Renders, tokenizes and masks both sides of every pair.

    Raises:
        InputError: An unknown position, one that lies outside a text, or a mask strategy on raw text; names the pair.
        PromptError: A chat that cannot be rendered or located; names the pair.
    """
    _check(token_position)
    sides = [
        (f"pair {index} {name}", side)
        for index, pair in enumerate(pairs)
        for name, side in (("positive", pair.positive), ("negative", pair.negative))
    ]
    chats = [(name, side) for name, side in sides if not isinstance(side, str)]
    raw = [(name, side) for name, side in sides if isinstance(side, str)]
    # Raw text needs no chat template, and a base model's tokenizer has none.
    rendered = prepare_messages(tokenizer, chats, template_kwargs=template_kwargs) if chats else []
    prompts = {prompt.sample_id: prompt for prompt in rendered}
    chat_masks = _chat_masks(list(prompts.values()), token_position)
    raw_ids = dict(zip((name for name, _ in raw), _tokenize(tokenizer, [side for _, side in raw]), strict=True))
    samples, texts = [], []
    for name, side in sides:
        if isinstance(side, str):
            ids = torch.tensor(raw_ids[name], dtype=torch.long)
            mask = _position_mask(name, 0, len(ids), len(ids), token_position)
            texts.append(side)
        else:
            ids, mask = prompts[name].input_ids, chat_masks[name]
            texts.append(prompts[name].prompt_text)
        samples.append(Sample(name, ids, mask[None]))
    return ContrastTexts(tuple(samples), tuple(texts), rendered[0].proof.template_digest if rendered else None)


def _check(position: TokenPosition) -> None:
    if isinstance(position, bool) or not isinstance(position, int | str):
        raise InputError(
            f"token_position {position!r} is no position: use last, first, mean, an int or a mask strategy"
        )
    if isinstance(position, str) and position not in (*_WORDS, *MaskStrategy):
        raise InputError(f"unknown token_position {position!r}: use {', '.join((*_WORDS, *MaskStrategy))} or an int")


def _tokenize(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Raw text as the tokenizer sees it, BOS included, but never a second BOS before one that the text has."""
    if not texts:
        return []
    if tokenizer is None:
        raise InputError("the model has no tokenizer: pass one")
    bos: str = getattr(tokenizer, "bos_token", None) or ""
    return [list(tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"]) for text in texts]


def _position_mask(name: str, start: int, end: int, width: int, position: TokenPosition) -> TokenMask:
    """The mask over `width` tokens for a position within the tokens `start` to `end`."""
    length = end - start
    if position == "mean":
        chosen = range(start, end)
    else:
        index = {"last": -1, "first": 0}.get(position, position) if isinstance(position, str) else position
        if not isinstance(index, int):
            raise InputError(f"{name}: {position} needs a chat with a question and an answer, this is raw text")
        if not -length <= index < length:
            raise InputError(f"{name}: position {index} lies outside its {length} tokens")
        chosen = range(start + index % length, start + index % length + 1)
    pos = torch.arange(width)
    return (pos >= chosen.start) & (pos < chosen.stop)


def _chat_masks(prompts: Sequence[Prompt], position: TokenPosition) -> dict[str, TokenMask]:
    if not prompts:
        return {}
    if isinstance(position, str) and position in list(MaskStrategy):
        masks = build_masks(SpanBatch.of(prompts), position)
        return {prompt.sample_id: mask[: len(prompt.input_ids)] for prompt, mask in zip(prompts, masks, strict=True)}
    return {
        prompt.sample_id: _position_mask(
            prompt.sample_id,
            prompt.spans.response.token_start,
            prompt.spans.response.token_end,
            len(prompt.input_ids),
            position,
        )
        for prompt in prompts
    }
