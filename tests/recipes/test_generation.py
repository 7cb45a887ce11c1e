"""Greedy generation equals that of the transformers model the weights came from, on every class and release."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import D_MODEL, VOCAB_SIZE, WINDOW
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tl_persona import Intervention, attach, generate, load_model, monitor
from tl_persona.errors import InputError, PromptError

BRIDGE = pytest.param("bridge", marks=pytest.mark.tl)
HOOKED = pytest.param("hooked", marks=pytest.mark.hooked)
EVERY_KIND = pytest.mark.parametrize("kind", ["transformers", BRIDGE, HOOKED])
HOOK = "blocks.1.hook_resid_post"
DIRECTION = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(5))
CHAT = [{"role": "system", "content": "You are Mara."}, {"role": "user", "content": "Where do you live?"}]

Boot = Callable[..., Any]


@pytest.fixture(scope="module")
def boot(tiny_model: Callable[[str], Path]) -> Boot:
    kept: dict[tuple[str, str], Any] = {}

    def get(family: str, kind: str) -> Any:
        if (family, kind) not in kept:
            if kind == "transformers":
                kept[family, kind] = AutoModelForCausalLM.from_pretrained(
                    tiny_model(family), dtype=torch.float32
                ).eval()
            else:
                kept[family, kind] = load_model(tiny_model(family), kind=kind)  # type: ignore[call-overload]
        return kept[family, kind]

    return get


def ids_of(length: int, seed: int = 1) -> Tensor:
    return torch.randint(10, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed))


def by_transformers(hf: Any, ids: Tensor, steps: int, edit: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The oracle: the whole text again at every step, without any cache."""
    body = hf.base_model
    block = (body.layers if hasattr(body, "layers") else body.h)[1]

    def change(_module: Any, _args: Any, out: Any) -> Any:
        if edit is None:
            return None
        return (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out)

    handle = block.register_forward_hook(change)
    tokens = ids[None]
    try:
        with torch.no_grad():
            for _ in range(steps):
                tokens = torch.cat([tokens, hf(tokens, use_cache=False).logits[:, -1:].argmax(dim=-1)], dim=1)
    finally:
        handle.remove()
    return tokens[0, len(ids) :]


def until(stop: int | None, tokens: Tensor) -> list[int]:
    found: list[int] = tokens.tolist()
    return found[: found.index(stop) + 1] if stop in found else found


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(
            pytest.param(family, "bridge", marks=pytest.mark.tl)
            for family in ("llama", "gpt2", "gemma", "gemma3", "mistral", "qwen3", "bloom", "mixtral")
        ),
        *(pytest.param(family, "hooked", marks=pytest.mark.hooked) for family in ("llama", "gpt2")),
        ("llama", "transformers"),
    ],
)
@pytest.mark.parametrize("length", [6, 2 * WINDOW])
def test_it_says_what_transformers_says(length: int, family: str, kind: str, boot: Boot, tiny_model: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(family))
    prompts = [ids_of(length, seed) for seed in range(3)]
    found = generate(boot(family, kind), prompts, tokenizer=tokenizer, max_new_tokens=8)
    for place, (said, ids) in enumerate(zip(found, prompts, strict=True)):
        expected = until(tokenizer.eos_token_id, by_transformers(boot(family, "transformers"), ids, 8))
        assert (said.prompt, said.sample, said.ids.tolist()) == (place, 0, expected)
        assert said.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert said.stopped == ("eos" if expected[-1] == tokenizer.eos_token_id else "length")


@EVERY_KIND
def test_interventions_act_on_the_prompt_and_on_what_is_generated(kind: str, boot: Boot, tiny_model: Any) -> None:
    model, ids = boot("llama", kind), ids_of(9)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    plain = by_transformers(boot("llama", "transformers"), ids, 6)
    steered = by_transformers(boot("llama", "transformers"), ids, 6, lambda x: x + 6 * DIRECTION)
    assert not torch.equal(plain, steered)
    (said,) = generate(
        model, [ids], tokenizer=tokenizer, max_new_tokens=6, interventions=[Intervention(HOOK, DIRECTION, 6.0)]
    )
    assert said.ids.tolist() == until(tokenizer.eos_token_id, steered)
    (after,) = generate(model, [ids], tokenizer=tokenizer, max_new_tokens=6)
    assert after.ids.tolist() == until(tokenizer.eos_token_id, plain)


