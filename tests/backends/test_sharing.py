"""Shared prefixes and packed rows change no number, on any family; where they would, the plain path is taken.

The limits of the planner are set to a few tokens here, so that tiny texts take every path that long prompts take.
"""

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kinds import ALL_LAYERS, BOTH_KINDS, Boot
from oracle import looking_on, oracle_means, relative_error, watched
from sharing import assert_exact, pairs, persona, pool, samples_of, text
from tiny import D_MODEL, FAMILIES, N_LAYERS, VOCAB_SIZE, WINDOW
from torch import Tensor

from tl_persona import load_model
from tl_persona.backends import open_backend
from tl_persona.backends.local import backend as local_backend
from tl_persona.backends.local import proof
from tl_persona.backends.local import runners as passes
from tl_persona.backends.local.pooling import PoolingRun
from tl_persona.errors import HookError, ModelError, NonFiniteError
from tl_persona.plan import Plan, Sample, Sharing, make_plan
from tl_persona.plan import rows as rows_module
from tl_persona.plan.rows import Pass

pytestmark = [pytest.mark.tl, pytest.mark.usefixtures("small_limits")]


HOOKED_FAMILIES = ("bloom", "gemma", "gpt2", "llama", "mistral", "mixtral", "qwen3")
EVERY_MODEL = pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, "bridge") for family in sorted(FAMILIES)),
        *(pytest.param(family, "hooked", marks=pytest.mark.hooked) for family in HOOKED_FAMILIES),
    ],
)


LAYOUTS = {
    "persona": persona,
    "short persona": lambda: persona(10),
    "persona and pairs": lambda: [*persona(70), *pairs()],
    "pairs": pairs,
}


def plain(model: Any, samples: Sequence[Sample], hooks: Sequence[str] = tuple(ALL_LAYERS)) -> list[Tensor]:
    """The same, each sample whole and by itself."""
    found = open_backend(model).pool(make_plan(samples, batch_tokens=1), hooks)
    pooled = {each.sample: each.means for each in found}
    return [pooled[index] for index in range(len(samples))]


# --- the numbers ---------------------------------------------------------------------------------------------------


@EVERY_MODEL
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shared_and_packed_means_equal_the_oracle(
    layout: str, family: str, kind: str, tiny_hooked: Boot, tiny_hf: Callable[[str], Any]
) -> None:
    notes = assert_exact(tiny_hooked(family, kind), tiny_hf(family), LAYOUTS[layout]())
    assert notes["sharing"] != "none"  # none of these families needs every token of every text run


@EVERY_MODEL
def test_every_kind_of_hook_equals_the_plain_path(family: str, kind: str, tiny_hooked: Boot) -> None:
    model = tiny_hooked(family, kind)
    inner = ("resid_pre", "resid_mid", "attn_out", "mlp_out")
    hooks = [name for kind_of in inner if (name := f"blocks.1.hook_{kind_of}") in model.hook_dict]
    assert len(hooks) >= 3
    samples = [*persona(), *pairs()]
    for got, expected in zip(pool(model, samples, hooks)[0], plain(model, samples, hooks), strict=True):
        assert relative_error(got, expected) < 1e-5


@BOTH_KINDS
@pytest.mark.parametrize("budget", [1, 20, 90, 1000])
@pytest.mark.parametrize("max_rows", [1, 2, None])
def test_no_limit_changes_a_number(
    budget: int, max_rows: int | None, kind: str, tiny_hooked: Boot, tiny_hf: Callable[[str], Any]
) -> None:
    samples = [*persona(), *pairs()]
    assert_exact(tiny_hooked("llama", kind), tiny_hf("llama"), samples, batch_tokens=budget, max_rows=max_rows)


FAMILY_TREE = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=8)


