"""Steering and monitoring: the same as hooks written by hand on the Hugging Face model, and nothing left behind."""

import gc
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from by_hand import NEW_TOKENS, Edit, V, W, adding, at, by_hand, generated_by_hand, setting, some_ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kinds import HOOKED
from oracle import keeping_its_cache, logits_of, some
from tiny import D_MODEL, N_LAYERS, WINDOW
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tl_persona.backends.local.observers import is_observed
from tl_persona.backends.local.trial import trial_of
from tl_persona.errors import HookError, InputError, NonFiniteError
from tl_persona.loading import load_model
from tl_persona.models.facts import source_of
from tl_persona.models.hooks import resid_post
from tl_persona.provenance import Provenance
from tl_persona.steering import Intervention, attach, monitor, project
from tl_persona.steering.pass_watch import PassWatch
from tl_persona.steering.positions import Positions
from tl_persona.vectors import SteeringVector, SteeringVectorSet

BRIDGE = pytest.param("bridge", marks=pytest.mark.tl)


EVERY_KIND = pytest.mark.parametrize("kind", [BRIDGE, HOOKED])
EVERY_MODEL = pytest.mark.parametrize(
    ("kind", "family"),
    [
        pytest.param("bridge", "llama", marks=pytest.mark.tl),
        pytest.param("bridge", "gpt2", marks=pytest.mark.tl),
        pytest.param("bridge", "gemma", marks=pytest.mark.tl),
        pytest.param("bridge", "mistral", marks=pytest.mark.tl),
        pytest.param("hooked", "llama", marks=pytest.mark.hooked),
        pytest.param("hooked", "gpt2", marks=pytest.mark.hooked),
    ],
)
MIDDLE = resid_post(1)
STRENGTH = 6.0


@pytest.fixture(scope="module")
def models(tiny_model: Callable[[str], Path]) -> Callable[..., Any]:
    """Gives a TransformerLens model by kind and family; kept, as every test must leave it as it was."""
    kept: dict[tuple[str, str, str], Any] = {}

    def get(kind: str, family: str = "llama", dtype: str = "float32") -> Any:
        key = kind, family, dtype
        if key not in kept:
            kept[key] = load_model(tiny_model(family), kind=kind, dtype=dtype)  # type: ignore[arg-type]
            residuals(kept[key], some_ids(2))  # transformers puts hooks of its own on at the first such pass
        return kept[key]

    return get


@pytest.fixture(scope="module")
def plain(tiny_model: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    """Gives the Hugging Face model of a family."""
    kept: dict[str, PreTrainedModel] = {}

    def get(family: str) -> PreTrainedModel:
        if family not in kept:
            folder = tiny_model(family)
            kept[family] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return kept[family]

    return get


def residuals(model: Any, ids: Tensor, name: str = MIDDLE, **options: Any) -> Tensor:
    with torch.no_grad():
        return model.run_with_cache(ids, names_filter=[name], **options)[1][name]


def generated(model: Any, ids: Tensor, **options: Any) -> Tensor:
    chosen = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "verbose": False, "stop_at_eos": False, **options}
    with keeping_its_cache(model):
        return model.generate(ids, **chosen)


def hooks_on(model: Any) -> int:
    """Every PyTorch hook anywhere on the model, and every entry of TransformerLens's own lists."""
    modules = list(model.modules())
    count = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules)
    return count + sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in set(model.hook_dict.values()))


MODES = [
    ({"coefficient": STRENGTH}, adding(STRENGTH)),
    ({"mode": "ablate"}, setting(0.0)),
    ({"mode": "clamp", "coefficient": -3.5}, setting(-3.5)),
]


@EVERY_MODEL
@pytest.mark.parametrize(("options", "edit"), MODES)
def test_a_steered_pass_equals_a_hook_written_by_hand(
    kind: str, family: str, options: dict[str, Any], edit: Edit, models: Any, plain: Any
) -> None:
    ids = some_ids(2 * WINDOW, batch=2)
    model, hf = models(kind, family), plain(family)
    with attach(model, [Intervention(MIDDLE, V, **options)]):
        steered = logits_of(model, ids)
    with by_hand(hf, {1: edit}):
        expected = hf(ids).logits
    torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-4)
    assert (steered - logits_of(model, ids)).abs().max() > 0.1


@EVERY_MODEL
def test_coefficient_zero_changes_nothing_bit_for_bit(kind: str, family: str, models: Any) -> None:
    model, ids = models(kind, family), some_ids(12)
    before, count = logits_of(model, ids), hooks_on(model)
    for direction in (V, -V, 1e30 * V):
        with attach(model, [Intervention(MIDDLE, direction, 0.0), Intervention(MIDDLE, direction, -0.0, positions=3)]):
            assert torch.equal(logits_of(model, ids), before)
            assert torch.equal(generated(model, ids), generated_by_hand_or_model(model, ids))
            assert hooks_on(model) == count


def generated_by_hand_or_model(model: Any, ids: Tensor) -> Tensor:
    """What the model generates with no block around it at all."""
    for _ in range(NEW_TOKENS):
        ids = torch.cat([ids, logits_of(model, ids)[:, -1:].argmax(dim=-1)], dim=1)
    return ids


def test_adding_the_zero_vector_keeps_negative_zeros(models: Any) -> None:
    model, ids = models("bridge"), some_ids(4)

    def negative_zero(x: Tensor, hook: Any) -> Tensor:
        return torch.full_like(x, -0.0)

    zero = torch.zeros(D_MODEL)
    with model.hooks(fwd_hooks=[(MIDDLE, negative_zero)]), attach(model, [Intervention(MIDDLE, zero, 5.0)]):
        seen = residuals(model, ids)
    assert torch.signbit(seen).all()


@EVERY_KIND
@pytest.mark.parametrize("positions", [None, "last", [0, -1]])
def test_after_the_block_outputs_are_as_before_bit_for_bit(kind: str, positions: Positions, models: Any) -> None:
    model, ids = models(kind), some_ids(9, batch=2)
    before, count = logits_of(model, ids), hooks_on(model)
    with attach(model, [Intervention(MIDDLE, V, STRENGTH, positions=positions)]):
        assert hooks_on(model) > count
        logits_of(model, ids)
    assert hooks_on(model) == count
    assert torch.equal(logits_of(model, ids), before)


