"""Prompts with their masks: what the persona recipe hands to the plan.

`PreparedInput` is one prompt under one strategy; `MaskedPrompts` is many prompts under several strategies, whose masks
share the forward passes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_persona.data.personas import QALike, answer_text, question_text
from tl_persona.display import Card, Piece, Shown, TokenView, token_texts
from tl_persona.masks import MaskStrategy, SpanBatch, as_strategy, build_masks
from tl_persona.prompts import Chat, Prompt, prepare_prompts
from tl_persona.tensors import Sample, TokenMask


@dataclass(frozen=True)
class PreparedInput(Prompt, Shown):
    """A rendered chat, its spans, and the mask of one strategy.

    Attributes:
        token_mask: True where the token contributes, shape (pos,); aligned with `input_ids`.
        mask_strategy: The strategy.
    """

    token_mask: Bool[Tensor, "pos"]
    mask_strategy: MaskStrategy

    def _card(self) -> Card:
        facts = {
            "question": self.question,
            "strategy": str(self.mask_strategy),
            "selected": f"{int(self.token_mask.sum())} of {len(self.input_ids)} tokens",
        }
        return Card(f"prepared input {self.sample_id}", facts, _masked_view(self))


def prepare_inputs(
    tokenizer: Any,
    system_prompt: str,
    qa_pairs: Sequence[QALike],
    mask_strategy: str = MaskStrategy.ANSWER_MEAN,
    *,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[PreparedInput]:
    """Renders question and answer of every pair under one system prompt and masks their tokens.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        system_prompt: The persona's text.
        qa_pairs: The questions; a multiple-choice row is answered by its letter.
        mask_strategy: Which tokens the masks select.
        template_kwargs: Passed to the chat template.

    Raises:
        InputError: A pair that cannot be rendered, located or masked; names the sample.
    """
    strategy = as_strategy(mask_strategy)
    prompts = persona_prompts(tokenizer, system_prompt, qa_pairs, template_kwargs=template_kwargs)
    if not prompts:
        return []
    masks = build_masks(SpanBatch.of(prompts), strategy)
    return [
        PreparedInput(
            **{field.name: getattr(prompt, field.name) for field in fields(Prompt)},
            token_mask=mask[: len(prompt.input_ids)],
            mask_strategy=strategy,
        )
        for prompt, mask in zip(prompts, masks, strict=True)
    ]


def persona_prompts(
    tokenizer: Any,
    system_prompt: str,
    qa_pairs: Sequence[QALike],
    *,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[Prompt]:
    """The rendered chats of `prepare_inputs`, without masks.

    Raises:
        InputError: A pair that cannot be rendered or located; names the sample.
    """
    chats = [Chat(qa.qid, system_prompt, question_text(qa), answer_text(qa)) for qa in qa_pairs]
    return prepare_prompts(tokenizer, chats, template_kwargs=template_kwargs)


_SPAN_STYLES = {
    "template": ("cyan", "border-bottom:2px solid #0072B2"),
    "question": ("yellow", "border-bottom:2px solid #E69F00"),
    "response": ("green", "border-bottom:2px solid #009E73"),
}
_SPOKEN = {"template": "persona", "question": "question", "response": "answer"}


def _masked_view(prompt: PreparedInput) -> TokenView:
    """The text with its spans underlined in a colour each, and the selected tokens marked."""
    pieces = []
    texts = token_texts(prompt.prompt_text, prompt.offset_mapping)
    for index, ((gap, text), selected) in enumerate(zip(texts, prompt.token_mask.tolist(), strict=True)):
        if gap:
            pieces.append(Piece(gap))
        spans = zip(prompt.spans._fields, prompt.spans, strict=True)
        name = next((name for name, span in spans if span.token_start <= index < span.token_end), None)
        rich, css = ("", "") if name is None else _SPAN_STYLES[name]
        if selected:
            rich, css = f"{rich} bold reverse", f"{css};background:#ffe08a;font-weight:bold"
        tip = " ".join([*([] if name is None else [_SPOKEN[name]]), *(["selected"] if selected else [])])
        pieces.append(Piece(text, rich.strip(), css, tip))
    return TokenView(tuple(pieces))


class MaskedPrompts:
    """Prompts of one persona and the masks of several strategies over them.

    Args:
        prompts: In sample order, at least one.
        strategies: The strategies; a persona-only one masks the first prompt alone.

    Raises:
        MaskError: A strategy selects nothing in a prompt; names the sample.
    """

    def __init__(self, prompts: Sequence[Prompt], strategies: Sequence[MaskStrategy]) -> None:
        self._prompts = tuple(prompts)
        self._masks: dict[MaskStrategy, list[TokenMask]] = {}
        for strategy in strategies:
            used = self.prompts_of(strategy)
            masks = build_masks(SpanBatch.of(used), strategy)
            self._masks[strategy] = [mask[: len(prompt.input_ids)] for mask, prompt in zip(masks, used, strict=True)]

    def prompts_of(self, strategy: MaskStrategy) -> tuple[Prompt, ...]:
        """The prompts that the strategy looks at."""
        return self._prompts[:1] if strategy.persona_only else self._prompts

    def mask_of(self, strategy: MaskStrategy, index: int) -> TokenMask:
        """The strategy's mask over prompt `index`."""
        return self._masks[strategy][index]

    def samples(self, strategies: Sequence[MaskStrategy]) -> tuple[list[Sample], list[list[int]]]:
        """What to run for some of the strategies.

        Returns:
            The samples, and for each of them which of `strategies`, by index, its mask rows belong to.
        """
        samples, rows = [], []
        for index, prompt in enumerate(self._prompts):
            wanted = [row for row, strategy in enumerate(strategies) if index < len(self._masks[strategy])]
            if wanted:
                masks = torch.stack([self._masks[strategies[row]][index] for row in wanted])
                samples.append(Sample(prompt.sample_id, prompt.input_ids, masks))
                rows.append(wanted)
        return samples, rows
