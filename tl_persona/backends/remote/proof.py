"""The most sharing that a model on a server was shown to run exactly.

A server does not say how its model masks or positions texts that share a row or continue a prefix. So every kind of
pass is run once both ways, in one request (`witness`), and what differs is not used again.
"""

import logging
from collections.abc import Callable, Sequence

from tl_persona.backends.remote.payload import Payload, payload_of
from tl_persona.backends.remote.witness import Kind, kinds_of, reach_of, witness_of
from tl_persona.errors import RemoteRefusedError
from tl_persona.plan.plan import Plan, Sharing
from tl_persona.tensors import SlotSums

_CACHE_NAMES = ("past_key_values", "cache")
"""Tried in this order: servers lag behind, and the older name goes into both for now."""

_NEXT_BEST = {Sharing.PACKED: Sharing.CACHED, Sharing.CACHED: Sharing.NONE}


class Proof:
    """What is known of the shortcuts of one model.

    Args:
        tolerance: The largest relative difference that counts as exact.

    Attributes:
        sharing: The most that was not refuted.
        fallbacks: What was, and why, in order.
        cache_name: The argument that continues a cache on the server.
        tolerance: See the argument.
    """

    def __init__(self, tolerance: float) -> None:
        self.sharing = Sharing.PACKED
        self.fallbacks: list[str] = []
        self.tolerance = tolerance
        self.cache_name = _CACHE_NAMES[0]
        self._reaches: dict[tuple[Sharing, Kind, frozenset[str]], int] = {}  # how many keys each was proven with

    def proven(self, part: Plan, hook_names: Sequence[str], run: Callable[[Payload], SlotSums]) -> Plan:
        """The plan with the most sharing that is exact, after as many requests as it takes to show it.

        Args:
            part: What is to run.
            hook_names: What is captured.
            run: Sends a request and gives the sums of its slots.

        Raises:
            RemoteError: The server did not bring a request to its end.
        """
        hooks = frozenset(hook_names)
        while True:
            plan = part.with_sharing(self.sharing)
            longest = kinds_of(plan)
            reaches = {kind: reach_of(plan, plan.passes[index]) for kind, index in longest.items()}
            todo = [
                kind for kind, reach in reaches.items() if self._reaches.get((self.sharing, kind, hooks), 0) < reach
            ]
            if not todo:
                return plan
            flaw = self._flaw(plan, [longest[kind] for kind in todo], run)
            if flaw is None:
                self._reaches |= {(self.sharing, kind, hooks): reaches[kind] for kind in todo}
                return plan
            self.fallbacks.append(f"{self.sharing}: {flaw}")
            less = _NEXT_BEST[self.sharing]
            logging.getLogger("tl_persona").warning(
                "%s prefixes are not exact on the server (%s): falling back to %s, which is slower",
                self.sharing,
                flaw,
                less,
            )
            self.sharing = less

    def _flaw(self, plan: Plan, chosen: Sequence[int], run: Callable[[Payload], SlotSums]) -> str | None:
        """Why passes of a plan cannot be trusted on the server's model; None where they can."""
        witness = witness_of(plan, chosen)
        flaw = None
        # A name that was right once is the server's.
        for name in [self.cache_name] if self._reaches else _CACHE_NAMES:
            try:
                sums = run(payload_of(witness.plan, witness.slots, witness.n_slots, name))
            except RemoteRefusedError as refusal:
                flaw = flaw or str(refusal)
                continue
            error = witness.error(sums)
            if error <= self.tolerance:
                self.cache_name = name
                return None
            flaw = flaw or f"differs by {error:.1e} from a text run alone, more than {self.tolerance:.0e}"
        return flaw