@EVERY_KIND
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_nothing_stays_when_the_block_raises(kind: str, error: type[BaseException], models: Any) -> None:
    model, ids = models(kind), some_ids(6)
    before, count = logits_of(model, ids), hooks_on(model)
    with (
        pytest.raises(error),
        attach(model, [Intervention(MIDDLE, V, positions=0)]),
        monitor(model, {"v": (MIDDLE, V)}),
    ):
        raise error
    assert hooks_on(model) == count
    assert torch.equal(logits_of(model, ids), before)


@EVERY_KIND
def test_nothing_stays_when_a_hook_raises_in_the_middle_of_a_pass(kind: str, models: Any) -> None:
    model, ids = models(kind), some_ids(6)
    before, count = logits_of(model, ids), hooks_on(model)
    with (
        pytest.raises(InputError, match="position 6 is outside a text of 6 tokens"),
        attach(model, [Intervention(resid_post(0), V), Intervention(MIDDLE, V, positions=6)]),
    ):
        model.run_with_cache(ids)
    assert hooks_on(model) == count
    assert torch.equal(logits_of(model, ids), before)


@EVERY_KIND
def test_nothing_stays_when_a_generator_is_closed_inside_the_block(kind: str, models: Any) -> None:
    model, ids = models(kind), some_ids(6)
    count = hooks_on(model)

    def steered() -> Iterator[Tensor]:
        with attach(model, [Intervention(MIDDLE, V, positions="last")]):
            while True:
                yield logits_of(model, ids)

    closed, forgotten = steered(), steered()
    next(closed)
    next(forgotten)
    assert hooks_on(model) > count
    closed.close()
    del forgotten
    gc.collect()
    assert hooks_on(model) == count


@EVERY_KIND
def test_the_callers_own_hooks_stay_and_see_the_model_as_it_was_before_them(kind: str, models: Any) -> None:
    model, ids = models(kind), some_ids(6)
    unsteered = residuals(model, ids)
    earlier, later = [], []
    model.add_hook(MIDDLE, lambda x, hook: earlier.append(x))
    try:
        with attach(model, [Intervention(MIDDLE, V, STRENGTH)]):
            model.add_hook(MIDDLE, lambda x, hook: later.append(x))
            logits_of(model, ids)
        logits_of(model, ids)
    finally:
        model.reset_hooks()
    assert torch.equal(earlier[0], unsteered)
    assert torch.equal(later[0], unsteered + STRENGTH * V)
    assert len(earlier) == len(later) == 2
    assert torch.equal(later[1], unsteered)


@EVERY_KIND
def test_steering_goes_on_after_reset_hooks_and_after_hooks_of_transformer_lens(kind: str, models: Any) -> None:
    model, ids = models(kind), some_ids(6)
    before = residuals(model, ids)
    with attach(model, [Intervention(MIDDLE, V, STRENGTH)]):
        model.reset_hooks()
        model.run_with_hooks(ids, fwd_hooks=[(MIDDLE, lambda x, hook: None)])
        assert torch.equal(residuals(model, ids), before + STRENGTH * V)
    assert torch.equal(residuals(model, ids), before)


@EVERY_KIND
def test_nested_blocks_add_up_and_may_end_in_any_order(kind: str, models: Any) -> None:
    model, ids = models(kind), some_ids(6)
    before = residuals(model, ids)
    outer, inner = ExitStack(), ExitStack()
    outer.enter_context(attach(model, [Intervention(MIDDLE, V, 2.0)]))
    inner.enter_context(attach(model, [Intervention(MIDDLE, W, 3.0, positions=[1])]))
    both = residuals(model, ids)
    outer.close()
    only_inner = residuals(model, ids)
    inner.close()
    expected = before + 2 * V
    expected[:, 1] += 3 * W
    torch.testing.assert_close(both, expected)
    torch.testing.assert_close(only_inner, expected - 2 * V)
    assert torch.equal(residuals(model, ids), before)


@EVERY_MODEL
def test_several_layers_at_once_equal_several_hooks_by_hand(kind: str, family: str, models: Any, plain: Any) -> None:
    model, hf, ids = models(kind, family), plain(family), some_ids(10)
    wanted = [Intervention(resid_post(layer), some(layer, D_MODEL), 1.0 + layer) for layer in range(N_LAYERS)]
    edits = {layer: adding(1.0 + layer, some(layer, D_MODEL)) for layer in range(N_LAYERS)}
    with attach(model, wanted):
        steered = logits_of(model, ids)
    with by_hand(hf, edits):
        torch.testing.assert_close(steered, hf(ids).logits, rtol=1e-4, atol=1e-4)


@EVERY_MODEL
@pytest.mark.parametrize(("options", "edit"), MODES)
def test_steered_generation_equals_hugging_face_generation_with_a_hook_by_hand(
    kind: str, family: str, options: dict[str, Any], edit: Edit, models: Any, plain: Any
) -> None:
    model, hf, ids = models(kind, family), plain(family), some_ids(2 * WINDOW)
    with by_hand(hf, {1: edit}):
        expected = hf.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    with attach(model, [Intervention(MIDDLE, V, **options)]):
        assert torch.equal(generated(model, ids), expected)


PROMPT = WINDOW + 4  # longer than a sliding window, which keeps fewer keys than there were tokens
LAST = PROMPT + NEW_TOKENS - 2  # the last token that passes through the model; one more is generated
CHOICES: list[tuple[Positions, list[int]]] = [
    (None, list(range(LAST + 1))),
    ("last", list(range(PROMPT - 1, LAST + 1))),
    ("generated", list(range(PROMPT, LAST + 1))),
    (0, [0]),
    (-1, [PROMPT - 1]),
    (PROMPT + 1, [PROMPT + 1]),
    ([2, -2, PROMPT], [2, PROMPT - 2, PROMPT]),
    (range(3, PROMPT + 3), list(range(3, PROMPT + 3))),
    (slice(PROMPT, None), list(range(PROMPT, LAST + 1))),
    (slice(-3, None), list(range(PROMPT - 3, LAST + 1))),
    (slice(2, -2), list(range(2, PROMPT - 2))),
    (slice(None, None, 3), list(range(0, LAST + 1, 3))),
    (slice(-5, PROMPT + 2, 2), list(range(PROMPT - 5, PROMPT + 2, 2))),
    (torch.arange(PROMPT)[None] % 4 == 1, list(range(1, PROMPT, 4))),
]


