"""The local backend against the naive oracle, for both TransformerLens classes; it leaves no trace on a model."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import ALL_LAYERS, BOTH_KINDS
from oracle import oracle_means, relative_error, watched
from tiny import D_MODEL, FAMILIES, N_LAYERS, VOCAB_SIZE
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tl_persona import load_model, prepare_inputs
from tl_persona.backends import open_backend
from tl_persona.data.personas import QAPair
from tl_persona.errors import HookError, InputError, NonFiniteError
from tl_persona.plan import Sample
from tl_persona.prompts.masks import MaskStrategy

pytestmark = pytest.mark.tl

Boot = Callable[[str, str], Any]


EVERY_MODEL = pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, "bridge") for family in sorted(FAMILIES)),
        *(pytest.param(family, "hooked", marks=pytest.mark.hooked) for family in ("gemma", "gpt2", "llama")),
    ],
)


SYSTEM = "You are Mara. You kept the light on the north coast for thirty years, and you speak in short sentences."
QUESTIONS = [
    QAPair("q-short", "explicit", "frq", "individual", "Name?", "Mara."),
    QAPair("q-long", "implicit", "frq", "individual", "Where do you live, and what do you do there in the evening?",
           "I live by the sea, in the old house.\n\nIn the evening I read, and I listen to the wind."),
    QAPair("q-choice", "explicit", "mcq", "shared", "Tea or rain?", "Rain", ("Tea", "Rain"), 1),
    QAPair("q-twice", "implicit", "frq", "individual", "Are you Mara?", "You are Mara, I am told."),
]  # fmt: skip


def strategies_of(family: str) -> list[MaskStrategy]:
    """All eight; seven where the template ends the question in plain text."""
    brackets = family in ("mistral", "mixtral")
    return [strategy for strategy in MaskStrategy if not (brackets and strategy == "question_last_special")]


def persona_samples(tokenizer: Any, strategies: Sequence[MaskStrategy] = tuple(MaskStrategy)) -> list[Sample]:
    """One sample a question, one mask row a strategy."""
    by_strategy = [prepare_inputs(tokenizer, SYSTEM, QUESTIONS, strategy) for strategy in strategies]
    return [
        Sample(same[0].sample_id, same[0].input_ids, torch.stack([prompt.token_mask for prompt in same]))
        for same in zip(*by_strategy, strict=True)
    ]


def random_samples(*lengths: int, seed: int = 0) -> list[Sample]:
    """Texts that have nothing in common, with one mask over all tokens and one over the last."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index, length in enumerate(lengths):
        ids = torch.randint(10, VOCAB_SIZE, (length,), generator=generator)
        masks = torch.ones(2, length, dtype=torch.bool)
        masks[1, :-1] = False
        samples.append(Sample(f"s{index}", ids, masks))
    return samples


def pool(
    model: Any,
    samples: Sequence[Sample],
    hooks: Sequence[str] = tuple(ALL_LAYERS),
    *,
    tokenizer: Any = None,
    **limits: Any,
) -> list[Tensor]:
    """The pooled means of every sample, in the order of the samples."""
    backend = open_backend(model, tokenizer=tokenizer)
    pooled = {each.sample: each.means for each in backend.pool(backend.plan(samples, **limits), hooks)}
    return [pooled[index] for index in range(len(samples))]


