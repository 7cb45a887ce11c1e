"""`hook_attn_out` and `hook_mlp_out` are what is added to the stream, whatever the family and class, or are refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoders import DECODERS
from hooked_residuals import RELEASE, residuals
from kinds import HAS_HOOKED_TRANSFORMER
from oracle import relative_error

from tl_persona import load_model
from tl_persona.errors import HookError, ModelError
from tl_persona.steering import Intervention, attach, monitor

pytestmark = [pytest.mark.tl, pytest.mark.slow]

EDGES, INSIDE = ("hook_resid_pre", "hook_resid_post"), ("hook_attn_out", "hook_mlp_out")

ONE_STREAM = [name for name, record in DECODERS.items() if not record.unreadable]

NO_SUM_OF_TWO = {
    **dict.fromkeys(("openai-gpt", "opt post", "bloom post"), "a norm stands on the stream"),
    **dict.fromkeys(("mamba", "mamba2", "falcon mamba", "nemotron h"), "a block has one part"),
    **dict.fromkeys(("falcon h1", "granite hybrid", "zamba2"), "a block has three parts"),
    **dict.fromkeys(("gemma4", "gemma4 shared keys", "gemma4 multimodal"), "the stream is multiplied"),
    "opt": "the MLP gives no axis of texts",
}
"""Decoders of whose blocks no two modules give what is added, with the reason."""

NOT_THE_SUM = (
    *("lfm2", "lfm2 experts", "qwen3-next", "qwen3.5", "qwen3.5 experts", "bamba", "granite hybrid", "jamba"),
    *("bloom post", "falcon h1", "gemma4", "gemma4 shared keys", "gemma4 multimodal"),
)
"""Decoders of which a bridge of TransformerLens 4.3 shows something else in some block, or in a block without the other
hook."""


def _blocks(model: Any) -> list[int]:
    """Those that have both hooks."""
    numbers = range(int(model.cfg.n_layers))
    return [n for n in numbers if all(f"blocks.{n}.{hook}" in model.hook_dict for hook in INSIDE)]


def _names(block: int) -> list[str]:
    return [f"blocks.{block}.{hook}" for hook in ("hook_resid_pre", *INSIDE, "hook_resid_post")]


@pytest.mark.parametrize("name", ONE_STREAM)
def test_what_a_transformers_models_blocks_add_up_to_is_the_stream(name: str, decoder: Callable[[str], Any]) -> None:
    saved = decoder(name)
    model = load_model(saved.folder, kind="transformers")
    blocks = _blocks(model)
    assert bool(blocks) == (name not in NO_SUM_OF_TWO)
    for block in blocks:
        for before, attention, mlp, after in residuals(model, saved.texts, names=_names(block)):
            assert relative_error(before + attention + mlp, after) < 1e-5


@pytest.mark.parametrize("name", [name for name in ONE_STREAM if name not in NO_SUM_OF_TWO])
def test_what_is_written_there_is_added_to_the_stream(name: str, decoder: Callable[[str], Any]) -> None:
    saved = decoder(name)
    model: Any = load_model(saved.folder, kind="transformers")
    block, ids = _blocks(model)[-1], saved.texts[2][None]
    names = _names(block)
    direction = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        _, plain = model.run_with_cache(ids, names_filter=names)
        for name_of_part in names[1:3]:
            with attach(model, [Intervention(name_of_part, direction, 2.0)]):
                _, kept = model.run_with_cache(ids, names_filter=names)
            before, attention, mlp, after = (kept[each] for each in names)
            torch.testing.assert_close(kept[name_of_part], plain[name_of_part] + 2 * direction, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(before + attention + mlp, after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bridge", *(["hooked"] if HAS_HOOKED_TRANSFORMER else [])])
@pytest.mark.parametrize("name", ONE_STREAM)
def test_a_hooked_class_shows_what_is_added_or_is_refused(name: str, kind: str, decoder: Callable[[str], Any]) -> None:
    saved = decoder(name)
    try:
        model = load_model(saved.folder, kind=kind)
    except ModelError:  # which errors may come is another test's
        return
    itself = load_model(saved.folder, kind="transformers")
    refused = False
    for block in range(int(model.cfg.n_layers)):
        inside = [each for hook in INSIDE if (each := f"blocks.{block}.{hook}") in model.hook_dict]
        names = [f"blocks.{block}.hook_resid_pre", *inside, f"blocks.{block}.hook_resid_post"]
        try:
            shown = residuals(model, saved.texts, names=names)
        except HookError as error:
            assert "is not what is added to the residual stream" in str(error)
            refused = True
            continue
        for values in shown:
            if inside:
                assert relative_error(values[:-1].sum(dim=0), values[-1]) < 1e-5
        both = [each for each in inside if each in itself.hook_dict]
        for mine, own in zip(shown, residuals(itself, saved.texts, names=both) if both else [], strict=False):
            for each, value in zip(both, own, strict=True):
                assert relative_error(mine[names.index(each)], value) < 1e-5
    if kind == "bridge" and RELEASE.startswith("4.3."):
        assert refused == (name in NOT_THE_SUM)


def test_neither_an_edit_nor_a_monitor_goes_where_something_else_is_shown(decoder: Callable[[str], Any]) -> None:
    model: Any = load_model(decoder("gemma4").folder, kind="bridge", check=False)
    name, direction = "blocks.1.hook_mlp_out", torch.ones(model.cfg.d_model)
    with pytest.raises(HookError, match=r"blocks\.1\.hook_mlp_out of this TransformerBridge is not what is added"):
        attach(model, [Intervention(name, direction)]).__enter__()
    with pytest.raises(HookError, match="kind='transformers'"):
        monitor(model, {"seen": (name, direction)}).__enter__()


def test_the_stream_between_attention_and_mlp_is_read_and_not_edited(decoder: Callable[[str], Any]) -> None:
    saved = decoder("gemma3")
    model: Any = load_model(saved.folder, kind="transformers")
    names = [f"blocks.1.hook_{part}" for part in ("resid_pre", "attn_out", "resid_mid")]
    for before, attention, middle in residuals(model, saved.texts, names=names):
        assert relative_error(before + attention, middle) < 1e-6
    direction = torch.ones(model.cfg.d_model)
    with pytest.raises(HookError, match="never reaches the stream"):
        attach(model, [Intervention(names[2], direction)]).__enter__()
    with (
        pytest.raises(HookError, match="never reaches the stream"),
        model.hooks([(names[2], lambda value, hook: value)]),
    ):
        model(saved.texts[0][None])