@EVERY_MODEL
@pytest.mark.parametrize(("positions", "columns"), CHOICES, ids=[str(p)[:24] for p, _ in CHOICES])
def test_positions_mean_the_same_tokens_with_a_cache_as_in_one_pass_over_the_whole_text(
    kind: str, family: str, positions: Positions, columns: list[int], models: Any, plain: Any
) -> None:
    model, hf, ids = models(kind, family), plain(family), some_ids(PROMPT)
    after = resid_post(2)
    with (
        attach(model, [Intervention(MIDDLE, V, STRENGTH, positions=positions)]),
        monitor(model, {"w": (after, W)}) as seen,
    ):
        text = generated(model, ids)
    edits = {1: at(columns, adding(STRENGTH))}
    assert torch.equal(text, generated_by_hand(hf, ids, edits))
    captured: list[Tensor] = []
    with by_hand(hf, {**edits, 2: lambda x: captured.append(x) or x}):
        hf(text[:, :-1], use_cache=False)
    (projections,) = seen.texts("w")
    torch.testing.assert_close(projections, captured[0] @ (W / W.norm()), rtol=1e-4, atol=1e-4)
    assert projections.shape == (1, LAST + 1)


# A static cache is wrong in the bridge of TransformerLens 3.9, steered or not.
@pytest.mark.parametrize("cache", [pytest.param(None, marks=pytest.mark.tl), "static"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_positions_hold_in_the_generate_of_hugging_face_inside_a_bridge(
    family: str, cache: str | None, models: Any, plain: Any
) -> None:
    model, ids = models("bridge", family), some_ids(PROMPT)
    chosen = [0, PROMPT - 1, PROMPT + 2]
    edits = [Intervention(MIDDLE, V, STRENGTH, positions=[0, -1, PROMPT + 2])]
    with attach(model, edits), keeping_its_cache(model):
        text = model.original_model.generate(
            ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, cache_implementation=cache
        )
    assert torch.equal(text, generated_by_hand(plain(family), ids, {1: at(chosen, adding(STRENGTH))}))


@EVERY_KIND
def test_absolute_positions_hold_without_a_cache_too(kind: str, models: Any) -> None:
    model, ids = models(kind), some_ids(PROMPT)
    with attach(model, [Intervention(MIDDLE, V, STRENGTH, positions=slice(PROMPT - 2, PROMPT + 2))]):
        with_cache = generated(model, ids)
        assert torch.equal(generated(model, ids, use_past_kv_cache=False), with_cache)
    assert not torch.equal(generated(model, ids), with_cache)


@EVERY_KIND
def test_what_is_generated_cannot_be_told_without_a_cache_and_that_is_said(kind: str, models: Any) -> None:
    model, ids = models(kind), some_ids(6)
    with attach(model, [Intervention(MIDDLE, V, positions="generated")]):
        with pytest.raises(InputError, match="needs a key-value cache"):
            generated(model, ids, use_past_kv_cache=False)
        with pytest.raises(InputError, match="needs a key-value cache"):
            logits_of(model, ids)


@pytest.mark.tl
@pytest.mark.parametrize("positions", ["generated", -1, slice(-2, None), torch.ones(1, 6, dtype=torch.bool)])
def test_a_prompt_that_ran_before_the_block_is_not_guessed_at(positions: Positions, models: Any) -> None:
    model, ids = models("bridge"), some_ids(8)
    with torch.no_grad(), keeping_its_cache(model):
        _, cache = model(ids[:, :6], return_type="logits_and_cache", use_cache=True)
    with (
        attach(model, [Intervention(MIDDLE, V, positions=positions)]),
        pytest.raises(InputError, match="began before the block"),
    ):
        logits_of(model, ids[:, 6:], past_key_values=cache)


@pytest.mark.tl
def test_absolute_positions_are_right_on_a_cache_from_before_the_block(models: Any) -> None:
    model, ids = models("bridge"), some_ids(8)
    with attach(model, [Intervention(MIDDLE, V, STRENGTH, positions=7)]):
        expected = logits_of(model, ids)[:, 6:]
    with torch.no_grad(), keeping_its_cache(model):
        _, cache = model(ids[:, :6], return_type="logits_and_cache", use_cache=True)
    with attach(model, [Intervention(MIDDLE, V, STRENGTH, positions=7)]):
        torch.testing.assert_close(logits_of(model, ids[:, 6:], past_key_values=cache), expected, rtol=1e-4, atol=1e-5)


@contextmanager
def losing_its_cache(model: Any) -> Iterator[None]:
    """A bridge whose attentions are not handed the cache, as where two releases call it by different names."""

    def drop(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {name: value for name, value in kwargs.items() if not hasattr(value, "get_seq_length")}

    handles = [block.attn.register_forward_pre_hook(drop, with_kwargs=True) for block in model.blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


UNDER_HOOKS: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "attach": lambda model: attach(model, [Intervention(MIDDLE, V, STRENGTH)]),
    "attach at the last position": lambda model: attach(model, [Intervention(MIDDLE, V, positions="last")]),
    "attach what adds nothing": lambda model: attach(model, [Intervention(MIDDLE, V, 0.0)]),
    "monitor": lambda model: monitor(model, {"v": (MIDDLE, V)}),
}


@pytest.mark.tl
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("how", UNDER_HOOKS)
def test_generation_that_loses_its_cache_is_refused_at_its_first_cached_step(
    how: str, family: str, models: Any
) -> None:
    model, ids = models("bridge", family), some_ids(8)
    passes: list[int] = []
    with losing_its_cache(model), UNDER_HOOKS[how](model):
        counting = model.original_model.register_forward_pre_hook(lambda *_: passes.append(1))
        for generate in (model.generate, model.hf_generate):
            passes.clear()
            with pytest.raises(InputError, match=r"has lost the beginning.*tl_persona\.generate, or with use_past_kv"):
                generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
            assert len(passes) <= 2  # the prompt, and at most the step that is refused
        counting.remove()
        without = model.generate(
            ids, max_new_tokens=2, do_sample=False, verbose=False, stop_at_eos=False, use_past_kv_cache=False
        )
    assert without.shape == (1, 10)


@pytest.mark.tl
def test_a_loop_of_the_callers_that_goes_on_with_a_lost_cache_is_refused(models: Any) -> None:
    model, ids = models("bridge"), some_ids(8)
    with losing_its_cache(model), attach(model, [Intervention(MIDDLE, V)]), torch.no_grad():
        _, cache = model(ids[:, :6], return_type="logits_and_cache", use_cache=True)
        with pytest.raises(InputError, match="has lost the beginning"):
            model(ids[:, 6:], past_key_values=cache)
        assert model(ids, use_cache=True).shape[1] == 8  # a pass over a whole text needs no cache


@pytest.mark.tl
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "mistral"])
def test_a_loaded_bridge_generates_by_itself_as_transformers_does(family: str, models: Any, plain: Any) -> None:
    model, ids = models("bridge", family), some_ids(2 * WINDOW)
    chosen = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "verbose": False, "stop_at_eos": False}
    expected = generated_by_hand(plain(family), ids, {})
    assert torch.equal(model.generate(ids, **chosen), expected)
    whole = model.hf_generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, stop_at_eos=False)
    assert torch.equal(whole, expected)
    assert not is_observed([*model.modules(), *model.original_model.modules()])
    for block in model.blocks:
        pickle.dumps(list(block.attn._forward_pre_hooks.values()))


