"""Plans that every family of decoders has to run, and how far their means may be from the model's own.

The texts share what real ones share, and lie on either side of every length that a configuration of `decoders` names.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from decoder_record import CONTEXT, ORIGINAL_CONTEXT, WINDOW
from oracle import block_outputs
from sharing import pairs, persona, pool, text
from torch import Tensor

from tl_persona.plan import Sample

LENGTHS = (WINDOW, ORIGINAL_CONTEXT, 3 * WINDOW)
"""A window, the length past which positions are scaled, which is two chunks too, and three chunks."""

SMALL, LARGE = 16, 512
"""Token budgets: nearly every text by itself, and all that fits."""


def plans() -> dict[str, list[Sample]]:
    """Samples by what is special about them."""
    found = {"persona": persona(), "pairs": pairs(), "prompts": _prompts(), "beginnings": _beginnings()}
    for length in LENGTHS:
        found |= {f"below {length}": _below(length), f"around {length}": _around(length)}
    return found | {f"around {CONTEXT}": _at_the_end(CONTEXT)}


def _sample(name: str, *parts: Tensor) -> Sample:
    """Masks over all of a text, its first part, what straddles that part's end, and the last token."""
    ids, first = torch.cat(parts), len(parts[0])
    masks = torch.zeros(4, len(ids), dtype=torch.bool)
    masks[0] = True
    masks[1, :first] = True
    masks[2, first - 1 : first + 1] = True
    masks[3, -1] = True
    return Sample(name, ids, masks)


def _prompts() -> list[Sample]:
    """The beginning alone counts, and what follows need not run: one that all have, and one each."""
    beginning, samples = text(21, 500), []
    for index, (own, rest) in enumerate([(0, 9), (5, 30), (11, 1), (0, 0), (5, 3)]):
        ids = torch.cat([beginning, text(own, 510 + own), text(rest, 520 + index)])
        masks = torch.zeros(2, len(ids), dtype=torch.bool)
        masks[0, : 21 + own] = True
        masks[1, 21 + own - 1] = True
        samples.append(Sample(f"prompt {index}", ids, masks))
    return samples


def _beginnings() -> list[Sample]:
    """A conversation, cut after every turn, in no order, and one that leaves it half way."""
    turns = [text(length, 600 + length) for length in (10, 7, 13, 4, 20)]
    cuts = list(accumulate(turns, lambda before, turn: torch.cat([before, turn])))
    ids = [cuts[index] for index in (2, 4, 0, 3, 1)]
    return [*(_sample(f"cut {len(each)}", each) for each in ids), _sample("leaves", cuts[1], text(9, 610))]


def _below(length: int) -> list[Sample]:
    """Everything shorter than a length, with beginnings in common."""
    beginning = text(length - 6, 700 + length)
    continued = [_sample(f"{more} more", beginning, text(more, 710 + more)) for more in (1, 3, 5)]
    return [*continued, _sample("alone", text(length - 1, 720))]


def _around(length: int) -> list[Sample]:
    """Texts below, at and above a length; beginnings below and above it, with members on either side."""
    short, long = text(length - 6, 800 + length), text(length + 3, 801 + length)
    return [
        *(_sample(f"alone {size}", text(size, 810 + size)) for size in (length - 1, length, length + 1)),
        *(_sample(f"short and {more}", short, text(more, 820 + more)) for more in (3, 6, 7, 40)),
        *(_sample(f"long and {more}", long, text(more, 830 + more)) for more in (5, 20)),
        _sample("short of the long", long[: length - 2]),
    ]


def _at_the_end(length: int) -> list[Sample]:
    """Texts that fill the context, or all but."""
    beginning = text(length - 20, 900)
    return [
        _sample("all but", text(length - 1, 901)),
        _sample("full", text(length, 902)),
        *(_sample(f"continued by {more}", beginning, text(more, 910 + more)) for more in (7, 19, 20)),
    ]


