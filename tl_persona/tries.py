"""Finds what token sequences share at their beginning: a compressed trie, built from their sorted order.

Pure lists of ints; what is done with it is `plan`'s work.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

MIN_SHARED = 8
"""Shorter shared beginnings are not worth a segment: every chat starts with the same few template tokens."""


@dataclass(frozen=True)
class Node:
    """Positions `start` to `stop`, in which all members have the same tokens, as they have before `start`.

    Attributes:
        members: Sequences, by index, that pass through here.
        start: First position.
        stop: Position after the last.
        children: The nodes that go on from `stop`; members that end at `stop` are in none of them.
    """

    members: tuple[int, ...]
    start: int
    stop: int
    children: tuple["Node", ...] = ()

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def tokens(self) -> int:
        """Tokens of this node and all below, each shared one once."""
        return len(self) + sum(child.tokens for child in self.children)

    def walk(self) -> Iterator["Node"]:
        """This node and all below, parents before children."""
        yield self
        for child in self.children:
            yield from child.walk()

    def ending_here(self) -> list[int]:
        """Members whose sequence ends at `stop`."""
        below = {member for child in self.children for member in child.members}
        return [member for member in self.members if member not in below]

    def lengths(self) -> Iterator[tuple[int, int]]:
        """Every member with the length of its sequence."""
        for node in self.walk():
            for member in node.ending_here():
                yield member, node.stop

    def from_start(self, start: int) -> "Node":
        """This node with the positions from `start` on taken in from its parent."""
        return replace(self, start=start)


def prefix_trees(sequences: Sequence[Sequence[int]], min_shared: int = MIN_SHARED) -> list[Node]:
    """The sequences as trees of shared beginnings.

    Args:
        sequences: Non-empty token sequences.
        min_shared: A node with several members has at least this many positions, unless they are all equal from there.

    Returns:
        Trees that hold every sequence once, in the order of their first sequence.

    Example:
        >>> tree, = prefix_trees([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3]], min_shared=2)
        >>> tree.members, tree.stop, tree.tokens, tree.ending_here()
        ((0, 1, 2), 3, 5, [2])
        >>> [tree.members for tree in prefix_trees([[1, 2], [1, 3]], min_shared=2)]
        [(0,), (1,)]
    """
    order = sorted(range(len(sequences)), key=lambda index: list(sequences[index]))
    shared = [_common(sequences[one], sequences[other]) for one, other in pairwise(order)]
    trees = _nodes(sequences, order, shared, 0, min_shared)
    return sorted(trees, key=lambda tree: tree.members[0])


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    for position, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return position
    return min(len(one), len(other))


def _nodes(
    sequences: Sequence[Sequence[int]], order: Sequence[int], shared: Sequence[int], start: int, min_shared: int
) -> list[Node]:
    """The nodes at `start` for sequences in sorted order; `shared[i]` is what i and i + 1 have in common."""
    if len(order) == 1:
        return [Node((order[0],), start, len(sequences[order[0]]))]
    stop = min(shared)
    all_equal = all(len(sequences[index]) == stop for index in order)
    if stop - start >= min_shared or (all_equal and stop > start):
        longer = next((place for place, index in enumerate(order) if len(sequences[index]) > stop), len(order))
        children = [
            child
            for low, high in _runs(shared[longer:], stop, longer, len(order))
            for child in _nodes(sequences, order[low:high], shared[low : high - 1], stop, min_shared)
        ]
        return [Node(tuple(sorted(order)), start, stop, tuple(children))]
    return [
        node
        for low, high in _runs(shared, stop, 0, len(order))
        for node in _nodes(sequences, order[low:high], shared[low : high - 1], start, min_shared)
    ]


def _runs(shared: Sequence[int], stop: int, first: int, end: int) -> Iterator[tuple[int, int]]:
    """Ranges of neighbours that share more than `stop`."""
    if first == end:
        return
    low = first
    for offset, common in enumerate(shared):
        if common <= stop:
            yield low, first + offset + 1
            low = first + offset + 1
    yield low, end
