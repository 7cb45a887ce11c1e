"""How our own runs really ran: the plans they had, and whether they took the shortcuts.

A shortcut that does not hold is left with a warning and no error, and what is timed then would be the slow path.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

from tl_persona.backends import Pooled
from tl_persona.backends.local.backend import LocalBackend
from tl_persona.plan import Plan

SHORTCUTS = {
    "TransformerBridge": {"sharing": "packed", "attention": "fused"},
    "HookedTransformer": {"sharing": "cached"},
}
"""By the model's class, what the notes of a run say that took all there are."""


class Run(NamedTuple):
    """A plan, and the backend it ran on."""

    plan: Plan
    backend: LocalBackend


@contextmanager
def watched_runs() -> Iterator[list[Run]]:
    """Everything that local backends run until the end, in order."""
    found: list[Run] = []
    pooled = LocalBackend._pooled  # behind samples one by one, and behind their sums

    def watched(self: LocalBackend, plan: Plan, hook_names: Sequence[str], *, with_norms: bool) -> Iterator[Pooled]:
        found.append(Run(plan, self))
        return pooled(self, plan, hook_names, with_norms=with_norms)

    with mock.patch.object(LocalBackend, "_pooled", watched):
        yield found


def assert_all_took_the_shortcuts(runs: Sequence[Run]) -> None:
    assert runs
    for _, backend in runs:
        notes: dict[str, Any] = backend.notes
        expected = SHORTCUTS[notes["model_class"]]
        assert {name: notes.get(name) for name in expected} == expected, notes
        assert "fallbacks" not in notes, notes
