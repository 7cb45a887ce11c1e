"""Residuals of every block and position as the package gives them, and what it may say where a class has others."""

import importlib.metadata
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from decoders import Decoder
from oracle import relative_error
from torch import Tensor

from tl_persona.backends import open_backend
from tl_persona.errors import ModelError
from tl_persona.plan import Sample

TOLERANCE = 1e-5
"""Of a residual in float32, relative to its norm; right classes stay below a third of it."""

RELEASE = importlib.metadata.version("transformer-lens")
_RELEASES = RELEASE, importlib.metadata.version("transformers")
_SEEN_WITH = ("3.9.", "4.3."), ("5.24.",)

NEWEST = RELEASE.startswith(_SEEN_WITH[0][1]) and _RELEASES[1].startswith(_SEEN_WITH[1])
"""Whether these are the releases that `wrong` and `missing` of 4.3 were seen with; others may be right or refuse."""

RIGHT, REFUSED, MISSING = "right", "refused", "missing"

_SAYS_MISSING = (
    "has no bridge for|has no HookedTransformer|cannot make a HookedTransformer|cannot run|has no hook blocks|"
    "cannot be read as plain transformers"
)


def residuals(
    model: Any, texts: Sequence[Tensor], tokenizer: Any = None, names: Sequence[str] | None = None
) -> list[Tensor]:
    """Residuals after every block, or what other hooks show: for each text of shape (hook, pos, d_model).

    A mask a position, all in one plan.
    """
    backend = open_backend(model, tokenizer=tokenizer)
    names = names or [f"blocks.{layer}.hook_resid_post" for layer in range(backend.facts.n_layers)]
    samples = [Sample(f"text {n}", ids, torch.eye(len(ids), dtype=torch.bool)) for n, ids in enumerate(texts)]
    pooled = {each.sample: each.means for each in backend.pool(backend.plan(samples), names)}
    return [pooled[n].transpose(0, 1) for n in range(len(samples))]


def outcome(run: Callable[[], Sequence[Tensor]], expected: Sequence[Tensor]) -> str:
    """What came of a run: its numbers are the expected ones, or it refuses in a way that says why.

    Anything else fails: other numbers, an error of another kind, and one that leaves out what has to be said.
    """
    try:
        found = run()
    except ModelError as error:
        return _kind_of_refusal(error)
    assert len(found) == len(expected)
    errors = [relative_error(got, wanted) for got, wanted in zip(found, expected, strict=True)]
    assert max(errors) < TOLERANCE, f"wrong numbers, in silence; the error of each text: {errors}"
    return RIGHT


def _kind_of_refusal(error: ModelError) -> str:
    message = str(error)
    if re.search(_SAYS_MISSING, message):
        return MISSING
    assert re.search(r"\bblocks?[ .]\d", message), f"the error names no block: {message}"
    sizes = re.findall(r"\bby (?:about )?(\d[\d.]*(?:e[+-]?\d+)?)", message)
    assert any(float(size.rstrip(".")) > TOLERANCE for size in sizes), f"the error does not say by how much: {message}"
    assert RELEASE in message, f"the error does not name TransformerLens {RELEASE}: {message}"
    return REFUSED


def allowed(decoder: Decoder, kind: str) -> Collection[str]:
    """What may come of a decoder as `load_model` has it with this kind, by what is known of the releases at hand."""
    if not all(release.startswith(known) for release, known in zip(_RELEASES, _SEEN_WITH, strict=True)):
        return RIGHT, REFUSED, MISSING
    if kind == "auto":  # it goes on to the transformers model itself
        return (MISSING,) if decoder.unreadable else (RIGHT,)
    states = {_state(decoder, kind)}
    if RIGHT in states:
        return (RIGHT,)
    return (RIGHT, *states) if REFUSED in states else (MISSING,)


def _state(decoder: Decoder, kind: str) -> str:
    name = f"{kind} {'.'.join(RELEASE.split('.')[:2])}"
    if name in decoder.missing:
        return MISSING
    return REFUSED if name in decoder.wrong else RIGHT
