"""Samples that share their beginnings, and their means."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from kinds import ALL_LAYERS
from oracle import oracle_means, relative_error
from tiny import VOCAB_SIZE
from torch import Tensor

from tl_persona.backends import open_backend
from tl_persona.plan import Sample


def text(length: int, seed: int) -> Tensor:
    return torch.randint(10, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed))


def samples_of(*texts: Sequence[Tensor], prefix: int) -> list[Sample]:
    """Texts with masks over everything, the prefix, some of it, what straddles its end, and the last token."""
    samples = []
    for index, parts in enumerate(texts):
        ids = torch.cat(list(parts))
        masks = torch.zeros(5, len(ids), dtype=torch.bool)
        masks[0] = True
        masks[1, :prefix] = True
        masks[2, prefix // 2 : prefix // 2 + 2] = True
        masks[3, prefix - 2 : prefix + 3] = True
        masks[4, -1] = True
        samples.append(Sample(f"s{index}", ids, masks))
    return samples


def persona(prefix: int = 24) -> list[Sample]:
    """One long beginning: continued at various lengths, by itself, twice alike, and with a second one nested in it."""
    beginning, nested = text(prefix, 1), text(9, 2)
    alone = [(beginning, text(length, 10 + length)) for length in (12, 1, 27, 7)]
    below = [(beginning, nested, text(length, 40 + length)) for length in (5, 11, 2)]
    return samples_of(*alone, (beginning,), *below, (beginning, text(7, 17)), (beginning, nested), prefix=prefix)


def pairs() -> list[Sample]:
    """Pairs with a short question of their own each: they lie side by side, in rows of different lengths."""
    texts = []
    for index, (question, positive, negative) in enumerate([(6, 3, 5), (9, 1, 2), (5, 8, 8), (12, 4, 0), (7, 2, 6)]):
        shared = text(question, 100 + index)
        texts += [(shared, text(positive, 200 + index)), (shared, text(negative, 300 + index))]
    return samples_of(*texts, prefix=5)


def pool(
    model: Any, samples: Sequence[Sample], hooks: Sequence[str] = tuple(ALL_LAYERS), **limits: Any
) -> tuple[list[Tensor], dict[str, Any]]:
    """The pooled means of every sample, in the order of the samples, and the notes on how they came about."""
    backend = open_backend(model)
    pooled = {each.sample: each.means for each in backend.pool(backend.plan(samples, **limits), hooks)}
    assert_nothing_is_lost_in_silence(backend.notes)
    return [pooled[index] for index in range(len(samples))], backend.notes


def assert_nothing_is_lost_in_silence(notes: Mapping[str, Any]) -> None:
    """Whatever of its class a run did without has a reason in its notes."""
    reasons = {"packed": ("packed", "cached", "batching"), "fused": ("fused attention",)}
    told = [note.split(": ")[0] for note in notes.get("fallbacks", [])]
    if notes.get("hooks") == "of the caller":  # by design
        assert notes["sharing"] == "none"
    elif notes["sharing"] == "none":
        assert "why" in notes or any(name in reasons["packed"] for name in told), notes
    elif notes["model_class"] == "TransformerBridge":
        assert notes["sharing"] == "packed" or any(name in reasons["packed"] for name in told), notes
        assert notes.get("attention") == "fused" or any(name in reasons["fused"] for name in told), notes
    elif notes["model_class"] == "TransformersModel":
        assert notes["sharing"] == "packed" or any(name in reasons["packed"] for name in told), notes
    else:
        assert notes["sharing"] == "cached", notes


def assert_exact(model: Any, hf_model: Any, samples: Sequence[Sample], **limits: Any) -> dict[str, Any]:
    """Compares every mean with the oracle, and gives the notes."""
    means, notes = pool(model, samples, **limits)
    for sample, got in zip(samples, means, strict=True):
        assert relative_error(got, oracle_means(hf_model, sample)) < 1e-5
    return notes