@BOTH_KINDS
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(tree=FAMILY_TREE, budget=st.integers(1, 200), random=st.randoms())
def test_neither_company_nor_order_moves_a_mean_beyond_rounding(
    kind: str, tiny_hooked: Boot, tree: list[tuple[int, int, int]], budget: int, random: Any
) -> None:
    model = tiny_hooked("llama", kind)
    # Which beginning (of 9 to 25 tokens), which middle, and how much of an ending.
    texts = [(text(9 + 8 * one, one), text(5 * two, 20 + two), text(ending, 50 + ending)) for one, two, ending in tree]
    samples = samples_of(*texts, prefix=6)
    random.shuffle(samples)
    for got, alone in zip(pool(model, samples, batch_tokens=budget)[0], plain(model, samples), strict=True):
        assert relative_error(got, alone) < 5e-6


@BOTH_KINDS
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_shares_within_its_own_rounding_and_is_pooled_in_more(
    dtype: str, kind: str, tiny_model: Callable[[str], Path], tiny_hf: Callable[[str], Any]
) -> None:
    model = load_model(tiny_model("llama"), kind=kind, dtype=dtype)
    samples = [*persona(), *pairs()]
    means, notes = pool(model, samples)
    assert notes["sharing"] != "none" and "fallbacks" not in notes
    exact = [oracle_means(tiny_hf("llama"), sample) for sample in samples]
    # The weights are rounded either way; beyond that, shortcuts may cost a little luck and no precision.
    assert mean_error(means, exact) < 1.2 * mean_error(plain(model, samples), exact)
    assert all(got.dtype in (torch.float32, torch.float64) for got in means)
    whole = torch.stack([got[0] for got in means])
    assert not torch.equal(whole, whole.to(getattr(torch, dtype)).to(whole.dtype))


