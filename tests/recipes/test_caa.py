"""Contrastive activation addition: one pass equals the definition, one text at a time on the Hugging Face model."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median_low
from typing import Any

import pytest
import torch
from kinds import BOTH_KINDS, HOOKED
from oracle import block_outputs, looking_on, relative_error, watched
from tiny import D_MODEL, GPT2_CONTEXT, N_LAYERS
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import tl_persona
from tl_persona import caa, extract_caa_vector, extract_caa_vectors, get_model_config, load_pairs, load_refusal_pairs
from tl_persona.data.contrast import ContrastPair, ContrastPairDataset, Side
from tl_persona.errors import HookError, InputError, NonFiniteError
from tl_persona.models.checkpoints import find_checkpoint
from tl_persona.prompts.inputs import TokenPosition, contrast_texts
from tl_persona.prompts.masks import MaskStrategy
from tl_persona.provenance import text_digest
from tl_persona.statistics.directions import logistic_direction, mean_difference, pca_direction
from tl_persona.statistics.layers import layer_statistics
from tl_persona.statistics.means import ActivationSpool
from tl_persona.vectors import SteeringVector, SteeringVectorSet

pytestmark = pytest.mark.tl

Boot = Callable[[str, str], Any]


EVERY_FAMILY = pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])

RAW = [
    {"positive": "I read by the sea in the evening.", "negative": "There is wind from the west."},
    {"positive": "Tea, please.", "negative": "Give me the rain and the wind, and be quick about it today!"},
    {"positive": "You are kind, and you speak plainly.", "negative": "Mara kept the light."},
    {"positive": "What is your name?", "negative": "No."},
    {"positive": "Strong wind today; thirty years of it.", "negative": "One sentence about the weather."},
]
SYSTEM = "You are Mara, and you speak in short sentences."


def chat(question: str, answer: str, system: str | None = None) -> list[dict[str, str]]:
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def chats(system: str | None = None) -> list[ContrastPair]:
    """Pairs with the same question on both sides, as the bundled ones have it, and answers of several lengths."""
    questions = ["Who are you?", "Where do you live, and what do you do there?", "Tea or rain?", "Wind?", "And now?"]
    return [
        ContrastPair(chat(question, pair["positive"], system), chat(question, pair["negative"], system))
        for question, pair in zip(questions, RAW, strict=True)
    ]


@pytest.fixture(scope="module")
def plain(tiny_model: Callable[[str], Path]) -> Callable[[str], Any]:
    """The Hugging Face model of a family."""

    @functools.cache
    def model_of(family: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32).eval()

    return model_of


def naive(hf_model: Any, tokenizer: Any, side: Side, position: TokenPosition, include_first: bool = False) -> Tensor:
    """One text's activations by the definition: (layer, d_model)."""

    def tokens_of(part: str) -> list[int]:
        start = text.rindex(part)
        return [at for at, (left, right) in enumerate(offsets) if left < start + len(part) and right > start]

    if isinstance(side, str):
        ids = tokenizer(side)["input_ids"]
        counted = list(range(len(ids)))
        if position in ("first", "mean") and not include_first:
            counted = counted[1:]
    else:
        text = tokenizer.apply_chat_template(list(side), tokenize=False)
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        counted = tokens_of(side[-1]["content"])
    if isinstance(position, int):
        places = [counted[position]]
    elif position in ("last", "first", "mean"):
        places = {"last": counted[-1:], "first": counted[:1], "mean": counted}[position]
    else:
        assert not isinstance(side, str)
        persona, question = tokens_of(side[0]["content"]), tokens_of(side[-2]["content"])
        places = {
            "persona_mean": persona,
            "persona_last": persona[-1:],
            "question_last": question[-1:],
            "question_last_special": [question[-1] + 1],
            "answer_previous": [counted[0] - 1],
            "answer_first": counted[:1],
            "answer_last": counted[-1:],
            "answer_mean": counted,
        }[position]
    return block_outputs(hf_model, torch.tensor(ids))[:, places].mean(dim=1)


def both_sides(
    hf_model: Any, tokenizer: Any, pairs: Any, position: TokenPosition, include_first: bool = False
) -> tuple[Tensor, Tensor]:
    """Activations of the positive and the negative sides, (pair, layer, d_model) each."""
    found = list(ContrastPairDataset("any", pairs))
    positive, negative = (
        torch.stack([naive(hf_model, tokenizer, getattr(pair, side), position, include_first) for pair in found])
        for side in ("positive", "negative")
    )
    return positive, negative


def stacked(vectors: SteeringVectorSet) -> Tensor:
    return torch.stack([vector.vector for vector in vectors])


def extract(model: Any, pairs: Any = RAW, layers: Any = None, position: Any = "last", **options: Any) -> Any:
    return extract_caa_vectors(model, None, pairs, layers, position, show_progress=False, **options)


@pytest.fixture
def model(tiny_hooked: Boot) -> Any:
    return tiny_hooked("llama", "bridge")


