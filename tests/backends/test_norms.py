"""The norm of every token of a text comes back with its means, whoever shared its passes."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from kinds import ALL_LAYERS, BOTH_KINDS, Boot
from oracle import block_outputs
from sharing import persona, samples_of, text
from torch import Tensor

from tl_persona.backends import open_backend
from tl_persona.backends.local import backend as local_backend
from tl_persona.backends.local.pooling import PoolingRun
from tl_persona.plan import Plan, Sample, make_plan

pytestmark = [pytest.mark.tl, pytest.mark.usefixtures("small_limits")]


def norms_of(backend: Any, plan: Plan) -> list[Tensor]:
    found = {each.sample: each.norms for each in backend.pool(plan, ALL_LAYERS)}
    return [found[index] for index in range(len(plan.samples))]


def assert_norms(hf_model: Any, samples: Sequence[Sample], found: Sequence[Tensor]) -> None:
    for sample, norms in zip(samples, found, strict=True):
        expected = block_outputs(hf_model, sample.input_ids).norm(dim=-1)
        assert norms.dtype == torch.float32
        torch.testing.assert_close(norms.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@BOTH_KINDS
@pytest.mark.parametrize("budget", [20, 1000])
def test_norms_of_shared_and_packed_texts_are_those_of_each_text_alone(
    budget: int, kind: str, family: str, tiny_hooked: Boot, tiny_hf: Callable[[str], Any]
) -> None:
    backend, samples = open_backend(tiny_hooked(family, kind)), persona()
    found = norms_of(backend, backend.plan(samples, batch_tokens=budget))
    assert backend.notes["sharing"] != "none"
    assert_norms(tiny_hf(family), samples, found)
    assert_norms(tiny_hf(family), samples, norms_of(backend, make_plan(samples, batch_tokens=budget)))


def test_tokens_that_no_mask_selects_have_norms_too_and_those_behind_the_last_selected_do_not_run(
    tiny_hooked: Boot, tiny_hf: Callable[[str], Any]
) -> None:
    masks = torch.zeros(2, 20, dtype=torch.bool)
    masks[0, 3], masks[1, 7] = True, True
    samples = [Sample("a", text(20, 1), masks), Sample("b", text(20, 2), masks)]
    backend = open_backend(tiny_hooked("llama", "bridge"))
    found = norms_of(backend, backend.plan(samples))
    assert [norms.shape[1] for norms in found] == [8, 8]
    assert_norms(tiny_hf("llama"), [Sample("a", each.input_ids[:8], masks[:, :8]) for each in samples], found)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_norms_are_float32_and_do_not_overflow_whatever_the_models_type(dtype: str) -> None:
    samples = [Sample("a", torch.arange(3), torch.ones(1, 3, dtype=torch.bool))]
    plan = make_plan(samples)
    run = PoolingRun(plan, ["a", "b"], with_norms=True)
    activation = torch.full((1, 3, 4), 300.0, dtype=getattr(torch, dtype))  # its square is beyond float16
    (pooled,) = run.add(plan.passes[0], {"a": activation, "b": activation * 2})
    assert torch.equal(pooled.norms, torch.tensor([[600.0] * 3, [1200.0] * 3]))


def test_sums_over_samples_cost_no_norms(tiny_hooked: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Observed(PoolingRun):
        def __init__(self, plan: Plan, hook_names: Sequence[str], with_norms: bool = False) -> None:
            super().__init__(plan, hook_names, with_norms)
            asked.append(with_norms)

    monkeypatch.setattr(local_backend, "PoolingRun", Observed)
    backend = open_backend(tiny_hooked("llama", "bridge"))
    plan = backend.plan(samples_of((text(8, 1),), prefix=4))
    list(backend.total(plan, ALL_LAYERS, [range(5)], 5))
    list(backend.pool(plan, ALL_LAYERS))
    assert asked == [False, True]