@pytest.mark.tl
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "mistral"])
def test_a_bridge_of_the_users_generates_under_hooks_rightly_or_is_refused_never_garbage(
    family: str, plain: Any, tiny_model: Callable[[str], Path]
) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    folder, ids = tiny_model(family), some_ids(2 * WINDOW)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = TransformerBridge.boot_transformers(
        str(folder), hf_model=hf, tokenizer=AutoTokenizer.from_pretrained(folder), dtype=torch.float32
    )
    chosen = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "verbose": False, "stop_at_eos": False}
    expected = generated_by_hand(plain(family), ids, {1: adding(STRENGTH)})
    with attach(model, [Intervention(MIDDLE, V, STRENGTH)]):
        try:
            text = model.generate(ids, **chosen)
        except InputError as error:
            assert "has lost the beginning" in str(error)
            assert trial_of(model).read_as is not None  # only where attentions look for another name
            text = model.generate(ids, use_past_kv_cache=False, **chosen)
    assert torch.equal(text, expected)


@pytest.mark.tl
@pytest.mark.parametrize("name", ["cache", "past_key_values", "some_later_name"])
def test_a_cache_is_known_by_what_it_offers_and_not_by_its_name(name: str) -> None:
    cache = SimpleNamespace(get_seq_length=lambda: 7)
    with PassWatch(Announcing(), MIDDLE) as watch:
        assert places_in(watch, 1, 2, **{name: cache}) == [[7, 8]]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"cache": SimpleNamespace(length=7)}, "does not tell how many tokens went before"),
        ({"state": SimpleNamespace(length=7)}, "does not tell how many tokens went before"),
        ({"padding_mask": torch.tensor([[0, 1, 1]])}, "'padding_mask' looks like an attention mask"),
        ({"padding_mask": torch.tensor([[False, True, True]])}, "'padding_mask' looks like an attention mask"),
    ],
)
def test_an_argument_that_may_be_a_cache_or_a_mask_under_another_name_is_refused(
    arguments: dict[str, Any], why: str
) -> None:
    with PassWatch(Announcing(), MIDDLE) as watch, pytest.raises(InputError, match=why):
        places_in(watch, 1, 3, **arguments)


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        place = slice(0, len(tokens)) if side == "right" else slice(width - len(tokens), width)
        ids[row, place], mask[row, place] = tokens, 1
    return ids, mask


@EVERY_KIND
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["last", 0, -2, [1, -1], slice(-3, -1)])
def test_positions_count_real_tokens_where_a_mask_tells_the_padding(
    kind: str, side: str, positions: Positions, models: Any
) -> None:
    model = models(kind)
    rows = [some_ids(length, seed=length)[0] for length in (4, 9, 7)]
    ids, mask = padded(rows, side)
    with attach(model, [Intervention(MIDDLE, V, STRENGTH, positions=positions)]):
        together = logits_of(model, ids, attention_mask=mask)
        for row, tokens in enumerate(rows):
            alone = logits_of(model, tokens[None])[0]
            torch.testing.assert_close(together[row][mask[row].bool()], alone, rtol=1e-4, atol=1e-4)


@EVERY_KIND
def test_positions_count_real_tokens_while_a_left_padded_batch_generates(kind: str, models: Any) -> None:
    model = models(kind)
    prompts = ["You are", "Where do you live, and what do you do in the evening?"]
    options = {"prepend_bos": False, "return_type": "tokens"}
    with attach(model, [Intervention(MIDDLE, V, STRENGTH, positions=[0, -1, 9, 13])]):
        together = generated(model, prompts, **options)
        alone = [generated(model, prompt, **options)[0] for prompt in prompts]
    assert len(alone[0]) < len(alone[1])
    for row, tokens in enumerate(alone):
        assert torch.equal(together[row, -NEW_TOKENS:], tokens[-NEW_TOKENS:])
    unsteered = generated(model, prompts, **options)
    assert not any(torch.equal(unsteered[row], together[row]) for row in range(2))


@EVERY_KIND
def test_a_mask_steers_exactly_its_tokens_and_leaves_the_others_bit_for_bit(kind: str, models: Any) -> None:
    model, ids = models(kind), some_ids(7, batch=3)
    mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(5)) > 0.5
    before = residuals(model, ids)
    for options in ({"coefficient": STRENGTH}, {"mode": "ablate"}, {"mode": "clamp", "coefficient": 2.0}):
        with attach(model, [Intervention(MIDDLE, V, positions=mask, **options)]):
            after = residuals(model, ids)
        assert torch.equal((after != before).any(dim=-1), mask)


