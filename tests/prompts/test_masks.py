import random
from typing import Any, Literal

import pytest
import torch
from chat_families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import BEHAVIOURS, Behaviour
from tokenizer_kinds import fast_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tl_persona.errors import InputError, MaskError
from tl_persona.prompts.masks import (
    BUILDERS,
    MaskStrategy,
    SpanBatch,
    as_strategies,
    as_strategy,
    build_mask,
    build_masks,
)
from tl_persona.prompts.prepare import Chat, prepare_messages, prepare_prompts
from tl_persona.prompts.prompt import Prompt, PromptSpans, Span, SpanProof

Side = Literal["left", "right"]
SIDES: tuple[Side, ...] = ("left", "right")
S = MaskStrategy
SPAN_OF = {
    S.PERSONA_MEAN: "template",
    S.PERSONA_LAST: "template",
    S.QUESTION_LAST: "question",
    S.ANSWER_FIRST: "response",
    S.ANSWER_LAST: "response",
    S.ANSWER_MEAN: "response",
}
"""The strategies that look inside a span. The other two look beside one."""

every_strategy = pytest.mark.parametrize("strategy", list(MaskStrategy))


def a_prompt(gaps: tuple[int, int, int, int], lengths: tuple[int, int, int], special: set[int], name: str) -> Prompt:
    """A prompt of made-up tokens: gap, persona, gap, question, gap, answer, gap; one character a token."""
    spans, position = [], 0
    for gap, length in zip(gaps[:3], lengths, strict=True):
        start = position + gap
        position = start + length
        spans.append(Span(start, position, start, position))
    n_pos = position + gaps[3]
    return Prompt(
        sample_id=name,
        question="q",
        prompt_text="x" * n_pos,
        spans=PromptSpans(*spans),
        offset_mapping=[(index, index + 1) for index in range(n_pos)],
        input_ids=torch.arange(n_pos),
        is_special=torch.tensor([index in special for index in range(n_pos)]),
        proof=SpanProof((), ("x" * n_pos,), folded=False, template_digest=""),
    )


