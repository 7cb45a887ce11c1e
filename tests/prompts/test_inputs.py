"""Contrast pairs as samples: what is tokenized, and which tokens a position means, told from the text itself."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import FAMILIES, build_tokenizer
from torch import Tensor

from tl_persona.data.contrast import ContrastPair
from tl_persona.data.personas import QAPair
from tl_persona.errors import InputError, PromptError
from tl_persona.prompts.inputs import TokenPosition, contrast_texts, prepare_inputs
from tl_persona.prompts.masks import MaskStrategy

PLAIN = build_tokenizer(FAMILIES["llama"])  # no BOS, a system role
WITH_BOS = build_tokenizer(FAMILIES["gemma"])  # its template renders a BOS, and it adds one to raw text
RAW = ContrastPair("I read by the sea in the evening.", "There is wind from the west.")
SYSTEM = "You are Mara."
QUESTION = "Where do you live?"
ANSWERS = ("I live by the sea, in the old house.", "In the north.")


def chat(answer: str, *, system: str | None = None, question: str = QUESTION) -> list[dict[str, str]]:
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


CHAT = ContrastPair(chat(ANSWERS[0]), chat(ANSWERS[1]))


def chosen(
    tokenizer: Any, pair: ContrastPair, position: TokenPosition, **options: Any
) -> list[tuple[list[int], list[int]]]:
    """For each side, its ids and the indices of the tokens that count."""
    samples = contrast_texts(tokenizer, [pair], position, **options).samples
    assert all(sample.masks.shape == (1, len(sample.input_ids)) for sample in samples)
    return [(sample.input_ids.tolist(), sample.masks[0].nonzero()[:, 0].tolist()) for sample in samples]


def text_of(tokenizer: Any, ids: list[int], places: list[int]) -> str:
    return str(tokenizer.decode([ids[place] for place in places]))


# --- raw text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS], ids=["no BOS", "BOS"])
def test_raw_text_is_what_the_tokenizer_makes_of_it_and_a_position_counts_over_all_of_it(tokenizer: Any) -> None:
    expected = [tokenizer(text)["input_ids"] for text in (RAW.positive, RAW.negative)]
    assert [ids for ids, _ in chosen(tokenizer, RAW, "last")] == expected
    assert [places for _, places in chosen(tokenizer, RAW, "last")] == [[len(ids) - 1] for ids in expected]
    assert [places for _, places in chosen(tokenizer, RAW, 0)] == [[0], [0]]


@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS], ids=["no BOS", "BOS"])
def test_the_mean_and_the_first_token_of_raw_text_leave_token_0_out_unless_it_is_asked_for(tokenizer: Any) -> None:
    lengths = [len(tokenizer(text)["input_ids"]) for text in (RAW.positive, RAW.negative)]
    assert [places for _, places in chosen(tokenizer, RAW, "first")] == [[1], [1]]
    assert [places for _, places in chosen(tokenizer, RAW, "mean")] == [list(range(1, length)) for length in lengths]
    asked = {"include_first": True}
    assert [places for _, places in chosen(tokenizer, RAW, "first", **asked)] == [[0], [0]]
    assert [places for _, places in chosen(tokenizer, RAW, "mean", **asked)] == [list(range(n)) for n in lengths]


def test_token_0_of_raw_text_is_the_bos_where_there_is_one_and_is_counted_as_any_other() -> None:
    ids, places = chosen(WITH_BOS, RAW, "first", include_first=True)[0]
    assert [ids[place] for place in places] == [WITH_BOS.bos_token_id]
    own = ContrastPair(f"{WITH_BOS.bos_token}The sea.", "The wind.")
    assert [places[0] for _, places in chosen(WITH_BOS, own, "mean")] == [1, 1]


@pytest.mark.parametrize("position", ["first", "mean"])
def test_a_raw_text_of_one_token_alone_is_refused_with_both_ways_out(position: str) -> None:
    for tokenizer, text in ((PLAIN, "a"), (WITH_BOS, WITH_BOS.bos_token)):
        pair = ContrastPair(text, "The wind.")
        message = r"^pair 0 positive: the text is one token alone.* longer text, or pass include_first=True"
        with pytest.raises(InputError, match=message):
            chosen(tokenizer, pair, position)
        assert next(places for _, places in chosen(tokenizer, pair, position, include_first=True)) == [0]
        assert next(places for _, places in chosen(tokenizer, pair, "last")) == [0]


@pytest.mark.parametrize("position", ["last", "first", "mean", 0, -1, MaskStrategy.ANSWER_MEAN], ids=str)
def test_token_0_is_left_out_of_no_chat(position: TokenPosition) -> None:
    assert chosen(PLAIN, CHAT, position) == chosen(PLAIN, CHAT, position, include_first=True)


def test_token_0_of_a_chat_counts_where_a_strategy_selects_it() -> None:
    bare = build_tokenizer(FAMILIES["llama"])
    bare.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    pair = ContrastPair(*(chat(answer, system=SYSTEM) for answer in ANSWERS))
    for ids, places in chosen(bare, pair, MaskStrategy.PERSONA_MEAN):
        assert places[0] == 0 and text_of(bare, ids, places).strip() == SYSTEM  # the line break is part of a token


def test_a_text_that_brings_its_own_bos_gets_no_second_one() -> None:
    pair = ContrastPair(f"{WITH_BOS.bos_token}The sea.", "The wind.")
    for ids, _ in chosen(WITH_BOS, pair, "last"):
        assert ids.count(WITH_BOS.bos_token_id) == 1 and ids[0] == WITH_BOS.bos_token_id
    assert chosen(WITH_BOS, pair, "last")[0][0] == WITH_BOS("The sea.")["input_ids"]


@given(st.integers(-40, 40))
def test_an_index_means_what_it_means_for_a_list_or_is_refused(index: int) -> None:
    lengths = [len(PLAIN(text)["input_ids"]) for text in (RAW.positive, RAW.negative)]
    outside = [name for name, length in zip(("positive", "negative"), lengths, strict=True)
               if not -length <= index < length]  # fmt: skip
    if outside:
        with pytest.raises(InputError, match=rf"^pair 0 {outside[0]}: position {index} lies outside its \d+ tokens"):
            chosen(PLAIN, RAW, index)
    else:
        assert [places for _, places in chosen(PLAIN, RAW, index)] == [[range(length)[index]] for length in lengths]


# --- chats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS], ids=["no BOS", "BOS"])
def test_in_a_chat_a_position_counts_within_the_answer(tokenizer: Any) -> None:
    for (ids, places), answer in zip(chosen(tokenizer, CHAT, "mean"), ANSWERS, strict=True):
        assert text_of(tokenizer, ids, places) == answer
    everything = chosen(tokenizer, CHAT, "mean")
    for position, index in [("first", 0), ("last", -1), (1, 1), (-2, -2)]:
        expected = [[places[index]] for _, places in everything]
        assert [places for _, places in chosen(tokenizer, CHAT, position)] == expected


def test_a_chat_has_one_bos_though_the_template_renders_it_and_the_tokenizer_would_add_it() -> None:
    assert WITH_BOS("x")["input_ids"][0] == WITH_BOS.bos_token_id
    for ids, _ in chosen(WITH_BOS, CHAT, "last"):
        assert ids.count(WITH_BOS.bos_token_id) == 1 and ids[0] == WITH_BOS.bos_token_id


def test_an_index_outside_an_answer_is_refused_though_the_chat_is_longer() -> None:
    lengths = [len(places) for _, places in chosen(PLAIN, CHAT, "mean")]
    assert lengths[1] < lengths[0] < len(chosen(PLAIN, CHAT, "mean")[1][0])
    beyond = lengths[1]
    with pytest.raises(InputError, match=f"pair 0 negative: position {beyond} lies outside its {beyond} tokens"):
        chosen(PLAIN, CHAT, beyond)


def test_the_answer_is_the_last_turn_though_earlier_turns_say_the_same() -> None:
    turns = [*chat(ANSWERS[0]), *chat(ANSWERS[0])]
    ids, places = chosen(PLAIN, ContrastPair(turns, chat("No.")), "mean")[0]
    earlier = chosen(PLAIN, CHAT, "mean")[0][1]
    assert text_of(PLAIN, ids, places) == ANSWERS[0] and places[0] > earlier[-1]


@pytest.mark.parametrize("strategy", list(MaskStrategy))
def test_a_mask_strategy_chooses_in_a_chat_pair_what_it_chooses_in_a_persona_sample(strategy: MaskStrategy) -> None:
    pair = ContrastPair(*(chat(answer, system=SYSTEM) for answer in ANSWERS))
    for spelled in (strategy, str(strategy)):
        for sample, answer in zip(contrast_texts(PLAIN, [pair], spelled).samples, ANSWERS, strict=True):
            question = QAPair("q", "explicit", "frq", "individual", QUESTION, answer)
            (expected,) = prepare_inputs(PLAIN, SYSTEM, [question], strategy)
            assert torch.equal(sample.input_ids, expected.input_ids)
            assert torch.equal(sample.masks[0], expected.token_mask)


def test_arguments_of_the_template_reach_it() -> None:
    tokenizer = build_tokenizer(FAMILIES["llama"])
    tokenizer.chat_template = "{% if shout %}!!!{% endif %}" + tokenizer.chat_template
    quiet = contrast_texts(tokenizer, [CHAT]).texts
    assert contrast_texts(tokenizer, [CHAT], template_kwargs={"shout": True}).texts == tuple(f"!!!{t}" for t in quiet)


# --- both ----------------------------------------------------------------------------------------------------------


def test_samples_come_pair_by_pair_with_the_positive_side_first_whether_raw_or_chat() -> None:
    found = contrast_texts(PLAIN, [RAW, CHAT, RAW], "last")
    names = [f"pair {index} {side}" for index in range(3) for side in ("positive", "negative")]
    assert [sample.sample_id for sample in found.samples] == names
    rendered = [PLAIN.apply_chat_template(list(side), tokenize=False) for side in (CHAT.positive, CHAT.negative)]
    assert list(found.texts) == [RAW.positive, RAW.negative, *rendered, RAW.positive, RAW.negative]
    for sample, text in zip(found.samples, found.texts, strict=True):
        assert sample.input_ids.tolist() == PLAIN(text)["input_ids"]


@pytest.mark.parametrize("strategy", list(MaskStrategy))
def test_a_mask_strategy_is_refused_for_raw_text(strategy: MaskStrategy) -> None:
    with pytest.raises(InputError, match=f"pair 0 positive: {strategy} needs a chat"):
        contrast_texts(PLAIN, [RAW], strategy)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("position", ["middle", "", True, None, 1.0, [0], Tensor])
def test_what_is_no_position_is_refused_with_the_choices(position: Any) -> None:
    with pytest.raises(InputError, match=r"token_position .*last, first, mean"):
        contrast_texts(PLAIN, [RAW], position)


def test_a_chat_that_the_template_cannot_render_names_its_pair() -> None:
    with pytest.raises(PromptError, match="pair 1 positive"):
        contrast_texts(WITH_BOS, [RAW, ContrastPair([*chat("Yes.")[1:]], chat("No."))])


def test_a_tokenizer_without_a_template_can_do_raw_text_only() -> None:
    tokenizer = build_tokenizer(FAMILIES["llama"])
    tokenizer.chat_template = None
    assert len(contrast_texts(tokenizer, [RAW]).samples) == 2
    with pytest.raises(PromptError, match="chat template"):
        contrast_texts(tokenizer, [CHAT])