@EVERY_KIND
def test_run_with_cache_holds_the_steered_activation_and_what_follows_from_it(kind: str, models: Any) -> None:
    model, ids = models(kind), some_ids(7)
    before = residuals(model, ids)
    with attach(model, [Intervention(MIDDLE, V, STRENGTH)]):
        assert torch.equal(residuals(model, ids), before + STRENGTH * V)
        assert torch.equal(residuals(model, ids, "blocks.2.hook_resid_pre"), before + STRENGTH * V)
        assert torch.equal(residuals(model, ids, stop_at_layer=2), before + STRENGTH * V)


@EVERY_KIND
def test_ablation_leaves_nothing_along_the_direction(kind: str, models: Any) -> None:
    model, ids = models(kind), some_ids(20, batch=2)
    before = residuals(model, ids)
    for scale in (1.0, 1e-3, 1e4):
        with attach(model, [Intervention(MIDDLE, scale * V, mode="ablate")]):
            after = residuals(model, ids)
        assert (project(after, V).abs() <= 1e-5 * before.norm(dim=-1)).all()
        across = before - project(before, V)[..., None] * V / V.norm()
        torch.testing.assert_close(after, across, rtol=1e-5, atol=1e-5)


@EVERY_KIND
@pytest.mark.parametrize("target", [0.0, 1.5, -40.0])
def test_clamping_sets_the_projection_and_nothing_else(kind: str, target: float, models: Any) -> None:
    model, ids = models(kind), some_ids(20)
    before = residuals(model, ids)
    with attach(model, [Intervention(MIDDLE, 7 * V, target, mode="clamp")]):
        after = residuals(model, ids)
    torch.testing.assert_close(project(after, V), torch.full((1, 20), target), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(project(after, W - (W @ V) / (V @ V) * V), project(before, W - (W @ V) / (V @ V) * V))


@EVERY_KIND
def test_half_precision_activations_stay_so_and_are_edited_in_single(kind: str, models: Any) -> None:
    model, ids = models(kind, dtype="bfloat16"), some_ids(12)
    before = residuals(model, ids)
    assert before.dtype == torch.bfloat16
    for options, edit in MODES[1:]:
        with attach(model, [Intervention(MIDDLE, V, **options)]):
            after = residuals(model, ids)
            assert logits_of(model, ids).dtype == torch.bfloat16
        expected = edit(before.double()).to(torch.bfloat16)
        assert after.dtype == torch.bfloat16
        assert (after != expected).float().mean() < 0.01  # a last digit may round the other way
        torch.testing.assert_close(after, expected, rtol=1e-2, atol=1e-2)
    with attach(model, [Intervention(MIDDLE, V.double(), STRENGTH)]):
        assert torch.equal(residuals(model, ids), before + (STRENGTH * V).to(torch.bfloat16))


@EVERY_MODEL
def test_a_monitor_records_what_run_with_cache_would_give(kind: str, family: str, models: Any) -> None:
    model, ids = models(kind, family), some_ids(8, batch=2)
    wanted = {"v": (MIDDLE, V), "w": (resid_post(2), 5 * W), "mid": ("blocks.0.hook_resid_mid", W)}
    with monitor(model, wanted) as seen:
        logits_of(model, ids)
        text = generated(model, ids)
    for name, (hook, direction) in wanted.items():
        first, second = seen.texts(name)
        unit = direction.double() / direction.double().norm()
        torch.testing.assert_close(first, (residuals(model, ids, hook).double() @ unit).float(), rtol=1e-5, atol=1e-5)
        whole = (residuals(model, text[:, :-1], hook).double() @ unit).float()
        torch.testing.assert_close(second, whole, rtol=1e-4, atol=1e-4)
        assert [values.shape[1] for values in seen.projections[name]] == [8, 8, *[1] * (NEW_TOKENS - 1)]


@EVERY_KIND
def test_a_monitor_keeps_scalars_only(kind: str, models: Any) -> None:
    model = models(kind)
    with monitor(model, {"v": (MIDDLE, V)}) as seen:
        generated(model, some_ids(30))
    stored = sum(values.untyped_storage().nbytes() for values in seen.projections["v"])
    assert stored == 4 * (30 + NEW_TOKENS - 1)


@EVERY_KIND
def test_a_monitor_sees_the_blocks_around_it_and_not_those_inside(kind: str, models: Any) -> None:
    model, ids = models(kind), some_ids(5)
    before = project(residuals(model, ids), V)
    steer = [Intervention(MIDDLE, V, 2.0)]
    with attach(model, steer), monitor(model, {"v": (MIDDLE, V)}) as inside:
        logits_of(model, ids)
    with monitor(model, {"v": (MIDDLE, V)}) as outside, attach(model, steer):
        logits_of(model, ids)
    torch.testing.assert_close(inside.texts("v")[0], before + 2 * V.norm())
    torch.testing.assert_close(outside.texts("v")[0], before)


@EVERY_KIND
def test_a_monitor_changes_nothing_and_leaves_nothing(kind: str, models: Any) -> None:
    model, ids = models(kind), some_ids(6)
    before, count = logits_of(model, ids), hooks_on(model)
    with monitor(model, {"v": (MIDDLE, V)}):
        assert torch.equal(logits_of(model, ids), before)
    assert hooks_on(model) == count


@pytest.mark.tl
def test_vectors_are_monitored_under_their_behaviour_and_their_hook_where_that_is_not_enough(models: Any) -> None:
    model, ids = models("bridge"), some_ids(6)
    humor = [SteeringVector("humor", layer, some(layer, D_MODEL), "m") for layer in (0, 2)]
    with monitor(model, [*humor, SteeringVector("refusal", 1, V, "m")]) as seen:
        logits_of(model, ids)
    assert set(seen.projections) == {"humor@blocks.0.hook_resid_post", "humor@blocks.2.hook_resid_post", "refusal"}
    torch.testing.assert_close(seen.texts("refusal")[0], project(residuals(model, ids), V))
    with pytest.raises(InputError, match=r"two vectors are called humor@blocks\.0"), monitor(model, [*humor, humor[0]]):
        pass


directions = st.integers(0, 2**31).map(lambda seed: some(seed, D_MODEL))
coefficients = st.floats(-50, 50, width=32)
laws = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def steered(model: Any, ids: Tensor, *wanted: Intervention) -> Tensor:
    with attach(model, wanted):
        return residuals(model, ids, stop_at_layer=2)


@pytest.mark.tl
@laws
@given(v=directions, a=coefficients, b=coefficients)
def test_adding_twice_is_adding_the_sum(v: Tensor, a: float, b: float, models: Any) -> None:
    model, ids = models("bridge"), some_ids(6)
    twice = steered(model, ids, Intervention(MIDDLE, v, a), Intervention(MIDDLE, v, b))
    torch.testing.assert_close(twice, steered(model, ids, Intervention(MIDDLE, v, a + b)), rtol=1e-4, atol=1e-3)


@pytest.mark.tl
@laws
@given(v=directions, a=coefficients, target=coefficients)
def test_ablating_or_clamping_undoes_what_was_added_before(v: Tensor, a: float, target: float, models: Any) -> None:
    model, ids = models("bridge"), some_ids(6)
    for last in (Intervention(MIDDLE, v, mode="ablate"), Intervention(MIDDLE, v, target, mode="clamp")):
        both = steered(model, ids, Intervention(MIDDLE, v, a), last)
        torch.testing.assert_close(both, steered(model, ids, last), rtol=1e-4, atol=1e-3)


@pytest.mark.tl
@laws
@given(v=directions, scale=st.floats(0.01, 100), target=coefficients)
def test_clamping_and_ablating_do_not_depend_on_the_length_of_the_direction(
    v: Tensor, scale: float, target: float, models: Any
) -> None:
    model, ids = models("bridge"), some_ids(6)
    for options in ({"mode": "ablate"}, {"mode": "clamp", "coefficient": target}):
        one = steered(model, ids, Intervention(MIDDLE, v, **options))
        torch.testing.assert_close(one, steered(model, ids, Intervention(MIDDLE, scale * v, **options)))


@given(rows=st.integers(1, 4), scale=st.floats(0.1, 1000), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_a_projection_depends_on_the_direction_and_not_on_its_length(rows: int, scale: float, seed: int) -> None:
    x, v = some(seed, rows, 3, 8), some(seed + 1, 8)
    expected = torch.tensor([[sum(a * b for a, b in zip(p, v.tolist(), strict=True)) for p in r] for r in x.tolist()])
    torch.testing.assert_close(project(x, scale * v), expected / v.norm(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(project(x, scale * v, normalize=False), expected * scale, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(project(v[None], scale * v), v.norm()[None])


def test_half_precision_is_projected_in_single_and_double_stays_double() -> None:
    x = torch.full((4096,), 0.1, dtype=torch.bfloat16)
    ones = torch.ones(4096, dtype=torch.bfloat16)
    assert project(x, ones, normalize=False).item() == pytest.approx(4096 * float(x[0]), rel=1e-6)
    assert project(torch.full((4096,), 100.0, dtype=torch.float16), ones.half()).item() == pytest.approx(6400)
    assert project(x.double(), ones).dtype == torch.float64
    assert project(x[None, None], ones).shape == (1, 1)


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        (torch.zeros(8), "zero: nothing can be projected"),
        (torch.ones(7), "width 7, the activations 8"),
        (torch.ones(8).long(), "1-D floating-point"),
        (torch.ones(2, 8), "1-D floating-point"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_projected_on_is_refused(direction: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        project(torch.ones(3, 8), direction)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"direction": torch.ones(1, D_MODEL)}, r"1-D floating-point tensor, got torch\.float32 of shape \(1, 32\)"),
        ({"direction": [1.0, 2.0]}, "1-D floating-point tensor"),
        ({"direction": torch.zeros(D_MODEL), "mode": "clamp"}, "direction is zero, so mode 'clamp'"),
        ({"mode": "subtract"}, "unknown mode 'subtract': choose add, ablate, clamp"),
        ({"coefficient": "4"}, "coefficient must be a number, got '4'"),
        ({"coefficient": 2.0, "mode": "ablate"}, "'ablate' takes no coefficient, got 2.0"),
        ({"positions": "first"}, "positions='first' is unknown"),
        ({"positions": []}, "positions is empty"),
        ({"positions": True}, "positions=True is unknown"),
        ({"positions": [1, 2.5]}, r"positions=\[1, 2.5\] is unknown"),
        ({"positions": "15"}, "positions='15' is unknown"),
        ({"positions": slice(0, 9, 0)}, "step must be 1 or more"),
        ({"positions": slice(0, 9, -1)}, "step must be 1 or more"),
        ({"positions": slice("a", None)}, "is unknown"),
        ({"positions": torch.ones(9, dtype=torch.bool)}, r"\(batch, pos\), got torch.bool of shape \(9,\)"),
        ({"positions": torch.ones(1, 9)}, r"a bool tensor of shape \(batch, pos\), got torch.float32"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_an_intervention_that_means_nothing_is_refused_at_once(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Intervention(**{"hook_name": MIDDLE, "direction": V, **fields})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_infinite_direction_or_coefficient_is_refused(bad: float) -> None:
    with pytest.raises(NonFiniteError, match="coefficient is"):
        Intervention(MIDDLE, V, bad)
    with pytest.raises(NonFiniteError, match="direction holds NaN or infinity"):
        Intervention(MIDDLE, V * bad)


@EVERY_KIND
@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        (lambda: Intervention("blocks.1.hook_resid_pots", V), HookError, r"nearest: .*blocks\.1\.hook_resid_post"),
        (lambda: Intervention(resid_post(N_LAYERS), V), HookError, r"no hook 'blocks\.3\.hook_resid_post'"),
        (lambda: Intervention("blocks.*.hook_resid_post", V), HookError, "is a choice of layers, not a hook"),
        (lambda: Intervention(MIDDLE, V[:-1]), InputError, "direction has width 31, the model 32"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_the_model_is_touched(
    kind: str, wanted: Callable[[], Intervention], error: type[Exception], message: str, models: Any
) -> None:
    model = models(kind)
    count = hooks_on(model)
    with pytest.raises(error, match=message), attach(model, [Intervention(MIDDLE, V), wanted()]):
        pytest.fail("the block was entered")
    with pytest.raises(error, match=message), monitor(model, {"x": (wanted().hook_name, wanted().direction)}):
        pytest.fail("the block was entered")
    assert hooks_on(model) == count


@EVERY_KIND
def test_a_hook_of_another_shape_is_refused_when_it_fires(kind: str, models: Any) -> None:
    model = models(kind)
    with (
        attach(model, [Intervention("blocks.1.attn.hook_q", V)]),
        pytest.raises(HookError, match="not \\(batch, pos, 32"),
    ):
        logits_of(model, some_ids(5))


@EVERY_KIND
def test_a_hook_that_is_switched_off_is_refused(kind: str, models: Any) -> None:
    model = models(kind)
    count = hooks_on(model)
    with pytest.raises(HookError, match="use_hook_mlp_in"), attach(model, [Intervention("blocks.1.hook_mlp_in", V)]):
        pytest.fail("the block was entered")
    assert hooks_on(model) == count


@pytest.mark.tl
def test_a_bridge_refuses_an_edit_that_would_not_reach_its_stream(models: Any) -> None:
    model = models("bridge")
    with (
        pytest.raises(HookError, match="never reaches the stream"),
        attach(model, [Intervention("blocks.1.hook_resid_mid", V)]),
    ):
        pytest.fail("the block was entered")


@pytest.mark.hooked
def test_a_hooked_transformer_refuses_the_embedding_hook_that_generate_passes_by(models: Any) -> None:
    model = models("hooked")
    with (
        pytest.raises(HookError, match=r"choose blocks\.0\.hook_resid_pre"),
        attach(model, [Intervention("hook_embed", V)]),
    ):
        pytest.fail("the block was entered")


@EVERY_KIND
@pytest.mark.parametrize("site", ["blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"])
def test_other_sites_of_the_stream_are_steered_alike(kind: str, site: str, models: Any, plain: Any) -> None:
    model, hf, ids = models(kind), plain("llama"), some_ids(9)
    block = hf.base_model.layers[1]
    if site.endswith("resid_pre"):
        handle = hf.base_model.layers[0].register_forward_hook(lambda _m, _a, out: out + STRENGTH * V)
    elif site.endswith("mlp_out"):
        handle = block.mlp.register_forward_hook(lambda _m, _a, out: out + STRENGTH * V)
    else:
        handle = block.self_attn.register_forward_hook(lambda _m, _a, out: (out[0] + STRENGTH * V, *out[1:]))
    try:
        expected = logits_of(hf, ids)
    finally:
        handle.remove()
    with attach(model, [Intervention(site, V, STRENGTH)]):
        torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-4, atol=1e-4)


@EVERY_KIND
def test_a_position_outside_the_text_is_one_clear_error(kind: str, models: Any) -> None:
    model, ids = models(kind), some_ids(5)
    for positions, message in [
        (5, "position 5 is outside a text of 5 tokens"),
        (-6, "position -6 is outside a prompt of 5 tokens"),
        (range(3, 7), "position 5 is outside a text of 5 tokens"),
        (torch.ones(1, 4, dtype=torch.bool), r"mask of positions has shape \(1, 4\), the prompt \(1, 5\)"),
    ]:
        with attach(model, [Intervention(MIDDLE, V, positions=positions)]), pytest.raises(InputError, match=message):
            logits_of(model, ids)


@EVERY_KIND
def test_a_coefficient_that_overflows_half_precision_is_refused(kind: str, models: Any) -> None:
    model = models(kind, dtype="float16")
    with (
        attach(model, [Intervention(MIDDLE, V, 1e6)]),
        pytest.raises(NonFiniteError, match=r"overflows torch\.float16"),
    ):
        logits_of(model, some_ids(5))


@pytest.mark.usefixtures("unchecked")
def test_a_model_without_layers_to_hook_is_pointed_to_load_model() -> None:
    message = r"Linear has no TransformerLens hooks.*tl_persona\.load_model"
    with pytest.raises(InputError, match=message), attach(torch.nn.Linear(2, 2), [Intervention(MIDDLE, V)]):
        pytest.fail("the block was entered")


def test_nothing_to_do_is_an_error(models: Any) -> None:
    with pytest.raises(InputError, match="nothing to steer with"), attach(models("bridge"), []):
        pytest.fail("the block was entered")
    with pytest.raises(InputError, match="nothing to monitor"), monitor(models("bridge"), []):
        pytest.fail("the block was entered")
    zero = {"z": (MIDDLE, torch.zeros(D_MODEL))}
    with pytest.raises(InputError, match="direction is zero"), monitor(models("bridge"), zero):
        pytest.fail("the block was entered")


class Announcing(torch.nn.Module):
    """Stands in for a bridge whose wrapped model takes any argument; `hooked` runs where a hook would."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.original_model = torch.nn.Module()
        self.original_model.config = SimpleNamespace(**config)
        self.original_model.forward = lambda hooked, **_: hooked()


class Recurrent:
    """A state that keeps no count of the tokens it has seen."""

    def get_seq_length(self) -> int:
        raise ValueError("no attention layer")


def places_in(watch: PassWatch, batch: int, pos: int, **arguments: Any) -> list[list[int]]:
    """What a watched hook is told of a pass with these arguments."""
    return watch._module(lambda: watch.tokens(batch, pos).places, **arguments).tolist()


def test_where_a_recurrent_model_is_in_its_text_is_read_from_the_cache_position_or_refused() -> None:
    with PassWatch(Announcing(), MIDDLE) as watch:
        told = {"cache_params": Recurrent(), "cache_position": torch.tensor([7, 8])}
        assert places_in(watch, 1, 2, **told) == [[7, 8]]
        with pytest.raises(InputError, match="does not tell how many tokens went before"):
            places_in(watch, 1, 2, cache_params=Recurrent())


def test_a_mask_that_does_not_tell_the_padding_of_several_rows_is_refused() -> None:
    allowed = torch.ones(2, 1, 3, 3)
    with PassWatch(Announcing(), MIDDLE) as watch:
        assert places_in(watch, 1, 3, attention_mask=allowed[:1]) == [[0, 1, 2]]
        assert places_in(watch, 2, 3, attention_mask=torch.tensor([[0, 1, 1], [1, 0, 1]])) == [[-1, 0, 1], [0, -1, 1]]
        for mask in (allowed, torch.ones(2, 4), {"full_attention": allowed}):
            with pytest.raises(InputError, match=r"takes one of shape \(batch, all tokens so far\), here \(2, 3\)"):
                places_in(watch, 2, 3, attention_mask=mask)


def test_a_hook_that_fires_before_any_pass_of_the_model_is_refused() -> None:
    with PassWatch(Announcing(), MIDDLE) as watch, pytest.raises(InputError, match="ran outside a pass of its model"):
        watch.tokens(1, 3)


def test_models_whose_passes_do_not_follow_one_text_are_refused() -> None:
    for model in (Announcing(is_encoder_decoder=True), torch.nn.Linear(1, 1)):
        with pytest.raises(InputError, match="cannot be followed, which monitors need"):
            PassWatch(model, MIDDLE)


def vector_of(model_name: str, layer: int = 1, direction: Tensor = V, **fields: Any) -> SteeringVector:
    return SteeringVector("humor", layer, direction, model_name, **fields)


@EVERY_KIND
def test_a_vector_steers_at_its_own_hook(kind: str, models: Any, tiny_llama: Path) -> None:
    model, ids = models(kind), some_ids(6)
    vector = vector_of(tiny_llama.name, hook_name="blocks.1.hook_resid_pre")
    for options, wanted in [
        ((2.0,), Intervention(vector.hook_name, V, 2.0)),
        ((), Intervention(vector.hook_name, V)),
    ]:
        with vector.steer(model, *options):
            found = logits_of(model, ids)
        with attach(model, [wanted]):
            assert torch.equal(found, logits_of(model, ids))
    with vector.steer(model, -3.0, positions=[0, -1], mode="clamp"):
        found = project(residuals(model, ids, vector.hook_name), V)[0]
    torch.testing.assert_close(found[[0, -1]], torch.tensor([-3.0, -3.0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1:-1], vector.project(residuals(model, ids, vector.hook_name))[0, 1:-1])


@EVERY_KIND
def test_a_set_steers_all_its_layers_or_the_chosen_ones(kind: str, models: Any, tiny_llama: Path) -> None:
    model, ids = models(kind), some_ids(6)
    vectors = SteeringVectorSet(
        "humor", [vector_of(tiny_llama.name, layer, some(layer, D_MODEL)) for layer in range(N_LAYERS)]
    )
    for layers in (None, [0, 2], [1]):
        with vectors.steer(model, 2.0, layers=layers):
            found = logits_of(model, ids)
        with attach(
            model, [Intervention(v.hook_name, v.vector, 2.0) for v in vectors if v.layer_index in (layers or [0, 1, 2])]
        ):
            assert torch.equal(found, logits_of(model, ids))
    stacked = torch.stack([residuals(model, ids, v.hook_name) for v in vectors], dim=-2)
    for layer, values in enumerate(vectors.project(stacked).unbind(dim=-1)):
        torch.testing.assert_close(values, project(stacked[..., layer, :], vectors[layer].vector))


@pytest.mark.tl
def test_a_set_refuses_layers_it_lacks_and_activations_that_do_not_fit(models: Any, tiny_llama: Path) -> None:
    vectors = SteeringVectorSet("humor", [vector_of(tiny_llama.name, layer) for layer in (0, 2)])
    with pytest.raises(InputError, match=r"no vector for layers \[1, 9\] of 'humor'; there are \[0, 2\]"):
        vectors.steer(models("bridge"), layers=[0, 1, 9])
    with pytest.raises(InputError, match=r"activations of 3 layers, for vectors at layers \[0, 2\]"):
        vectors.project(torch.ones(5, 3, D_MODEL))
    with pytest.raises(InputError, match="nothing to steer with"), SteeringVectorSet("humor").steer(models("bridge")):
        pytest.fail("the block was entered")


@EVERY_KIND
def test_a_vector_of_another_model_is_refused_and_one_of_the_same_files_is_not(
    kind: str, models: Any, tiny_llama: Path
) -> None:
    model = models(kind)
    count = hooks_on(model)
    with pytest.raises(InputError, match=f"is of model 'org/other', this is '.*{tiny_llama.name}'"):
        vector_of("org/other").steer(model)
    with (
        pytest.raises(InputError, match="width 8, the model 32"),
        vector_of(tiny_llama.name, direction=V[:8]).steer(model),
    ):
        pytest.fail("the block was entered")
    assert hooks_on(model) == count
    source = source_of(model)
    assert source is not None
    provenance = Provenance(
        model_name="mine",
        revision=source.revision,
        dtype="float32",
        weights="unprocessed",
        hook_names=(MIDDLE,),
        strategy="last",
        prompts_digest="",
        sample_ids=(),
    )
    for same in (vector_of("mine", provenance=provenance), vector_of(f"org/{tiny_llama.name.upper()}")):
        with same.steer(model):
            assert hooks_on(model) > count


@pytest.mark.usefixtures("unchecked")
def test_a_vector_steers_a_transformers_model_as_it_is(plain: Any, models: Any, tiny_llama: Path) -> None:
    ids, model = torch.arange(5, 14)[None], plain("llama")
    logits = []
    for each in (model, models("bridge")):
        with vector_of(tiny_llama.name).steer(each), torch.no_grad():
            output = each(ids)
        logits.append(output if isinstance(output, torch.Tensor) else output.logits)
    with torch.no_grad():
        assert not torch.allclose(logits[0], model(ids).logits, atol=1e-2)
    assert torch.allclose(logits[0], logits[1], atol=1e-3)
