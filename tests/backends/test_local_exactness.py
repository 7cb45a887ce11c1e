"""What no list of architectures tells: hooks of the caller's, lengths not met before, models that change."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import ALL_LAYERS, BOTH_KINDS, Boot
from oracle import oracle_means, relative_error
from sharing import assert_exact, persona, pool, samples_of, text
from tiny import D_MODEL, WINDOW
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tl_persona.backends import open_backend
from tl_persona.backends.local import backend as budget
from tl_persona.backends.local import inspection
from tl_persona.loading import load_model
from tl_persona.plan import Sample

pytestmark = [pytest.mark.tl, pytest.mark.usefixtures("small_limits")]


def shift_the_last(activation: Tensor, hook: Any) -> Tensor:
    return torch.cat([activation[:, :-1], activation[:, -1:] + 0.5], dim=1)


def by_themselves(model: Any, samples: Sequence[Sample]) -> list[Tensor]:
    """Means of every sample, run whole and alone by TransformerLens itself."""
    means = []
    for each in samples:
        _, cache = model.run_with_cache(each.input_ids[None], names_filter=ALL_LAYERS)
        outputs = torch.stack([cache[name][0] for name in ALL_LAYERS]).double()
        means.append(torch.stack([outputs[:, mask].mean(dim=1) for mask in each.masks]))
    return means


def agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(relative_error(got, right) < 1e-5 for got, right in zip(found, expected, strict=True))


# --- hooks of the caller's -------------------------------------------------------------------------------------------


@BOTH_KINDS
@pytest.mark.parametrize("point", ["hook_attn_out", "hook_resid_mid", "hook_resid_pre", "mlp.hook_post"])
def test_a_hook_acts_on_every_text_as_on_one_by_itself(kind: str, point: str, tiny_hooked: Boot) -> None:
    model, samples = tiny_hooked("llama", kind), persona()
    untouched, _ = pool(model, samples)
    with model.hooks(fwd_hooks=[(f"blocks.1.{point}", shift_the_last)]):
        steered, notes = pool(model, samples)
        expected = by_themselves(model, samples)
    assert (notes["sharing"], notes["hooks"]) == ("none", "of the caller")
    assert agree(steered, expected)
    assert not any(agree([got], [before]) for got, before in zip(steered, untouched, strict=True))
    again, notes = pool(model, samples)
    assert notes["sharing"] != "none" and agree(again, untouched)


@BOTH_KINDS
def test_what_was_first_seen_under_a_hook_is_shared_without_it(kind: str, tiny_model: Callable[[str], Path]) -> None:
    model = load_model(tiny_model("llama"), kind=kind)  # type: ignore[arg-type]
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", shift_the_last)]):  # type: ignore[attr-defined]
        assert pool(model, persona())[1]["sharing"] == "none"
    assert pool(model, persona())[1]["sharing"] != "none"


def test_what_transformer_lens_leaves_behind_is_nobodys_hook(tiny_model: Callable[[str], Path]) -> None:
    model: Any = load_model(tiny_model("llama"), kind="bridge")
    model.run_with_cache(text(9, 1)[None])
    model.run_with_hooks(text(9, 1)[None], fwd_hooks=[("blocks.0.hook_resid_post", shift_the_last)])
    model.generate("Who?", max_new_tokens=2, verbose=False)
    notes = pool(model, persona())[1]
    assert (notes["sharing"], notes["attention"]) == ("packed", "fused")


# --- lengths and positions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
def test_texts_longer_than_any_before_are_proven_anew(
    named: bool, tiny_model: Callable[[str], Path], tiny_hf: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not named:  # not even the configuration tells of the window
        monkeypatch.setattr(inspection, "critical_lengths", lambda model: ())
    model = load_model(tiny_model("gpt_neo"), kind="bridge")
    short = samples_of(*((text(6, 1), text(length, length)) for length in (4, 3)), prefix=6)
    assert sum(len(sample.input_ids) for sample in short) - 6 < WINDOW
    assert assert_exact(model, tiny_hf("gpt_neo"), short)["sharing"] == "packed"
    notes = assert_exact(model, tiny_hf("gpt_neo"), persona(WINDOW + 20))
    assert notes["sharing"] != "packed" and "packed" in notes["fallbacks"][0]
    assert assert_exact(model, tiny_hf("gpt_neo"), persona(WINDOW + 20)) == notes


@pytest.mark.parametrize("lengths", [(12, 50), (50, 12), (50,), (20, 28), (40, 50, 44)])
def test_what_lies_beside_or_after_a_text_does_not_change_it_where_positions_hang_on_the_longest(
    lengths: tuple[int, ...], tiny_model: Callable[[str], Path], tiny_hf: Callable[[str], Any]
) -> None:
    model, hf_model = load_model(tiny_model("longrope"), kind="bridge"), tiny_hf("longrope")
    for n_selected in (10, 50):
        samples = []
        for length in lengths:
            mask = torch.zeros(1, length, dtype=torch.bool)
            mask[0, :n_selected] = True
            samples.append(Sample(f"of {length}", text(length, length), mask))
        assert agree(pool(model, samples)[0], [oracle_means(hf_model, sample) for sample in samples])


def test_a_persona_on_both_sides_of_the_length_at_which_positions_change_is_exact(
    tiny_model: Callable[[str], Path], tiny_hf: Callable[[str], Any]
) -> None:
    model = load_model(tiny_model("longrope"), kind="bridge")
    beginning = text(24, 1)
    below = samples_of(*((beginning, text(length, length)) for length in (3, 1, 7, 5)), prefix=24)
    both = samples_of(*((beginning, text(length, length)) for length in (3, 1, 27, 7, 15, 19)), prefix=24)
    assert assert_exact(model, tiny_hf("longrope"), below)["sharing"] == "packed"
    notes = assert_exact(model, tiny_hf("longrope"), both)
    assert notes["sharing"] == "none" and [note.split(":")[0] for note in notes["fallbacks"]] == [
        "packed",
        "cached",
        "batching",
    ]
    assert assert_exact(model, tiny_hf("longrope"), below)["sharing"] == "packed"


# --- what is foreseen ------------------------------------------------------------------------------------------------


def test_once_a_model_is_known_the_predicted_cost_is_what_runs(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = load_model(tiny_model("mistral"), kind="bridge")
    samples = persona(WINDOW + 8)
    first = pool(model, samples)[1]
    ran, run = [], model.run_with_cache
    monkeypatch.setattr(
        model, "run_with_cache", lambda tokens, **more: ran.append(tokens.numel()) or run(tokens, **more)
    )
    backend = open_backend(model)
    plan = backend.plan(samples)
    assert len(list(backend.pool(plan, ALL_LAYERS))) == len(samples)
    assert (str(plan.sharing), plan.tokens_run) == ("cached", sum(ran))
    assert backend.notes == first  # what was given up is noted though it was foreseen


# --- models that change ----------------------------------------------------------------------------------------------


def test_a_transformers_model_runs_as_it_is_now(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    hf_model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    tokenizer, samples = AutoTokenizer.from_pretrained(tiny_llama), persona()

    def found() -> list[Tensor]:
        backend = open_backend(hf_model, tokenizer=tokenizer)
        pooled = {each.sample: each.means for each in backend.pool(backend.plan(samples), ALL_LAYERS)}
        return [pooled[index] for index in range(len(samples))]

    def expected() -> list[Tensor]:
        return [oracle_means(hf_model, sample) for sample in samples]

    before = found()
    assert agree(before, expected())
    layers = hf_model.model.layers
    width = layers[0].mlp.down_proj.in_features
    layers[0].mlp.down_proj = torch.nn.Linear(width, D_MODEL, bias=False).requires_grad_(False)
    replaced = found()
    assert agree(replaced, expected()) and not agree(replaced, before)
    handle = layers[1].register_forward_hook(lambda _module, _inputs, output: output + 1.0)
    assert agree(found(), expected()) and not agree(found(), replaced)
    handle.remove()
    with caplog.at_level(logging.WARNING):
        assert agree(found(), replaced)


# --- the token budget ------------------------------------------------------------------------------------------------


def test_memory_that_torch_holds_for_the_next_pass_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise each persona would get a smaller budget than the one before it."""
    figures = {"mem_get_info": (3_000, 16_000), "memory_reserved": 9_000, "memory_allocated": 5_000}
    for name, figure in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, figure=figure: figure)
    assert budget.free_bytes(torch.device("cuda", 0)) == 3_000 + 4_000
