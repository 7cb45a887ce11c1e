"""What a model takes is found by trying: whatever a release renames is told, and never ends in other numbers.

Here releases are made up: the model's forward, its cache or its attributes are changed, and the run must be right all
the same, with a note and one warning that say what was lost, or end in an error.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import block_outputs, relative_error
from tiny import N_LAYERS, VOCAB_SIZE
from torch import Tensor
from transformers import AutoModelForCausalLM

from tl_persona import Intervention, attach, load_model
from tl_persona.backends import open_backend
from tl_persona.backends.local import trial as trial_module
from tl_persona.backends.local.trial import trial_of
from tl_persona.errors import ModelError, TLPersonaError
from tl_persona.plan import Sample, Sharing
from tl_persona.plan import plan as plan_module
from tl_persona.plan import rows as rows_module

pytestmark = pytest.mark.tl

HOOKS = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes of a few tokens are worth a pass."""
    monkeypatch.setattr(plan_module, "MIN_SHARED", 4)
    monkeypatch.setattr(rows_module, "WORTH_CACHING", 8)
    monkeypatch.setattr(rows_module, "PACKED_ROW_TOKENS", 40)


def ids_of(length: int, seed: int) -> Tensor:
    return torch.randint(10, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed))


def texts() -> list[Tensor]:
    """Six texts that share their first twelve tokens."""
    beginning = ids_of(12, 1)
    return [torch.cat([beginning, ids_of(length, length)]) for length in (3, 5, 8, 6, 4, 7)]


def pooled(model: Any) -> tuple[list[Tensor], dict[str, Any]]:
    backend = open_backend(model)
    samples = [Sample(f"t{place}", ids, torch.ones(1, len(ids)).bool()) for place, ids in enumerate(texts())]
    means: list[Any] = [None] * len(samples)
    for sample, mean, _ in backend.pool(backend.plan(samples), HOOKS):
        means[sample] = mean[0]
    return means, backend.notes


@pytest.fixture
def expected(tiny_model: Callable[[str], Path]) -> list[Tensor]:
    hf = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()
    return [block_outputs(hf, ids).mean(dim=1) for ids in texts()]


@pytest.fixture
def model(tiny_model: Callable[[str], Path]) -> Any:
    """A bridge that was not tried yet."""
    loaded = load_model(tiny_model("llama"), kind="bridge")
    trial_module._TRIALS.pop(loaded)
    return loaded


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "tl_persona"]


CACHES = ("cache", "past_key_values", "cache_params")
RENAMED = {
    "use_cache": ("use_cache",),
    "the cache": CACHES,
    "position_ids": ("position_ids",),
    "attention_mask": ("attention_mask",),
    "logits_to_keep": ("logits_to_keep",),
    "output_attentions": ("output_attentions",),
    "stop_at_layer": ("stop_at_layer",),
    "names_filter": ("names_filter",),
    "everything": (*CACHES, "use_cache", "position_ids", "attention_mask", "logits_to_keep", "output_attentions"),
}


