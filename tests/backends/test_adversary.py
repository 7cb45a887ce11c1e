"""Fake models that are wrong, each in its own way, where texts share a pass: whatever is proven on them is exact."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import CHOOSING, FAULTS, NAMED, FakeRunner, named_lengths, proven_error, small_limits

from tl_persona.backends.shortcuts import choice_in
from tl_persona.plan.plan import Plan, Sharing, make_plan
from tl_persona.plan.rows import Pass
from tl_persona.tensors import Sample

TOOL = Path(__file__).resolve().parents[1] / "tools" / "fuzz_proof.py"

EXAMPLES = 10_000
"""Of histories of one to three plans each; `make fuzz-proof SEEDS=a:b` runs others."""


@pytest.fixture(scope="module")
def ran() -> dict[str, Any]:
    """What came of the first of them, run without the type checks of every call that tests make elsewhere."""
    command = [sys.executable, str(TOOL), "--seeds", f"0:{EXAMPLES}", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_no_plan_that_was_proven_is_wrong(ran: dict[str, Any]) -> None:
    assert not ran["wrong"], "seeds with a wrong mean, or a fallback without a reason"


@pytest.mark.parametrize("fault", [*FAULTS, *CHOOSING])
def test_every_fault_is_met_and_what_it_does_not_touch_is_shared(fault: str, ran: dict[str, Any]) -> None:
    """A fake that no plan exposes would prove nothing, and one that is always refused neither."""
    shared, less = (
        sum(ran["seen"].get(f"{fault}: {sharing}", 0) for sharing in kinds)
        for kinds in (("packed",), ("cached", "none"))
    )
    assert shared > 50
    assert (less == 0) is (fault in ("none", "a window", "chunks"))


# --- plans that were once proven and wrong ---------------------------------------------------------------------------


def sample(name: str, ids: Sequence[int], first: int = 0, stop: int | None = None) -> Sample:
    mask = torch.zeros((1, len(ids)), dtype=torch.bool)
    mask[0, first:stop] = True
    return Sample(name, torch.tensor(ids), mask)


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, 30, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


START = ids(20, 1)

PLANS = {
    "a text past the window that shares less than the window": (
        ("a window, left out under a mask", 26),
        [sample("long", START + ids(18, 2), 20), sample("short", START + ids(4, 3), 20)],
    ),
    "a beginning that goes on below and above the length": (
        ("changes where the longest text is past a length", 30),
        [sample("above", START + ids(15, 2)), sample("below", START + ids(5, 3)), sample("other", START + ids(6, 4))],
    ),
    "a text that is the beginning of the others": (
        ("changes where the longest text is past a length", 30),
        [sample("start", START), sample("above", START + ids(15, 2)), sample("other", START + ids(12, 3))],
    ),
    "a text that is the beginning and was longer as it was given": (
        ("attention in both directions", 1),
        [sample("start", START + ids(9, 5), 3, 20), sample("above", START + ids(15, 2))],
    ),
    "positions that start at 0 again behind a cache": (
        ("positions start again for several cached tokens", 1),
        [sample("one", START + ids(8, 2)), sample("two", START + ids(3, 3))],
    ),
    "attention in both directions, lengths apart": (
        ("attention in both directions", 1),
        [sample("long", ids(30, 6)), sample("short", ids(7, 7)), sample("middle", ids(19, 8))],
    ),
    "a gap as long as the prefix, where positions start again behind a cache": (
        ("positions start again behind a cache", 1),
        [sample("first", START + ids(20, 2)), sample("second", START + ids(7, 3)), sample("third", START + ids(3, 4))],
    ),
    "a gap that leaves a chunk whole, where a smaller one cuts it in two": (
        ("chunks of places in the row", 13),
        [sample(str(at), START[:13] + ids(length, at), 13) for at, length in enumerate([3, 3, 5, 3, 5])],
    ),
    "company behind a text that has the token that was cut off it": (
        ("what lies behind", 1),
        [sample("start", START), sample("cut", [*START, 5, START[0]], 3, 21)],
    ),
}  # fmt: skip


NAMED_OR_NOT = [(name, named) for name, ((fault, _), _) in PLANS.items() for named in {True, fault in NAMED}]


@pytest.mark.parametrize(("name", "named"), NAMED_OR_NOT)
@pytest.mark.parametrize("budget", [1, 48, 1024])
def test_a_plan_that_was_once_proven_and_wrong(name: str, named: bool, budget: int) -> None:
    (fault, n), samples = PLANS[name]
    for order in (samples, samples[::-1]):
        assert proven_error(FakeRunner(fault, n, 0), order, budget, named_lengths(fault, n) if named else []) < 1e-5


# --- keys that are chosen by what they are ---------------------------------------------------------------------------


def test_beyond_the_number_of_chosen_keys_nothing_is_shared() -> None:
    samples = [sample("one", START + ids(8, 2)), sample("two", START + ids(3, 3))]
    plan = make_plan(samples, sharing=Sharing.PACKED)
    keys = sum(each.width for each in plan.passes)
    assert choice_in(plan, None) is None and choice_in(plan, keys) is None
    assert str(keys) in str(choice_in(plan, keys - 1))
    runner = FakeRunner("keys chosen by what they are", 12, 0)
    assert proven_error(runner, samples, 1024, [12], chosen_keys=12) < 1e-5


# --- too little memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["none", "a window, left out under a mask"])
def test_what_has_no_room_for_a_probe_is_compared_where_it_lies(fault: str) -> None:
    samples = [sample(str(length), START + ids(length, length)) for length in (14, 3, 9, 6, 5)]
    runner, largest, refused = FakeRunner(fault, 26, 0), 0, []

    class Small(FakeRunner):
        """Has room for what the plan runs, and no more."""

        def run(self, plan: Plan, each: Pass, *arguments: Any, **options: Any) -> Any:
            if each.tokens_run > largest:
                refused.append(each.tokens_run)
                raise MemoryError
            return super().run(plan, each, *arguments, **options)

    with small_limits(min_shared=2, worth_caching=3, row_tokens=40, cached_rows=8):
        plan = make_plan(samples, batch_tokens=40, sharing=Sharing.PACKED)
        largest = max(max(each.tokens_run for each in plan.passes), *(len(each.input_ids) for each in samples))
    assert proven_error(runner, samples, 40) < 1e-5
    assert proven_error(Small(fault, 26, 0), samples, 40) < 1e-5
    assert refused
