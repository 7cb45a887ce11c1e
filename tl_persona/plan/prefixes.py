"""Finds what token sequences share at their beginning: a compressed trie, built from their sorted order.

Nothing here recurses: a long conversation, cut after every turn, nests thousands of beginnings.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

MIN_SHARED = 8
"""Shorter shared beginnings are not worth a segment: every chat starts with the same few template tokens."""


@dataclass(frozen=True, eq=False)  # compared by identity: comparing whole trees would recurse
class Node:
    """Positions `start` to `stop`, in which all members have the same tokens, as they have before `start`.

    Attributes:
        members: Sequences, by index, that pass through here.
        start: First position.
        stop: Position after the last.
        ending: Members whose sequence ends at `stop`.
        children: The nodes that go on from `stop`.
        tokens: Tokens of this node and all below, each shared one once.
    """

    members: tuple[int, ...]
    start: int
    stop: int
    ending: tuple[int, ...]
    children: tuple["Node", ...] = field(repr=False)
    tokens: int

    def __len__(self) -> int:
        return self.stop - self.start

    def walk(self) -> Iterator["Node"]:
        """This node and all below, parents before children."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting += reversed(node.children)


def prefix_trees(sequences: Sequence[Any], min_shared: int = MIN_SHARED) -> list[Node]:
    """The sequences as trees of shared beginnings.

    Args:
        sequences: Non-empty token sequences: lists of ints or arrays.
        min_shared: A node with several members has at least this many positions, unless they are all equal from there.

    Returns:
        Trees that hold every sequence once, in the order of their first sequence.

    Example:
        >>> tree, = prefix_trees([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3]], min_shared=2)
        >>> tree.members, tree.stop, tree.tokens, tree.ending
        ((0, 1, 2), 3, 5, (2,))
        >>> [tree.members for tree in prefix_trees([[1, 2], [1, 3]], min_shared=2)]
        [(0,), (1,)]
    """
    arrays = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    keys = [array.tobytes() for array in arrays]  # any order will do in which equal beginnings are neighbours
    order = sorted(range(len(arrays)), key=keys.__getitem__)
    lengths = np.array([len(arrays[index]) for index in order], dtype=np.int64)
    shared = np.array([_common(arrays[one], arrays[other]) for one, other in pairwise(order)], dtype=np.int64)
    trees = _assembled(_found(lengths, shared, min_shared), np.array(order, dtype=np.int64))
    return sorted(trees, key=lambda tree: tree.members[0])


def _common(one: Any, other: Any) -> int:
    """How many tokens two arrays share at their beginning."""
    length = min(len(one), len(other))
    different = one[:length] != other[:length]
    first = int(different.argmax()) if length else 0
    return first if length and different[first] else length


class _Found(NamedTuple):
    """A node before its children are known: places `low` to `high` of the sorted order, `ending` of them end here."""

    low: int
    high: int
    start: int
    stop: int
    ending: int
    parent: int | None


def _found(lengths: Any, shared: Any, min_shared: int) -> list[_Found]:
    """All nodes, parents first; `shared[i]` is what places i and i + 1 of the sorted order have in common."""
    found: list[_Found] = []
    waiting: list[tuple[int, int, int, int | None]] = [(0, len(lengths), 0, None)]
    while waiting:
        low, high, start, parent = waiting.pop()
        within = shared[low : high - 1]
        stop = int(within.min()) if len(within) else int(lengths[low])
        all_equal = int(lengths[low:high].max()) == stop
        longer = low + int((lengths[low:high] == stop).sum())  # what ends here comes first in sorted order
        if stop - start >= min_shared or all_equal:
            found.append(_Found(low, high, start, stop, longer - low, parent))
            start, parent = stop, len(found) - 1
        elif longer > low:  # too short to share with what goes on, but these are equal
            found.append(_Found(low, longer, start, stop, longer - low, parent))
        if longer < high:
            cuts = longer + 1 + np.flatnonzero(shared[longer : high - 1] <= stop)
            waiting += [(first, end, start, parent) for first, end in pairwise([longer, *cuts.tolist(), high])]
    return found


def _assembled(found: Sequence[_Found], order: Any) -> list[Node]:
    """The trees, built from the leaves up."""
    children: list[list[Node]] = [[] for _ in found]
    trees: list[Node] = []
    for index in range(len(found) - 1, -1, -1):
        low, high, start, stop, ending, parent = found[index]
        node = Node(
            members=tuple(np.sort(order[low:high]).tolist()),
            start=start,
            stop=stop,
            ending=tuple(np.sort(order[low : low + ending]).tolist()),
            children=tuple(children[index]),
            tokens=stop - start + sum(child.tokens for child in children[index]),
        )
        (trees if parent is None else children[parent]).append(node)
    return trees