def load_hf(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


# --- the numbers ---------------------------------------------------------------------------------------------------


@EVERY_MODEL
def test_every_strategy_and_layer_of_every_sample_equals_the_oracle(
    family: str, kind: str, tiny_hooked: Boot, tiny_hf: Callable[[str], Any]
) -> None:
    model = tiny_hooked(family, kind)
    samples = persona_samples(model.tokenizer, strategies_of(family))
    assert len({len(sample.input_ids) for sample in samples}) == len(samples)  # so some of them are padded
    for sample, means in zip(samples, pool(model, samples), strict=True):
        assert relative_error(means, oracle_means(tiny_hf(family), sample)) < 1e-5


@pytest.fixture(scope="module")
def alone(tiny_hooked: Boot) -> Callable[[str, str], tuple[list[Sample], list[Tensor]]]:
    """Samples that share a prefix and samples that do not, and the means of each when it runs by itself."""

    @cache
    def means_of(family: str, kind: str) -> tuple[list[Sample], list[Tensor]]:
        model = tiny_hooked(family, kind)
        samples = persona_samples(model.tokenizer, strategies_of(family)) + random_samples(7, 23, 23)
        return samples, [pool(model, [sample])[0] for sample in samples]

    return means_of


@EVERY_MODEL
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_neither_batches_nor_order_nor_company_change_a_mean(
    family: str,
    kind: str,
    tiny_hooked: Boot,
    alone: Callable[[str, str], tuple[list[Sample], list[Tensor]]],
    data: st.DataObject,
) -> None:
    model = tiny_hooked(family, kind)
    samples, by_itself = alone(family, kind)
    order = data.draw(st.permutations(range(len(samples))))
    chosen = order[: data.draw(st.integers(1, len(samples)))]
    pooled = pool(model, [samples[index] for index in chosen], batch_tokens=data.draw(st.integers(1, 3000)))
    for index, means in zip(chosen, pooled, strict=True):
        # How the experts' products are cut depends on what runs beside a token, which moves a rounding or two.
        assert relative_error(means, by_itself[index]) < (5e-6 if family == "mixtral" else 2e-6)


def samples_with_a_prefix(*lengths: int, prefix: int = 120) -> list[Sample]:
    """Texts that begin alike, with a mask over everything and one over the last token."""
    beginning, *endings = random_samples(prefix, *lengths, seed=5)
    texts = [torch.cat([beginning.input_ids, ending.input_ids]) for ending in endings]
    whole = [torch.ones(2, len(ids), dtype=torch.bool) for ids in texts]
    for masks in whole:
        masks[1, :-1] = False
    return [Sample(f"p{index}", ids, masks) for index, (ids, masks) in enumerate(zip(texts, whole, strict=True))]


@EVERY_MODEL
@pytest.mark.parametrize("prefix", [120, 430])
def test_a_shared_prefix_never_changes_a_number(
    prefix: int, family: str, kind: str, tiny_hooked: Boot, tiny_hf: Callable[[str], Any]
) -> None:
    samples = samples_with_a_prefix(30, 1, 17, 17, 45, prefix=prefix)
    for sample, means in zip(samples, pool(tiny_hooked(family, kind), samples), strict=True):
        assert relative_error(means, oracle_means(tiny_hf(family), sample)) < 1e-5


@BOTH_KINDS
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_a_shared_prefix_runs_once(family: str, kind: str, tiny_hooked: Boot) -> None:
    model = tiny_hooked(family, kind)
    samples = samples_with_a_prefix(10, 10, 10, 10, 10)
    pool(model, samples)  # the first run also proves that sharing is exact on this model
    with watched(model) as positions:
        pool(model, samples)
    assert positions["blocks.0.mlp"] == positions["blocks.2.mlp"] == 120 + 5 * 10


@BOTH_KINDS
def test_a_tokenizer_that_pads_on_the_left_changes_nothing(
    kind: str, tiny_hooked: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_hooked("llama", kind)
    samples = persona_samples(model.tokenizer)
    expected = pool(model, samples)
    pads_left = copy.deepcopy(model.tokenizer)
    pads_left.padding_side, pads_left.pad_token = (
        "left",
        "<|im_start|>",
    )  # every prompt begins with what looks like padding
    monkeypatch.setattr(model, "tokenizer", pads_left)
    assert int(samples[0].input_ids[0]) == pads_left.pad_token_id
    for means, right in zip(pool(model, samples), expected, strict=True):
        assert relative_error(means, right) < 1e-6


@BOTH_KINDS
def test_ids_that_look_like_padding_or_bos_are_run_as_they_are(
    kind: str, tiny_hooked: Boot, tiny_hf: Callable[[str], Any]
) -> None:
    model = tiny_hooked("llama", kind)
    special = model.tokenizer.convert_tokens_to_ids(["<pad>", "<|im_end|>", "<|im_start|>"])
    ids = torch.tensor([special[0], special[0], 30, special[1], 31, special[2], special[0]])
    sample = Sample("odd", ids, torch.eye(len(ids), dtype=torch.bool))
    means = pool(model, [sample, *random_samples(20)])[0]
    # Absolute, for <pad> itself is embedded as zero; the other residuals are of order one.
    torch.testing.assert_close(means, oracle_means(tiny_hf("llama"), sample), rtol=1e-5, atol=1e-5, check_dtype=False)


@BOTH_KINDS
def test_samples_of_one_plan_may_have_different_numbers_of_masks(
    kind: str, tiny_hooked: Boot, tiny_hf: Callable[[str], Any]
) -> None:
    first, second = random_samples(9, 14)
    second = Sample(second.sample_id, second.input_ids, second.masks[1:])
    pooled = pool(tiny_hooked("llama", kind), [first, second])
    assert [means.shape for means in pooled] == [(2, N_LAYERS, D_MODEL), (1, N_LAYERS, D_MODEL)]
    for sample, means in zip([first, second], pooled, strict=True):
        assert relative_error(means, oracle_means(tiny_hf("llama"), sample)) < 1e-5


@BOTH_KINDS
def test_half_precision_models_are_averaged_in_float32_or_better(kind: str, tiny_model: Callable[[str], Path]) -> None:
    model = load_model(tiny_model("llama"), kind=kind, dtype="bfloat16")
    (sample,) = random_samples(900)
    with torch.no_grad():
        _, cache = model.run_with_cache(sample.input_ids[None], names_filter=ALL_LAYERS)
    activations = torch.stack([cache[name][0] for name in ALL_LAYERS])
    assert activations.dtype == torch.bfloat16
    right = activations.double().mean(dim=1)
    in_half_precision = accumulate(activations.unbind(dim=1), torch.add)
    assert relative_error(list(in_half_precision)[-1] / 900, right) > 1e-2  # so a careless sum would be noticed
    assert relative_error(pool(model, [sample])[0][0], right) < 1e-6


# --- hooks ---------------------------------------------------------------------------------------------------------


@BOTH_KINDS
def test_rows_come_in_the_order_of_the_hooks_and_resid_pre_is_the_block_before(kind: str, tiny_hooked: Boot) -> None:
    model = tiny_hooked("llama", kind)
    samples = random_samples(11, 17)
    everything = pool(model, samples)
    hooks = ["blocks.2.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"]
    for means, layers in zip(pool(model, samples, hooks), everything, strict=True):
        assert relative_error(means, layers[:, [2, 0, 1]]) < 1e-6


@BOTH_KINDS
def test_attention_and_mlp_outputs_add_up_to_the_residual(kind: str, tiny_hooked: Boot) -> None:
    model = tiny_hooked("llama", kind)
    parts = ["blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"]
    (means,) = pool(model, random_samples(19), [*parts, "blocks.1.hook_resid_post"])
    assert relative_error(means[:, :3].sum(dim=1), means[:, 3]) < 1e-5


@BOTH_KINDS
def test_the_embedding_can_be_read(kind: str, tiny_hooked: Boot, tiny_hf: Callable[[str], Any]) -> None:
    (sample,) = random_samples(13)
    (means,) = pool(tiny_hooked("llama", kind), [sample], ["hook_embed"])
    embedded = tiny_hf("llama").get_input_embeddings()(sample.input_ids).detach().double()
    assert relative_error(means[0, 0], embedded.mean(dim=0)) < 1e-6


@BOTH_KINDS
@pytest.mark.parametrize("hook", ["blocks.1.attn.hook_q", "blocks.0.attn.hook_pattern", "blocks.2.mlp.hook_post"])
def test_a_hook_without_a_d_model_axis_is_refused_before_the_samples_run(
    hook: str, kind: str, tiny_hooked: Boot
) -> None:
    model = tiny_hooked("llama", kind)
    with watched(model) as positions, pytest.raises(HookError, match=f"{hook}.*(shape|did not fire)"):
        pool(model, random_samples(40), [ALL_LAYERS[0], hook])
    assert positions["blocks.0.mlp"] <= 2


@BOTH_KINDS
def test_nothing_after_the_last_needed_block_runs(kind: str, tiny_hooked: Boot) -> None:
    model = tiny_hooked("llama", kind)
    with watched(model) as positions:
        pool(model, random_samples(10, 20), ["blocks.1.hook_resid_post", "blocks.0.hook_resid_post"])
    ran = {name for name, count in positions.items() if count}
    assert ran == {"blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"}


@BOTH_KINDS
def test_the_embedding_runs_no_block(kind: str, tiny_hooked: Boot) -> None:
    model = tiny_hooked("llama", kind)
    with watched(model) as positions:
        pool(model, random_samples(10, 20), ["hook_embed"])
    assert not any(positions.values())


@BOTH_KINDS
def test_no_logits_are_computed_but_one_a_text_at_most(kind: str, tiny_hooked: Boot) -> None:
    model = tiny_hooked("llama", kind)
    pool(model, random_samples(10, 20))  # what is tried and compared first
    with watched(model) as positions:
        pool(model, random_samples(10, 20))
    assert positions["unembed"] <= 2


# --- no trace on the model -----------------------------------------------------------------------------------------


def hooks_on(model: Any) -> dict[str, int]:
    """How many hooks sit on each module, of torch's and of TransformerLens's own."""
    counts = {}
    for name, module in model.named_modules():
        kinds = (module._forward_hooks, module._forward_pre_hooks, getattr(module, "fwd_hooks", ()))
        counts[name] = sum(len(hooks) for hooks in kinds)
    return counts


@contextmanager
def failing_block(model: Any, layer: int) -> Iterator[None]:
    def fail(*_: Any) -> None:
        raise RuntimeError("the block failed")

    handle = model.blocks[layer].mlp.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@BOTH_KINDS
def test_no_hook_stays_on_the_model_whether_the_run_ends_fails_or_is_left(kind: str, tiny_hooked: Boot) -> None:
    model = tiny_hooked("llama", kind)
    before = hooks_on(model)
    pool(model, random_samples(10, 20))
    assert hooks_on(model) == before
    with failing_block(model, 1), pytest.raises(RuntimeError, match="the block failed"):
        pool(model, random_samples(10, 20))
    assert hooks_on(model) == before
    backend = open_backend(model)
    running = backend.pool(backend.plan(random_samples(10, 20, 30), batch_tokens=1), ALL_LAYERS)
    next(iter(running))
    running.close()  # type: ignore[attr-defined]
    assert hooks_on(model) == before


@BOTH_KINDS
@pytest.mark.parametrize("trained", ["everything", "one module"])
def test_dropout_is_off_while_the_model_runs_and_as_it_was_afterwards(
    trained: str, kind: str, tiny_model: Callable[[str], Path]
) -> None:
    model = load_model(tiny_model("gpt2"), kind=kind)  # GPT-2 has dropout, 0.1 by default
    samples = random_samples(12, 30)
    expected = pool(model, samples)
    inner: Any = getattr(model, "original_model", model)
    (model if trained == "everything" else inner).train()
    if trained == "one module":
        model.blocks[0].eval()
    before = [module.training for module in (*model.modules(), *inner.modules())]
    assert True in before
    for means, right in zip(pool(model, samples), expected, strict=True):
        assert torch.equal(means, right)
    assert [module.training for module in (*model.modules(), *inner.modules())] == before
    with failing_block(model, 1), pytest.raises(RuntimeError, match="the block failed"):
        pool(model, samples)
    assert [module.training for module in (*model.modules(), *inner.modules())] == before


@BOTH_KINDS
def test_gradients_are_off_for_the_run_and_for_nobody_else(kind: str, tiny_hooked: Boot) -> None:
    model = tiny_hooked("llama", kind)
    backend = open_backend(model)
    for pooled in backend.pool(backend.plan(random_samples(10, 20), batch_tokens=1), ALL_LAYERS):
        assert not pooled.means.requires_grad
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_a_hugging_face_model_is_taken_as_it_is_and_stays_as_it_was(
    family: str, tiny_model: Callable[[str], Path], tiny_hooked: Boot
) -> None:
    folder = tiny_model(family)
    hf_model, tokenizer = load_hf(folder).train(), AutoTokenizer.from_pretrained(folder)
    samples = persona_samples(tokenizer)

    def state() -> tuple[object, ...]:
        classes = [(name, type(module), module.training) for name, module in hf_model.named_modules()]
        return classes, hooks_on(hf_model), [id(tensor) for tensor in (*hf_model.parameters(), *hf_model.buffers())]

    def logits() -> Tensor:
        hf_model.eval()
        try:
            with torch.no_grad():
                return hf_model(samples[0].input_ids[None]).logits  # type: ignore[no-any-return]
        finally:
            hf_model.train()

    before, logits_before, tokens_before = state(), logits(), dict(tokenizer.special_tokens_map)
    weights_before = {name: tensor.clone() for name, tensor in hf_model.state_dict().items()}
    pooled = pool(hf_model, samples, tokenizer=tokenizer)
    again = pool(hf_model, samples, tokenizer=tokenizer)
    assert state() == before
    assert torch.equal(logits(), logits_before)
    assert (dict(tokenizer.special_tokens_map), tokenizer.padding_side) == (tokens_before, "right")
    assert all(torch.equal(tensor, weights_before[name]) for name, tensor in hf_model.state_dict().items())
    for index, booted in enumerate(pool(tiny_hooked(family, "bridge"), samples)):
        assert relative_error(pooled[index], booted) < 1e-6
        assert torch.equal(again[index], pooled[index])


def test_new_weights_of_a_hugging_face_model_are_seen(tiny_model: Callable[[str], Path]) -> None:
    hf_model = load_hf(tiny_model("llama"))
    (sample,) = random_samples(15)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    for _ in range(2):
        (means,) = pool(hf_model, [sample], tokenizer=tokenizer)
        assert relative_error(means, oracle_means(hf_model, sample)) < 1e-5
        with torch.no_grad():
            hf_model.model.layers[0].mlp.down_proj.weight.mul_(3)


def test_a_hugging_face_model_is_freed_with_its_last_reference(tiny_model: Callable[[str], Path]) -> None:
    hf_model = load_hf(tiny_model("llama"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    pool(hf_model, random_samples(5), tokenizer=tokenizer)
    weights = weakref.ref(hf_model.model.layers[0].mlp.down_proj.weight)
    del hf_model
    gc.collect()
    assert weights() is None


def test_what_is_no_model_is_refused_with_what_would_do() -> None:
    with pytest.raises(InputError, match=r"type dict.*load_model"):
        open_backend({"weights": 1})


# --- memory --------------------------------------------------------------------------------------------------------


@BOTH_KINDS
def test_activations_die_with_their_batch(kind: str, tiny_hooked: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_hooked("llama", kind)
    run, seen, alive = model.run_with_cache, [], []

    def spy(*args: Any, **kwargs: Any) -> tuple[Any, Mapping[str, Tensor]]:
        alive.append(sum(reference() is not None for reference in seen))
        output, cache = run(*args, **kwargs)
        seen.extend(weakref.ref(tensor) for tensor in cache.values())
        return output, cache

    monkeypatch.setattr(model, "run_with_cache", spy)

    def most_alive(n_samples: int) -> int:
        seen.clear()
        alive.clear()
        kept = pool(model, random_samples(*range(10, 10 + n_samples)), batch_tokens=1)
        assert len(kept) == n_samples and len(alive) >= n_samples
        assert not any(reference() is not None for reference in seen)  # the results keep none of them alive
        return max(alive)

    assert most_alive(3) == most_alive(12)


# --- numbers that are none -----------------------------------------------------------------------------------------


@BOTH_KINDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_activation_that_is_no_number_names_its_sample_and_layer(
    bad: float, kind: str, tiny_model: Callable[[str], Path]
) -> None:
    model = load_model(tiny_model("llama"), kind=kind)
    samples = random_samples(12, 18, 15, 12)
    first_bad = torch.tensor(399)
    with torch.no_grad():
        embedding = next(tensor for tensor in model.parameters() if tensor.shape == (VOCAB_SIZE, D_MODEL))
        embedding[first_bad] = bad
    spoiled = Sample("spoiled", torch.cat([samples[2].input_ids[:6], first_bad[None]]), samples[2].masks[:, -7:])
    clean = [sample for sample in samples if first_bad not in sample.input_ids]
    assert len(clean) == 4
    with pytest.raises(NonFiniteError, match=r"sample 'spoiled'.*blocks\.0\.hook_resid_post.*NaN or infinity"):
        pool(model, [*clean[:2], spoiled, *clean[2:]])
    assert all(bool(means.isfinite().all()) for means in pool(model, clean))


@BOTH_KINDS
def test_the_layer_where_the_numbers_end_is_named(kind: str, tiny_model: Callable[[str], Path]) -> None:
    model = load_model(tiny_model("llama"), kind=kind)

    def overflow(_module: Any, _args: Any, output: Any) -> Any:
        return output * float("inf")

    handle = model.blocks[1].mlp.register_forward_hook(overflow)  # type: ignore[attr-defined]
    with pytest.raises(NonFiniteError, match=r"sample 's[01]'.*blocks\.1\.hook_resid_post"):
        pool(model, random_samples(12, 12))
    handle.remove()
    assert len(pool(model, random_samples(12, 12))) == 2
