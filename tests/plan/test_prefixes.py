"""Shared beginnings, against the definition of a trie: the set of all prefixes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tl_persona.plan.prefixes import Node, prefix_trees

Text = list[int]

TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=14)
"""Three tokens only, so that texts often begin alike, repeat, or continue one another."""


def distinct_prefixes(texts: list[Text]) -> int:
    """Tokens of a full trie: every prefix once."""
    return len({tuple(text[: end + 1]) for text in texts for end in range(len(text))})


def tokens_by_rule(texts: list[Text], start: int, min_shared: int) -> int:
    """Tokens when beginnings shorter than `min_shared` are not shared, straight from that rule."""
    if len(texts) == 1:
        return len(texts[0]) - start
    stop = start
    while all(len(text) > stop for text in texts) and len({text[stop] for text in texts}) == 1:
        stop += 1
    shares = stop - start >= min_shared or all(len(text) == stop for text in texts)
    groups: dict[int | None, list[Text]] = {}
    for text in texts:
        groups.setdefault(text[stop] if len(text) > stop else None, []).append(text)
    ending = groups.pop(None, [])
    below = sum(tokens_by_rule(group, stop if shares else start, min_shared) for group in groups.values())
    if shares:
        return stop - start + below
    return below + (stop - start if ending else 0)  # equal texts that end here run once


def all_nodes(trees: list[Node]) -> list[Node]:
    return [node for tree in trees for node in tree.walk()]


@given(TEXTS)
def test_a_trie_without_a_minimum_holds_every_distinct_prefix_once(texts: list[Text]) -> None:
    assert sum(tree.tokens for tree in prefix_trees(texts, 1)) == distinct_prefixes(texts)


@given(TEXTS, st.integers(1, 6))
def test_with_a_minimum_exactly_what_is_long_enough_is_shared(texts: list[Text], min_shared: int) -> None:
    assert sum(tree.tokens for tree in prefix_trees(texts, min_shared)) == tokens_by_rule(texts, 0, min_shared)


@given(TEXTS, st.integers(1, 6))
def test_nodes_share_their_tokens_and_cover_every_text_once(texts: list[Text], min_shared: int) -> None:
    trees = prefix_trees(texts, min_shared)
    covered: list[list[int]] = [[] for _ in texts]
    for node in all_nodes(trees):
        assert len({tuple(texts[member][: node.stop]) for member in node.members}) == 1
        assert set(node.ending) == {member for member in node.members if len(texts[member]) == node.stop}
        for member in node.members:
            covered[member] += range(node.start, node.stop)  # parents first, so in order
    assert covered == [list(range(len(text))) for text in texts]
    assert sum(tree.tokens for tree in trees) == sum(map(len, all_nodes(trees)))


@given(TEXTS, st.integers(1, 6))
def test_children_continue_their_parent_and_part_its_members(texts: list[Text], min_shared: int) -> None:
    for node in all_nodes(prefix_trees(texts, min_shared)):
        below = [member for child in node.children for member in child.members]
        assert sorted([*below, *node.ending]) == list(node.members)
        assert all(child.start == node.stop for child in node.children)
        assert len(node.members) == 1 or len(node) >= min_shared or not node.children


@given(TEXTS, st.integers(1, 6), st.randoms())
def test_the_order_of_the_texts_changes_nothing_but_numbers(texts: list[Text], min_shared: int, random: object) -> None:
    def shapes(texts: list[Text]) -> list[tuple[Text, int, list[Text]]]:
        nodes = all_nodes(prefix_trees(texts, min_shared))
        return sorted((texts[n.members[0]][: n.stop], n.start, sorted(texts[m] for m in n.members)) for n in nodes)

    shuffled = list(texts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert shapes(shuffled) == shapes(texts)


def test_negative_and_large_ids_are_tokens_like_any_other() -> None:
    (tree,) = prefix_trees([[-1, 2**40, 3], [-1, 2**40, 4], [-1, 2**40]], 1)
    assert (tree.stop, tree.ending, tree.tokens) == (2, (2,), 4)


def test_thousands_of_nested_beginnings_are_no_deeper_for_python() -> None:
    tree, *others = prefix_trees([list(range(length)) for length in range(3000, 0, -1)], 1)
    nodes = list(tree.walk())
    assert not others and len(nodes) == tree.tokens == 3000
    assert nodes[-1].members == (0,) and nodes[-1].stop == 3000
    assert "members" in repr(nodes[-1]) and tree == tree  # neither of which may recurse


@pytest.mark.timeout(600)  # half a second when nothing else runs; far longer in quadratic time
@pytest.mark.parametrize("shared", [0, 900, 1000])
def test_two_million_tokens_are_sorted_in_good_time(shared: int) -> None:
    beginning = list(range(shared))
    texts = [beginning + [100_000 + index] * (1000 - shared) for index in range(2000)]
    trees = prefix_trees(texts)
    assert sum(tree.tokens for tree in trees) == shared + (2000 * (1000 - shared))
