"""Fake models, each wrong in a way of its own where texts share a pass, and runs of random plans on them.

A fake computes every token from the tokens that it may attend to, and from its position. Where a pass is more than one
whole text it does one thing that a real model may do: attends within a window counted in its row, numbers positions
from the row's beginning, looks at what lies behind, and so on. What a text has by itself is the truth.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any
from unittest import mock

import numpy as np
import torch

from tl_persona.backends.local.pooling import PoolingRun
from tl_persona.backends.local.proof import Prover
from tl_persona.models.facts import ModelFacts
from tl_persona.plan import plan as plan_module
from tl_persona.plan import rows as rows_module
from tl_persona.plan.passes import needs_mask, pass_positions, pass_tokens, pass_visibility
from tl_persona.plan.plan import Plan, Sharing, make_plan
from tl_persona.plan.rows import Pass
from tl_persona.tensors import Sample

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
WIDTH = 4
VOCABULARY = 30
LONGEST = 40
"""Tokens of a text, at most."""

_RANDOM = np.random.default_rng(0)
_VALUES = _RANDOM.normal(size=(VOCABULARY, WIDTH))
_PLACES = _RANDOM.normal(size=(8 * LONGEST, WIDTH))
_NEAR = 1.0 / (1.0 + 0.1 * np.abs(np.arange(-8 * LONGEST, 8 * LONGEST)))


@dataclass
class View:
    """What a fake has before it in one pass.

    Attributes:
        tokens: Token ids, shape (row, pos).
        keys: Token ids of the prefix and then of the row, shape (row, key).
        positions: Of the tokens, shape (row, pos).
        key_positions: Of prefix and row, shape (row, key).
        visible: What each token may attend to, shape (row, pos, key).
        context: Tokens of the prefix.
        masked: Whether mask and positions were given.
        lengths: Tokens of each row.
        extra: Added to every residual of a token, shape (row, pos).
    """

    tokens: Any
    keys: Any
    positions: Any
    key_positions: Any
    visible: Any
    context: int
    masked: bool
    lengths: Sequence[int]
    extra: Any

    @property
    def back(self) -> Any:
        """How many places in the row lie between a token and a key, shape (pos, key)."""
        width = self.tokens.shape[1]
        return (self.context + np.arange(width))[:, None] - np.arange(self.context + width)[None]

    @property
    def apart(self) -> Any:
        """How many positions lie between a token and a key, shape (row, pos, key)."""
        return self.positions[:, :, None] - self.key_positions[:, None, :]

    @property
    def longest(self) -> int:
        """Of all positions in the pass, counting from one."""
        return int(self.key_positions.max()) + 1 if self.masked else self.keys.shape[1]


Fault = Callable[[View, int], None]


def _window_without_mask(view: View, n: int) -> None:
    if not view.masked:
        view.visible &= view.back < n


def _window_in_row(view: View, n: int) -> None:
    view.visible &= view.back < n


def _window(view: View, n: int) -> None:
    view.visible &= view.apart < n


def _chunks_without_mask(view: View, n: int) -> None:
    if not view.masked:
        _chunks_in_row(view, n)


def _chunks_in_row(view: View, n: int) -> None:
    width = view.tokens.shape[1]
    place = (view.context + np.arange(width))[:, None] // n
    view.visible &= place == np.arange(view.context + width)[None] // n


def _chunks(view: View, n: int) -> None:
    view.visible &= view.positions[:, :, None] // n == view.key_positions[:, None, :] // n


def _hangs_on_the_longest(view: View, n: int) -> None:
    view.extra += 0.1 * np.sin(view.longest)


def _changes_past(view: View, n: int) -> None:
    view.extra += 0.1 * (view.longest > n)


def _padding(view: View, n: int) -> None:
    width = view.tokens.shape[1]
    view.extra += 0.1 * (np.array([width - length for length in view.lengths]) >= n)[:, None]


def _places_in_row(view: View, n: int) -> None:
    view.positions = np.broadcast_to(view.context + np.arange(view.tokens.shape[1]), view.positions.shape)


def _starts_again(view: View, n: int) -> None:
    if view.context:
        view.positions = np.broadcast_to(np.arange(view.tokens.shape[1]), view.positions.shape)


def _starts_again_for_several(view: View, n: int) -> None:
    if view.tokens.shape[1] > 1:
        _starts_again(view, n)


def _looks_behind(view: View, n: int) -> None:
    if view.tokens.shape[1] > n:
        view.extra[:, :-n] += 0.1 * (1 + view.tokens[:, n:])


def _both_directions(view: View, n: int) -> None:
    if not view.masked:
        view.visible[...] = True


def _carries_state(view: View, n: int) -> None:
    state = np.cumsum(np.sin(1.0 + view.keys) * 0.9 ** np.arange(view.keys.shape[1]), axis=1)
    view.extra += state[:, view.context :]


def _loses_state_for_several(view: View, n: int) -> None:
    keys = view.keys[:, view.context :] if view.context and view.tokens.shape[1] > 1 else view.keys
    state = np.cumsum(np.sin(1.0 + keys), axis=1)
    view.extra += 0.1 * state[:, -view.tokens.shape[1] :]


def _rows(view: View, n: int) -> None:
    view.extra += 0.1 * (len(view.tokens) > n % 6)


def _later_rows(view: View, n: int) -> None:
    view.extra[n % 6 + 1 :] += 0.1


def _short_cache(view: View, n: int) -> None:
    if view.context > n:
        view.visible[:, :, : view.context - n] = False


def _most_keys(view: View, n: int) -> None:
    view.extra += 0.1 * ((view.context + np.arange(view.tokens.shape[1])) >= n + view.positions)


def _chooses_keys(view: View, n: int) -> None:
    """The n of the whole row that score highest, whether they may be attended to or not."""
    scores = np.sin(3.0 + view.keys)
    if scores.shape[1] > n:
        worst = np.argsort(scores, axis=1)[:, :-n]
        for row, keys in enumerate(worst):
            view.visible[row][:, keys] = False


def _nothing(view: View, n: int) -> None:
    pass


FAULTS: Mapping[str, Fault] = MappingProxyType(
    {
        "none": _nothing,
        "a window": _window,
        "a window, left out under a mask": _window_without_mask,
        "a window of places in the row": _window_in_row,
        "chunks": _chunks,
        "chunks, left out under a mask": _chunks_without_mask,
        "chunks of places in the row": _chunks_in_row,
        "hangs on the longest text": _hangs_on_the_longest,
        "changes where the longest text is past a length": _changes_past,
        "padding": _padding,
        "positions are places in the row": _places_in_row,
        "positions start again behind a cache": _starts_again,
        "positions start again for several cached tokens": _starts_again_for_several,
        "what lies behind": _looks_behind,
        "attention in both directions": _both_directions,
        "recurrent state": _carries_state,
        "recurrent state, lost for several cached tokens": _loses_state_for_several,
        "rows": _rows,
        "later rows": _later_rows,
        "a cache that holds few tokens": _short_cache,
        "a gap of some tokens": _most_keys,
    }
)

CHOOSING = MappingProxyType({"keys chosen by what they are": _chooses_keys})
"""A fault that no text tells of another; beyond the number of keys that the configuration names nothing is shared."""

NAMED = frozenset({"changes where the longest text is past a length", "chunks of places in the row"})
"""Faults whose length the configuration always names: no relation finds them otherwise."""


class FakeRunner:
    """Runs passes on one fake; see `tl_persona.backends.local.runners.Runner`.

    Args:
        fault: What it does wrong.
        n: The length that plays a part in it.
        layer: The first block in which it does.
        plain: Who runs passes that share nothing; None where this one does.
    """

    sharing = Sharing.PACKED
    limits: Mapping[Sharing, str] = MappingProxyType({})
    costs: Mapping[str, str] = MappingProxyType({})

    def __init__(self, fault: str, n: int, layer: int, plain: "FakeRunner | None" = None) -> None:
        self._fault: Fault = {**FAULTS, **CHOOSING}[fault]
        self._n, self._layer, self._plain = n, layer, plain
        self.attention = "stepwise" if plain is None else "fused"

    def prepare(self) -> None:
        """Nothing is to be tried."""

    def obstacle(self, names: Sequence[str]) -> str | None:
        return None

    def run(
        self,
        plan: Plan,
        each: Pass,
        names: Sequence[str],
        context: Any,
        context_length: int,
        only_row: int | None = None,
    ) -> tuple[Mapping[str, torch.Tensor], Any]:
        if self._plain is not None and not (each.kept or each.packed or each.context is not None):
            return self._plain.run(plan, each, names, context, context_length, only_row)
        view = _view(plan, each, context, context_length)
        sound = replace(view, extra=view.extra.copy(), visible=view.visible.copy())
        self._fault(view, self._n)
        residuals = [_residuals(view if layer >= self._layer else sound, layer) for layer in range(len(HOOKS))]
        rows = slice(None) if only_row is None else slice(only_row, only_row + 1)
        captured = {
            name: torch.from_numpy(one[rows]) for name, one in zip(HOOKS, residuals, strict=True) if name in names
        }
        return captured, (view.keys, view.key_positions) if each.kept else None


def _view(plan: Plan, each: Pass, context: Any, context_length: int) -> View:
    tokens = pass_tokens(plan, each).numpy()
    rows, width = tokens.shape
    masked = needs_mask(plan, each)
    keys, key_positions = tokens, np.broadcast_to(context_length + np.arange(width), tokens.shape)
    positions = pass_positions(each).numpy() if masked else key_positions
    key_positions = positions
    if context is not None:
        before, places = context
        keys = np.concatenate([np.broadcast_to(before, (rows, context_length)), keys], axis=1)
        key_positions = np.concatenate([np.broadcast_to(places, (rows, context_length)), key_positions], axis=1)
    if masked:
        visible = pass_visibility(each, context_length).numpy().copy()
    else:
        visible = np.tril(np.ones((width, context_length + width), dtype=bool), context_length)
        visible = np.repeat(visible[None], rows, axis=0)
    lengths = [len(row) for row in each.rows]
    return View(
        tokens, keys, positions, key_positions, visible, context_length, masked, lengths, np.zeros(tokens.shape)
    )


def _residuals(view: View, layer: int) -> Any:
    near = _NEAR[view.positions[:, :, None] - view.key_positions[:, None, :] + 8 * LONGEST]
    weights = np.where(view.visible, near, 0.0)
    # By their places too, as equal tokens would otherwise stand for each other.
    mixed = weights @ (_VALUES[view.keys] + 0.5 * _PLACES[view.key_positions])
    mixed = mixed / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-9)
    return mixed + (1 + layer) * _PLACES[view.positions] + view.extra[..., None]


@contextmanager
def small_limits(min_shared: int, worth_caching: int, row_tokens: int, cached_rows: int) -> Iterator[None]:
    """Limits of a size at which texts of a few tokens take every way through the planner."""
    with (
        mock.patch.object(plan_module, "MIN_SHARED", min_shared),
        mock.patch.object(rows_module, "WORTH_CACHING", worth_caching),
        mock.patch.object(rows_module, "PACKED_ROW_TOKENS", row_tokens),
        mock.patch.object(rows_module, "CACHED_ROWS", cached_rows),
    ):
        yield


def texts_that_share(draw: random.Random) -> list[Sample]:
    """Texts of which some begin alike, some are the beginning of others and some are equal, with one to three masks."""
    stems = [_ids(draw, draw.randint(1, LONGEST // 2)) for _ in range(draw.randint(1, 2))]
    samples = []
    for index in range(draw.randint(1, 7)):
        ids = list(draw.choice(stems)) if draw.random() < 0.85 else []
        if not ids or draw.random() < 0.85:
            ids += _ids(draw, draw.randint(1, draw.choice([3, 8, LONGEST // 2])))
        if draw.random() < 0.1:
            stems.append(ids[: LONGEST // 2])
        masks = torch.zeros((draw.randint(1, 3), len(ids)), dtype=torch.bool)
        for mask in masks:
            first = draw.randrange(len(ids))
            mask[first : draw.choice([first + 1, len(ids), draw.randint(first + 1, len(ids))])] = True
        samples.append(Sample(f"s{index}", torch.tensor(ids), masks))
    draw.shuffle(samples)
    return samples


def _ids(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(VOCABULARY) for _ in range(count)]


@dataclass(frozen=True)
class Outcome:
    """What came of one history of plans on one fake.

    Attributes:
        fault: Of the fake.
        sharing: What each plan ran with.
        error: The largest relative error of a pooled mean.
        told: Whether every plan that ran with less than packed says why.
    """

    fault: str
    sharing: tuple[str, ...]
    error: float
    told: bool


class _Model:
    """Something to remember findings with."""


def _facts() -> ModelFacts:
    return ModelFacts(
        name="fake",
        revision=None,
        kind="k",
        dtype="float32",
        weights="unprocessed",
        n_layers=len(HOOKS),
        d_model=WIDTH,
        n_ctx=None,
        hook_names=tuple(HOOKS),
    )


def proven_error(
    runner: FakeRunner,
    samples: Sequence[Sample],
    batch_tokens: int,
    critical_lengths: Sequence[int] = (),
    chosen_keys: int | None = None,
) -> float:
    """The largest relative error of a mean, the samples run as far together as was proven on a fake."""
    prover = Prover(_Model(), [runner], _facts(), torch.device("cpu"), critical_lengths, chosen_keys)
    with small_limits(min_shared=2, worth_caching=3, row_tokens=40, cached_rows=8):
        plan = make_plan(samples, batch_tokens=batch_tokens, sharing=Sharing.PACKED)
        trusted, chosen, _ = prover.prove(plan, HOOKS)
    assert isinstance(chosen, FakeRunner)
    return max(_error(pooled, plan, runner, HOOKS) for pooled in _pooled(trusted, chosen, HOOKS))


def named_lengths(fault: str, n: int) -> list[int]:
    """What a configuration names: chunks also by their multiples."""
    times = 4 * LONGEST // n if "chunks" in fault else 1
    return [n * time for time in range(1, times + 1)]


def run_history(seed: int) -> Outcome:
    """Draws a fake and some plans, has them proven and run one after the other, and compares with each text alone."""
    draw = random.Random(seed)
    fault = draw.choice([*FAULTS, *CHOOSING])
    n = draw.randint(1, LONGEST if draw.random() < 0.7 else 2 * LONGEST)
    named = fault in NAMED or fault in CHOOSING or draw.random() < 0.3
    layer = draw.randrange(len(HOOKS))
    plain = FakeRunner(fault, n, layer)
    runners = [plain]
    if draw.random() < 0.3:  # a faster one that goes wrong elsewhere
        runners = [FakeRunner(fault, n if fault in CHOOSING else max(1, n // 2), 0, plain), plain]
    critical = named_lengths(fault, n) if named else []
    critical.append(5 * LONGEST)
    model = _Model()
    errors, sharing, told = [0.0], [], True
    limits = draw.choice([1, 2, 4]), draw.choice([1, 3, 12]), draw.choice([8, 16, 40, 100]), draw.choice([1, 3, 8])
    with small_limits(*limits):
        for _ in range(draw.randint(1, 3)):
            chosen_keys = n if fault in CHOOSING else None
            prover = Prover(model, runners, _facts(), torch.device("cpu"), critical, chosen_keys)
            names = HOOKS if draw.random() < 0.8 else [draw.choice(HOOKS)]
            plan = make_plan(texts_that_share(draw), batch_tokens=draw.choice([1, 10, 30, 90, 400]),
                             max_rows=draw.choice([None, None, 1, 3]), sharing=Sharing.PACKED)  # fmt: skip
            trusted, runner, notes = prover.prove(plan, names)
            assert isinstance(runner, FakeRunner)
            sharing.append(str(trusted.sharing))
            told &= trusted.sharing is Sharing.PACKED or bool(notes.get("fallbacks"))
            errors += [_error(pooled, plan, plain, names) for pooled in _pooled(trusted, runner, names)]
    return Outcome(fault, tuple(sharing), max(errors), told)


def _pooled(plan: Plan, runner: FakeRunner, names: Sequence[str]) -> Iterator[Any]:
    run, contexts = PoolingRun(plan, names), {}
    for index, each in enumerate(plan.passes):
        context, length = None, 0
        if each.context is not None:
            context, length = contexts[each.context], plan.passes[each.context].width
        captured, contexts[index] = runner.run(plan, each, names, context, length)
        yield from run.add(each, captured)


def _error(pooled: Any, plan: Plan, plain: FakeRunner, names: Sequence[str]) -> float:
    """Of one sample's means, relative to their norms."""
    sample = plan.given[pooled.sample]
    alone = make_plan([sample]).alone()
    captured, _ = plain.run(alone, alone.passes[0], names, None, 0)
    both = torch.stack([captured[name][0] for name in names])
    expected = torch.stack([both[:, mask].mean(dim=1) for mask in sample.masks])
    return float(((pooled.means - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def run_range(begin: int, end: int) -> tuple[list[int], Counter[tuple[str, str]]]:
    """The seeds with a wrong or untold result, and how often each fault ran with each kind of sharing."""
    wrong, seen = [], Counter[tuple[str, str]]()
    for seed in range(begin, end):
        outcome = run_history(seed)
        seen.update((outcome.fault, sharing) for sharing in outcome.sharing)
        if not outcome.error < 1e-5 or not outcome.told:
            wrong.append(seed)
    return wrong, seen