@pytest.mark.parametrize("kind", [BRIDGE, HOOKED])
def test_the_blocks_around_it_act_too(kind: str, boot: Boot) -> None:
    model, ids = boot("llama", kind), ids_of(9)
    edit = Intervention(HOOK, DIRECTION, 6.0)
    (expected,) = generate(model, [ids], max_new_tokens=4, interventions=[edit])
    with attach(model, [edit]), monitor(model, {"along": (HOOK, DIRECTION)}) as seen:
        (said,) = generate(model, [ids], max_new_tokens=4)
    assert torch.equal(said.ids, expected.ids)
    (projections,) = seen.texts("along")
    assert projections.shape == (1, len(ids) + len(said.ids) - 1)


@EVERY_KIND
def test_texts_chats_and_ids_are_what_they_say(kind: str, boot: Boot, tiny_model: Any) -> None:
    model, tokenizer = boot("llama", kind), AutoTokenizer.from_pretrained(tiny_model("llama"))
    rendered = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    begun = [*CHAT, {"role": "assistant", "content": "By the"}]
    going_on = tokenizer.apply_chat_template(begun, continue_final_message=True, return_dict=False)
    assert going_on[: len(rendered)] == rendered and tokenizer.decode(going_on).endswith("By the")
    prompts = [CHAT, begun, "Where do you live?"]
    as_ids = [torch.tensor(each) for each in (rendered, going_on, tokenizer("Where do you live?")["input_ids"])]
    found = generate(model, prompts, tokenizer=tokenizer, max_new_tokens=5)
    for one, other in zip(found, generate(model, as_ids, tokenizer=tokenizer, max_new_tokens=5), strict=True):
        assert torch.equal(one.ids, other.ids)


@pytest.mark.tl
def test_a_text_ends_at_every_token_that_the_checkpoint_names(tiny_model: Any) -> None:
    model, ids = load_model(tiny_model("llama"), kind="bridge"), ids_of(6)
    (whole,) = generate(model, [ids], max_new_tokens=6)
    settings = model.original_model.generation_config  # type: ignore[attr-defined]
    settings.eos_token_id, settings.repetition_penalty = [int(whole.ids[2])], 5.0
    (said,) = generate(model, [ids], max_new_tokens=6)
    expected = until(int(whole.ids[2]), whole.ids)
    assert (said.ids.tolist(), said.stopped) == (expected, "eos")  # the penalty is not applied
    assert model.original_model.generation_config is settings  # type: ignore[attr-defined]


@pytest.mark.tl
@pytest.mark.parametrize(
    ("prompts", "options", "why"),
    [
        ("Who?", {}, r"prompts must be a list of prompts, got one str: pass \[prompt\]"),
        (["Who?"], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        (
            [torch.zeros(2, 2, dtype=torch.long)],
            {},
            r"prompt 0: token ids must be .* got torch.int64 of shape \(2, 2\)",
        ),
        ([torch.zeros(0, dtype=torch.long)], {}, "prompt 0 has no token"),
        ([torch.tensor([3]), torch.tensor([VOCAB_SIZE])], {}, f"prompt 1 has ids outside the {VOCAB_SIZE}"),
        ([torch.ones(2047, dtype=torch.long)], {}, "prompt 0 has 2047 tokens: with 3 new ones .* context of 2048"),
        ([[]], {}, "prompt 0 must be a text, a list of messages or token ids"),
    ],
)
def test_a_bad_prompt_is_refused_before_anything_runs(
    prompts: Any, options: dict[str, Any], why: str, boot: Boot
) -> None:
    model, ran = boot("llama", "bridge"), []
    handle = model.original_model.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(InputError, match=why):
            generate(model, prompts, **{"max_new_tokens": 3, **options})
    finally:
        handle.remove()
    assert not ran


@pytest.mark.tl
def test_a_chat_that_the_template_refuses_is_named(boot: Boot) -> None:
    with pytest.raises(PromptError, match=r"prompt 0: the chat template cannot render it: .*System role"):
        generate(boot("gemma", "bridge"), [CHAT], max_new_tokens=3)