# --- the numbers ---------------------------------------------------------------------------------------------------


@EVERY_FAMILY
@BOTH_KINDS
@pytest.mark.parametrize("position", ["last", "first", "mean", 1, -2], ids=str)
@pytest.mark.parametrize("pairs", [RAW, chats()], ids=["raw", "chat"])
def test_one_pass_for_all_layers_equals_the_definition(
    pairs: Any, position: TokenPosition, kind: str, family: str, tiny_hooked: Boot, plain: Callable[[str], Any]
) -> None:
    booted = tiny_hooked(family, kind)
    positive, negative = both_sides(plain(family), booted.tokenizer, pairs, position)
    vectors = extract(booted, pairs, position=position)
    assert vectors.layers == list(range(N_LAYERS))
    assert relative_error(stacked(vectors), positive.mean(dim=0) - negative.mean(dim=0)) < 1e-5


@EVERY_FAMILY
@BOTH_KINDS
@pytest.mark.parametrize("position", ["first", "mean"])
def test_include_first_brings_token_0_of_raw_text_back(
    position: str, kind: str, family: str, tiny_hooked: Boot, plain: Callable[[str], Any]
) -> None:
    booted = tiny_hooked(family, kind)
    positive, negative = both_sides(plain(family), booted.tokenizer, RAW, position, include_first=True)
    if (family, position) == ("gemma", "first"):  # the BOS sees nothing but itself, so the definition gives zero
        assert torch.equal(positive, negative)
        with pytest.raises(InputError, match=r"\(5 pairs\) .* at every layer: the tokens up to there are the same"):
            extract(booted, position=position, include_first=True)
        return
    found = stacked(extract(booted, position=position, include_first=True))
    assert relative_error(found, positive.mean(dim=0) - negative.mean(dim=0)) < 1e-5


@BOTH_KINDS
@pytest.mark.parametrize("position", ["last", "first", "mean", "answer_mean", 1], ids=str)
def test_include_first_changes_nothing_of_chats(position: TokenPosition, kind: str, tiny_hooked: Boot) -> None:
    booted = tiny_hooked("llama", kind)
    found = extract(booted, chats(), position=position, include_first=True)
    assert torch.equal(stacked(found), stacked(extract(booted, chats(), position=position)))


def test_metadata_has_include_first_where_it_decides_what_counts(model: Any) -> None:
    def recorded(pairs: Any, position: TokenPosition, **options: Any) -> set[Any]:
        return {vector.metadata.get("include_first") for vector in extract(model, pairs, position=position, **options)}

    for position in ("first", "mean"):
        assert recorded(RAW, position) == recorded([*chats(), RAW[0]], position) == {False}
        assert recorded(RAW, position, include_first=True) == {True}
        assert recorded(chats(), position) == recorded(chats(), position, include_first=True) == {None}
    assert recorded(RAW, "last") == recorded(RAW, 0, include_first=True) == {None}


@pytest.mark.parametrize("position", ["first", "mean"])
def test_a_text_of_one_token_alone_is_refused_before_the_model_runs(position: str, model: Any) -> None:
    pairs = [*RAW, {"positive": "What is your name?", "negative": "a"}]
    assert len(model.tokenizer("a")["input_ids"]) == 1
    message = r"pair 5 negative: the text is one token alone.*write a longer text, or pass include_first=True"
    with nothing_runs(model), pytest.raises(InputError, match=message):
        extract(model, pairs, position=position)
    assert extract(model, pairs, position=position, include_first=True).layers == list(range(N_LAYERS))
    assert extract(model, pairs, position="last").layers == list(range(N_LAYERS))


@BOTH_KINDS
@pytest.mark.parametrize("strategy", [name for name in MaskStrategy if name.startswith("answer")])
def test_mask_strategies_of_the_answer_equal_the_definition(
    strategy: MaskStrategy, kind: str, tiny_hooked: Boot, plain: Callable[[str], Any]
) -> None:
    booted = tiny_hooked("llama", kind)
    # The token before the answer is the same on both sides, unless the questions differ.
    pairs = [
        ContrastPair(chat(f"{index}?", pair["positive"], SYSTEM), chat("And you?", pair["negative"], SYSTEM))
        for index, pair in enumerate(RAW)
    ]
    positive, negative = both_sides(plain("llama"), booted.tokenizer, pairs, strategy)
    found = stacked(extract(booted, pairs, position=strategy))
    assert relative_error(found, positive.mean(dim=0) - negative.mean(dim=0)) < 1e-5


