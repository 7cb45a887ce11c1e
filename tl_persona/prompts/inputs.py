"""What goes to a model: prompts with their masks, and the texts of contrast pairs with a token position."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_persona.data.contrast import ContrastPair
from tl_persona.data.personas import QALike, answer_text, question_text
from tl_persona.display import Card, Piece, Shown, TokenView, token_texts
from tl_persona.errors import InputError
from tl_persona.prompts.masks import MaskStrategy, SpanBatch, as_strategy, build_masks
from tl_persona.prompts.prepare import Chat, prepare_messages, prepare_prompts
from tl_persona.prompts.prompt import Prompt
from tl_persona.prompts.reasoning import Reasoning
from tl_persona.tensors import Sample, TokenMask

TokenPosition: TypeAlias = int | str
"""`"last"`, `"first"`, `"mean"`, an index (negative: from the end), or for chats a mask strategy's name."""

_WORDS = ("last", "first", "mean")
_WITHOUT_TOKEN_0 = ("first", "mean")


@dataclass(frozen=True)
class ContrastTexts:
    """Contrast pairs ready for a plan.

    Attributes:
        samples: Positive and negative of the first pair, of the second, and so on; one mask row each.
        texts: What was tokenized, in the same order.
        template_digest: Of the chat template in use; None where all texts are raw.
        include_first: Whether a mean or first token of raw text may be token 0; None where that decides nothing.
    """

    samples: tuple[Sample, ...]
    texts: tuple[str, ...]
    template_digest: str | None
    include_first: bool | None


def contrast_texts(
    tokenizer: Any,
    pairs: Sequence[ContrastPair],
    token_position: TokenPosition = "last",
    *,
    include_first: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> ContrastTexts:
    """Renders, tokenizes and masks both sides of every pair.

    In raw text `mean` and `first` leave token 0 out, BOS or not: many models give whatever stands there an activation
    of enormous norm that says nothing of the text. `include_first` brings it back.

    Raises:
        InputError: An unknown position, one that lies outside a text, a text that has nothing after token 0, or a mask
            strategy on raw text; names the pair.
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
    raw_ids = dict(zip((name for name, _ in raw), raw_token_ids(tokenizer, [side for _, side in raw]), strict=True))
    samples, texts = [], []
    for name, side in sides:
        if isinstance(side, str):
            ids = torch.tensor(raw_ids[name], dtype=torch.long)
            mask = _raw_mask(name, len(ids), token_position, include_first)
            texts.append(side)
        else:
            ids, mask = prompts[name].input_ids, chat_masks[name]
            texts.append(prompts[name].prompt_text)
        samples.append(Sample(name, ids, mask[None]))
    return ContrastTexts(
        samples=tuple(samples),
        texts=tuple(texts),
        template_digest=rendered[0].proof.template_digest if rendered else None,
        include_first=include_first if raw and token_position in _WITHOUT_TOKEN_0 else None,
    )


def _check(position: TokenPosition) -> None:
    if isinstance(position, bool) or not isinstance(position, int | str):
        raise InputError(
            f"token_position {position!r} is no position: use last, first, mean, an int or a mask strategy"
        )
    if isinstance(position, str) and position not in (*_WORDS, *MaskStrategy):
        raise InputError(f"unknown token_position {position!r}: use {', '.join((*_WORDS, *MaskStrategy))} or an int")


def raw_token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Raw text as the tokenizer sees it, BOS included, but never a second BOS before one that the text has.

    Raises:
        InputError: There are texts and no tokenizer.
    """
    if not texts:
        return []
    if tokenizer is None:
        raise InputError("the model has no tokenizer: pass one")
    bos: str = getattr(tokenizer, "bos_token", None) or ""
    return [list(tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"]) for text in texts]


def _raw_mask(name: str, length: int, position: TokenPosition, include_first: bool) -> TokenMask:
    start = 0 if include_first or position not in _WITHOUT_TOKEN_0 else 1
    if length == 1 and start == 1:
        raise InputError(
            f"{name}: the text is one token alone, and {position} of raw text leaves token 0 out: write a longer text, "
            "or pass include_first=True (--include-first)"
        )
    return _position_mask(name, start, length, length, position)


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
    reasoning: Reasoning = "include",
) -> list[PreparedInput]:
    """Renders question and answer of every pair under one system prompt and masks their tokens.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        system_prompt: The persona's text.
        qa_pairs: The questions; a multiple-choice row is answered by its letter.
        mask_strategy: Which tokens the masks select.
        template_kwargs: Passed to the chat template.
        reasoning: `"include"` counts a block of reasoning that an answer begins with as answer, as far as the template
            shows it; `"exclude"` leaves it out.

    Raises:
        InputError: A pair that cannot be rendered, located or masked; names the sample.
    """
    strategy = as_strategy(mask_strategy)
    prompts = persona_prompts(tokenizer, system_prompt, qa_pairs, template_kwargs=template_kwargs, reasoning=reasoning)
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
    reasoning: Reasoning = "include",
) -> list[Prompt]:
    """The rendered chats of `prepare_inputs`, without masks.

    Raises:
        InputError: A pair that cannot be rendered or located; names the sample.
    """
    chats = [Chat(qa.qid, system_prompt, question_text(qa), answer_text(qa)) for qa in qa_pairs]
    return prepare_prompts(tokenizer, chats, template_kwargs=template_kwargs, reasoning=reasoning)


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
