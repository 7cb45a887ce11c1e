"""What a trace on the real server computes, beside the same model run here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

RELATIVE = 1e-5  # of a row's norm; float32 on both sides, only the order of sums may differ

PERSONA = "You are Ada Lovelace, a mathematician who loves poetry and machines."
ANSWERS = [" What do you love?", " The engine weaves patterns, like a loom.", " Numbers"]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((got - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@pytest.fixture(scope="module")
def tokens(smollm2: tuple[Any, Any]) -> Callable[[str], torch.Tensor]:
    def ids_of(text: str) -> torch.Tensor:
        return smollm2[1](text, return_tensors="pt")["input_ids"]

    return ids_of


def test_the_client_holds_no_weights(client: Any) -> None:
    assert {parameter.device.type for parameter in client._module.parameters()} == {"meta"}


def test_every_block_output_equals_the_local_model(
    client: Any, backend: Any, tokens: Any, local_states: Callable[..., torch.Tensor]
) -> None:
    ids = tokens(PERSONA)
    with client.trace({"input_ids": ids}, backend=backend()):
        states = torch.stack([block.output for block in client.model.layers]).save()
    assert states.dtype == torch.float32
    assert relative_error(states, local_states(input_ids=ids)) < RELATIVE


def test_block_inputs_and_sublayer_outputs_add_up_to_the_block_output(client: Any, backend: Any, tokens: Any) -> None:
    block = client.model.layers[7]
    with client.trace({"input_ids": tokens(PERSONA)}, backend=backend()):
        before = block.input.save()
        attention = block.self_attn.output[0].save()
        mlp = block.mlp.output.save()
        after = block.output.save()
    assert relative_error(before + attention + mlp, after) < RELATIVE


def test_a_masked_mean_is_taken_on_the_server(
    client: Any, backend: Any, tokens: Any, local_states: Callable[..., torch.Tensor]
) -> None:
    ids = tokens(PERSONA)
    mask = torch.arange(ids.shape[1]) % 3 == 1
    weights = mask.float() / mask.sum()
    with client.trace({"input_ids": ids}, backend=backend()):
        means = torch.stack([weights @ block.output[0] for block in client.model.layers]).save()
    expected = local_states(input_ids=ids)[:, 0, mask].mean(dim=1)
    assert means.shape == (30, 576)
    assert relative_error(means, expected) < RELATIVE


def test_a_trace_enters_at_the_state_another_left_with_the_earlier_blocks_skipped(
    client: Any, backend: Any, tokens: Any, local_states: Callable[..., torch.Tensor]
) -> None:
    ids = tokens(PERSONA)
    blocks = client.model.layers
    with client.session(backend=backend()):
        with client.trace({"input_ids": ids}) as first:
            boundary = blocks[9].output
            first.stop()
        with client.trace({"input_ids": ids}) as second:
            for index in range(10):
                blocks[index].skip(boundary)
            rest = torch.stack([blocks[index].output for index in range(10, 20)]).save()
            second.stop()
    assert relative_error(rest, local_states(input_ids=ids)[10:20]) < RELATIVE


def test_skipped_blocks_and_blocks_after_a_stop_do_not_run(client: Any, backend: Any, tokens: Any) -> None:
    ids = tokens(PERSONA)
    blocks = client.model.layers
    with client.session(backend=backend()):
        ran = [].save()
        hooks = [
            block.mlp._module.register_forward_hook(lambda *_, index=index: ran.append(index))
            for index, block in enumerate(blocks)
        ]
        with client.trace({"input_ids": ids}) as first:
            boundary = blocks[9].output
            first.stop()
        ran.append("then")
        with client.trace({"input_ids": ids}) as second:
            for index in range(10):
                blocks[index].skip(boundary)
            last = blocks[19].output.save()
            second.stop()
        for hook in hooks:
            hook.remove()
    assert ran == [*range(10), "then", *range(10, 20)]
    assert last.shape == (1, ids.shape[1], 576)


def test_a_prefix_run_once_serves_the_suffixes_of_a_batch(
    client: Any, backend: Any, tokens: Any, local_states: Callable[..., torch.Tensor]
) -> None:
    prefix, suffixes = tokens(PERSONA), [tokens(text) for text in ANSWERS]
    start, width = prefix.shape[1], max(suffix.shape[1] for suffix in suffixes)
    batch = torch.cat([torch.nn.functional.pad(suffix, (0, width - suffix.shape[1])) for suffix in suffixes])
    rows = len(suffixes)
    with client.session(backend=backend()):
        with client.trace({"input_ids": prefix, "use_cache": True}):
            cache = client.output.past_key_values
        cache.batch_repeat_interleave(rows)
        with client.trace({"input_ids": batch, "past_key_values": cache, "use_cache": True}):
            states = torch.stack([block.output for block in client.model.layers]).save()
    for row, suffix in enumerate(suffixes):
        expected = local_states(input_ids=torch.cat([prefix, suffix], dim=1))[:, 0, start:]
        assert relative_error(states[:, row, : suffix.shape[1]], expected) < RELATIVE


def test_suffixes_packed_into_one_row_see_the_prefix_and_themselves(
    client: Any, backend: Any, tokens: Any, local_states: Callable[..., torch.Tensor]
) -> None:
    prefix, suffixes = tokens(PERSONA), [tokens(text) for text in ANSWERS]
    start, lengths = prefix.shape[1], [suffix.shape[1] for suffix in suffixes]
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    packed = torch.tril(owner[:, None] == owner[None, :])
    allowed = torch.cat([torch.ones(len(owner), start, dtype=torch.bool), packed], dim=1)
    additive = torch.zeros(1, 1, *allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    positions = torch.cat([torch.arange(start, start + length) for length in lengths])[None]
    row = torch.cat(suffixes, dim=1)
    with client.session(backend=backend()):
        with client.trace({"input_ids": prefix, "use_cache": True}):
            cache = client.output.past_key_values
        inputs = {"input_ids": row, "attention_mask": additive, "position_ids": positions}
        with client.trace(inputs | {"past_key_values": cache, "use_cache": True}):
            states = torch.stack([block.output[0] for block in client.model.layers]).save()
    for part, suffix in zip(states.split(lengths, dim=1), suffixes, strict=True):
        expected = local_states(input_ids=torch.cat([prefix, suffix], dim=1))[:, 0, start:]
        assert relative_error(part, expected) < RELATIVE