@BOTH_KINDS
@pytest.mark.parametrize("strategy", [name for name in MaskStrategy if not name.startswith("answer")])
def test_mask_strategies_of_persona_and_question_equal_the_definition(
    strategy: MaskStrategy, kind: str, tiny_hooked: Boot, plain: Callable[[str], Any]
) -> None:
    booted = tiny_hooked("llama", kind)
    systems = [(f"You are Mara, {word}.", f"You are {word}.") for word in ("plain", "retired", "short", "long", "kind")]
    pairs = [
        ContrastPair(chat(f"{index} or rain?", "Yes.", one), chat("What of the wind?", "No.", other))
        for index, (one, other) in enumerate(systems)
    ]
    positive, negative = both_sides(plain("llama"), booted.tokenizer, pairs, strategy)
    found = stacked(extract(booted, pairs, position=strategy))
    assert relative_error(found, positive.mean(dim=0) - negative.mean(dim=0)) < 1e-5


@pytest.mark.slow
@BOTH_KINDS
@pytest.mark.parametrize("position", ["last", "mean"])
def test_a_real_chat_model_equals_the_definition_at_every_layer(
    position: str, kind: str, smollm2: tuple[Any, Any], smollm2_hooked: Callable[[str], Any]
) -> None:
    weights, tokenizer = smollm2
    pairs = load_pairs("refusal")[:5]
    positive, negative = both_sides(weights, tokenizer, pairs, position)
    found = stacked(extract(smollm2_hooked(kind), pairs, position=position))
    assert found.shape == (30, 576)
    assert relative_error(found, positive.mean(dim=0) - negative.mean(dim=0)) < 1e-5


def test_swapping_the_sides_turns_the_vectors_round(model: Any) -> None:
    swapped = [{"positive": pair["negative"], "negative": pair["positive"]} for pair in RAW]
    assert relative_error(-stacked(extract(model, swapped)), stacked(extract(model))) < 1e-6


def test_the_order_of_pairs_does_not_matter(model: Any) -> None:
    assert relative_error(stacked(extract(model, RAW[::-1])), stacked(extract(model))) < 1e-6


def test_raw_and_chat_pairs_may_be_mixed(model: Any, plain: Callable[[str], Any]) -> None:
    mixed = [RAW[0], *chats()[1:3], RAW[3]]
    positive, negative = both_sides(plain("llama"), model.tokenizer, mixed, "mean")
    found = stacked(extract(model, mixed, position="mean"))
    assert relative_error(found, positive.mean(dim=0) - negative.mean(dim=0)) < 1e-5


# --- layers --------------------------------------------------------------------------------------------------------


def test_chosen_layers_are_those_of_all_and_carry_their_hooks(model: Any) -> None:
    everything = extract(model)
    chosen = extract(model, layers=[2, "blocks.1.hook_resid_pre"])
    assert chosen.layers == [1, 2]
    assert [vector.hook_name for vector in chosen] == ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_post"]
    # What goes into block 1 is what comes out of block 0.
    expected = stacked(everything)[[0, 2]]
    assert relative_error(stacked(chosen), expected) < 1e-6


def test_one_layer_is_that_layer_of_the_set(model: Any) -> None:
    everything = extract(model)
    for layer_idx, layer in [(1, 1), (-1, 2), ("blocks.0.hook_resid_post", 0)]:
        vector = extract_caa_vector(model, None, RAW, layer_idx, show_progress=False)
        assert isinstance(vector, SteeringVector) and vector.layer_index == layer
        assert relative_error(vector.vector, everything[layer].vector) < 1e-6


@contextmanager
def nothing_runs(booted: Any) -> Iterator[None]:
    with watched(booted) as positions:
        yield
    assert not any(positions.values())


@BOTH_KINDS
@pytest.mark.parametrize("several", ["0:2", ":", "blocks.*.hook_resid_post", slice(0, 2)], ids=str)
def test_a_choice_that_means_several_layers_is_no_layer_idx(several: Any, kind: str, tiny_hooked: Boot) -> None:
    booted = tiny_hooked("llama", kind)
    with nothing_runs(booted), pytest.raises(HookError, match=r"means [23] layers: use extract_caa_vectors"):
        extract_caa_vector(booted, None, RAW, several)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([1, "blocks.1.hook_resid_pre"], r"two hooks of block 1 .*blocks\.1\.hook_resid_pre"),
        ("hook_embed", "'hook_embed' belongs to no block"),
        (3, "there is no layer 3: the model has layers 0 to 2"),
        ("2:5", "leaves the model"),
        ("blocks.0.hook_resid_pst", "no hook 'blocks.0.hook_resid_pst'; nearest: blocks.0.hook_resid_post"),
        ([1, 1], "chosen twice"),
    ],
)
def test_layers_that_cannot_be_are_refused_before_the_model_runs(layers: Any, message: str, model: Any) -> None:
    with nothing_runs(model), pytest.raises(HookError, match=message):
        extract(model, layers=layers)


# --- what runs -----------------------------------------------------------------------------------------------------


@BOTH_KINDS
def test_all_layers_cost_what_the_deepest_costs(kind: str, tiny_hooked: Boot) -> None:
    booted = tiny_hooked("llama", kind)
    extract(booted, chats())  # the first run may also prove a shortcut
    with watched(booted) as for_all:
        extract(booted, chats())
    with watched(booted) as for_one:
        extract(booted, chats(), layers=[-1])
    assert for_all == for_one and for_all["blocks.0.mlp"] > 0


