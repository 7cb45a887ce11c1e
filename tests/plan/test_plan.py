"""What a plan refuses before any model runs, what it never loses, and that its predicted cost is right."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tl_persona.errors import InputError, MaskError
from tl_persona.plan import Plan, Sample, Sharing, make_plan
from tl_persona.plan import plan as plan_module
from tl_persona.plan import rows as rows_module
from tl_persona.plan.rows import Pass, Row, Segment


def sample(*ids: int, sample_id: str = "q7") -> Sample:
    return Sample(sample_id, torch.tensor(ids, dtype=torch.long), torch.ones(1, len(ids), dtype=torch.bool))


IDS, MASK = torch.tensor([4, 5, 6]), torch.tensor([[True, False, True]])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("ids", "masks", "kind", "message"),
    [
        (IDS[None], MASK, InputError, r"'q7'.*1-D.*\(1, 3\)"),
        (IDS, MASK[0], InputError, "'q7'.*3 token ids"),
        (IDS, MASK[:, :2], InputError, "'q7'.*3 token ids but a mask over 2 positions"),
        (IDS[:0], MASK[:, :0], InputError, "'q7' has no tokens"),
        (IDS.float(), MASK, InputError, "'q7'.*integers.*float32"),
        (IDS, torch.cat([MASK, MASK & False]), MaskError, "'q7': a mask selects 0 of 3 tokens"),
        (torch.arange(9), torch.ones(1, 9, dtype=torch.bool), InputError, "'q7' has 9 tokens.*context is 8"),
    ],
)
def test_a_sample_that_cannot_run_is_named(
    ids: torch.Tensor, masks: torch.Tensor, kind: type[InputError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        make_plan([sample(1, 2, sample_id="good"), Sample("q7", ids, masks)], n_ctx=8)


def test_a_sample_may_fill_the_context_and_exceed_the_budget() -> None:
    assert make_plan([sample(*range(8))], n_ctx=8, batch_tokens=2).tokens == 8


def test_ids_are_those_of_the_models_vocabulary() -> None:
    assert make_plan([sample(0, 9), sample(9, 9), sample(0, 0)], vocabulary=10).tokens == 6
    for ids, seen in (((1, 10), "from 1 to 10"), ((-1, 2), "from -1 to 2"), ((10, 10), "from 10 to 10")):
        with pytest.raises(InputError, match=f"'q7': token ids {seen}, but the model has 10 tokens"):
            make_plan([sample(1, sample_id="good"), sample(*ids)], vocabulary=10)


def test_the_kinds_of_sharing_are_known_by_lower_case_names_which_provenance_holds() -> None:
    assert [str(sharing) for sharing in Sharing] == ["none", "cached", "packed"]


def test_a_model_without_a_context_limit_takes_any_length() -> None:
    assert make_plan([sample(*range(5000))], n_ctx=None).tokens == 5000


def test_nothing_to_run_and_no_budget_are_refused() -> None:
    with pytest.raises(InputError, match="no sample to run"):
        make_plan([])
    with pytest.raises(InputError, match="batch_tokens must be at least 1, got 0"):
        make_plan([sample(1)], batch_tokens=0)
    with pytest.raises(InputError, match="the number of rows must be at least 1, got 0"):
        make_plan([sample(1)], max_rows=0)


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=12), st.integers(1, 60))
def test_a_plan_keeps_the_callers_samples_and_counts_their_tokens(texts: list[list[int]], budget: int) -> None:
    samples = [sample(*ids, sample_id=str(index)) for index, ids in enumerate(texts)]
    plan = make_plan(samples, batch_tokens=budget)
    assert [one.sample_id for one in plan.samples] == [str(index) for index in range(len(texts))]
    assert plan.tokens == sum(map(len, texts))


# --- what a plan lays out ------------------------------------------------------------------------------------------

Text = list[int]

TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), min_size=1, max_size=14)
"""Three tokens only, so that texts often begin alike, repeat, or continue one another."""

SHARING = st.sampled_from(Sharing)


@contextmanager
def small_limits(
    min_shared: int = 2,
    worth_caching: int = 3,
    row_tokens: int = 10,
    cached_rows: int = 3,
    shares: tuple[int, ...] = rows_module.ROW_SHARES,
) -> Iterator[None]:
    """Limits of a size at which texts of a few tokens take every way through the planner."""
    with (
        mock.patch.object(plan_module, "MIN_SHARED", min_shared),
        mock.patch.object(rows_module, "WORTH_CACHING", worth_caching),
        mock.patch.object(rows_module, "PACKED_ROW_TOKENS", row_tokens),
        mock.patch.object(rows_module, "CACHED_ROWS", cached_rows),
        mock.patch.object(rows_module, "ROW_SHARES", shares),
    ):
        yield


LIMITS = st.builds(
    dict,
    min_shared=st.integers(1, 4),
    worth_caching=st.integers(0, 12),
    row_tokens=st.integers(1, 40),
    cached_rows=st.integers(1, 4),
    shares=st.sampled_from([(), (1,), rows_module.ROW_SHARES]),
)


def planned(texts: list[Text], **options: Any) -> Plan:
    return make_plan([sample(*ids, sample_id=str(index)) for index, ids in enumerate(texts)], **options)


def segments_of(plan: Plan) -> list[Segment]:
    return [segment for each in plan.passes for row in each.rows for segment in row.segments]


def read_back(plan: Plan, texts: list[Text]) -> list[Text]:
    """Every text as a model would see it: for its last token, all tokens it may attend to, in order."""
    seen: list[Text] = [[] for _ in texts]
    for each in plan.passes:
        if each.kept:
            continue
        prefix = () if each.context is None else plan.passes[each.context].rows[0].segments
        for row in each.rows:
            for member in {member for segment in row.segments for member in segment.members}:
                for segment in (*prefix, *row.segments):
                    if member in segment.members:
                        assert segment.start == len(seen[member])
                        seen[member] += texts[segment.members[0]][segment.start : segment.stop]
    for each in plan.passes:  # texts that end with their prefix
        for segment in each.rows[0].segments if each.kept else ():
            for member in segment.members:
                seen[member] = seen[member] or texts[segment.members[0]][: segment.stop]
    return seen


@given(TEXTS, SHARING, LIMITS, st.integers(1, 60), st.none() | st.integers(1, 4))
def test_every_position_of_every_sample_runs_exactly_once_with_all_before_it_in_reach(
    texts: list[Text], sharing: Sharing, limits: dict[str, Any], budget: int, max_rows: int | None
) -> None:
    with small_limits(**limits):
        plan = planned(texts, sharing=sharing, batch_tokens=budget, max_rows=max_rows)
    for segment in segments_of(plan):
        assert len({tuple(texts[member][: segment.stop]) for member in segment.members}) == 1
    covered: list[Text] = [[] for _ in texts]
    for segment in segments_of(plan):
        for member in segment.members:
            covered[member] += range(segment.start, segment.stop)
    assert [sorted(positions) for positions in covered] == [list(range(len(text))) for text in texts]
    assert read_back(plan, texts) == texts


def test_nothing_is_planned_past_the_last_token_that_a_mask_selects() -> None:
    ids = torch.tensor([7, 8, 9, 10, 11])
    masks = torch.tensor([[True, False, False, False, False], [False, True, True, False, False]])
    for sharing in Sharing:
        plan = make_plan([Sample("short", ids, masks), Sample("whole", ids, masks.flip(1))], sharing=sharing)
        short, whole = plan.samples
        assert short.input_ids.tolist() == [7, 8, 9] and whole.input_ids.equal(ids)
        assert short.masks.tolist() == [[True, False, False], [False, True, True]]
        assert whole.masks.equal(masks.flip(1))
        assert plan.tokens == 3 + 5


@given(TEXTS, SHARING, SHARING, LIMITS, st.integers(1, 60), st.none() | st.integers(1, 4))
def test_a_plan_for_another_sharing_is_the_one_made_for_it_within_the_same_limits(
    texts: list[Text], first: Sharing, second: Sharing, limits: dict[str, Any], budget: int, max_rows: int | None
) -> None:
    with small_limits(**limits):
        changed = planned(texts, sharing=first, batch_tokens=budget, max_rows=max_rows).with_sharing(second)
        direct = planned(texts, sharing=second, batch_tokens=budget, max_rows=max_rows)
    assert changed.passes == direct.passes
    assert [each.input_ids.tolist() for each in changed.samples] == texts
    assert (changed.sharing, changed.batch_tokens, changed.max_rows) == (second, budget, max_rows)


@given(TEXTS, SHARING, LIMITS)
def test_a_prefix_runs_alone_before_what_continues_it_and_only_packing_puts_texts_side_by_side(
    texts: list[Text], sharing: Sharing, limits: dict[str, Any]
) -> None:
    with small_limits(**limits):
        plan = planned(texts, sharing=sharing)
    continued = set()
    for index, each in enumerate(plan.passes):
        if each.context is not None:
            prefix = plan.passes[each.context]
            assert each.context < index and prefix.kept and prefix.context is None
            assert len(prefix.rows) == 1 and prefix.rows[0].segments[0].start == 0
            continued.add(each.context)
        for row in each.rows:
            begin = 0 if each.context is None else plan.passes[each.context].width
            for place, segment in enumerate(row.segments):
                stops = [above.stop for above in row.segments[:place] if set(segment.members) <= set(above.members)]
                assert segment.start == max([begin, *stops])  # what it continues is in its row, and earlier
        assert sharing is Sharing.PACKED or not each.packed
    assert continued == {index for index, each in enumerate(plan.passes) if each.kept}
    assert sharing is not Sharing.NONE or not continued


@given(TEXTS, SHARING, LIMITS, st.integers(1, 60), st.none() | st.integers(1, 4))
def test_only_a_single_segment_may_exceed_the_limits(
    texts: list[Text], sharing: Sharing, limits: dict[str, Any], budget: int, max_rows: int | None
) -> None:
    with small_limits(**limits):
        plan = planned(texts, sharing=sharing, batch_tokens=budget, max_rows=max_rows)
    for each in plan.passes:
        longest = each.rows[0]
        assert each.tokens_run <= budget or (len(each.rows) == 1 and len(longest.segments) == 1)
        assert max_rows is None or len(each.rows) <= max_rows
        for row in each.rows:
            assert len(row.segments) == 1 or len(row) <= limits["row_tokens"]
        if each.context is not None:
            assert len(each.rows) <= limits["cached_rows"]


@given(TEXTS, SHARING, LIMITS, st.integers(1, 60))
def test_the_predicted_cost_is_what_the_passes_hold(
    texts: list[Text], sharing: Sharing, limits: dict[str, Any], budget: int
) -> None:
    with small_limits(**limits):
        plan = planned(texts, sharing=sharing, batch_tokens=budget)
    grids = [
        (len(each.rows), max(sum(s.stop - s.start for s in row.segments) for row in each.rows)) for each in plan.passes
    ]
    assert plan.tokens_run == sum(rows * width for rows, width in grids)
    assert plan.tokens_distinct == sum(segment.stop - segment.start for segment in segments_of(plan))
    assert plan.tokens == sum(map(len, texts))
    largest = max(rows * width for rows, width in grids)
    assert (plan.peak_bytes(3, 8, 2), plan.peak_bytes(3, 8)) == (largest * 3 * 8 * 2, largest * 3 * 8 * 4)


@given(TEXTS, SHARING, LIMITS, st.integers(1, 60), st.randoms())
def test_the_order_of_the_samples_does_not_change_the_cost(
    texts: list[Text], sharing: Sharing, limits: dict[str, Any], budget: int, random: Any
) -> None:
    shuffled = list(texts)
    random.shuffle(shuffled)
    with small_limits(**limits):
        one = planned(texts, sharing=sharing, batch_tokens=budget)
        other = planned(shuffled, sharing=sharing, batch_tokens=budget)
    assert (one.tokens_run, one.tokens_distinct) == (other.tokens_run, other.tokens_distinct)
    assert len(one.passes) == len(other.passes)


@given(TEXTS, LIMITS)
def test_sharing_never_runs_more_distinct_tokens_than_going_without(texts: list[Text], limits: dict[str, Any]) -> None:
    fewest = len({tuple(text[: end + 1]) for text in texts for end in range(len(text))})
    with small_limits(**limits):
        without, cached, packed = (planned(texts, sharing=sharing) for sharing in Sharing)
    assert fewest <= packed.tokens_distinct <= without.tokens_distinct == without.tokens
    assert fewest <= cached.tokens_distinct <= without.tokens


def test_one_row_that_holds_all_runs_each_distinct_token_once() -> None:
    texts = [[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2], [9, 9], [1, 2, 3, 5, 6]]
    with small_limits(min_shared=1, row_tokens=100):
        plan = planned(texts, sharing=Sharing.PACKED)
    assert plan.tokens_distinct == len([1, 2, 3, 4, 5, 6]) + len([9, 9])


def chats(n_personas: int, n_questions: int, header: int = 20, persona: int = 600, rest: int = 30) -> list[Text]:
    """Texts of several personas behind one header, all other tokens distinct."""
    fresh = itertools.count(100)
    beginnings = [list(range(header)) + list(itertools.islice(fresh, persona)) for _ in range(n_personas)]
    return [[*beginning, *itertools.islice(fresh, rest)] for beginning in beginnings for _ in range(n_questions)]


@pytest.mark.parametrize("sharing", [Sharing.CACHED, Sharing.PACKED])
def test_a_long_prompt_is_kept_rather_than_the_short_header_before_it(sharing: Sharing) -> None:
    # Fifty texts share the header, so keeping it saves almost a thousand tokens, and the prompts thousands.
    plan = planned(chats(n_personas=5, n_questions=10), sharing=sharing)
    assert sorted(each.width for each in plan.passes if each.kept) == [620] * 5
    assert plan.tokens_distinct == 5 * (620 + 10 * 30)


def test_a_header_is_kept_where_nothing_longer_is_shared() -> None:
    plan = planned(chats(n_personas=50, n_questions=1), sharing=Sharing.CACHED)
    assert [each.width for each in plan.passes if each.kept] == [20]
    assert plan.tokens_distinct == 20 + 50 * 630


def test_a_prefix_that_saves_little_gets_no_pass_of_its_own() -> None:
    plan = planned(
        chats(n_personas=1, n_questions=2, header=0, persona=rows_module.WORTH_CACHING - 1), sharing=Sharing.CACHED
    )
    assert not any(each.kept for each in plan.passes)
    plan = planned(
        chats(n_personas=1, n_questions=2, header=0, persona=rows_module.WORTH_CACHING), sharing=Sharing.CACHED
    )
    assert [each.kept for each in plan.passes] == [True, False]


def test_no_more_rows_continue_a_prefix_at_once_than_its_keys_are_copied_for() -> None:
    for sharing, n_questions, max_rows in [
        (Sharing.CACHED, 20, None),
        (Sharing.CACHED, 20, 3),
        (Sharing.PACKED, 400, 3),
    ]:
        texts = chats(n_personas=1, n_questions=n_questions, header=0)
        plan = planned(texts, sharing=sharing, batch_tokens=100_000, max_rows=max_rows)
        rows = [len(each.rows) for each in plan.passes if each.context is not None]
        assert max(rows) == (max_rows or rows_module.CACHED_ROWS)
    texts = chats(n_personas=1, n_questions=400, header=0)
    plan = planned(texts, sharing=Sharing.PACKED, batch_tokens=100_000)
    assert max(len(each.rows) for each in plan.passes) == rows_module.CACHED_ROWS


@given(st.lists(st.integers(4, 30), min_size=12, max_size=24), st.integers(1, 40), st.sampled_from([10, 50, 250]))
@example([23, 28, 26, 19, 8, 22, 21, 28, 7, 14, 5, 17, 6, 16, 29], 10, 10)  # where a price a little off misleads
@settings(max_examples=25)
def test_what_continues_a_prefix_is_laid_out_as_cheaply_as_the_best_of_the_shares(
    lengths: list[int], starting: int, keys_a_token: int
) -> None:
    """The price of a pass, written out: starting it, its tokens with padding, and the keys that each of them sees."""
    prefix = 8
    fresh = itertools.count(100)
    texts = [[*range(prefix), *itertools.islice(fresh, length)] for length in lengths]

    def price(shares: tuple[int, ...]) -> float:
        with small_limits(min_shared=1, worth_caching=0, row_tokens=48, cached_rows=4, shares=shares):
            passes = [each for each in planned(texts, sharing=Sharing.PACKED).passes if each.context is not None]
        widths = [(len(each.rows), max(sum(map(len, row.segments)) for row in each.rows)) for each in passes]
        assert widths
        return sum(starting + rows * width * (1 + (prefix + width) / keys_a_token) for rows, width in widths)

    shares = rows_module.ROW_SHARES
    with (
        mock.patch.object(rows_module, "TOKENS_A_PASS", starting),
        mock.patch.object(rows_module, "KEYS_A_TOKEN", keys_a_token),
    ):
        assert price(shares) == pytest.approx(min(price((share,)) for share in shares))


def test_rows_behind_a_prefix_are_as_short_as_they_can_be_without_another_pass_where_attention_is_dear() -> None:
    texts = [[*range(8), *range(100 * n, 100 * n + 6)] for n in range(1, 9)]
    with (
        small_limits(min_shared=1, worth_caching=0, row_tokens=48, cached_rows=4),
        mock.patch.object(rows_module, "TOKENS_A_PASS", 40),
        mock.patch.object(rows_module, "KEYS_A_TOKEN", 10),
    ):
        plan = planned(texts, sharing=Sharing.PACKED)
    # The 48 tokens cost 40 + 48 * (1 + (8 + 48) / 10) = 357 in one row, 184 in four of 12, and 195 in two passes of 6.
    assert [(len(each.rows), each.width) for each in plan.passes if each.context is not None] == [(4, 12)]


def test_rows_that_would_be_too_long_are_not_made_though_they_would_be_cheaper() -> None:
    texts = [[*range(8), *range(100 * n, 100 * n + length)] for n, length in enumerate((6, 6, 6, 2), 1)]
    with (  # the 20 tokens would fit two rows of a single pass, but one of them would have two texts of 6
        small_limits(min_shared=1, worth_caching=0, row_tokens=10, shares=(1,)),
        mock.patch.object(rows_module, "TOKENS_A_PASS", 1000),
    ):
        plan = planned(texts, sharing=Sharing.PACKED, max_rows=2)
    rows = [row for each in plan.passes if each.context is not None for row in each.rows]
    assert sorted(len(row) for row in rows) == [6, 6, 8]


def test_the_longest_come_first_and_rows_are_filled_to_their_last_token() -> None:
    texts = [[*range(8), *range(100 * n, 100 * n + length)] for n, length in enumerate((4, 5, 6, 5), 1)]
    with small_limits(min_shared=1, worth_caching=0, row_tokens=11, shares=()):
        plan = planned(texts, sharing=Sharing.PACKED)
        alone = planned(texts, sharing=Sharing.PACKED, max_rows=1)
    rows = [[len(s) for s in row.segments] for each in plan.passes if each.context is not None for row in each.rows]
    assert rows == [[6, 5], [5, 4]]
    assert [len(each.rows) for each in alone.passes if each.context is not None] == [1, 1]


def test_what_just_fits_a_row_or_the_budget_is_not_cut() -> None:
    pair = chats(n_personas=1, n_questions=2, header=0, persona=40, rest=5)
    with small_limits(row_tokens=50):
        (one,) = planned(pair, sharing=Sharing.PACKED).passes
        assert one.packed and [len(row) for row in one.rows] == [50]
    with small_limits(row_tokens=49):
        assert len(planned(pair, sharing=Sharing.PACKED).passes) > 1
    alike = [[1] * 6, [2] * 6, [3] * 6]
    for budget, rows in ((18, [3]), (17, [2, 1]), (12, [2, 1]), (11, [1, 1, 1])):
        assert [len(each.rows) for each in planned(alike, batch_tokens=budget).passes] == rows


def test_what_branches_share_behind_a_kept_prefix_runs_once_where_a_row_just_holds_it() -> None:
    prefix, fresh = list(range(300)), itertools.count(1000)
    branches = [[*prefix, *itertools.islice(fresh, 20)] for _ in range(2)]
    texts = [[*branch, *itertools.islice(fresh, 5)] for branch in branches for _ in range(2)]
    for row_tokens, behind in ((30, 2 * (20 + 5 + 5)), (29, 4 * (20 + 5))):
        with small_limits(row_tokens=row_tokens):
            plan = planned(texts, sharing=Sharing.PACKED)
        assert plan.tokens_distinct == 300 + behind


def test_texts_that_lie_in_one_row_save_a_prefix_once_and_not_each() -> None:
    # Without the prefix of 200 two texts share a row of 230, and the third takes 210; behind it 30 and 10 are left.
    prefix, fresh = list(range(200)), itertools.count(1000)
    branch = [*prefix, *itertools.islice(fresh, 20)]
    texts = [[*branch, *itertools.islice(fresh, 5)] for _ in range(2)] + [[*prefix, *itertools.islice(fresh, 10)]]
    for worth_caching, kept in ((200, True), (201, False)):
        with small_limits(worth_caching=worth_caching, row_tokens=230):
            plan = planned(texts, sharing=Sharing.PACKED)
        assert any(each.kept for each in plan.passes) is kept
        assert plan.tokens_distinct == (240 if kept else 440)


def test_a_text_that_others_continue_runs_whole_where_nothing_is_kept() -> None:
    texts = [list(range(10)), [*range(10), 20, 21], [*range(10), 30, 31, 32]]
    with small_limits(worth_caching=1000):
        plan = planned(texts, sharing=Sharing.CACHED)
    segments = sorted((each.members, each.start, each.stop) for each in segments_of(plan))
    assert segments == [((0,), 0, 10), ((1,), 0, 12), ((2,), 0, 13)]


def test_a_pass_is_packed_from_two_segments_in_a_row_on() -> None:
    one, other = Segment((0,), 0, 3), Segment((1,), 0, 2)
    assert Pass((Row((one,)), Row((one, other)))).packed
    assert not Pass((Row((one,)), Row((other,)))).packed


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=6),
    st.integers(0, 6),
)
@settings(max_examples=60)
def test_no_other_choice_of_what_to_keep_would_run_fewer_tokens(texts: list[Text], worth_caching: int) -> None:
    """All choices tried: prefixes of which none begins another, each run once, and every text behind its own."""
    distinct = {tuple(text) for text in texts}
    shared = {text[:end] for text in distinct for end in range(1, len(text) + 1)}
    shared = {prefix for prefix in shared if sum(text[: len(prefix)] == prefix for text in distinct) > 1}

    def price(kept: tuple[Any, ...]) -> int:
        saved = sum(len(prefix) for text in distinct for prefix in kept if text[: len(prefix)] == prefix)
        return sum(map(len, distinct)) - saved + sum(len(prefix) + worth_caching for prefix in kept)

    def apart(kept: tuple[Any, ...]) -> bool:
        return not any(a[: len(b)] == b for a, b in itertools.permutations(kept, 2))

    choices = [kept for n in range(4) for kept in itertools.combinations(shared, n) if apart(kept)]
    with small_limits(min_shared=1, worth_caching=worth_caching):
        plan = planned(texts, sharing=Sharing.CACHED)
    paid = plan.tokens_distinct + worth_caching * sum(each.kept for each in plan.passes)
    assert paid == min(map(price, choices))


def test_a_branch_behind_a_prefix_that_is_too_long_for_a_row_is_cut_into_its_texts() -> None:
    prefix, branch = list(range(20)), [30, 31, 32, 33]
    ends = [branch, [*branch, *range(40, 46)], [*branch, *range(50, 56)], [60, 61, 62]]  # the first is part of two
    with small_limits(min_shared=1, worth_caching=0, row_tokens=10):
        plan = planned([prefix + end for end in ends], sharing=Sharing.PACKED)
    behind = [each for each in plan.passes if each.context is not None]
    segments = [segment for each in behind for row in each.rows for segment in row.segments]
    assert sorted((each.members, each.start, each.stop) for each in segments) == [
        ((0,), 20, 24),
        ((1,), 20, 30),
        ((2,), 20, 30),
        ((3,), 20, 23),
    ]
    assert all(len(row) <= 10 for each in behind for row in each.rows)


def test_a_text_that_another_continues_is_kept_where_that_saves_enough() -> None:
    plan = planned([list(range(300)), list(range(305))], sharing=Sharing.CACHED)
    assert [(each.kept, each.tokens_run) for each in plan.passes] == [(True, 300), (False, 5)]


def test_a_prefix_is_weighed_against_what_its_branches_would_run_and_not_against_all_of_it_once() -> None:
    # Four texts of 115 tokens: 460 without keeping anything, 100 + 4 * 15 with the beginning that all share.
    beginning, fresh = list(range(100)), itertools.count(1000)
    branches = [list(itertools.islice(fresh, 10)) for _ in range(2)]
    texts = [beginning + branch + list(itertools.islice(fresh, 5)) for branch in branches for _ in range(2)]
    plan = planned(texts, sharing=Sharing.CACHED)
    assert [each.width for each in plan.passes if each.kept] == [100]
    assert plan.tokens_distinct == 160


def test_contrast_pairs_lie_side_by_side_each_with_its_question_once() -> None:
    pairs = chats(n_personas=6, n_questions=2, header=0, persona=40, rest=5)
    plan = planned(pairs, sharing=Sharing.PACKED)
    assert all(len(row.segments) == 3 and len(row) == 40 + 2 * 5 for each in plan.passes for row in each.rows)
    assert plan.tokens_run == plan.tokens_distinct == 6 * 50


@pytest.mark.parametrize("sharing", list(Sharing))
def test_thousands_of_nested_texts_do_not_reach_the_recursion_limit(sharing: Sharing) -> None:
    with small_limits(min_shared=1, worth_caching=20, row_tokens=64):
        plan = planned([list(range(length)) for length in range(1, 3001)], sharing=sharing)
    assert plan.tokens == 3000 * 3001 // 2
    assert sum(segment.stop == 3000 for segment in segments_of(plan)) == 1


@pytest.mark.timeout(600)  # half a second when nothing else runs; far longer in quadratic time
@pytest.mark.parametrize("sharing", list(Sharing))
def test_two_million_tokens_are_planned_in_good_time(sharing: Sharing) -> None:
    texts = torch.cat([torch.arange(900).expand(2000, -1), torch.randint(0, 9999, (2000, 100))], dim=1)
    masks = torch.ones(1, 1000, dtype=torch.bool)
    samples = [Sample(str(index), text, masks) for index, text in enumerate(texts)]
    plan = make_plan(samples, sharing=sharing)
    assert plan.tokens_distinct <= (2_000_000 if sharing is Sharing.NONE else 900 + 2000 * 100)
