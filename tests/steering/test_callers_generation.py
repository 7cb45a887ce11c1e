"""A caller's own generation in which a pass is not the prompt, and then one token: counted right, or refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import NEW_TOKENS, V, adding, at, generated_by_hand, some_ids
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from tl_persona import Intervention, attach, load_model, monitor
from tl_persona.errors import InputError
from tl_persona.models.hooks import resid_post
from tl_persona.steering.positions import Positions

pytestmark = pytest.mark.tl

HOOK, LENGTH = resid_post(1), 10
IDS = some_ids(LENGTH)
FROM_ZERO = [(3, [3]), ([0, 6], [0, 6]), (slice(2, 5), [2, 3, 4]), (slice(6, None), range(6, 99)), (None, range(99))]
FROM_THE_PROMPTS_END = ["generated", "last", -1, slice(-2, None)]


@pytest.fixture(params=["bridge", "transformers"])
def model(request: Any, tiny_model: Callable[[str], Path]) -> Any:
    if request.param == "transformers":
        return AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()
    return load_model(tiny_model("llama"), kind="bridge")


@pytest.fixture
def plain(tiny_model: Callable[[str], Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()


def generated(model: Any, **how: Any) -> Tensor:
    """By transformers' own loop."""
    settings = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, **how.pop("settings", {}))
    found: Tensor = getattr(model, "original_model", model).generate(
        IDS, attention_mask=torch.ones_like(IDS), generation_config=settings, **how
    )
    return found


def chunks(_: Any) -> dict[str, Any]:
    return {"settings": {"prefill_chunk_size": 4}}


def drafts(plain: Any) -> dict[str, Any]:
    return {"assistant_model": plain}


WAYS = {"chunks": (chunks, "prefill_chunk_size"), "drafts": (drafts, "drafts")}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("positions", "places"), FROM_ZERO)
def test_places_from_zero_are_counted_by_tokens(
    positions: Positions, places: Any, way: str, model: Any, plain: Any
) -> None:
    expected = generated_by_hand(plain, IDS, {1: at(places, adding(6.0))})
    with attach(model, [Intervention(HOOK, V, 6.0, positions=positions)]):
        assert torch.equal(generated(model, **WAYS[way][0](plain)), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("positions", FROM_THE_PROMPTS_END, ids=str)
def test_what_depends_on_where_the_prompt_ends_is_refused(
    positions: Positions, way: str, model: Any, plain: Any
) -> None:
    how, why = WAYS[way]
    with attach(model, [Intervention(HOOK, V, 6.0, positions=positions)]), pytest.raises(InputError, match=why):
        generated(model, **how(plain))


@pytest.mark.parametrize("way", WAYS)
def test_a_mask_does_not_fit_what_is_not_the_prompt(way: str, model: Any, plain: Any) -> None:
    mask = torch.ones(1, LENGTH, dtype=torch.bool)
    with attach(model, [Intervention(HOOK, V, 6.0, positions=mask)]), pytest.raises(InputError, match="has shape"):
        generated(model, **WAYS[way][0](plain))


def test_a_monitor_joins_the_pieces_of_a_prompt(model: Any) -> None:
    with monitor(model, {"v": (HOOK, V)}) as whole:
        expected = generated(model)
    with monitor(model, {"v": (HOOK, V)}) as pieces:
        assert torch.equal(generated(model, **chunks(None)), expected)
    assert len(pieces.projections["v"]) > len(whole.projections["v"])
    (one,), (other,) = pieces.texts("v"), whole.texts("v")
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_monitor_refuses_drafts(model: Any, plain: Any) -> None:
    with monitor(model, {"v": (HOOK, V)}), pytest.raises(InputError, match="drafts"):
        generated(model, **drafts(plain))


def test_a_monitor_refuses_to_go_on_where_tokens_were_taken_back(plain: Any) -> None:
    with torch.no_grad(), monitor(plain, {"v": (HOOK, V)}) as seen:
        cache = plain(IDS, use_cache=True).past_key_values
        plain(IDS[:, :1], past_key_values=cache)
        cache.crop(-3)
        with pytest.raises(InputError, match="taken back"):
            plain(IDS[:, :1], past_key_values=cache)
    assert [each.shape[1] for each in seen.texts("v")] == [LENGTH + 1]