@contextmanager
def rows_of_passes(booted: Any) -> Iterator[list[int]]:
    rows: list[int] = []

    def count(_layer: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
        rows.append(hidden.shape[0])

    handle = booted.blocks[0].mlp.register_forward_pre_hook(looking_on(count), with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


@BOTH_KINDS
def test_batch_size_limits_the_rows_of_a_pass_and_changes_no_number(kind: str, tiny_hooked: Boot) -> None:
    booted = tiny_hooked("llama", kind)
    everything = stacked(extract(booted))
    seen = {}
    for batch_size in (1, 3, 10):
        with rows_of_passes(booted) as rows:
            found = extract(booted, batch_size=batch_size)
        assert relative_error(stacked(found), everything) < 1e-6
        assert sum(rows) == 2 * len(RAW)  # their first tokens differ, so each text is a row
        seen[batch_size] = rows
    assert seen == {1: [1] * 10, 3: [3, 3, 3, 1], 10: [10]}
    with rows_of_passes(booted) as rows:
        single = extract_caa_vector(booted, None, RAW, 1, "last", 2, False)
    assert max(rows) == 2 and relative_error(single.vector, everything[1]) < 1e-6


def test_batch_tokens_limit_what_a_pass_holds_and_change_no_number(model: Any) -> None:
    everything = stacked(extract(model))
    with rows_of_passes(model) as rows:
        found = extract(model, batch_tokens=1)
    assert set(rows) == {1}
    assert relative_error(stacked(found), everything) < 1e-6


@BOTH_KINDS
def test_the_turns_that_a_pair_shares_run_once(kind: str, tiny_hooked: Boot) -> None:
    booted = tiny_hooked("llama", kind)
    extract(booted, chats(SYSTEM * 6))  # the first run also proves the shortcut
    ids = [
        booted.tokenizer(booted.tokenizer.apply_chat_template(list(side), tokenize=False))["input_ids"]
        for pair in chats(SYSTEM * 6)
        for side in (pair.positive, pair.negative)
    ]
    with watched(booted) as positions:
        extract(booted, chats(SYSTEM * 6))
    assert positions["blocks.0.mlp"] < 0.5 * sum(map(len, ids))


def test_activations_on_disk_give_the_same_vectors_and_statistics(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = extract(model)
    spools: list[ActivationSpool] = []

    def on_disk(*args: Any) -> ActivationSpool:
        spools.append(ActivationSpool(*args, in_memory_bytes=0))
        return spools[-1]

    monkeypatch.setattr(caa, "ActivationSpool", on_disk)
    found = extract(model)
    (spool,) = spools
    assert spool.on_disk and torch.equal(stacked(found), stacked(in_memory))
    assert [vector.metadata for vector in found] == [vector.metadata for vector in in_memory]
    assert spool._file is not None and spool._file.closed


def test_a_run_that_fails_closes_its_file_too(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spools: list[ActivationSpool] = []

    def on_disk(*args: Any) -> ActivationSpool:
        spools.append(ActivationSpool(*args, in_memory_bytes=0))
        return spools[-1]

    monkeypatch.setattr(caa, "ActivationSpool", on_disk)

    def failing(pos: Tensor, neg: Tensor) -> Tensor:
        raise RuntimeError("no direction")

    with pytest.raises(RuntimeError, match="no direction"):
        extract(model, direction=failing)
    assert spools[0]._file is not None and spools[0]._file.closed


# --- what is said of a vector --------------------------------------------------------------------------------------


@BOTH_KINDS
def test_metadata_has_norms_and_statistics_of_the_activations_themselves(
    kind: str, tiny_hooked: Boot, plain: Callable[[str], Any]
) -> None:
    booted = tiny_hooked("llama", kind)
    positive, negative = both_sides(plain("llama"), booted.tokenizer, RAW, "mean")
    for layer, vector in enumerate(extract(booted, position="mean", seed=3)):
        pos, neg = positive[:, layer], negative[:, layer]
        found = vector.metadata
        assert (found["num_pairs"], found["token_position"]) == (len(RAW), "mean")
        assert found["pos_mean_norm"] == pytest.approx(float(pos.mean(dim=0).norm()), rel=1e-5)
        assert found["neg_mean_norm"] == pytest.approx(float(neg.mean(dim=0).norm()), rel=1e-5)
        assert found["vector_norm"] == pytest.approx(float((pos - neg).mean(dim=0).norm()), rel=1e-5)
        assert found["vector_norm"] == pytest.approx(vector.norm, rel=1e-6)
        expected = layer_statistics(pos, neg, seed=3).as_metadata()["statistics"]
        assert found["statistics"].pop("note") is expected.pop("note") is None
        assert found["statistics"] == pytest.approx(expected, rel=1e-4)


WIND = " wind"


@pytest.fixture(scope="module")
def loud(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in which one word has an activation far longer than any other, at every layer."""
    folder = tmp_path_factory.mktemp("loud") / "model"
    weights, tokenizer = (kind.from_pretrained(tiny_model("llama")) for kind in (AutoModelForCausalLM, AutoTokenizer))
    (word,) = tokenizer(WIND)["input_ids"]
    with torch.no_grad():
        weights.get_input_embeddings().weight[word] *= 3000
    weights.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def outlying_by_hand(folder: Path, pairs: Any, position: TokenPosition) -> list[dict[str, Any]]:
    """For each layer, what `outliers` must be, by the definition and one text at a time."""
    weights = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found: list[dict[str, Any]] = [{"tokens": 0, "texts": 0, "largest_share": None} for _ in range(N_LAYERS)]
    for sample in contrast_texts(tokenizer, list(ContrastPairDataset("any", pairs)), position).samples:
        places = sample.masks[0].nonzero()[:, 0].tolist()
        for layer, output in enumerate(block_outputs(weights, sample.input_ids[: places[-1] + 1])):
            norms = output.norm(dim=-1).tolist()
            outlying = [place for place in places if norms[place] >= 10 * median_low(norms)]
            found[layer]["tokens"] += len(outlying)
            found[layer]["texts"] += bool(outlying)
            if len(places) > 1:
                share = max(norms[place] for place in places) / sum(norms[place] for place in places)
                found[layer]["largest_share"] = max(share, found[layer]["largest_share"] or 0.0)
    return found


OUTLYING = r"selected tokens have a norm at least 10 times the median of their text"


@BOTH_KINDS
@pytest.mark.parametrize("pairs", [RAW, chats(SYSTEM * 6)], ids=["raw", "chat"])
def test_selected_tokens_of_outlying_norm_are_counted_named_and_kept(pairs: Any, kind: str, loud: Path) -> None:
    booted = tl_persona.load_model(loud, kind=kind)
    expected = outlying_by_hand(loud, pairs, "mean")
    assert all(found["tokens"] == found["texts"] == 3 for found in expected)  # three answers have the word
    with pytest.warns(UserWarning, match=OUTLYING) as caught:
        vectors = extract(booted, pairs, position="mean")
    (warning,) = caught
    message = str(warning.message)
    assert "at 3 of 3 layers" in message and "up to 3 at one layer" in message and "' wind', token" in message
    for vector, found in zip(vectors, expected, strict=True):
        assert vector.metadata["outliers"] == pytest.approx(found, rel=1e-4)
    assert f"up to {max(found['largest_share'] for found in expected):.0%} of a mean" in message
    rows = vectors.summary().rows
    assert [(row["outliers"], row["largest_share"]) for row in rows] == [
        (found["tokens"], pytest.approx(found["largest_share"], rel=1e-4)) for found in expected
    ]
    weights = AutoModelForCausalLM.from_pretrained(loud, dtype=torch.float32).eval()
    positive, negative = both_sides(weights, booted.tokenizer, pairs, "mean")
    assert relative_error(stacked(vectors), positive.mean(dim=0) - negative.mean(dim=0)) < 1e-5


@BOTH_KINDS
def test_outliers_are_the_same_whoever_shares_the_pass(kind: str, loud: Path) -> None:
    booted = tl_persona.load_model(loud, kind=kind)

    def found(**options: Any) -> list[Any]:
        with pytest.warns(UserWarning, match=OUTLYING):
            return [
                vector.metadata["outliers"] for vector in extract(booted, chats(SYSTEM * 6), position="mean", **options)
            ]

    shared = found()
    assert found(batch_size=1, batch_tokens=1) == [pytest.approx(each, rel=1e-5) for each in shared]
    handle = booted.blocks[0].mlp.register_forward_hook(lambda *_: None)  # so every text runs whole
    try:
        assert found() == [pytest.approx(each, rel=1e-5) for each in shared]
    finally:
        handle.remove()


def test_an_outlying_token_that_is_not_selected_is_not_reported(loud: Path, recwarn: pytest.WarningsRecorder) -> None:
    vectors = extract(tl_persona.load_model(loud, kind="bridge"))  # the last tokens are points
    expected = [{"tokens": 0, "texts": 0, "largest_share": None}] * N_LAYERS
    assert [vector.metadata["outliers"] for vector in vectors] == expected
    assert not [each for each in recwarn if "norm" in str(each.message)]


def test_token_0_that_was_asked_for_is_counted_without_a_warning(loud: Path, recwarn: pytest.WarningsRecorder) -> None:
    booted = tl_persona.load_model(loud, kind="bridge")
    pairs = [{"positive": f"{WIND} {word}", "negative": word} for word in ("from the west.", "in the evening.")]
    assert booted.tokenizer(WIND)["input_ids"] == booted.tokenizer(f"{WIND} from")["input_ids"][:1]
    for options, tokens in (({}, 0), ({"include_first": True}, 2)):
        vectors = extract(booted, pairs, position="mean", **options)
        assert {vector.metadata["outliers"]["tokens"] for vector in vectors} == {tokens}
        assert not [each for each in recwarn if "norm" in str(each.message)]


def test_the_seed_decides_the_folds(model: Any) -> None:
    def statistics(seed: int) -> list[Any]:
        return [vector.metadata["statistics"] for vector in extract(model, seed=seed)]

    assert statistics(0) == statistics(0) != statistics(1)


@pytest.mark.parametrize(
    ("direction", "method"), [(mean_difference, "caa"), (pca_direction, "pca"), (logistic_direction, "logistic")]
)
def test_a_direction_function_gets_both_sides_and_gives_its_name(
    direction: Any, method: str, model: Any, plain: Callable[[str], Any]
) -> None:
    positive, negative = both_sides(plain("llama"), model.tokenizer, RAW, "last")
    for layer, vector in enumerate(extract(model, direction=direction)):
        assert vector.extraction_method == method
        assert relative_error(vector.vector, direction(positive[:, layer], negative[:, layer])) < 1e-3
        statistics = layer_statistics(positive[:, layer], negative[:, layer], direction=direction)
        assert vector.metadata["statistics"]["auc"] == pytest.approx(statistics.auc, abs=1e-6)


def test_a_direction_of_ones_own_is_used_as_it_is(model: Any) -> None:
    def first_axis(pos: Tensor, neg: Tensor) -> Tensor:
        return torch.eye(D_MODEL)[0]

    vector = extract(model, direction=first_axis)[1]
    assert vector.extraction_method == "first_axis" and torch.equal(vector.vector, torch.eye(D_MODEL)[0])
    assert extract(model, direction=lambda pos, neg: neg[0] - pos[0])[0].extraction_method == "<lambda>"


@BOTH_KINDS
def test_provenance_says_what_the_vector_was_computed_from(kind: str, tiny_hooked: Boot, tiny_llama: Path) -> None:
    booted = tiny_hooked("llama", kind)
    pairs = ContrastPairDataset("plainness", chats())
    rendered = [
        booted.tokenizer.apply_chat_template(list(side), tokenize=False)
        for pair in pairs
        for side in (pair.positive, pair.negative)
    ]
    for vector in extract(booted, pairs, layers=[0, 2]):
        found = vector.provenance
        assert vector.behavior == "plainness" and vector.model_name == found.model_name == tiny_llama.name
        assert found.revision == find_checkpoint(tiny_llama).revision
        assert (found.dtype, found.weights, found.strategy) == ("float32", "unprocessed", "last")
        assert found.hook_names == (vector.hook_name,)
        assert found.prompts_digest == text_digest(rendered)
        assert found.sample_ids[:3] == ("pair 0 positive", "pair 0 negative", "pair 1 positive")
        assert found.notes["pairs_digest"] == pairs.digest()
        assert found.notes["backend"] == "local" and found.notes["model_class"] == type(booted).__name__
        assert {"torch", "transformers", "transformer-lens"} <= set(found.notes)


def test_names_given_by_the_caller_are_recorded(model: Any) -> None:
    found = extract(model, behavior="calm", model_name="org/other")
    assert {(v.behavior, v.model_name, v.provenance.model_name) for v in found} == {("calm", "org/other", "org/other")}
    assert found.behavior == "calm" and extract(model).behavior == "unknown"


def test_arguments_of_the_template_change_the_prompts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% if shout %}!!!{% endif %}" + model.tokenizer.chat_template
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    quiet, loud = extract(model, chats()), extract(model, chats(), template_kwargs={"shout": True})
    assert quiet[0].provenance.prompts_digest != loud[0].provenance.prompts_digest
    assert relative_error(stacked(loud), stacked(quiet)) > 1e-3


def test_progress_is_shown_on_a_terminal_unless_it_is_unwanted(
    model: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    extract(model)
    assert capfd.readouterr().err == ""
    extract_caa_vectors(model, None, RAW, behavior="calm")
    assert "calm, 3 layers" in capfd.readouterr().err


# --- bad input -----------------------------------------------------------------------------------------------------

LONG = "The wind is strong. " * 400


@BOTH_KINDS
def test_a_text_longer_than_the_context_is_refused_and_not_cut(kind: str, tiny_hooked: Boot) -> None:
    booted = tiny_hooked("gpt2", kind)
    long = [*RAW, {"positive": "Short.", "negative": LONG}]
    assert len(booted.tokenizer(LONG)["input_ids"]) > GPT2_CONTEXT
    with nothing_runs(booted), pytest.raises(InputError, match=rf"'pair 5 negative' has \d+ tokens.* {GPT2_CONTEXT}"):
        extract(booted, long)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "there are no contrast pairs"),
        (ContrastPairDataset("empty"), "empty: there are no contrast pairs"),
        ([RAW[0], {"positive": "Yes."}], "pair 1: no 'negative'"),
        ([{"positive": "Yes.", "negative": ""}], "pair 0: the negative text is empty"),
        ([{"positive": "Yes.", "negative": " \n"}], "pair 0: the negative text is empty"),
        ([RAW[0], {"positive": "Same.", "negative": "Same."}], "pair 1: the two sides are identical"),
        ([{"positive": "Yes.", "negative": chat("Who?", "No.")}], "pair 0: the two sides are text and chat"),
        ({"positive": ["a", "b"], "negative": ["c"]}, "give a ContrastPairDataset or a list of pairs"),
        ("refusal", "give a ContrastPairDataset or a list of pairs"),
    ],
    ids=lambda value: "" if isinstance(value, str) else None,
)
def test_pairs_that_cannot_be_used_are_refused_before_the_model_runs(pairs: Any, message: str, model: Any) -> None:
    with nothing_runs(model), pytest.raises(InputError, match=message):
        extract(model, pairs)


@pytest.mark.parametrize(
    ("position", "message"),
    [
        (3, r"pair 3 negative: position 3 lies outside its 3 tokens"),
        (-9, r"pair \d (positive|negative): position -9 lies outside"),
        ("middle", "unknown token_position 'middle'"),
        ("answer_mean", "pair 0 positive: answer_mean needs a chat"),
    ],
)
def test_positions_that_cannot_be_are_refused_before_the_model_runs(position: Any, message: str, model: Any) -> None:
    with nothing_runs(model), pytest.raises(InputError, match=message):
        extract(model, position=position)


TRANSFORMERS = "transformers"
EVERY_MODEL = pytest.mark.parametrize("kind", [TRANSFORMERS, "bridge", HOOKED])


def a_model(kind: str, tiny_hooked: Boot, plain: Callable[[str], Any], tokenizer: Any) -> tuple[Any, Any]:
    """A model and the tokenizer to pass with it."""
    return (plain("llama"), tokenizer) if kind == TRANSFORMERS else (tiny_hooked("llama", kind), None)


@EVERY_MODEL
@pytest.mark.parametrize("position", ["answer_previous", "question_last"])
def test_a_position_before_the_answers_of_equal_questions_is_refused_before_the_model_runs(
    position: str, kind: str, tiny_hooked: Boot, plain: Callable[[str], Any], tiny_llama: Path
) -> None:
    own = AutoTokenizer.from_pretrained(tiny_llama)
    booted, tokenizer = a_model(kind, tiny_hooked, plain, own)
    positive, negative = both_sides(plain("llama"), own, chats(SYSTEM), position)
    assert torch.equal(positive, negative)
    message = (
        rf"^both sides of every pair for 'unknown' \(5 pairs\) .* at token_position '{position}', at every layer: "
    )
    with nothing_runs(tiny_hooked("llama", "bridge")), pytest.raises(InputError, match=message):
        extract_caa_vectors(booted, tokenizer, chats(SYSTEM), token_position=position, show_progress=False)


@EVERY_MODEL
def test_one_pair_whose_sides_differ_at_the_position_is_enough(
    kind: str, tiny_hooked: Boot, plain: Callable[[str], Any], tiny_llama: Path
) -> None:
    own = AutoTokenizer.from_pretrained(tiny_llama)
    booted, tokenizer = a_model(kind, tiny_hooked, plain, own)
    pairs = [*chats(SYSTEM), ContrastPair(chat("Sea?", "Yes.", SYSTEM), chat("Town?", "No.", SYSTEM))]
    positive, negative = both_sides(plain("llama"), own, pairs, "answer_previous")
    found = extract_caa_vectors(booted, tokenizer, pairs, token_position="answer_previous", show_progress=False)
    assert relative_error(stacked(found), positive.mean(dim=0) - negative.mean(dim=0)) < 1e-5


@BOTH_KINDS
def test_a_hook_where_both_sides_of_every_pair_are_equal_is_refused_by_name(kind: str, tiny_hooked: Boot) -> None:
    # The last token is the same on both sides, and with rotary positions the first block is given its embedding.
    pairs = [{"positive": f"I am {word}.", "negative": f"There is wind, {word}."} for word in "abcdef"]
    names = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]
    with pytest.raises(InputError, match=r"\(6 pairs\) .* at blocks\.0\.hook_resid_pre\. .* leave these hooks out$"):
        extract(tiny_hooked("llama", kind), pairs, names)
    assert extract(tiny_hooked("llama", kind), pairs, names[1:])[1].norm > 0


def test_a_hook_of_the_callers_may_tell_sides_apart_that_begin_alike(model: Any) -> None:
    def by_length(activation: Tensor, hook: Any) -> Tensor:
        return activation + activation.shape[1]

    model.add_hook("blocks.0.hook_resid_post", by_length)
    try:
        vectors = extract(model, chats(SYSTEM), position="answer_previous")
    finally:
        model.reset_hooks()
    assert all(vector.norm > 0 for vector in vectors)


def test_a_batch_size_below_one_is_refused(model: Any) -> None:
    for batch_size in (0, -1):
        with pytest.raises(InputError, match="at least 1"):
            extract(model, batch_size=batch_size)


def test_a_model_in_this_process_does_not_run_remotely(model: Any) -> None:
    with pytest.raises(InputError, match=r"remote=True takes a name .*not a TransformerBridge"):
        extract(model, remote=True)


def test_one_pair_gives_a_vector_and_no_invented_statistics(model: Any, plain: Callable[[str], Any]) -> None:
    positive, negative = both_sides(plain("llama"), model.tokenizer, RAW[:1], "last")
    vectors = extract(model, RAW[:1])
    assert relative_error(stacked(vectors), (positive - negative)[0]) < 1e-5
    for vector in vectors:
        statistics = dict(vector.metadata["statistics"])
        assert statistics.pop("note") == "1 pair: statistics need at least 4"
        assert set(statistics.values()) == {None}
    assert "1 pair: statistics need at least 4" in str(vectors.summary())
    with pytest.warns(UserWarning, match="no held-out separation"):
        vectors.get_best()
    with pytest.raises(InputError, match="no separation at layers"):
        vectors.get_best("separation")


@BOTH_KINDS
def test_activations_that_are_not_finite_are_an_error_that_names_the_text(
    kind: str, tiny_model: Callable[[str], Path]
) -> None:
    broken = tl_persona.load_model(tiny_model("llama"), kind=kind)
    with torch.no_grad():
        parameter = [value for name, value in broken.named_parameters() if "mlp" in name][-1]
        parameter.fill_(torch.inf)
    with pytest.raises(NonFiniteError, match=r"pair \d (positive|negative)"):
        extract(broken)


# --- calls written for rotalabs-steer ------------------------------------------------------------------------------


def test_calls_written_for_rotalabs_steer_work_with_a_transformers_model(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    refusal_pairs = load_refusal_pairs()

    vector = extract_caa_vector(
        model=model,
        tokenizer=tokenizer,
        contrast_pairs=refusal_pairs,
        layer_idx=1,
        token_position="last",
    )
    positive, negative = both_sides(model, tokenizer, list(refusal_pairs), "last")
    differences = positive.mean(dim=0) - negative.mean(dim=0)
    assert relative_error(vector.vector, differences[1]) < 1e-5
    assert vector.norm == pytest.approx(float(differences[1].norm()), rel=1e-5) and vector.dim == D_MODEL
    assert {"num_pairs", "token_position", "pos_mean_norm", "neg_mean_norm", "vector_norm"} <= set(vector.metadata)

    layers = get_model_config(model).get_recommended_layers("refusal")
    vectors = extract_caa_vectors(
        model=model,
        tokenizer=tokenizer,
        contrast_pairs=refusal_pairs,
        layer_indices=layers,
    )
    assert vectors.layers == sorted(layers)
    vectors.save("./refusal_vectors/")
    best_vector = vectors.get_best()
    assert best_vector.layer_index in layers
    loaded = SteeringVectorSet.load("./refusal_vectors/")
    assert torch.equal(loaded[best_vector.layer_index].vector, best_vector.vector)
    assert loaded[best_vector.layer_index].metadata == best_vector.metadata


def test_the_recommended_layers_of_a_model_by_name_are_layers_it_has() -> None:
    layers = get_model_config("Qwen/Qwen3-8B").get_recommended_layers("refusal")
    assert layers and all(type(layer) is int and 0 <= layer < 36 for layer in layers)  # it has 36 blocks


def test_a_transformers_model_is_left_as_it_was(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    ids = torch.arange(20, 40)[None]
    names, before = list(dict(model.named_modules())), model(ids).logits
    extract_caa_vectors(model, AutoTokenizer.from_pretrained(tiny_llama), RAW, show_progress=False)
    assert list(dict(model.named_modules())) == names
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("pairs", [RAW, chats()], ids=["raw", "chat"])
def test_a_transformers_model_without_a_tokenizer_is_refused(pairs: Any, tiny_llama: Path) -> None:
    with pytest.raises(InputError, match="the model has no tokenizer"):
        extract_caa_vectors(AutoModelForCausalLM.from_pretrained(tiny_llama), None, pairs)


def test_the_models_own_tokenizer_is_taken_unless_one_is_given(tiny_hooked: Boot, tiny_model: Any) -> None:
    booted = tiny_hooked("llama", "bridge")
    other = AutoTokenizer.from_pretrained(tiny_model("gemma"))  # adds a BOS, which moves every later activation
    own = stacked(extract(booted))
    assert torch.equal(stacked(extract_caa_vectors(booted, booted.tokenizer, RAW, show_progress=False)), own)
    assert relative_error(stacked(extract_caa_vectors(booted, other, RAW, show_progress=False)), own) > 1e-2