Shape = tuple[tuple[int, int, int, int], tuple[int, int, int], set[int], str]
"""Arguments of `a_prompt`."""


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Prompts for which every strategy selects something: a special token lies right behind the question."""
    gap, length = st.integers(0, 4), st.integers(1, 6)
    gaps = (draw(gap), draw(gap), draw(st.integers(1, 4)), draw(gap))
    lengths = (draw(length), draw(length), draw(length))
    behind_question = sum(gaps[:2]) + sum(lengths[:2])
    return gaps, lengths, {behind_question}, f"s{draw(st.integers(0, 99))}"


batches = st.lists(shapes(), min_size=1, max_size=6)


def expected_indices(prompt: Prompt, strategy: MaskStrategy) -> set[int]:
    """What a strategy selects, by its description, as token indices."""
    persona, question, answer = (range(span.token_start, span.token_end) for span in prompt.spans)
    return {
        S.PERSONA_MEAN: set(persona),
        S.PERSONA_LAST: {persona[-1]},
        S.QUESTION_LAST: {question[-1]},
        S.QUESTION_LAST_SPECIAL: {question[-1] + 1},
        S.ANSWER_PREVIOUS: {answer[0] - 1},
        S.ANSWER_FIRST: {answer[0]},
        S.ANSWER_LAST: {answer[-1]},
        S.ANSWER_MEAN: set(answer),
    }[strategy]


def selected(mask: torch.Tensor) -> set[int]:
    return set(mask.nonzero().flatten().tolist())


@every_strategy
@given(drawn=batches)
@settings(deadline=None)
def test_a_mask_selects_what_the_strategy_says_on_either_padding_side(
    strategy: MaskStrategy, drawn: list[Shape]
) -> None:
    batch = [a_prompt(*shape) for shape in drawn]
    width = max(len(prompt.input_ids) for prompt in batch)
    for side in SIDES:
        masks = build_masks(SpanBatch.of(batch, padding_side=side), strategy)
        assert masks.dtype == torch.bool
        for prompt, mask in zip(batch, masks, strict=True):
            shift = width - len(prompt.input_ids) if side == "left" else 0
            assert selected(mask) == {index + shift for index in expected_indices(prompt, strategy)}


@every_strategy
@given(drawn=batches)
@settings(deadline=None)
def test_batched_masks_equal_masks_one_at_a_time(strategy: MaskStrategy, drawn: list[Shape]) -> None:
    batch = [a_prompt(*shape) for shape in drawn]
    for side in SIDES:
        spans = SpanBatch.of(batch, padding_side=side)
        for prompt, mask, is_token in zip(batch, build_masks(spans, strategy), spans.is_token, strict=True):
            assert torch.equal(mask[is_token], build_mask(prompt, strategy))
            assert not mask[~is_token].any()


@every_strategy
@given(drawn=batches, draw=st.randoms())
@settings(deadline=None)
def test_permuting_the_batch_permutes_the_masks(
    strategy: MaskStrategy, drawn: list[Shape], draw: random.Random
) -> None:
    batch = [a_prompt(*shape) for shape in drawn]
    order = list(range(len(batch)))
    draw.shuffle(order)
    for side in SIDES:
        masks = build_masks(SpanBatch.of(batch, padding_side=side), strategy)
        permuted = build_masks(SpanBatch.of([batch[index] for index in order], padding_side=side), strategy)
        assert torch.equal(permuted, masks[order])


@given(drawn=batches, side=st.sampled_from(SIDES))
@settings(deadline=None)
def test_strategies_are_related_as_their_names_say(drawn: list[Shape], side: Side) -> None:
    batch = [a_prompt(*shape) for shape in drawn]
    spans = SpanBatch.of(batch, padding_side=side)
    masks = {strategy: build_masks(spans, strategy) for strategy in MaskStrategy}
    for strategy, name in SPAN_OF.items():
        mean = {"template": S.PERSONA_MEAN, "response": S.ANSWER_MEAN}.get(name, strategy)
        assert not (masks[strategy] & ~masks[mean]).any()
    for strategy in set(MaskStrategy) - {S.PERSONA_MEAN, S.ANSWER_MEAN}:
        assert (masks[strategy].sum(dim=1) == 1).all()
    assert torch.equal(masks[S.ANSWER_PREVIOUS].roll(1, dims=1), masks[S.ANSWER_FIRST])
    assert torch.equal(masks[S.QUESTION_LAST].roll(1, dims=1), masks[S.QUESTION_LAST_SPECIAL])
    assert not (masks[S.QUESTION_LAST_SPECIAL] & ~spans.is_special).any()


@every_strategy
@given(
    ends=st.lists(st.tuples(st.integers(-2, 9), st.integers(-2, 9)), min_size=3, max_size=3),
    special=st.lists(st.booleans(), min_size=8, max_size=8),
)
@settings(deadline=None)
def test_no_builder_leaves_its_span_or_the_row_whatever_the_spans(
    strategy: MaskStrategy, ends: list[tuple[int, int]], special: list[bool]
) -> None:
    template, question, response = (torch.tensor([pair]) for pair in ends)
    is_token = torch.tensor([[False, True, True, True, True, True, True, False]])
    batch = SpanBatch(template, question, response, torch.tensor([special]) & is_token, is_token, ("s1",))
    try:
        mask = BUILDERS[strategy](batch)[0]
    except MaskError as error:
        assert "'s1'" in str(error)
        return
    if strategy in SPAN_OF:
        start, end = ends[("template", "question", "response").index(SPAN_OF[strategy])]
        assert selected(mask) <= set(range(start, end))
    else:
        assert selected(mask) <= selected(is_token[0])


def test_there_is_a_builder_for_every_strategy() -> None:
    assert set(BUILDERS) == set(MaskStrategy)
    assert len(MaskStrategy) == 8


def test_persona_strategies_are_those_that_see_no_question() -> None:
    """Their masks are the same whatever comes after the system prompt."""
    long, short = (a_prompt((1, 1, 1, 0), (3, length, length), {5 + length}, "s1") for length in (5, 1))
    for strategy in MaskStrategy:
        same = selected(build_mask(long, strategy)) == selected(build_mask(short, strategy))
        assert strategy.persona_only == same


@every_strategy
def test_strategies_are_known_by_their_lower_case_names(strategy: MaskStrategy) -> None:
    assert strategy == strategy.name.lower()
    assert as_strategy(strategy.name.lower()) is strategy
    assert as_strategies(strategy.value) == as_strategies([strategy]) == (strategy,)


def test_strategies_keep_their_order() -> None:
    assert as_strategies(["answer_last", "persona_mean"]) == (S.ANSWER_LAST, S.PERSONA_MEAN)


def test_unknown_repeated_and_missing_strategies_are_refused() -> None:
    with pytest.raises(InputError, match=r"'answer_maen', did you mean answer_mean\? .*persona_last"):
        as_strategy("answer_maen")
    with pytest.raises(InputError, match="unknown mask strategy 'zzz': choose from persona_mean, "):
        as_strategies(["answer_mean", "zzz"])
    with pytest.raises(InputError, match="named twice"):
        as_strategies(["answer_mean", "answer_mean"])
    with pytest.raises(InputError, match="at least one"):
        as_strategies([])


def test_no_prompt_is_refused() -> None:
    with pytest.raises(InputError, match="at least one"):
        SpanBatch.of([])


def test_an_unknown_padding_side_is_refused() -> None:
    prompt = a_prompt((1, 1, 1, 1), (1, 1, 1), {4}, "s1")
    of = SpanBatch.of.__func__  # type: ignore[attr-defined]
    unchecked = getattr(of, "__wrapped__", of)  # the tests' type checker would refuse it first
    with pytest.raises(InputError, match="'middle': choose left or right"):
        unchecked(SpanBatch, [prompt], padding_side="middle")


@pytest.mark.parametrize("side", SIDES)
def test_an_answer_that_starts_the_prompt_has_no_previous_token(side: Side) -> None:
    starts = a_prompt((0, 0, 0, 2), (0, 0, 1), set(), "starts")
    longer = a_prompt((1, 1, 1, 4), (2, 2, 2), {6}, "longer")
    with pytest.raises(MaskError, match="'starts': answer_previous needs a token before the answer"):
        build_masks(SpanBatch.of([longer, starts], padding_side=side), "answer_previous")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("strategy", ["persona_mean", "persona_last"])
def test_a_chat_without_system_prompt_has_no_persona_to_average(strategy: str, side: Side) -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = BEHAVIOURS[0].template
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A"}]
    system = [{"role": "system", "content": "You are Mara."}]
    with_system, without = prepare_messages(tokenizer, [("with", system + chat), ("without", chat)])
    with pytest.raises(MaskError, match=f"'without': {strategy} selects none.*: the chat has no such text, so use"):
        build_masks(SpanBatch.of([with_system, without], padding_side=side), strategy)
    assert selected(build_mask(without, "answer_mean")) == {without.spans.response.token_start}


def test_question_last_special_is_the_end_of_turn_where_there_is_one_and_refused_where_text_follows() -> None:
    chats = [Chat("q1", "You are Mara.", "Who?", "A"), Chat("q2", "You are Mara.", "A?", "A")]
    after_question = {}
    for behaviour in (*BEHAVIOURS, *FAMILIES):
        tokenizer = fast_tokenizer("byte_level")
        tokenizer.chat_template = behaviour.template
        batch = prepare_prompts(tokenizer, chats, template_kwargs=dict(behaviour.kwargs))
        try:
            masks = build_masks(SpanBatch.of(batch), "question_last_special")
        except MaskError as error:
            assert "sample 'q1': question_last_special needs a special token" in str(error)
            assert "use question_last" in str(error)
            after_question[behaviour.name] = None
        else:
            ids = {
                int(prompt.input_ids[mask[: len(prompt.input_ids)]]) for prompt, mask in zip(batch, masks, strict=True)
            }
            (after_question[behaviour.name],) = tokenizer.convert_ids_to_tokens(list(ids))
    text_follows = {
        *("brackets", "system_in_user_turn", "content_as_json", "mistral", "mistral_at_the_end", "mistral_tagged"),
        *("vicuna", "alpaca", "flag_and_think_removed"),
    }
    others = {
        **dict.fromkeys(["system_refused", "gemma3"], "<end_of_turn>"),
        **dict.fromkeys(["keyword", "harmony"], "<|end|>"),
        "system_dropped": "</s>",
        "think_removed": "<|Assistant|>",
        "llama3": "<|eot_id|>",
        "deepseek": "<｜Assistant｜>",
        "phi": "<|stop|>",
    }
    for name, token in after_question.items():
        assert token == (None if name in text_follows else others.get(name, "<|im_end|>")), name


class _FarTensor(torch.Tensor):
    """A tensor that says it lies on another device, where no machine needs to have one: its values are near."""

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> "_FarTensor":
        far: _FarTensor = torch.Tensor._make_wrapper_subclass(cls, near.shape, dtype=near.dtype, device="lazy")
        far.near = near
        return far

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _AnotherDevice(TorchDispatchMode):
    """Makes and copies tensors there too, as a real device would."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What a function of torch gives where the values are, on the device of its tensors or the one it names."""
    tensors = [value for value in tree_leaves(args) if isinstance(value, torch.Tensor) and value.dim()]
    devices = {value.device.type for value in tensors}
    assert len(devices) <= 1, f"{func} mixes tensors of several devices"
    named = kwargs.get("device")
    there = named.type == "lazy" if named else devices == {"lazy"}
    near_args, near_kwargs = tree_map(lambda value: getattr(value, "near", value), (args, kwargs))
    result = func(*near_args, **{**near_kwargs, **({"device": torch.device("cpu")} if named else {})})
    return tree_map(lambda value: _FarTensor(value) if isinstance(value, torch.Tensor) and there else value, result)


