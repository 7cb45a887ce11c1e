"""Builds token masks from spans: eight strategies, batched, by broadcasting.

A strategy is a function from a `SpanBatch` to `Bool[Tensor, "batch pos"]`; the one-sample form is a batch of one. A
mask that would select nothing raises a `MaskError`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_persona.errors import InputError, MaskError
from tl_persona.prompts.prompt import Prompt
from tl_persona.tensors import BatchMask


class MaskStrategy(StrEnum):
    """Which tokens of a chat are averaged.

    The persona strategies look at the rendered system prompt, the question strategies at the user's turn, the
    answer strategies at the assistant's answer or the token just before it.

    Example:
        >>> MaskStrategy("answer_first") is MaskStrategy.ANSWER_FIRST, MaskStrategy.PERSONA_MEAN.persona_only
        (True, True)
    """

    PERSONA_MEAN = "persona_mean"
    PERSONA_LAST = "persona_last"
    QUESTION_LAST = "question_last"
    QUESTION_LAST_SPECIAL = "question_last_special"
    ANSWER_PREVIOUS = "answer_previous"
    ANSWER_FIRST = "answer_first"
    ANSWER_LAST = "answer_last"
    ANSWER_MEAN = "answer_mean"

    @property
    def persona_only(self) -> bool:
        """True where the mask depends on the system prompt alone, so that one question suffices."""
        return self in (MaskStrategy.PERSONA_MEAN, MaskStrategy.PERSONA_LAST)


@dataclass(frozen=True)
class SpanBatch:
    """The token spans of several prompts, ready for broadcasting.

    Attributes:
        template: Start and end of the persona span of each prompt, in positions of the padded row.
        question: The same for the question.
        response: The same for the answer.
        is_special: True at special tokens; False on padding.
        is_token: True at the prompt's own tokens, False on padding.
        sample_ids: One id a row, for messages.
    """

    template: Int[Tensor, "batch 2"]
    question: Int[Tensor, "batch 2"]
    response: Int[Tensor, "batch 2"]
    is_special: Bool[Tensor, "batch pos"]
    is_token: Bool[Tensor, "batch pos"]
    sample_ids: tuple[str, ...]

    @classmethod
    def of(
        cls,
        prompts: Sequence[Prompt],
        *,
        padding_side: Literal["left", "right"] = "right",
        device: torch.device | str | None = None,
    ) -> "SpanBatch":
        """Stacks the spans of prompts, padded to the longest on the given side.

        Raises:
            InputError: There is no prompt, or no such side.
        """
        if not prompts:
            raise InputError("there is no prompt to mask: pass at least one")
        if padding_side not in ("left", "right"):
            raise InputError(f"unknown padding side {padding_side!r}: choose left or right")
        cpu = torch.device("cpu")  # where prompts are, whatever torch's default device is
        lengths = torch.tensor([len(prompt.input_ids) for prompt in prompts], device=cpu)
        width = int(lengths.max())
        shift = (width - lengths if padding_side == "left" else torch.zeros_like(lengths))[:, None]
        pos = torch.arange(width, device=cpu)
        is_token = (pos >= shift) & (pos < shift + lengths[:, None])
        is_special = torch.zeros_like(is_token)
        is_special[is_token] = torch.cat([prompt.is_special for prompt in prompts])
        spans = (
            torch.tensor([[span[2:] for span in prompt.spans] for prompt in prompts], device=cpu) + shift[:, :, None]
        )
        template, question, response = spans.to(device).unbind(dim=1)
        ids = tuple(prompt.sample_id for prompt in prompts)
        return cls(template, question, response, is_special.to(device), is_token.to(device), ids)

    @property
    def pos(self) -> Int[Tensor, "pos"]:
        """Positions of the padded rows."""
        return torch.arange(self.is_token.shape[1], device=self.is_token.device)


MaskBuilder = Callable[[SpanBatch], Bool[Tensor, "batch pos"]]


def _inside(batch: SpanBatch, span: Int[Tensor, "batch 2"]) -> BatchMask:
    return (batch.pos >= span[:, :1]) & (batch.pos < span[:, 1:])


def _first(batch: SpanBatch, span: Int[Tensor, "batch 2"]) -> BatchMask:
    return _inside(batch, span) & (batch.pos == span[:, :1])


def _last(batch: SpanBatch, span: Int[Tensor, "batch 2"]) -> BatchMask:
    return _inside(batch, span) & (batch.pos == span[:, 1:] - 1)


def _at(batch: SpanBatch, index: Int[Tensor, "batch 1"]) -> BatchMask:
    # Beside a span may lie the end of the row or padding, which is nobody's token.
    return (batch.pos == index) & batch.is_token


def persona_mean(batch: SpanBatch) -> BatchMask:
    """Every token of the system prompt."""
    return _inside(batch, batch.template)


def persona_last(batch: SpanBatch) -> BatchMask:
    """The last token of the system prompt."""
    return _last(batch, batch.template)


def question_last(batch: SpanBatch) -> BatchMask:
    """The last token of the question."""
    return _last(batch, batch.question)


def question_last_special(batch: SpanBatch) -> BatchMask:
    """The special token right after the question.

    Raises:
        MaskError: The template ends the question in plain text; names the first such sample.
    """
    mask = _at(batch, batch.question[:, 1:]) & batch.is_special
    _require_one(
        batch,
        mask,
        "question_last_special needs a special token right after the question, but the chat template puts plain text "
        "there: use question_last",
    )
    return mask


def answer_previous(batch: SpanBatch) -> BatchMask:
    """The token before the answer, from which its first token is predicted.

    Raises:
        MaskError: The answer starts the prompt.
    """
    mask = _at(batch, batch.response[:, :1] - 1)
    _require_one(batch, mask, "answer_previous needs a token before the answer, which starts the prompt")
    return mask


def answer_first(batch: SpanBatch) -> BatchMask:
    """The first token of the answer."""
    return _first(batch, batch.response)


def answer_last(batch: SpanBatch) -> BatchMask:
    """The last token of the answer."""
    return _last(batch, batch.response)


def answer_mean(batch: SpanBatch) -> BatchMask:
    """Every token of the answer."""
    return _inside(batch, batch.response)


BUILDERS: Mapping[MaskStrategy, MaskBuilder] = {
    MaskStrategy.PERSONA_MEAN: persona_mean,
    MaskStrategy.PERSONA_LAST: persona_last,
    MaskStrategy.QUESTION_LAST: question_last,
    MaskStrategy.QUESTION_LAST_SPECIAL: question_last_special,
    MaskStrategy.ANSWER_PREVIOUS: answer_previous,
    MaskStrategy.ANSWER_FIRST: answer_first,
    MaskStrategy.ANSWER_LAST: answer_last,
    MaskStrategy.ANSWER_MEAN: answer_mean,
}


_NO_TEXT = "the chat has no such text, so use another strategy or give it some"


def _require_one(batch: SpanBatch, mask: BatchMask, message: str) -> None:
    empty = (~mask.any(dim=1)).nonzero()
    if len(empty):
        raise MaskError(f"sample {batch.sample_ids[int(empty[0, 0])]!r}: {message}")


def as_strategy(strategy: str) -> MaskStrategy:
    """The strategy of that name.

    Raises:
        InputError: There is none.

    Example:
        >>> as_strategy("answer_mean") is MaskStrategy.ANSWER_MEAN
        True
    """
    try:
        return MaskStrategy(strategy)
    except ValueError:
        near = get_close_matches(str(strategy).lower(), MaskStrategy, n=1)
        hint = f", did you mean {near[0]!s}?" if near else ":"
        raise InputError(f"unknown mask strategy {strategy!r}{hint} choose from {', '.join(MaskStrategy)}") from None


def as_strategies(strategies: str | Sequence[str]) -> tuple[MaskStrategy, ...]:
    """One strategy or several, checked, in the given order.

    Raises:
        InputError: One is unknown or named twice, or there is none.
    """
    names = (strategies,) if isinstance(strategies, str) else tuple(strategies)
    chosen = tuple(as_strategy(name) for name in names)
    if not chosen:
        raise InputError("no mask strategy was given: pass at least one")
    if len(set(chosen)) != len(chosen):
        raise InputError(f"a mask strategy is named twice: {', '.join(chosen)}")
    return chosen


def build_masks(batch: SpanBatch, strategy: str) -> BatchMask:
    """The masks of a batch for one strategy; every row selects at least one token.

    Masks are bool, shape (batch, pos): True where the token contributes, never on padding. They lie on the batch's
    device. With `*_mean` they select a span, with the other strategies one token.

    Raises:
        InputError: The strategy is unknown.
        MaskError: A row selects nothing; names the sample.
    """
    checked = as_strategy(strategy)
    mask = BUILDERS[checked](batch)
    _require_one(batch, mask, f"{checked} selects none of the prompt's tokens: {_NO_TEXT}")
    return mask


def build_mask(prompt: Prompt, strategy: str) -> Bool[Tensor, "pos"]:
    """The mask of one prompt: `build_masks` on a batch of one."""
    return build_masks(SpanBatch.of([prompt]), strategy)[0]