@pytest.mark.parametrize("unknown", ["is an error", "is ignored"])
@pytest.mark.parametrize("what", RENAMED)
def test_an_argument_that_the_model_no_longer_knows_is_told_and_changes_no_number(
    what: str, unknown: str, model: Any, expected: list[Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    forward, run = model.original_model.forward, model.run_with_cache

    def without(call: Callable[..., Any]) -> Callable[..., Any]:
        def renamed(*args: Any, **kwargs: Any) -> Any:
            gone = [name for name in RENAMED[what] if name in kwargs]
            if gone and unknown == "is an error":
                raise TypeError(f"forward() got an unexpected keyword argument {gone[0]!r}")
            return call(*args, **{name: value for name, value in kwargs.items() if name not in gone})

        return renamed

    model.original_model.forward = without(forward)
    if what in ("stop_at_layer", "names_filter"):
        model.run_with_cache = without(run)
    with caplog.at_level(logging.WARNING, logger="tl_persona"):
        try:
            means, notes = pooled(model)
        except ModelError as error:  # without these a bridge cannot run
            assert {"output_attentions", "names_filter", "stop_at_layer"} & {
                *RENAMED[what]
            } and unknown == "is an error"
            assert "TransformerLens cannot run LlamaForCausalLM with the installed transformers" in str(error)
            return
    for got, right in zip(means, expected, strict=True):
        assert relative_error(got, right) < 1e-5
    if "fallbacks" not in notes:  # nothing was lost: what is not asked for is not computed, and keys come all the same
        assert unknown == "is ignored" and what in ("output_attentions", "use_cache")
        assert (notes["sharing"], notes["attention"]) == ("packed", "fused")
        return
    assert len(warnings_in(caplog)) == len(notes["fallbacks"]) > 0
    if what in ("the cache", "everything"):
        assert notes["sharing"] == "none" and any(note.startswith("cached: ") for note in notes["fallbacks"])
    elif what in ("position_ids", "attention_mask"):
        assert notes["sharing"] == "cached" and any(note.startswith("packed: ") for note in notes["fallbacks"])
    with caplog.at_level(logging.WARNING, logger="tl_persona"):
        assert pooled(model)[1]["fallbacks"] == notes["fallbacks"]
    assert len(warnings_in(caplog)) == len(notes["fallbacks"])  # once a model


@pytest.mark.parametrize("name", ["original_component", "hook_in"])
def test_a_part_of_attention_that_another_release_calls_otherwise_is_left_alone_and_that_is_said(
    name: str,
    model: Any,
    expected: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from tl_persona.backends.local import native

    def renamed(*_: Any) -> Any:
        raise AttributeError(f"'AttentionBridge' object has no attribute {name!r}")

    monkeypatch.setattr(native, "_config_of" if name == "original_component" else "_own_forward", renamed)
    with caplog.at_level(logging.WARNING, logger="tl_persona"):
        means, notes = pooled(model)
    for got, right in zip(means, expected, strict=True):
        assert relative_error(got, right) < 1e-5
    (fallback,) = notes["fallbacks"]
    assert fallback.startswith("fused attention: ") and name in fallback and len(warnings_in(caplog)) == 1


def test_a_model_that_does_not_say_that_attention_can_be_fused_runs_stepwise_and_says_so(
    model: Any, expected: list[Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(type(model.original_model), "_supports_sdpa", False)
    with caplog.at_level(logging.WARNING, logger="tl_persona"):
        means, notes = pooled(model)
    for got, right in zip(means, expected, strict=True):
        assert relative_error(got, right) < 1e-5
    assert "attention" not in notes and notes["sharing"] == "packed"
    assert [note.split(":")[0] for note in notes["fallbacks"]] == ["fused attention"]
    (warning,) = warnings_in(caplog)
    assert "fused attention cannot be used here (transformers has no fused attention" in warning


@pytest.mark.parametrize("broken", ["copied", "made"])
def test_a_cache_that_cannot_be_made_or_continued_is_not_shared_and_that_is_said(
    broken: str,
    model: Any,
    expected: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from tl_persona.backends.local import runners

    def refuse(*_: Any) -> Any:
        raise AttributeError("'DynamicCache' object has no attribute 'layers'")

    if broken == "copied":
        monkeypatch.setattr(runners, "_continued", refuse)
        monkeypatch.setattr(rows_module, "WORTH_CACHING", 1)
        monkeypatch.setattr(rows_module, "PACKED_ROW_TOKENS", 13)
    else:
        monkeypatch.setattr(trial_module, "new_cache", refuse)
    with caplog.at_level(logging.WARNING, logger="tl_persona"):
        means, notes = pooled(model)
    for got, right in zip(means, expected, strict=True):
        assert relative_error(got, right) < 1e-5
    assert notes["sharing"] == "none" and notes["fallbacks"] and warnings_in(caplog)


def test_a_cache_reaches_attentions_that_look_for_another_name(model: Any) -> None:
    trial = trial_of(model)
    assert trial.cache_name in CACHES and not trial.limits and not trial.costs
    ids = ids_of(6, 3)[None]
    with torch.no_grad():
        whole = model.run_with_cache(ids, names_filter=HOOKS)[1][HOOKS[-1]]
        cache = trial_module.new_cache(model.original_model)
        with trial.renamed(model):
            for part in (ids[:, :4], ids[:, 4:]):
                _, captured = model.run_with_cache(
                    part, names_filter=HOOKS, return_type=None, **{trial.cache_name: cache, "use_cache": True}
                )
    assert relative_error(captured[HOOKS[-1]][0], whole[0, 4:]) < 1e-5


def test_trying_leaves_the_model_and_its_hooks_as_they_were_and_shows_them_nothing(model: Any) -> None:
    seen: list[Any] = []
    model(ids_of(4, 1)[None])  # a bridge puts hooks of its own on at its first run
    parameters = [parameter.clone() for parameter in model.parameters()]
    with model.hooks(fwd_hooks=[(HOOKS[1], lambda activation, hook: seen.append(activation))]):
        before = [
            (module, dict(module._forward_hooks), dict(module._forward_pre_hooks))
            for root in (model, model.original_model)
            for module in root.modules()
        ]
        found = trial_of(model)
        assert not seen
        for module, forward, pre in before:
            kept = {key: hook for key, hook in module._forward_hooks.items() if key in forward}
            assert list(kept.items()) == list(forward.items())
            assert list(module._forward_pre_hooks.items()) == list(pre.items())
        model(ids_of(4, 1)[None])
        assert len(seen) == 1
    assert trial_of(model) is found
    assert all(torch.equal(one, other) for one, other in zip(parameters, model.parameters(), strict=True))


def test_extraction_under_hooks_of_the_callers_is_noted_and_warns_of_nothing(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    edit = Intervention(HOOKS[0], torch.ones(32))
    with caplog.at_level(logging.WARNING, logger="tl_persona"), attach(model, [edit]):
        _, notes = pooled(model)
    assert (notes["sharing"], notes["hooks"]) == ("none", "of the caller") and not warnings_in(caplog)


def test_nothing_shared_says_why(model: Any) -> None:
    backend = open_backend(model)
    samples = [Sample(f"t{length}", ids_of(length, length), torch.ones(1, length).bool()) for length in (5, 9)]
    list(backend.pool(backend.plan(samples), HOOKS))
    assert backend.notes["sharing"] == "none" and "no two texts share" in backend.notes["why"]


def test_a_model_whose_tokens_all_give_nan_is_an_error_and_is_tried_again(model: Any) -> None:
    with torch.no_grad():
        parameter = next(iter(model.original_model.model.layers[0].mlp.down_proj.parameters()))
        kept = parameter.clone()
        parameter.fill_(float("nan"))
    with pytest.raises(TLPersonaError, match="NaN"):
        pooled(model)
    with torch.no_grad():
        parameter.copy_(kept)
    assert pooled(model)[1]["sharing"] == "packed"


def test_the_plan_before_the_trial_is_for_the_most_that_the_class_has(model: Any) -> None:
    backend = open_backend(model)
    samples = [Sample(f"t{place}", ids, torch.ones(1, len(ids)).bool()) for place, ids in enumerate(texts())]
    assert backend.plan(samples).sharing is Sharing.PACKED
