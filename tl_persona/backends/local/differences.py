"""How far a hooked model is from the transformers model, at every block, on a text of random tokens.

Residuals are compared with those that the layers give; another hook with the nearest value that passes between modules.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_persona.backends.local.inspection import dtype_of, weights_processing
from tl_persona.backends.local.observers import evaluating, modules_of, without_hooks
from tl_persona.backends.local.reference import NoReferenceError, Reference
from tl_persona.backends.local.runners import capture_of, runners_for
from tl_persona.backends.local.verdicts import Difference
from tl_persona.backends.shortcuts import tolerance_of
from tl_persona.errors import ModelError
from tl_persona.models.facts import HookedModel
from tl_persona.models.hooks import layer_of
from tl_persona.plan.plan import make_plan
from tl_persona.plan.rows import Pass, Row, Segment
from tl_persona.tensors import Sample

_ALL_POSITIONS = 640
"""Positions of a text that are all compared; of a longer one the last of them and some of the others are."""

_SITES = 10
"""How many times the tolerance of a residual may be seen at a hook inside a block."""

_NOISE = 4
"""How many times the reference's own difference, with another text beside this one, may be seen."""


@torch.no_grad()
def difference(model: HookedModel, reference: Reference, n_tokens: int) -> Difference:
    """The largest relative difference of a residual, at any block and position of a text of random tokens.

    Weights that were centred on purpose are compared with a centred reference. Where numbers are rounded differently
    enough to matter (experts chosen by a hair), as much is allowed as the reference itself differs when another text
    is run beside this one.

    Raises:
        NoReferenceError: There is nothing to compare with.
    """
    vocabulary = min(int(model.cfg.d_vocab), reference.vocabulary)
    ids = _sample(n_tokens, vocabulary, reference.special_ids)
    positions = _positions(n_tokens)
    expected = reference.residuals(ids[:1], positions)
    n_layers = int(model.cfg.n_layers)
    if len(expected) != n_layers:
        raise NoReferenceError(f"{reference.name} has {len(expected)} decoder layers, and the model {n_layers}")
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(n_layers)]
    names = [name for name in names if name in model.hook_dict]
    got = captured(model, ids[0], names, positions)
    centred = "center_writing_weights" in weights_processing(model)
    dtype = dtype_of(model)
    exact = dtype in ("float32", "float64")
    worst, where = 0.0, names[0]
    for name, value in got.items():
        error = _relative(value, expected[int(name.split(".")[1])], centred, exact)
        if not error <= worst:
            worst, where = error, name
    allowed = _allowed(dtype, weights_processing(model))
    if worst != worst:
        raise NoReferenceError(f"{reference.name} gives NaN or infinity on random tokens")
    if worst > allowed:
        beside = reference.residuals(ids, positions)
        noise = max(_relative(one, other, centred, exact) for one, other in zip(beside, expected, strict=True))
        allowed = max(allowed, _NOISE * noise)
    return Difference(
        reference=reference.name, n_tokens=n_tokens, hook=where, worst=worst, allowed=allowed, holds=worst <= allowed
    )


@torch.no_grad()
def site_differences(
    model: HookedModel, reference: Reference, n_tokens: int, names: Sequence[str]
) -> dict[str, Difference]:
    """For each hook the relative difference from the nearest value that passes between modules of that decoder layer.

    Raises:
        NoReferenceError: There is nothing to compare with.
    """
    vocabulary = min(int(model.cfg.d_vocab), reference.vocabulary)
    ids = _sample(n_tokens, vocabulary, reference.special_ids)[:1]
    positions = _positions(n_tokens)
    got = captured(model, ids[0], names, positions)
    inside = reference.values_inside(ids, positions)
    centred = "center_writing_weights" in weights_processing(model)
    dtype = dtype_of(model)
    exact = dtype in ("float32", "float64")
    allowed = _SITES * _allowed(dtype, weights_processing(model))
    verdicts = {}
    for name, value in got.items():
        candidates = inside.get(layer_of(name), [])
        worst = min((_relative(value, one, centred, exact) for one in candidates), default=float("inf"))
        verdicts[name] = Difference(
            reference=reference.name, n_tokens=n_tokens, hook=name, worst=worst, allowed=allowed, holds=worst <= allowed
        )
    return verdicts


def captured(
    model: HookedModel,
    ids: Int[Tensor, "pos"],
    names: Sequence[str],
    positions: Sequence[int],
    edits: Sequence[tuple[str, Callable[..., Tensor]]] = (),
) -> dict[str, Float[Tensor, "chosen d_model"]]:
    """What the plain path reads at hooks, in float64 on the CPU, nobody's hooks in the way.

    Args:
        model: A hooked model.
        ids: A text.
        names: The hooks.
        positions: Of the text.
        edits: Hook names and functions that change what is there first.

    Raises:
        NoReferenceError: The model does not run so.
    """
    plain = runners_for(model)[-1]
    modules = modules_of(model)
    sample = Sample("check", ids, torch.ones((1, len(ids)), dtype=torch.bool))
    plan = make_plan([sample], batch_tokens=len(ids))
    whole = Pass((Row((Segment((0,), 0, len(ids)),)),))
    try:
        with evaluating(modules), without_hooks(modules), model.hooks(fwd_hooks=list(edits)):
            plain.prepare()
            captured, _ = plain.run(plan, whole, names, None, 0)
        index = torch.tensor(list(positions))
        return {name: capture_of(captured, name)[0].cpu()[index].double() for name in names}
    except (MemoryError, torch.OutOfMemoryError, ModelError):
        raise
    except Exception as error:  # a hook that never fires, a text that is refused: the run itself says so
        raise NoReferenceError(str(error)) from error


def _allowed(dtype: str, weights: str) -> float:
    # In float64 either side may compute a norm or positions in float32; processed weights are products of others.
    return max(tolerance_of(dtype), tolerance_of("float32")) * (1 if weights == "unprocessed" else 10)


def _relative(got: Tensor, expected: Tensor, centred: bool, exact: bool) -> float:
    if centred:
        got, expected = (value - value.mean(dim=-1, keepdim=True) for value in (got, expected))
    size = expected.norm(dim=-1)
    # A position that is all but zero is measured against the others.
    scale = size.clamp_min(float(size.median())).clamp_min(torch.finfo(torch.float64).tiny)
    errors = (got - expected).norm(dim=-1) / scale
    return float(errors.max() if exact else errors.mean())


def _sample(n_tokens: int, vocabulary: int, special: frozenset[int]) -> Int[Tensor, "row pos"]:
    """Two rows of random tokens, the same in every process."""
    ordinary = torch.tensor([token for token in range(vocabulary) if token not in special] or range(vocabulary))
    places = torch.randint(len(ordinary), (2, n_tokens), generator=torch.Generator().manual_seed(0))
    return ordinary[places]


def _positions(n_tokens: int) -> list[int]:
    if n_tokens <= _ALL_POSITIONS:
        return list(range(n_tokens))
    return sorted({*range(0, n_tokens, n_tokens // 64), *range(n_tokens - 64, n_tokens)})