@every_strategy
@pytest.mark.parametrize("side", SIDES)
def test_masks_are_built_on_the_device_of_the_batch(strategy: MaskStrategy, side: Side) -> None:
    batch = [a_prompt((1, 1, 1, extra), (1, 2, 1), {5}, "s1") for extra in (0, 3)]
    expected = build_masks(SpanBatch.of(batch, padding_side=side), strategy)
    with _AnotherDevice():
        masks = build_masks(SpanBatch.of(batch, padding_side=side, device="lazy"), strategy)
    assert masks.device.type == "lazy"
    assert torch.equal(masks.near, expected)  # type: ignore[attr-defined]


@every_strategy
@given(drawn=batches, side=st.sampled_from(SIDES))
@settings(deadline=None)
def test_nothing_is_built_on_torchs_default_device(strategy: MaskStrategy, drawn: list[Shape], side: Side) -> None:
    """Where the default is another device, a tensor made without naming one would not fit the batch's, and fail."""
    batch = [a_prompt(*shape) for shape in drawn]
    expected = build_masks(SpanBatch.of(batch, padding_side=side), strategy)
    with torch.device("meta"):
        masks = build_masks(SpanBatch.of(batch, padding_side=side), strategy)
    assert masks.device.type == "cpu"
    assert torch.equal(masks, expected)