@dataclass
class Means:
    """What plain transformers gives for a decoder's texts, one at a time, each run once.

    Attributes:
        plain: The transformers model.
        exact: Gives the same model in float64.
        layers: Where its layers are.
        half: Whether it runs in half precision, where a rounding can send any token to another expert, and only the
            mean over all masks of a plan is asked to agree, or to be three times what the plain model loses at most.
        rounds: Whether a rounding in float32 may do that too, so that what the plain model loses excuses as much.
    """

    plain: Any
    exact: Callable[[], Any]
    layers: str
    half: bool = False
    rounds: bool = False

    def __post_init__(self) -> None:
        self._outputs: dict[tuple[int, ...], Tensor] = {}
        self._exact_outputs: dict[tuple[int, ...], Tensor] = {}
        self._exact: Any = None

    def of(self, sample: Sample) -> Tensor:
        """Means over each mask in float64: (mask, layer, d_model)."""
        key = tuple(sample.input_ids.tolist())
        if key not in self._outputs:
            self._outputs[key] = block_outputs(self.plain, sample.input_ids, self.layers)
        return _means(self._outputs[key], sample)

    def lost(self, sample: Sample) -> Tensor:
        """How far each of the plain model's means is from the one in float64."""
        key = tuple(sample.input_ids.tolist())
        if key not in self._exact_outputs:
            self._exact = self._exact or self.exact()
            self._exact_outputs[key] = block_outputs(self._exact, sample.input_ids, self.layers)
        return _errors(self.of(sample), _means(self._exact_outputs[key], sample))

    def error(self, samples: Sequence[Sample], means: Sequence[Tensor], tolerance: float) -> float:
        """The largest error of a mean, in half precision their mean; fails where it is past the tolerance."""
        errors = [_errors(got, self.of(sample)) for sample, got in zip(samples, means, strict=True)]
        if self.half:
            error = float(torch.cat(errors).mean())
            if not error < tolerance:  # both sides lose as much
                lost = float(torch.cat([self.lost(sample) for sample in samples]).mean())
                assert error < 3 * lost, f"{error:.1e} on average; the plain model loses {lost:.1e}"
            return error
        for sample, found in zip(samples, errors, strict=True):
            error = float(found.max())
            if not error < tolerance:
                lost = float(self.lost(sample).max()) if self.rounds else 0.0
                assert error <= lost, f"{sample.sample_id}: {error:.1e}; the plain model loses {lost:.1e}"
        return float(torch.cat(errors).max())


def _means(outputs: Tensor, sample: Sample) -> Tensor:
    return torch.stack([outputs[:, mask].mean(dim=1) for mask in sample.masks])


def _errors(got: Tensor, expected: Tensor) -> Tensor:
    """Of every vector, relative to its norm."""
    return ((got.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten()


def run_all(model: Any, means: Means, hooks: Sequence[str], tolerance: float) -> dict[str, dict[str, Any]]:
    """Every plan within both budgets, one after the other on one model, and back; what was seen of each.

    Each is as right the second time, when what was proven before is known, as the first.
    """
    found: dict[str, dict[str, Any]] = {}
    order = [(name, samples, budget) for budget in (SMALL, LARGE) for name, samples in plans().items()]
    for name, samples, budget in [*order, *reversed(order)]:
        pooled, notes = pool(model, samples, hooks, batch_tokens=budget)
        try:
            error = means.error(samples, pooled, tolerance)
        except AssertionError as failure:
            raise AssertionError(f"{name}, {budget} tokens, sharing {notes['sharing']}: {failure}") from None
        seen = {"sharing": notes["sharing"], "error": error}
        before = found.setdefault(name, seen)
        found[name] = seen | {"error": max(error, before["error"])} if budget == LARGE else before
    return found


def leave(file: Path, name: str, record: Mapping[str, Any]) -> None:
    """Add what was seen of a decoder to a JSON file, for docs/site/families.py."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(known | {name: record}, indent=1) + "\n", encoding="utf-8")