def mean_error(means: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The mean over everything of how far a vector is from the exact one, relative to that one's norm."""
    errors = [(got - right).norm(dim=-1) / right.norm(dim=-1) for got, right in zip(means, exact, strict=True)]
    return float(torch.cat([error.flatten() for error in errors]).mean())


# --- which path ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "mixtral", "qwen3"])
def test_full_attention_is_packed_on_a_bridge(family: str, tiny_hooked: Boot) -> None:
    _, notes = pool(tiny_hooked(family, "bridge"), persona())
    assert notes["sharing"] == "packed"
    assert ("fallbacks" in notes) == (family in STEPWISE_FAMILIES)


@pytest.mark.parametrize(
    ("family", "why"),
    [("mistral", "relative difference"), ("gemma3", "relative difference"), ("bloom", "does not take")],
)
def test_windows_and_alibi_continue_a_prefix_but_are_not_packed(family: str, why: str, tiny_hooked: Boot) -> None:
    _, notes = pool(tiny_hooked(family, "bridge"), persona(WINDOW + 8))
    assert notes["sharing"] == "cached"  # bloom takes no positions, so its texts are never laid side by side
    (packed,) = [note for note in notes["fallbacks"] if note.startswith("packed:")]
    assert why in packed


@pytest.mark.hooked
@pytest.mark.parametrize("family", HOOKED_FAMILIES)
def test_a_hooked_transformer_continues_its_cache(family: str, tiny_hooked: Boot) -> None:
    _, notes = pool(tiny_hooked(family, "hooked"), persona())
    assert notes["sharing"] == "cached" and "fallbacks" not in notes


@EVERY_MODEL
def test_what_runs_is_what_was_planned(
    family: str, kind: str, tiny_hooked: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_hooked(family, kind)
    samples = [*persona(), *pairs()]
    _, notes = pool(model, samples)  # the first run also proves
    ran = spy_on_tokens(model, monkeypatch)
    backend = open_backend(model)
    plan = backend.plan(samples).with_sharing(Sharing(notes["sharing"]))
    list(backend.pool(plan, ALL_LAYERS))
    assert sum(ran) == plan.tokens_run < plan.tokens
    assert len(ran) == len(plan.passes)


def spy_on_tokens(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    run, ran = model.run_with_cache, []

    def spy(tokens: Tensor, **arguments: Any) -> Any:
        ran.append(tokens.numel())
        return run(tokens, **arguments)

    monkeypatch.setattr(model, "run_with_cache", spy)
    return ran


@BOTH_KINDS
def test_nothing_to_share_is_neither_proven_nor_noted_as_shared(
    kind: str, tiny_hooked: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_hooked("llama", kind)
    apart = samples_of((text(12, 1),), (text(9, 2),), prefix=4)
    pool(model, apart)  # that the texts may lie in one pass is proven once
    ran = spy_on_tokens(model, monkeypatch)
    _, notes = pool(model, apart)
    assert sum(ran) == 2 * 12
    assert notes["sharing"] == "none" and "proof" not in notes


# --- the model's own attention ---------------------------------------------------------------------------------------

FUSED_FAMILIES = ("gemma3", "llama", "mistral", "mixtral", "qwen3")
STEPWISE_FAMILIES = ("bloom", "gemma", "gpt2")  # ALiBi; capped scores; a projection that the bridge has split


@contextmanager
def attentions_entered(*, spoil: float = 0.0) -> Iterator[list[int]]:
    """Notes the tokens of every call of torch's fused attention; adds something to what it gives."""
    original, entered = torch.nn.functional.scaled_dot_product_attention, []

    def fused(query: Tensor, *args: Any, **options: Any) -> Tensor:
        entered.append(query.shape[0] * query.shape[-2])
        return original(query, *args, **options) + spoil

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
        yield entered


def state_of(model: Any) -> list[Any]:
    """What a run could leave behind on a bridge: hooks, replaced functions, modes, and how attention is configured."""
    modules = [*model.modules(), *model.original_model.modules()]
    config = model.original_model.config
    return [
        config._attn_implementation,
        [(id(module), sorted(vars(module)), module.training) for module in modules],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules],
        [(id(weight), weight.requires_grad, weight.grad) for weight in model.parameters()],
    ]


@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_shortcuts_run_the_models_own_attention_and_equal_the_oracle(
    family: str, tiny_hooked: Boot, tiny_hf: Callable[[str], Any]
) -> None:
    model, samples = tiny_hooked(family, "bridge"), [*persona(), *pairs()]
    pool(model, samples)
    before = state_of(model)
    with attentions_entered() as entered:
        notes = assert_exact(model, tiny_hf(family), samples)
        assert entered.pop() and state_of(model) == before
    assert notes["attention"] == "fused"
    backend = open_backend(model)
    plan = backend.plan(samples).with_sharing(Sharing(notes["sharing"]))
    shared = [each.tokens_run for each in plan.passes if each.kept or each.packed or each.context is not None]
    with attentions_entered() as entered, watched(model) as positions:
        list(backend.pool(plan, ALL_LAYERS))
    assert sum(entered) == N_LAYERS * sum(shared)
    assert positions["unembed"] <= sum(len(each.rows) for each in plan.passes if each.tokens_run not in shared)


@pytest.mark.parametrize("family", STEPWISE_FAMILIES)
def test_where_the_bridge_has_attention_of_its_own_it_is_left_alone(family: str, tiny_hooked: Boot) -> None:
    model = tiny_hooked(family, "bridge")
    pool(model, persona())  # a bridge remembers things of its own at its first run
    before = state_of(model)
    with attentions_entered() as entered:
        _, notes = pool(model, persona())
    assert not entered and "attention" not in notes and notes["sharing"] != "none"
    assert state_of(model) == before


def test_what_runs_whole_runs_as_the_bridge_has_it(tiny_hooked: Boot) -> None:
    model = tiny_hooked("llama", "bridge")
    with attentions_entered() as entered:
        _, notes = pool(model, samples_of((text(12, 1),), (text(9, 2),), prefix=4))
    assert not entered and "attention" not in notes


@pytest.mark.parametrize(
    "point", ["attn.hook_z", "attn.hook_pattern", "attn.hook_q", "attn.q.hook_in", "ln1.hook_scale"]
)
def test_a_hook_inside_attention_or_norms_keeps_acting(
    point: str, tiny_hooked: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = tiny_hooked("llama", "bridge"), [*persona(), *pairs()]
    untouched, notes = pool(model, samples)
    assert notes["attention"] == "fused"

    def halve(activation: Tensor, hook: Any) -> Tensor:
        return activation / 2

    with model.hooks(fwd_hooks=[(f"blocks.1.{point}", halve)]), attentions_entered() as entered:
        steered, notes = pool(model, samples)
        expected = plain(model, samples)
    assert not entered and "attention" not in notes
    for got, right, before in zip(steered, expected, untouched, strict=True):
        assert relative_error(got, right) < 1e-5
        assert float((got - before).norm()) > 1e-3 * float(before.norm())
    assert pool(model, samples)[1]["attention"] == "fused"


def test_a_hook_that_is_asked_for_inside_attention_is_read_there(tiny_hooked: Boot) -> None:
    model, samples = tiny_hooked("llama", "bridge"), [*persona(), *pairs()]
    hooks = ["blocks.1.attn.o.hook_out", "blocks.1.hook_attn_out"]
    means, notes = pool(model, samples, hooks)
    assert "attention" not in notes
    assert notes["fallbacks"] == ["fused attention: a hook lies inside attention or a norm"]
    for got, expected in zip(means, pool(model, samples, hooks[1:])[0], strict=True):
        assert relative_error(got, expected[:, [0, 0]]) < 1e-5


def test_a_hook_that_comes_while_samples_are_taken_acts_from_then_on(tiny_hooked: Boot) -> None:
    model = tiny_hooked("llama", "bridge")
    samples = [*persona(), *pairs()]
    pool(model, samples)
    backend = open_backend(model)
    running = iter(backend.pool(backend.plan(samples), ALL_LAYERS))
    next(running)
    silent = [("blocks.1.attn.hook_z", lambda activation, hook: activation)]
    with model.hooks(fwd_hooks=silent), attentions_entered() as entered:
        assert list(running)
    assert not entered


def test_the_model_is_as_it_was_after_a_pass_that_failed(tiny_hooked: Boot) -> None:
    model, samples = tiny_hooked("llama", "bridge"), persona()
    pool(model, samples)
    before, calls = state_of(model), []

    def fail(*_: Any) -> None:
        calls.append(model.original_model.config._attn_implementation)
        raise RuntimeError("the block failed")

    handle = model.blocks[1].mlp.register_forward_pre_hook(looking_on(fail))
    with pytest.raises(ModelError, match="the block failed"):
        pool(model, samples)
    handle.remove()
    assert calls == ["sdpa"] and state_of(model) == before


def test_gradients_flow_through_the_bridges_attention_after_a_run(tiny_model: Callable[[str], Path]) -> None:
    model = load_model(tiny_model("llama"), kind="bridge")
    pool(model, persona())
    seen: list[Tensor] = []
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", lambda pattern, hook: seen.append(pattern))]):
        model(text(9, 3)[None], return_type="loss").backward()
    assert seen[0].requires_grad and float(model.blocks[0].attn.q.weight.grad.abs().max()) > 0


def test_an_attention_that_is_not_the_same_is_caught_and_told_once(
    tiny_model: Callable[[str], Path], tiny_hf: Callable[[str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(tiny_model("llama"), kind="bridge")
    expected = [oracle_means(tiny_hf("llama"), sample) for sample in persona()]
    with attentions_entered(spoil=1e-3), caplog.at_level(logging.WARNING, logger="tl_persona"):
        for _ in range(2):
            means, notes = pool(model, persona())
    for got, right in zip(means, expected, strict=True):
        assert relative_error(got, right) < 1e-5
    assert notes["sharing"] == "packed" and "attention" not in notes
    (fallback,) = notes["fallbacks"]
    assert fallback.startswith("fused attention: relative difference")
    (record,) = [record for record in caplog.records if record.name == "tl_persona"]
    assert "fused attention is not exact here" in record.getMessage()


# --- the proof -----------------------------------------------------------------------------------------------------


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The hooks of every proof that is made."""
    compared, made = proof.compared, []

    def counted(runner: Any, plain: Any, probe: Any, names: list[str], *rest: Any) -> proof.Verdict:
        made.append(names)
        return compared(runner, plain, probe, names, *rest)

    monkeypatch.setattr(proof, "compared", counted)
    return made


@BOTH_KINDS
def test_a_proof_is_made_once_a_model_and_covers_no_deeper_layer_than_it_saw(
    kind: str, tiny_model: Callable[[str], Path], proofs: list[list[str]]
) -> None:
    model = load_model(tiny_model("llama"), kind=kind)
    samples = persona()
    for hooks, expected in [
        (ALL_LAYERS[:2], 1),
        (ALL_LAYERS[1:2], 1),
        (ALL_LAYERS[:1], 1),
        (ALL_LAYERS, 2),
        (["blocks.0.hook_attn_out"], 3),
        (["blocks.0.hook_attn_out", ALL_LAYERS[2]], 3),
    ]:
        pool(model, samples, hooks)
        assert len({tuple(names) for names in proofs}) == expected, hooks
    assert list(dict.fromkeys(map(tuple, proofs)))[:2] == [tuple(ALL_LAYERS[:2]), tuple(ALL_LAYERS)]


def test_what_holds_within_a_window_is_proven_again_beyond_it(
    tiny_model: Callable[[str], Path], tiny_hf: Callable[[str], Any]
) -> None:
    model = load_model(tiny_model("mistral"), kind="bridge")
    beginning = text(8, 1)
    within = samples_of(*((beginning, text(length, length)) for length in (7, 5, 8, 6, 4, 3)), prefix=6)
    beyond = samples_of(*((beginning, text(length, length)) for length in (15, 5, 9, 18, 4, 3)), prefix=6)
    assert max(len(sample.input_ids) for sample in within) == WINDOW < max(len(sample.input_ids) for sample in beyond)
    assert assert_exact(model, tiny_hf("mistral"), within)["sharing"] == "packed"
    notes = assert_exact(model, tiny_hf("mistral"), beyond)
    assert notes["sharing"] == "cached" and len(notes["fallbacks"]) == 1
    assert assert_exact(model, tiny_hf("mistral"), within)["sharing"] == "packed"


def test_a_fallback_is_logged_once_and_noted_every_time(
    tiny_model: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(tiny_model("mistral"), kind="bridge")
    with caplog.at_level(logging.WARNING, logger="tl_persona"):
        notes = [pool(model, persona(WINDOW + 8))[1] for _ in range(3)]
    (record,) = [record for record in caplog.records if record.name == "tl_persona"]
    assert "packed" in record.getMessage() and "cached" in record.getMessage()
    assert all(len(note["fallbacks"]) == 1 for note in notes)


class Double:
    """A runner that breaks what `spoil` says, in passes that continue a prefix or hold several texts."""

    def __init__(self, runner: Any, sharing: Sharing, spoil: Callable[..., Any]) -> None:
        self.sharing, self.attention = sharing, runner.attention
        self.limits: Mapping[Sharing, str] = {}
        self.costs: Mapping[str, str] = {}
        self._runner, self._spoil = runner, spoil

    def prepare(self) -> None:
        pass

    def obstacle(self, names: Sequence[str]) -> str | None:
        found: str | None = self._runner.obstacle(names)
        return found

    def run(
        self, plan: Plan, each: Pass, names: Sequence[str], context: Any, length: int, only_row: int | None = None
    ) -> Any:
        if each.context is None and not each.packed:
            return self._runner.run(plan, each, names, context, length, only_row)
        return self._spoil(self._runner, plan, each, names, context, length, only_row)


def forget_context(
    runner: Any, plan: Plan, each: Pass, names: Any, context: Any, length: int, only_row: int | None
) -> Any:
    return runner.run(plan.with_sharing(Sharing.CACHED), replace(each, context=None), names, None, 0, only_row)


def spoil_the_last_hook(value: float) -> Callable[..., Any]:
    def spoil(runner: Any, plan: Plan, each: Pass, names: Any, context: Any, length: int, only_row: int | None) -> Any:
        captured, kept = runner.run(plan, each, names, context, length, only_row)
        last = captured[ALL_LAYERS[-1]].clone()
        last[..., 0] += value
        return {**captured, ALL_LAYERS[-1]: last}, kept

    return spoil


def refuse(*_: Any) -> Any:
    raise NotImplementedError("no cache in this model")


BROKEN = {
    "context ignored": forget_context,
    "one number off": spoil_the_last_hook(1e-3),
    "NaN in the last hook": spoil_the_last_hook(float("nan")),
    "infinity in the last hook": spoil_the_last_hook(float("inf")),
    "refused": refuse,
}


@BOTH_KINDS
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_shortcut_is_caught_and_not_taken(
    broken: str,
    kind: str,
    tiny_model: Callable[[str], Path],
    tiny_hf: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load_model(tiny_model("llama"), kind=kind)
    doubles = [Double(runner, Sharing.CACHED, BROKEN[broken]) for runner in passes.runners_for(model)]
    monkeypatch.setattr(local_backend, "runners_for", lambda _: doubles)
    notes = assert_exact(model, tiny_hf("llama"), persona())
    assert notes["sharing"] == "none" and len(notes["fallbacks"]) == 1
    # What the double did was seen, not that it failed.
    assert ("it raised" in notes["fallbacks"][0]) is (broken == "refused")


@BOTH_KINDS
@pytest.mark.parametrize("layout", ["persona", "pairs"])
def test_one_row_of_a_pass_is_that_row_of_all(layout: str, kind: str, tiny_hooked: Boot) -> None:
    model = tiny_hooked("llama", kind)
    most = Sharing.PACKED if kind == "bridge" else Sharing.CACHED
    plan = make_plan(LAYOUTS[layout](), sharing=most)
    rows = 0
    for runner in passes.runners_for(model):
        runner.prepare()
        assert runner.obstacle(ALL_LAYERS) is None
        contexts: dict[int | None, tuple[Any, int]] = {None: (None, 0)}
        with torch.no_grad():
            for index, each in enumerate(plan.passes):
                rest = (plan, each, ALL_LAYERS, *contexts[each.context])
                captured, kept = runner.run(*rest)
                contexts[index] = kept, each.width
                for row in range(len(each.rows)):
                    only, _ = runner.run(*rest, only_row=row)
                    for name in ALL_LAYERS:
                        assert torch.equal(only[name], captured[name][row : row + 1]), (name, row)
                        assert only[name].untyped_storage().nbytes() == only[name].nbytes
                    rows += 1
    assert rows > len(plan.passes)


def see_everything(each: Pass, context_length: int) -> Tensor:
    causal = torch.ones(each.width, context_length + each.width, dtype=torch.bool).tril(context_length)
    return causal.expand(len(each.rows), -1, -1).clone()


def count_along_the_row(each: Pass) -> Tensor:
    return each.rows[0].segments[0].start + torch.arange(each.width).expand(len(each.rows), -1)


@pytest.mark.parametrize("layout", ["persona", "pairs"])
@pytest.mark.parametrize(
    ("part", "wrong"), [("pass_visibility", see_everything), ("pass_positions", count_along_the_row)]
)
def test_texts_that_see_each_other_or_lose_their_place_are_not_packed(
    part: str,
    wrong: Callable[..., Tensor],
    layout: str,
    tiny_model: Callable[[str], Path],
    tiny_hf: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(passes, part, wrong)
    notes = assert_exact(load_model(tiny_model("llama"), kind="bridge"), tiny_hf("llama"), LAYOUTS[layout]())
    assert notes["sharing"] != "packed" and notes["fallbacks"][0].startswith("packed: relative difference")


@pytest.mark.parametrize("sharing", [Sharing.CACHED, Sharing.PACKED])
def test_a_prefix_that_is_written_to_by_what_continues_it_is_not_shared(
    sharing: Sharing, tiny_model: Callable[[str], Path], tiny_hf: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_model("llama"), kind="bridge")
    runners: Any = passes.runners_for(model)
    for runner in runners:
        runner.sharing = sharing
    monkeypatch.setattr(local_backend, "runners_for", lambda _: runners)
    monkeypatch.setattr(rows_module, "CACHED_ROWS", 1)
    monkeypatch.setattr(passes, "_continued", lambda cache, n_rows: cache)  # as recurrent state is kept
    notes = assert_exact(model, tiny_hf("llama"), persona())
    assert notes["sharing"] == "none"


def test_running_out_of_memory_is_not_taken_for_a_verdict(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_model("llama"), kind="bridge")

    def exhausted(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory left")

    with monkeypatch.context() as patch:
        doubles = [Double(runner, Sharing.PACKED, exhausted) for runner in passes.runners_for(model)]
        patch.setattr(local_backend, "runners_for", lambda _: doubles)
        with pytest.raises(torch.OutOfMemoryError):
            pool(model, persona())
    assert pool(model, persona())[1]["sharing"] == "packed"


@BOTH_KINDS
def test_a_spoiled_sample_is_named_and_does_not_condemn_the_model(kind: str, tiny_model: Callable[[str], Path]) -> None:
    model = load_model(tiny_model("llama"), kind=kind)
    with torch.no_grad():
        embedding = next(tensor for tensor in model.parameters() if tensor.shape == (VOCAB_SIZE, D_MODEL))
        embedding[3] = float("nan")  # no other text has token 3
    clean = persona()
    ids = torch.cat([clean[2].input_ids[:24], torch.tensor([3]), clean[2].input_ids[25:]])
    spoiled = Sample("spoiled", ids, clean[2].masks)
    with pytest.raises(NonFiniteError, match="'spoiled'"):
        pool(model, [*clean[:2], spoiled, *clean[3:]])
    _, notes = pool(model, clean)
    assert notes["sharing"] == ("packed" if kind == "bridge" else "cached") and "fallbacks" not in notes


def test_nan_that_only_sharing_gives_is_told_and_the_texts_run_alone(
    tiny_model: Callable[[str], Path],
    tiny_hf: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = load_model(tiny_model("llama"), kind="bridge")
    pool(model, persona())  # proven, before it breaks
    doubles = [Double(runner, Sharing.PACKED, BROKEN["NaN in the last hook"]) for runner in passes.runners_for(model)]
    monkeypatch.setattr(local_backend, "runners_for", lambda _: doubles)
    with caplog.at_level(logging.WARNING, logger="tl_persona"):
        notes = assert_exact(model, tiny_hf("llama"), persona())
    assert notes["sharing"] == "none"
    assert notes["fallbacks"] == ["packed: NaN or infinity, which the same texts alone do not have"]
    (record,) = [record for record in caplog.records if record.name == "tl_persona"]
    assert "NaN or infinity" in record.getMessage()


@BOTH_KINDS
def test_a_hook_that_never_fires_is_refused_by_name(kind: str, tiny_hooked: Boot) -> None:
    with pytest.raises(HookError, match=r"'blocks\.7\.hook_resid_mid' did not fire"):
        pool(tiny_hooked("llama", kind), persona(), ["blocks.7.hook_resid_mid"])


# --- memory --------------------------------------------------------------------------------------------------------


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The keys and values handed to a pass, whatever the class and the release call them."""
    return next((value for value in arguments.values() if "cache" in type(value).__name__.lower()), None)


class Watch:
    """Weak references to what `run_with_cache` captured and to the keys it kept, by pass."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captured: list[weakref.ref[Tensor]] = []
        self.keys: list[weakref.ref[Tensor]] = []
        self.peak_bytes = 0
        self.left_over: list[int] = []
        run = model.run_with_cache

        def spy(tokens: Tensor, **arguments: Any) -> tuple[Any, Mapping[str, Tensor]]:
            self.left_over.append(self.alive_bytes())
            output, cache = run(tokens, **arguments)
            self.captured += [weakref.ref(tensor) for tensor in cache.values()]
            past = cache_in(arguments)
            if past is not None:
                self.keys.append(weakref.ref(past))
            self.peak_bytes = max(self.peak_bytes, self.alive_bytes())
            return output, cache

        monkeypatch.setattr(model, "run_with_cache", spy)

    def alive_bytes(self) -> int:
        storages = {}
        for reference in self.captured:
            tensor = reference()
            if tensor is not None:  # a bridge captures a tensor under two names
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return sum(storages.values())

    def keys_alive(self) -> int:
        return sum(reference() is not None for reference in self.keys)


@BOTH_KINDS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_captures_die_with_their_pass_and_never_exceed_the_prediction(
    layout: str, kind: str, tiny_hooked: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_hooked("llama", kind)
    samples = LAYOUTS[layout]()
    pool(model, samples, batch_tokens=50)  # the proof, which compares two captures, is over
    watch = Watch(model, monkeypatch)
    backend = open_backend(model)
    plan = backend.plan(samples, batch_tokens=50)
    list(backend.pool(plan, ALL_LAYERS))
    assert len(watch.left_over) == len(plan.passes) > 1
    assert not any(watch.left_over)
    assert 0 < watch.peak_bytes <= plan.peak_bytes(len(ALL_LAYERS), D_MODEL)


@BOTH_KINDS
def test_a_prefix_is_let_go_before_the_next_one_runs(
    kind: str, tiny_hooked: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_hooked("llama", kind)
    beginnings = [text(length, length) for length in (50, 60, 70)]
    samples = samples_of(*((one, text(length, length)) for one in beginnings for length in (3, 7, 30, 25)), prefix=5)
    pool(model, samples)
    watch = Watch(model, monkeypatch)
    backend = open_backend(model)
    plan = backend.plan(samples)
    alive_at_start: list[int] = []
    run = model.run_with_cache

    def count(*args: Any, **arguments: Any) -> Any:
        alive_at_start.append(watch.keys_alive())
        return run(*args, **arguments)

    monkeypatch.setattr(model, "run_with_cache", count)
    list(backend.pool(plan, ALL_LAYERS))
    starts = [alive for each, alive in zip(plan.passes, alive_at_start, strict=True) if each.kept]
    assert len(starts) == 3 and not any(starts)  # at the start of a prefix, no other is left
    assert watch.keys_alive() == 0


def test_a_continuation_keeps_none_of_the_keys_it_appends(tiny_hooked: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = tiny_hooked("llama", "bridge"), persona(30)
    pool(model, samples)
    lengths: list[set[int]] = []
    run = model.run_with_cache

    def spy(tokens: Tensor, **arguments: Any) -> Any:
        result = run(tokens, **arguments)
        if (cache := cache_in(arguments)) is not None:
            lengths.append({layer.keys.shape[-2] for layer in cache.layers})
        return result

    monkeypatch.setattr(model, "run_with_cache", spy)
    pool(model, samples)
    assert len(lengths) >= 2 and all(length == {30} for length in lengths)  # the prefix, and what continues it


@BOTH_KINDS
def test_what_waits_for_its_samples_does_not_grow_with_their_number(
    kind: str, tiny_hooked: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_hooked("llama", kind)
    runs: list[Any] = []

    class Observed(PoolingRun):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            runs.append(self)

    monkeypatch.setattr(local_backend, "PoolingRun", Observed)

    def most_waiting(n_samples: int) -> int:
        """Bytes of sums and norms held between passes, where every sample masks the prompt that all share."""
        texts = ((text(60, 1), torch.tensor([20 + index]), text(4, index)) for index in range(n_samples))
        backend = open_backend(model)
        plan = backend.plan(samples_of(*texts, prefix=40))
        return max(bytes_waiting(runs[-1]) for _ in backend.pool(plan, ALL_LAYERS))

    assert 0 < most_waiting(80) <= most_waiting(25)


def bytes_waiting(run: Any) -> int:
    tensors = {id(sums): sums for parts in run._earlier.values() for _, sums, _ in parts}
    tensors |= {id(norms): norms for parts in run._norms.values() for _, norms in parts}
    return sum(tensor.nbytes for tensor in tensors.values())
