"""Lays texts out in rows and passes: shared beginnings once, what follows side by side under a token budget.

A segment is tokens that run once for all samples that have them; a row is segments side by side; a pass is rows that go
through the model together.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tl_persona.plan.prefixes import Node

PACKED_ROW_TOKENS = 512
"""Rows of packed texts grow no longer than this: attention is computed over the whole row and then masked."""

ROW_SHARES = (1, 2, 3, 4, 6, 8)
"""Packed rows that continue a prefix may be this many times shorter: less is computed and masked, more is padded."""

KEYS_A_TOKEN = 8192
"""Keys that cost a token as much attention as all its other work: about six times d_model, of a small model."""

TOKENS_A_PASS = 32
"""Tokens that cost as much as starting one more pass."""

CACHED_ROWS = 8
"""Rows that continue one prefix side by side: its keys and values are copied for each of them."""

WORTH_CACHING = 256
"""Tokens that must be saved before a prefix gets a pass of its own, which costs about as much as some tokens."""


@dataclass(frozen=True)
class Segment:
    """Positions `start` to `stop` of every member: their tokens up to `stop` are the same, and run once.

    Attributes:
        members: Samples, by index, that have these tokens and those before them.
        start: First position.
        stop: Position after the last.
    """

    members: tuple[int, ...]
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Row:
    """Segments side by side; each attends to the earlier ones that hold all of its members."""

    segments: tuple[Segment, ...]

    def __len__(self) -> int:
        return sum(map(len, self.segments))


@dataclass(frozen=True)
class Pass:
    """Rows that go through the model together, padded to the longest.

    Attributes:
        rows: What runs.
        context: Index of the earlier pass whose only row all rows continue, or None.
        kept: True where a later pass continues this one, so that its keys and values must be kept.
    """

    rows: tuple[Row, ...]
    context: int | None = None
    kept: bool = False

    @property
    def width(self) -> int:
        """Length of the longest row."""
        return max(map(len, self.rows))

    @property
    def tokens_run(self) -> int:
        """Tokens that go through the model, padding included."""
        return self.width * len(self.rows)

    @property
    def packed(self) -> bool:
        """True where a row holds more than one segment, so that it needs a mask and positions of its own."""
        return any(len(row.segments) > 1 for row in self.rows)


class Layout:
    """Collects rows and passes while texts are added.

    Args:
        budget: Padded tokens a pass may hold; a longer row runs alone.
        max_rows: Rows a pass may hold; None sets no limit.
        packs: Whether several texts may lie in one row.
    """

    def __init__(self, budget: int, max_rows: int | None, *, packs: bool) -> None:
        self._budget, self._max_rows, self._packs = budget, max_rows, packs
        # No two texts lie side by side in a row of length 0, so nothing is packed where nothing may be.
        self._row_tokens = min(PACKED_ROW_TOKENS, budget) if packs else 0
        self._single: list[Row] = []  # rows of one segment, which need no mask
        self._packed: list[Row] = []
        self._chains: list[tuple[Row, list[list[Row]]]] = []  # a kept prefix, and the rows that continue it

    def add_sample(self, index: int, length: int) -> None:
        """Lays out one sample by itself, whatever it shares with others."""
        self._single.append(Row((Segment((index,), 0, length),)))

    def add_tree(self, tree: Node) -> None:
        """Lays out one tree of samples that begin alike."""
        kept = _worth_keeping(tree, self._row_tokens)
        waiting = [tree]
        while waiting:
            node = waiting.pop()
            if not node.children:
                self._single.append(Row((Segment(node.members, 0, node.stop),)))
            elif node.start + node.tokens <= self._row_tokens:
                self._packed.append(Row(_subtree(node, 0)))
            elif node in kept:
                self._add_chain(node)
            else:  # too little to gain: the children run the shared tokens themselves
                if node.ending:
                    self._single.append(Row((Segment(node.ending, 0, node.stop),)))
                waiting += node.children

    def _add_chain(self, node: Node) -> None:
        pieces = list(_pieces(node, self._row_tokens))
        limit = CACHED_ROWS if self._max_rows is None else min(self._max_rows, CACHED_ROWS)
        if self._packs:
            groups = self._side_by_side(pieces, node.stop, limit)
        else:  # rows of one sample share one
            groups = self._cut([Row(piece) for piece in pieces], limit)
        self._chains.append((Row((Segment(node.members, 0, node.stop),)), groups))

    def _side_by_side(self, pieces: Sequence[tuple[Segment, ...]], context: int, max_rows: int) -> list[list[Row]]:
        """Passes of rows of several pieces each: few long rows, or more and shorter ones, whatever is cheapest."""
        pieces = sorted(pieces, key=_tokens, reverse=True)
        layouts = [self._cut(_filled(pieces, self._row_tokens), max_rows)]
        for share in ROW_SHARES:
            width = max(1, self._row_tokens // share)
            rows = _spread(pieces, -(-sum(map(_tokens, pieces)) // width))
            if all(len(row) <= self._row_tokens or len(row.segments) == 1 for row in rows):
                layouts.append(self._cut(rows, max_rows))
        return min(layouts, key=lambda groups: sum(_cost(group, context) for group in groups))

    def passes(self) -> tuple[Pass, ...]:
        """Everything added, the largest passes first, so that a budget that is too large fails at once."""
        passes: list[Pass] = []
        for prefix, groups in self._chains:
            context = len(passes)
            passes.append(Pass((prefix,), kept=True))
            passes += [Pass(tuple(rows), context=context) for rows in groups]
        for rows in (self._single, self._packed):
            passes += [Pass(tuple(group)) for group in self._cut(rows, self._max_rows)]
        return tuple(passes)

    def _cut(self, rows: Sequence[Row], max_rows: int | None) -> list[list[Row]]:
        """Groups of rows of similar length within the budget."""
        groups: list[list[Row]] = []
        for row in sorted(rows, key=len, reverse=True):
            # Sorted by falling length, so the first row of a group is its width.
            fits = groups and len(groups[-1][0]) * (len(groups[-1]) + 1) <= self._budget
            if fits and (max_rows is None or len(groups[-1]) < max_rows):
                groups[-1].append(row)
            else:
                groups.append([row])
        return groups


def _tokens(piece: Iterable[Segment]) -> int:
    return sum(map(len, piece))


def _filled(pieces: Iterable[tuple[Segment, ...]], row_tokens: int) -> list[Row]:
    """Pieces side by side, a row at a time."""
    rows: list[list[Segment]] = []
    filled = 0
    for piece in pieces:
        length = _tokens(piece)
        if not rows or filled + length > row_tokens:
            rows.append([])
            filled = 0
        rows[-1].extend(piece)
        filled += length
    return [Row(tuple(row)) for row in rows]


def _spread(pieces: Iterable[tuple[Segment, ...]], n_rows: int) -> list[Row]:
    """Pieces, the longest first, each put to the row that is shortest so far: rows of much the same length."""
    rows: list[list[Segment]] = [[] for _ in range(n_rows)]
    filled = [(0, index) for index in range(n_rows)]
    for piece in pieces:
        length, index = filled[0]
        rows[index].extend(piece)
        heapq.heapreplace(filled, (length + _tokens(piece), index))
    return [Row(tuple(row)) for row in rows if row]


def _cost(rows: Sequence[Row], context: int) -> float:
    """What a pass costs, in tokens: padding runs, and what is masked is computed first."""
    width = max(map(len, rows))
    return TOKENS_A_PASS + len(rows) * width * (1 + (context + width) / KEYS_A_TOKEN)


def _worth_keeping(tree: Node, row_tokens: int) -> set[Node]:
    """The nodes whose prefix, from the start of the text, is best run once, kept, and continued by everything below.

    Counts the tokens that would run either way, from the leaves up: behind a kept prefix, or with every child running
    the prefix itself, where one of them may keep a longer one.
    """
    kept: set[Node] = set()
    least: dict[Node, int] = {}  # tokens that run, at best
    # The tokens that run, from position 0, where no prefix is kept, and in how many pieces.
    apart: dict[Node, tuple[int, int]] = {}
    for node in reversed(list(tree.walk())):
        together = node.start + node.tokens
        if not node.children:
            apart[node], least[node] = (together, 1), together
            continue
        ends = int(bool(node.ending))
        tokens = sum(apart[child][0] for child in node.children)
        pieces = sum(apart[child][1] for child in node.children)
        keeping = node.stop + tokens - pieces * node.stop + WORTH_CACHING
        splitting = sum(least[child] for child in node.children) + ends * node.stop
        least[node] = together if together <= row_tokens else min(keeping, splitting)
        apart[node] = (together, 1) if node.tokens <= row_tokens else (tokens + ends * node.stop, pieces + ends)
        if keeping <= splitting:
            kept.add(node)
    return kept


def _pieces(node: Node, row_tokens: int) -> Iterator[tuple[Segment, ...]]:
    """What continues a node, in pieces that fit a row: subtrees, and single samples where even those are too long."""
    waiting = list(reversed(node.children))
    while waiting:
        below = waiting.pop()
        if not below.children or below.tokens + below.start - node.stop <= row_tokens:
            yield _subtree(below, node.stop)
            continue
        if below.ending:
            yield (Segment(below.ending, node.stop, below.stop),)
        waiting += reversed(below.children)


def _subtree(node: Node, start: int) -> tuple[Segment, ...]:
    """A node and all below it, the first from `start` on."""
    first, *below = node.walk()
    return (
        Segment(first.members, start, first.stop),
        *(Segment(each.members, each.start, each.stop) for each in below),
    )