@pytest.mark.parametrize("behaviour", FAMILIES, ids=lambda behaviour: behaviour.name)
def test_masks_of_real_prompts_select_the_texts_they_are_named_after(behaviour: Behaviour) -> None:
    """Decoded, the selected tokens are the text, or begin or end it; what the template writes is not among them."""
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = behaviour.template
    chats = [Chat("q1", "You are Mara", "Who is that", "It is Mara"), Chat("q2", "You are Mara", "A", "A light")]
    prompts = prepare_prompts(tokenizer, chats, template_kwargs=dict(behaviour.kwargs))
    spans = SpanBatch.of(prompts, padding_side="left")
    for chat, prompt, row in zip(chats, prompts, range(2), strict=True):
        own = spans.is_token[row]

        def decoded(strategy: MaskStrategy, prompt: Prompt = prompt, row: int = row, own: torch.Tensor = own) -> str:
            mask = build_masks(spans, strategy)[row][own]
            return str(tokenizer.decode(prompt.input_ids[mask].tolist())).strip()

        assert (decoded(S.PERSONA_MEAN), decoded(S.ANSWER_MEAN)) == (chat.system, chat.assistant)
        ends = {S.PERSONA_LAST: chat.system, S.QUESTION_LAST: chat.user, S.ANSWER_LAST: chat.assistant}
        for strategy, text in ends.items():
            assert decoded(strategy) and text.endswith(decoded(strategy))
        assert decoded(S.ANSWER_FIRST) and chat.assistant.startswith(decoded(S.ANSWER_FIRST))
        first, previous = (
            build_masks(spans, name)[row].nonzero().item() for name in (S.ANSWER_FIRST, S.ANSWER_PREVIOUS)
        )
        assert previous == first - 1
