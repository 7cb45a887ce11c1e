"""Contrast pairs: what is accepted, what is refused and how, files, splits, the bundled behaviours."""

import json
import os
import string
import subprocess
import sys
import tempfile
from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_persona.data import behaviors
from tl_persona.data.behaviors import BEHAVIORS, load_pairs
from tl_persona.data.contrast import ROLES, ContrastPair, ContrastPairDataset, as_pairs
from tl_persona.errors import InputError, NotStoredError, StoreError

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Ready?"}
YES = {"role": "assistant", "content": "Yes."}
NO = {"role": "assistant", "content": "No."}

words = st.text(string.ascii_letters + 'äß漢😀"\\\n ', min_size=1).filter(str.strip)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text("aä\n"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc"), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def pair_dicts(draw: st.DrawFn) -> dict[str, Any]:
    sides: list[Any] = draw(st.lists(words, min_size=2, max_size=2, unique=True))
    if draw(st.booleans()):
        prefix = draw(st.lists(st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": words})))
        sides = [[*prefix, {"role": "assistant", "content": text}] for text in sides]
    metadata = draw(st.dictionaries(st.text("abc"), json_values, max_size=2))
    return {"positive": sides[0], "negative": sides[1], "metadata": metadata}


@dataclass
class ForeignPair:
    """A pair as another library has it."""

    positive: str
    negative: str
    metadata: dict[str, Any] = field(default_factory=dict)


class ForeignDataset(list[ForeignPair]):
    """A dataset as another library has it."""

    behavior = "calm"
    description = "calm against excited"


def numbered(n_pairs: int) -> ContrastPairDataset:
    return ContrastPairDataset("demo", [ContrastPair(f"yes {i}", f"no {i}") for i in range(n_pairs)], "about")


def test_a_text_pair_keeps_its_sides_and_metadata() -> None:
    pair = ContrastPair("Yes.", "No.", {"topic": "t"})
    assert (pair.positive, pair.negative, pair.metadata, pair.is_chat) == ("Yes.", "No.", {"topic": "t"}, False)
    assert pair.shared_turns == ()


def test_a_chat_given_as_a_list_or_a_tuple_is_the_same_pair() -> None:
    assert ContrastPair([USER, YES], [USER, NO]) == ContrastPair((USER, YES), (USER, NO))


def test_a_pair_cannot_be_changed_afterwards() -> None:
    messages, metadata = [dict(USER), dict(YES)], {"a": 1}
    pair = ContrastPair(messages, [USER, NO], metadata)
    messages[0]["content"] = "changed"
    metadata["a"] = 2
    assert pair.positive == (USER, YES)
    assert pair.metadata == {"a": 1}
    with pytest.raises(FrozenInstanceError):
        pair.positive = "other"  # type: ignore[misc]


def test_shared_turns_are_the_common_beginning() -> None:
    assert ContrastPair([SYSTEM, USER, YES], [SYSTEM, USER, NO]).shared_turns == (SYSTEM, USER)
    assert ContrastPair([SYSTEM, USER, YES], [USER, NO]).shared_turns == ()
    assert ContrastPair([USER, YES], [USER, YES, USER, NO]).shared_turns == (USER, YES)


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [
        ("", "No.", "the positive text is empty"),
        ("Yes.", " \n", "the negative text is empty"),
        ("Yes.", "Yes.", "identical"),
        ([USER, YES], [USER, YES], "identical"),
        ([USER, YES], "No.", "chat and text"),
        ([], [USER, NO], "the positive side has no messages"),
        ([USER, YES], [USER], "the negative side ends with role 'user'"),
        ([{"role": "tool", "content": "x"}, YES], [USER, NO], "message 0 of the positive side has role 'tool'"),
        ([USER, {"role": "assistant", "content": ""}], [USER, NO], "message 1 of the positive side is empty"),
        ([USER, {"role": "assistant", "text": "x"}], [USER, NO], "needs 'role' and 'content'"),
        ([USER, {**YES, "name": "x"}], [USER, NO], "nothing else"),
        ("bad \ud800", "No.", "not valid Unicode at character 4"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_bad_pair_is_refused_with_one_clear_message(positive: Any, negative: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ContrastPair(positive, negative)


def test_a_bad_pair_in_a_list_is_named_by_its_index() -> None:
    with pytest.raises(InputError, match=r"pair 1: the two sides are identical"):
        as_pairs([{"positive": "a", "negative": "b"}, {"positive": "a", "negative": "a"}])
    with pytest.raises(InputError, match=r"pair 0: no 'negative' in \{'positive': 'a'\}"):
        as_pairs([{"positive": "a"}])
    data = numbered(3)
    with pytest.raises(InputError, match="pair 3: the positive text is empty"):
        data.add_pair("", "b")
    assert len(data) == 3


def test_dicts_pairs_and_foreign_objects_give_the_same_dataset() -> None:
    expected = ContrastPairDataset("demo", [ContrastPair("a", "b", {"k": 1}), ContrastPair("c", "d")])
    dicts = [{"positive": "a", "negative": "b", "metadata": {"k": 1}}, {"positive": "c", "negative": "d"}]
    foreign = [ForeignPair("a", "b", {"k": 1}), ForeignPair("c", "d")]
    assert as_pairs(dicts, "demo") == expected
    assert as_pairs(foreign, "demo") == expected
    assert as_pairs(list(expected), "demo") == expected
    assert as_pairs(expected) == expected


def test_a_list_without_a_name_is_unknown_and_a_foreign_dataset_keeps_its_own() -> None:
    assert as_pairs([{"positive": "a", "negative": "b"}]).behavior == "unknown"
    found = as_pairs(ForeignDataset([ForeignPair("a", "b")]))
    assert (found.behavior, found.description) == ("calm", "calm against excited")
    assert as_pairs(found, "other").behavior == "other"


@pytest.mark.parametrize("nothing", [[], ContrastPairDataset("demo")])
def test_no_pairs_at_all_are_refused(nothing: Any) -> None:
    with pytest.raises(InputError, match="there are no contrast pairs"):
        as_pairs(nothing)


@pytest.mark.parametrize("single", ["text", {"positive": "a", "negative": "b"}])
@pytest.mark.usefixtures("unchecked")
def test_a_single_pair_is_not_taken_for_a_list_of_pairs(single: Any) -> None:
    with pytest.raises(InputError, match="give a ContrastPairDataset or a list of pairs"):
        as_pairs(single)


def test_add_len_iterate_and_index_follow_the_order_of_adding() -> None:
    data = ContrastPairDataset("demo")
    data.add(ContrastPair("a", "b"))
    data.add_pair("c", "d", topic="t")
    assert len(data) == 2
    assert [pair.positive for pair in data] == data.positives == ["a", "c"]
    assert data.negatives == ["b", "d"]
    assert data[-1] == ContrastPair("c", "d", {"topic": "t"})
    assert data[:1] == [ContrastPair("a", "b")]


def test_the_callers_list_is_not_shared() -> None:
    mine = [ContrastPair("a", "b")]
    data = ContrastPairDataset("demo", mine)
    data.add_pair("c", "d")
    assert len(mine) == 1


@settings(max_examples=40, deadline=None)
@given(words, st.lists(pair_dicts(), max_size=4), words)
def test_save_then_load_is_identity(behavior: str, pairs: list[dict[str, Any]], description: str) -> None:
    data = ContrastPairDataset(behavior, pairs, description)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new" / "pairs.json"
        data.save(path)
        assert ContrastPairDataset.load(path) == data


def test_a_file_written_by_hand_loads(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(
        '{"behavior": "calm", "pairs": [{"positive": [{"role": "user", "content": "Ready?"}, '
        '{"role": "assistant", "content": "Yes."}], "negative": [{"role": "user", "content": "Ready?"}, '
        '{"role": "assistant", "content": "No."}]}, {"positive": "a", "negative": "b", "metadata": {"k": 1}}]}'
    )
    expected = [ContrastPair([USER, YES], [USER, NO]), ContrastPair("a", "b", {"k": 1})]
    assert ContrastPairDataset.load(path) == ContrastPairDataset("calm", expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "expected an object with 'behavior'"),
        (b'{"behavior": "x", "pairs": {}}', "a list 'pairs'"),
        (b'{"pairs": []}', "behavior is ''"),
        (b'{"behavior": ["x"], "pairs": []}', "behavior is \\['x'\\]; name what the positive side shows"),
        (b'{"behavior": "x", "pairs": [{"positive": "a", "negative": ""}]}', "pair 0: the negative text is empty"),
        (b'{"behavior": "x", "pairs": [7]}', "pair 0: no 'positive' in 7"),
        (b'{"behavior": "x", "pairs": [{"positive": "a", "negative": "b"}, []]}', r"pair 1: no 'positive' in \[\]"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_bad_file_is_named_in_the_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "pairs.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        ContrastPairDataset.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(NotStoredError, match="no such file"):
        ContrastPairDataset.load(tmp_path / "none.json")
    with pytest.raises(StoreError, match="cannot be read"):
        ContrastPairDataset.load(tmp_path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError, match="pipe or a device"):
        ContrastPairDataset.load(tmp_path / "pipe")


def test_a_description_or_metadata_that_no_file_can_hold_is_refused_and_so_is_a_folder_that_cannot_be_made(
    tmp_path: Path,
) -> None:
    pairs = [{"positive": "a", "negative": "b"}]
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for dataset in (
        ContrastPairDataset("calm", pairs, "\ud800"),
        ContrastPairDataset("calm\ud800", pairs),
        ContrastPairDataset("calm", [{**pairs[0], "metadata": {"deep": deep}}]),
    ):
        with pytest.raises(InputError, match="has no JSON form"):
            dataset.save(tmp_path / "pairs.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot create the folder"):
        ContrastPairDataset("calm", pairs).save(tmp_path / "file" / "pairs.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object()])
def test_metadata_that_json_cannot_hold_is_refused_and_the_old_file_stays(tmp_path: Path, value: object) -> None:
    path = tmp_path / "pairs.json"
    numbered(1).save(path)
    with pytest.raises(InputError, match="no JSON form"):
        ContrastPairDataset("demo", [ContrastPair("a", "b", {"k": value})]).save(path)
    assert ContrastPairDataset.load(path) == numbered(1)


def test_the_digest_follows_the_sides_and_nothing_else() -> None:
    base = ContrastPairDataset("demo", [ContrastPair("a", "b"), ContrastPair("c", "d")])
    renamed = ContrastPairDataset("other", [ContrastPair("a", "b", {"k": 1}), ContrastPair("c", "d")], "text")
    assert base.digest() == renamed.digest()
    different = [
        [ContrastPair("b", "a"), ContrastPair("c", "d")],
        [ContrastPair("c", "d"), ContrastPair("a", "b")],
        [ContrastPair("a", "b")],
        [ContrastPair("a", "bc"), ContrastPair("c", "d")],
        [ContrastPair([USER, YES], [USER, NO]), ContrastPair("c", "d")],
    ]
    digests = {ContrastPairDataset("demo", changed).digest() for changed in different}
    assert len(digests | {base.digest()}) == len(different) + 1


def test_the_digest_does_not_depend_on_the_order_of_message_keys() -> None:
    turned = {"content": "Yes.", "role": "assistant"}
    one, other = ContrastPair([USER, YES], [USER, NO]), ContrastPair([USER, turned], [USER, NO])
    assert ContrastPairDataset("demo", [one]).digest() == ContrastPairDataset("demo", [other]).digest()


@settings(deadline=None)
@given(st.integers(2, 30), st.data())
def test_a_split_deals_every_pair_to_one_part_in_order(n_pairs: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, n_pairs - 1))
    seed = data.draw(st.integers(0, 2**32))
    whole = numbered(n_pairs)
    rest, test = whole.split(size, seed)
    assert len(test) == size
    order = {pair.positive: index for index, pair in enumerate(whole)}
    for part in (rest, test):
        places = [order[pair.positive] for pair in part]
        assert places == sorted(places)
        assert (part.behavior, part.description) == ("demo", "about")
    assert sorted([*rest.positives, *test.positives]) == sorted(whole.positives)
    assert whole.split(size, seed) == (rest, test)


def test_a_share_is_rounded_and_seeds_draw_differently() -> None:
    whole = numbered(30)
    assert len(whole.split(0.25)[1]) == 8  # 7.5, rounded to even
    assert len({whole.split(0.5, seed)[1].digest() for seed in range(10)}) > 1


@pytest.mark.parametrize("size", [0, 10, 11, -1, 0.0, 1.0, 0.01, 0.99, 2.5, True])
def test_a_split_that_leaves_a_part_empty_is_refused(size: float) -> None:
    with pytest.raises(InputError, match="of 10 pairs out"):
        numbered(10).split(size)


@pytest.mark.parametrize("behavior", BEHAVIORS)
def test_a_bundled_behaviour_is_well_formed(behavior: str) -> None:
    data = load_pairs(behavior)
    assert data.behavior == behavior
    assert data.description
    assert len(data) >= 24
    assert all(pair.is_chat for pair in data)
    prefixes = [json.dumps(pair.shared_turns) for pair in data]
    assert len(set(prefixes)) == len(data), "two pairs share their user turn"
    for pair in data:
        assert [turn["role"] for turn in pair.shared_turns][-1] == "user"
        assert len(pair.positive) == len(pair.negative) == len(pair.shared_turns) + 1
    assert getattr(behaviors, f"load_{behavior}_pairs")() == data


def test_the_length_of_the_answer_does_not_tell_the_sides_apart() -> None:
    for behavior in set(BEHAVIORS) - {"conciseness"}:  # there the length is the behaviour
        lengths = [
            (len(pair.positive[-1]["content"]), len(pair.negative[-1]["content"]))  # type: ignore[call-overload, index]
            for pair in load_pairs(behavior)
        ]
        positive, negative = (sum(side) for side in zip(*lengths, strict=True))
        assert abs(positive - negative) < 0.05 * (positive + negative) / 2, behavior


def test_other_names_of_the_reference_load_the_same_pairs() -> None:
    assert behaviors.load_hierarchy_pairs() == load_pairs("instruction_hierarchy")
    assert behaviors.get_refusal_pairs() == load_pairs("refusal")


def test_an_unknown_behaviour_is_refused_with_near_names() -> None:
    with pytest.raises(InputError, match="did you mean refusal"):
        load_pairs("refusals")
    with pytest.raises(InputError, match="bundled are refusal, uncertainty"):
        load_pairs("xyz")
    with pytest.raises(InputError):
        load_pairs("../contrast/refusal")


def test_importing_contrast_does_not_load_torch() -> None:
    code = "import sys, tl_persona.data.behaviors as b; b.load_pairs('humor'); print('torch' in sys.modules)"
    folder = Path(behaviors.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr
