"""Every family of decoders is extracted as plain transformers computes it, however its texts lie together.

A plan of each kind runs after the others on one model, so that what was proven for one is what the next relies on.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import DECODERS, EVERY, FURTHER, load_decoder
from family_plans import Means, leave, pairs, run_all
from hooked_residuals import NEWEST
from oracle import block_outputs, some
from sharing import pool

from tl_persona import extract_caa_vectors, load_model
from tl_persona.backends import open_backend
from tl_persona.backends.local import proof
from tl_persona.errors import TLPersonaError
from tl_persona.steering import Intervention, attach, monitor

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_limits")]

ONE_OF_EACH = (
    *("llama", "llama yarn", "phi3 longrope", "smollm3 windows", "gpt2", "bloom", "neox"),
    *("mistral", "gpt-neo", "modernbert", "llama4 scaled", "gpt-oss", "gemma3"),
    *("mixtral window", "qwen3 experts", "laguna", "youtu yarn", "deepseek", "glm sparse"),
    *("mamba2", "rwkv", "recurrentgemma", "qwen3.5 experts", "gemma4 multimodal"),
)
"""Those that run whenever the tests do: positions, windows, experts, latent and sparse attention, recurrences."""

KNOWN: dict[str, str] = {}
"""Decoders that are left out, with the reason."""

HALF_KNOWN = {
    **dict.fromkeys(("olmo", "olmo2", "olmo3", "flex-olmo"), "TransformerLens multiplies float32 by bfloat16"),
    **dict.fromkeys(("mixtral", "qwen3 experts"), "roundings send tokens to other experts"),
}
"""Decoders that have no bridge in half precision, with the reason."""

UNREADABLE = tuple(name for name, record in EVERY.items() if record.unreadable)

REFUSED = tuple(name for name, record in DECODERS.items() if {"bridge 4.3"} & {*record.wrong, *record.missing})

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}

PAIRS = [
    {"positive": "I read by the sea in the evening.", "negative": "I read by the sea; there is wind from the west."},
    {"positive": "Tea, please.", "negative": "Give me the rain and the wind, and be quick about it today!"},
    {"positive": "You are kind, and you speak plainly.", "negative": "You are Mara."},
]


def _of(names: Any) -> Any:
    return pytest.mark.parametrize("name", [name for name in names if name not in KNOWN and name not in REFUSED])


@pytest.fixture
def booted(decoder: Callable[[str], Any]) -> Callable[..., tuple[Any, Means]]:
    """Give a decoder as `load_model` has it, and what it has to equal."""

    def boot(name: str, dtype: torch.dtype = torch.float32, kind: str = "auto") -> tuple[Any, Means]:
        saved = decoder(name)
        plain, layers = load_decoder(saved.folder).to(dtype), saved.record.layers
        means = Means(plain, lambda: _exact(saved.folder, dtype), layers, dtype != torch.float32, _rounds(name))
        return load_model(saved.folder, kind, dtype=dtype), means

    return boot


def _exact(folder: Path, dtype: torch.dtype) -> Any:
    """The same weights, computed with in float64."""
    model = load_decoder(folder).to(dtype).double()
    model.set_experts_implementation("eager")  # the others have no float64
    return model


def _rounds(name: str) -> bool:
    """Whether a rounding may grow: where it sends a token to another expert, or to other keys."""
    return any("expert" in key or "topk" in key for key in EVERY[name].settings)


def _hooks(model: Any) -> list[str]:
    return [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]


def _run(name: str, dtype: torch.dtype, booted: Callable[..., tuple[Any, Means]]) -> None:
    model, means = booted(name, dtype)
    found = run_all(model, means, _hooks(model), TOLERANCE[dtype])
    if "TL_PERSONA_FAMILIES" in os.environ and dtype == torch.float32:
        about = {"architecture": type(model.original_model).__name__, "class": type(model).__name__}
        if type(model).__name__ == "TransformersModel":
            with pytest.raises(TLPersonaError) as refusal:
                booted(name, dtype, "bridge")
            about["bridge"] = str(refusal.value)
        leave(Path(os.environ["TL_PERSONA_FAMILIES"]), name, about | {"plans": found})


@pytest.mark.tl
@_of(ONE_OF_EACH)
def test_every_plan_has_the_means_of_the_plain_model(name: str, booted: Callable[..., tuple[Any, Means]]) -> None:
    _run(name, torch.float32, booted)


@pytest.mark.parametrize("name", ["phi3 longrope", "mistral", "llama4 scaled", "gemma3"])
def test_these_plans_show_what_a_shortcut_gets_wrong(
    name: str, booted: Callable[..., tuple[Any, Means]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, means = booted(name, kind="bridge")
    compared = proof.compared

    def trusting(*probe: Any) -> proof.Verdict:
        verdict = compared(*probe)
        return verdict._replace(holds="it raised" not in verdict.reason)

    monkeypatch.setattr(proof, "compared", trusting)
    with pytest.raises(AssertionError, match=r"tokens, sharing (packed|cached): .* the plain model loses"):
        run_all(model, means, _hooks(model), TOLERANCE[torch.float32])


@pytest.mark.heavy
@_of(name for name in DECODERS if name not in ONE_OF_EACH)
def test_every_other_decoder_has_the_means_of_the_plain_model(
    name: str, booted: Callable[..., tuple[Any, Means]]
) -> None:
    _run(name, torch.float32, booted)


@pytest.mark.heavy
@_of(name for name in DECODERS if name not in HALF_KNOWN)
def test_every_plan_is_right_in_half_precision(name: str, booted: Callable[..., tuple[Any, Means]]) -> None:
    _run(name, torch.bfloat16, booted)


@pytest.mark.heavy
@pytest.mark.parametrize("name", HALF_KNOWN)
def test_what_has_no_bridge_in_half_precision_is_taken_as_it_is(
    name: str, booted: Callable[..., tuple[Any, Means]]
) -> None:
    with pytest.raises(TLPersonaError):
        booted(name, torch.bfloat16, "bridge")
    model, means = booted(name, torch.bfloat16)
    assert type(model).__name__ == "TransformersModel"
    run_all(model, means, _hooks(model), TOLERANCE[torch.bfloat16])


def _as_plain_transformers(name: str, booted: Callable[..., tuple[Any, Means]]) -> None:
    model, means = booted(name, kind="transformers")
    run_all(model, means, _hooks(model), TOLERANCE[torch.float32])


@pytest.mark.tl
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_plan_is_right_on_the_transformers_model_itself(
    name: str, booted: Callable[..., tuple[Any, Means]]
) -> None:
    _as_plain_transformers(name, booted)


@pytest.mark.heavy
@pytest.mark.parametrize("name", [name for name in DECODERS if name not in (*ONE_OF_EACH, *REFUSED)])
def test_every_other_decoder_is_right_on_the_transformers_model_itself(
    name: str, booted: Callable[..., tuple[Any, Means]]
) -> None:
    _as_plain_transformers(name, booted)


@_of(ONE_OF_EACH)
def test_steering_vectors_are_the_differences_of_the_plain_models_means(
    name: str, booted: Callable[..., tuple[Any, Means]]
) -> None:
    model, means = booted(name)
    sides = []
    for side in ("positive", "negative"):
        ids = [model.tokenizer(pair[side], return_tensors="pt").input_ids[0] for pair in PAIRS]
        sides.append(torch.stack([block_outputs(means.plain, each, means.layers)[:, -1] for each in ids]).mean(dim=0))
    found = torch.stack([vector.vector for vector in extract_caa_vectors(model, None, PAIRS, show_progress=False)])
    sizes = torch.stack(sides).norm(dim=-1).mean(dim=0)
    assert float(((found - (sides[0] - sides[1])).norm(dim=-1) / sizes).max()) < 1e-5


@_of(ONE_OF_EACH)
def test_a_steered_model_is_extracted_and_watched_as_it_is_steered(
    name: str, booted: Callable[..., tuple[Any, Means]]
) -> None:
    model, means = booted(name)
    direction = some(3, model.cfg.d_model)
    layer = means.plain.get_submodule(means.layers)[1]
    layer.register_forward_hook(
        lambda _module, _args, out: (
            (out[0] + 2 * direction, *out[1:]) if isinstance(out, tuple) else out + 2 * direction
        )
    )
    samples = pairs()
    wanted = [Intervention("blocks.1.hook_resid_post", direction, 2.0)]
    with attach(model, wanted), monitor(model, {"seen": ("blocks.2.hook_resid_post", direction)}) as seen:
        with torch.no_grad():
            model(samples[0].input_ids[None])
        found, notes = pool(model, samples, _hooks(model))
    assert notes["hooks"] == "of the caller"
    means.error(samples, found, TOLERANCE[torch.float32])
    unit = (direction / direction.norm()).double()
    expected = block_outputs(means.plain, samples[0].input_ids, means.layers)[2]
    assert float((seen.projections["seen"][0][0] - expected @ unit).norm() / expected.norm()) < 1e-5


@pytest.mark.heavy
@pytest.mark.parametrize("name", [name for name in FURTHER if name not in UNREADABLE])
def test_every_further_decoder_has_the_means_of_the_plain_model(
    name: str, booted: Callable[..., tuple[Any, Means]]
) -> None:
    _run(name, torch.float32, booted)


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_has_no_one_stream_is_refused(name: str, decoder: Callable[[str], Any]) -> None:
    saved = decoder(name)
    with pytest.raises(TLPersonaError, match=r"cannot be told|run more than once in a pass") as refusal:
        load_model(saved.folder)
    if "TL_PERSONA_FAMILIES" in os.environ:
        about = {"architecture": type(saved.load()).__name__, "refused": str(refusal.value)}
        leave(Path(os.environ["TL_PERSONA_FAMILIES"]), name, about)


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in UNREADABLE])
def test_what_has_no_bridge_is_refused_as_one_with_an_error_of_ours_and_else_taken_as_it_is(
    name: str, booted: Callable[..., tuple[Any, Means]], caplog: pytest.LogCaptureFixture
) -> None:
    model, means = booted(name)
    if not NEWEST:  # what this release makes of it may be right
        run_all(model, means, _hooks(model), TOLERANCE[torch.float32])
        return
    with pytest.raises(TLPersonaError) as refusal:
        booted(name, kind="bridge")
    assert type(model).__name__ == "TransformersModel"
    assert "Taking the transformers model itself instead" in caplog.text
    found = run_all(model, means, _hooks(model), TOLERANCE[torch.float32])
    if "TL_PERSONA_FAMILIES" in os.environ:
        about = {"architecture": type(model.original_model).__name__, "class": type(model).__name__}
        leave(Path(os.environ["TL_PERSONA_FAMILIES"]), name, about | {"bridge": str(refusal.value), "plans": found})


@pytest.mark.parametrize("name", ["opt", "xglm"])
def test_hooks_that_transformer_lens_puts_on_itself_are_nobodys(
    name: str, booted: Callable[..., tuple[Any, Means]]
) -> None:
    model, _ = booted(name, kind="bridge")
    assert open_backend(model).interventions == ""
    assert "hooks" not in pool(model, pairs(), _hooks(model))[1]
    with model.hooks(fwd_hooks=[("blocks.1.mlp.hook_in", lambda tensor, hook: tensor + 0.5)]):
        assert open_backend(model).interventions == "unknown"
        assert pool(model, pairs(), _hooks(model))[1]["hooks"] == "of the caller"


def test_what_runs_in_float32_alone_is_refused_with_that_advice(decoder: Callable[[str], Any]) -> None:
    try:
        load_model(decoder("olmo2").folder, "bridge", dtype="bfloat16")
    except TLPersonaError as refusal:
        assert re.search(r"cannot run Olmo2ForCausalLM .*load it with dtype='float32' instead of", str(refusal))
    else:
        assert not NEWEST
