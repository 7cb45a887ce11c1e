"""How much goes to a server at once: groups of samples, and chunks of layers.

A group is what a failure costs. What a server could not do is learned from, and never more is asked again in the same
run: first all blocks; then chunks of blocks, a quarter of them, half of that, down to one; then fewer samples at once.
A request that takes too long is cut by its samples alone, for chunks take longer still.
"""

from dataclasses import dataclass, field

import torch

from tl_persona.backends.remote.transport import CapacityFailure
from tl_persona.plan.plan import Plan


@dataclass
class Appetite:
    """What one request may hold.

    Attributes:
        n_layers: Blocks of the model.
        layers: Blocks a request runs; all of them until the server runs out of memory.
        samples: Samples a request may have; None sets no limit.
        tried: What failed, in order.
    """

    n_layers: int
    layers: int = field(init=False)
    samples: int | None = None
    tried: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layers = self.n_layers

    @property
    def whole(self) -> bool:
        """Whether a request runs all blocks."""
        return self.layers >= self.n_layers

    def shrink(self, failure: CapacityFailure, n_samples: int) -> bool:
        """Asks for less after a failure; False where nothing less can be asked for.

        Args:
            failure: What happened.
            n_samples: Samples of the request that failed.

        Example:
            >>> appetite = Appetite(30)
            >>> out_of_memory = CapacityFailure("out of memory")
            >>> [appetite.shrink(out_of_memory, 4) and (appetite.layers, appetite.samples) for _ in range(7)]
            [(8, None), (4, None), (2, None), (1, None), (1, 2), (1, 2), (1, 2)]
            >>> appetite.shrink(out_of_memory, 1)
            False
        """
        self.tried.append(f"{self.layers} layers of {n_samples} samples: {failure}")
        if failure.of_memory and self.layers > 1:
            self.layers = -(-self.n_layers // 4) if self.whole and self.n_layers > 1 else self.layers // 2
            return True
        if n_samples > 1:
            self.samples = n_samples // 2
            return True
        return False

    def groups(self, samples: list[int]) -> list[list[int]]:
        """Samples cut into as many groups as the limit asks for."""
        size = len(samples) if self.samples is None else self.samples
        return [samples[first : first + size] for first in range(0, len(samples), size)]


def groups_of(plan: Plan, limit: int) -> list[list[int]]:
    """Samples in the caller's order, cut where the tokens that a group computes would pass the limit.

    A beginning that a sample shares with the one before it is counted once a group. A sample that is longer than the
    limit is a group of its own.
    """
    groups: list[list[int]] = []
    filled = 0
    for index, sample in enumerate(plan.samples):
        ids = sample.input_ids
        if groups:
            added = len(ids) - _shared(ids, plan.samples[index - 1].input_ids)
            if filled + added <= limit:
                groups[-1].append(index)
                filled += added
                continue
        groups.append([index])
        filled = len(ids)
    return groups


def _shared(first: torch.Tensor, second: torch.Tensor) -> int:
    """Tokens that two texts begin with alike."""
    length = min(len(first), len(second))
    differ = (first[:length] != second[:length]).nonzero()
    return int(differ[0]) if len(differ) else length
