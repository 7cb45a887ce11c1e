"""Records, data sets and splits, against naive readers; every message names the place of the fault."""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tl_persona.data.jsonl as jsonl
from tl_persona.data.dataset import PersonaDataset, related_frq_qids
from tl_persona.data.personas import BASELINE_PERSONA_ID, Persona, QAPair, answer_text, question_text, system_prompt
from tl_persona.errors import InputError

Row = dict[str, Any]


def person(id: str, **changes: Any) -> Row:
    names = {"first_name": "Ines", "last_name": "Okafor"}
    return {"id": id, "persona": names, "templated_view": f"Name: {id}", "biography_view": f"{id} was born.", **changes}


def row(id: str, qid: str, **changes: Any) -> Row:
    fixed = {"type": "explicit", "item_type": "frq", "scope": "individual", "question": "Where?", "answer": "Here."}
    return {"id": id, "qid": qid, **fixed, **changes}


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


def dataset(folder: Path, rows: list[Row], people: tuple[str, ...] = ("ana", "bo")) -> PersonaDataset:
    personas = write(folder / "personas.jsonl", [person(id) for id in people])
    return PersonaDataset.from_jsonl(personas, write(folder / "qa.jsonl", rows))


# --- records -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "name"),
    [
        ({"first_name": "Ines", "last_name": "Okafor"}, "Ines Okafor"),
        ({"first_name": "Assistant", "last_name": ""}, "Assistant"),
        ({"last_name": "Okafor"}, "Okafor"),
        ({"first_name": None, "last_name": " "}, "p7"),
        ({}, "p7"),
    ],
)
def test_a_persona_is_called_by_its_names_or_else_its_id(names: Row, name: str) -> None:
    assert Persona("p7", names, "Name: x", "").name == name


def test_records_cannot_be_changed_and_lists_given_to_one_become_tuples() -> None:
    lists: list[Any] = [["Yes", "No"], ["f1"]]
    pair = QAPair("q", "explicit", "mcq", "shared", "Tea?", "Yes", lists[0], 0, "b", lists[1], "ana")
    assert (pair.choices, pair.related_frq_qids, pair.id) == (("Yes", "No"), ("f1",), "ana")
    assert (
        len({pair, QAPair("q", "explicit", "mcq", "shared", "Tea?", "Yes", ("Yes", "No"), 0, "b", ("f1",), "ana")}) == 1
    )
    with pytest.raises(AttributeError):
        pair.answer = "No"  # type: ignore[misc]


# --- what is said --------------------------------------------------------------------------------------------------


@dataclass
class ForeignPersona:
    id: str
    name: str
    diary_view: str
    letters_view: str = ""


@dataclass
class ForeignPair:
    qid: str = "f9"
    type: str = "explicit"
    item_type: str = "mcq"
    question: str = "Which drink?"
    answer: str = "Tea"
    choices: list[str] = field(default_factory=lambda: ["Milk", "Tea", "Rum"])
    correct_choice_index: int | None = 1


def test_a_multiple_choice_record_of_another_class_is_lettered_and_answered_by_its_letter() -> None:
    lines = question_text(ForeignPair()).split("\n")
    assert lines[:5] == ["Which drink?", "", "A. Milk", "B. Tea", "C. Rum"]
    assert lines[5] == ""
    assert len(lines) == 7
    assert "letter" in lines[6]
    assert answer_text(ForeignPair()) == "B"


@pytest.mark.parametrize("changes", [{"item_type": "frq"}, {"correct_choice_index": None}])
def test_other_records_are_said_word_for_word(changes: Row) -> None:
    pair = ForeignPair(question=" Which\ndrink? ", answer="Tea, \n", **changes)
    assert (question_text(pair), answer_text(pair)) == (" Which\ndrink? ", "Tea, \n")


@given(st.integers(1, 26).flatmap(lambda count: st.tuples(st.just(count), st.integers(0, count - 1))))
def test_the_letter_of_the_answer_stands_before_the_correct_choice(case: tuple[int, int]) -> None:
    count, index = case
    pair = ForeignPair(choices=[f"choice {i}" for i in range(count)], correct_choice_index=index)
    assert f"\n{answer_text(pair)}. choice {index}\n" in question_text(pair)


@pytest.mark.parametrize(
    ("say", "changes", "seen"),
    [
        (question_text, {"question": " \n"}, "question is empty"),
        (question_text, {"question": "", "item_type": "frq"}, "question is empty"),
        (answer_text, {"answer": " ", "item_type": "frq"}, "answer is empty"),
        (answer_text, {"correct_choice_index": 3}, "3 is none of its 3"),
        (question_text, {"correct_choice_index": -1}, "-1 is none of its 3"),
        (question_text, {"choices": []}, "1 is none of its 0"),
        (answer_text, {"choices": ["x"] * 27}, "27 choices"),
    ],
)
def test_what_cannot_be_said_is_refused_by_sample(say: Callable[[Any], str], changes: Row, seen: str) -> None:
    with pytest.raises(InputError, match=r"sample 'f9'.*" + seen):
        say(ForeignPair(**changes))


def test_a_system_prompt_is_an_instruction_and_then_the_view_of_the_variant() -> None:
    ana = Persona("ana", {}, "Name: Ana", "Ana was born in Graz.")
    templated, biography = system_prompt(ana, "templated"), system_prompt(ana, "biography")
    assert templated.removesuffix("Name: Ana") == biography.removesuffix("Ana was born in Graz.") != templated
    assert "person described" in templated
    assert system_prompt(ForeignPersona("x", "X", "Dear diary"), "diary").endswith("\n\nDear diary")


def test_the_baseline_speaks_its_view_and_nothing_else() -> None:
    baseline = Persona(BASELINE_PERSONA_ID, {}, "You are a helpful assistant.", "You help.")
    assert system_prompt(baseline, "templated") == "You are a helpful assistant."


def test_an_unknown_or_empty_view_is_refused_with_the_views_there_are() -> None:
    with pytest.raises(InputError, match=r"'x' has no variant 'biografy'; it has: diary, letters"):
        system_prompt(ForeignPersona("x", "X", "Dear diary"), "biografy")
    with pytest.raises(InputError, match=r"'x': its letters view is empty"):
        system_prompt(ForeignPersona("x", "X", "Dear diary"), "letters")


# --- reading -------------------------------------------------------------------------------------------------------

IDS = ("ana", "an", 'q"uote', "back\\slash", "Zoë", "日本", "a/b", "id", "tab\t")
LAYOUTS = ("id first", "id last", "nested id first", "tight")


def naive_pairs(path: Path, persona_id: str) -> list[QAPair]:
    """Every line by `json.loads`, nothing clever."""
    pairs = []
    for line in path.read_text(encoding="utf-8-sig").split("\n"):
        if not line.strip() or json.loads(line)["id"] != persona_id:
            continue
        raw = json.loads(line)
        names = ("qid", "type", "item_type", "scope", "question", "answer")
        pairs.append(
            QAPair(
                **{name: raw[name] for name in names},
                choices=tuple(raw.get("choices") or ()),
                correct_choice_index=raw.get("correct_choice_index"),
                bank_id=raw.get("bank_id") or None,
                related_frq_qids=tuple(raw.get("related_frq_qids") or ()),
                id=raw["id"],
            )
        )
    return pairs


def written_line(number: int, id: str, layout: str, ascii_only: bool, text: str) -> str:
    raw = row(id, f"q{number}", question=text, answer=f'{text}, "id": "ana", {{"id": "ana"}}', tags=["x"], choices=None)
    if layout != "id first" and layout != "tight":
        raw = {**{key: value for key, value in raw.items() if key != "id"}, "id": id}
    if layout == "nested id first":
        raw = {"source": {"id": "ana"}, **raw}
    return json.dumps(raw, ensure_ascii=ascii_only, separators=(",", ":") if layout == "tight" else None)


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.tuples(st.sampled_from(IDS), st.sampled_from(LAYOUTS), st.booleans(), st.text(max_size=8))),
    ending=st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n"]),
    mark=st.booleans(),
    last_ending=st.booleans(),
)
def test_the_reader_finds_what_a_naive_reader_finds(
    lines: list[tuple[str, str, bool, str]], ending: str, mark: bool, last_ending: bool
) -> None:
    safe = [
        (id, layout, ascii_only, text.encode("utf-8", "replace").decode()) for id, layout, ascii_only, text in lines
    ]
    content = ending.join(written_line(number, *line) for number, line in enumerate(safe)) + ending * last_ending
    with tempfile.TemporaryDirectory() as folder:
        personas = write(Path(folder, "personas.jsonl"), [person(id) for id in IDS])
        qa = Path(folder, "qa.jsonl")
        qa.write_bytes(content.encode("utf-8-sig" if mark else "utf-8"))
        data = PersonaDataset.from_jsonl(personas, qa)
        for id in IDS:
            assert data.get_qa(id) == naive_pairs(qa, id)


def test_an_id_escaped_letter_by_letter_is_found(tmp_path: Path) -> None:
    data = dataset(tmp_path, [row("bo", "q1")])
    escaped = json.dumps(row("ana", "q2")).replace('"ana"', r'"\u0061n\u0061"')
    (tmp_path / "qa.jsonl").write_text(escaped)
    assert [pair.qid for pair in data.get_qa("ana")] == ["q2"]


def test_rows_of_other_personas_are_not_decoded(tmp_path: Path) -> None:
    data = dataset(tmp_path, [row("ana", "q1"), row("bo", "q2"), row("cy", "q3"), row("ana", "q4")])
    qa = tmp_path / "qa.jsonl"
    lines = qa.read_text().splitlines()
    qa.write_text("\n".join([lines[0], lines[1][:40], lines[2][:40], lines[3]]))
    assert [pair.qid for pair in data.get_qa("ana")] == ["q1", "q4"]
    with pytest.raises(InputError, match=r"qa\.jsonl, line 2: not valid JSON"):
        data.get_qa("bo")


def test_the_questions_are_not_opened_before_one_is_asked_for(tmp_path: Path) -> None:
    data = PersonaDataset.from_jsonl(write(tmp_path / "p.jsonl", [person("ana")]), tmp_path / "none.jsonl")
    assert data.persona_ids == ("ana",)
    with pytest.raises(InputError, match=r"none\.jsonl: cannot be read \(No such file"):
        data.get_qa("ana")


def test_a_file_changed_after_indexing_is_refused(tmp_path: Path) -> None:
    data = dataset(tmp_path, [row("ana", "q1"), row("ana", "q2")])
    assert len(data.get_qa("ana")) == 2
    write(tmp_path / "qa.jsonl", [row("bo", "longer"), row("ana", "q1")])
    with pytest.raises(InputError, match=r"qa\.jsonl: the file was changed"):
        data.get_qa("ana")


def test_a_data_set_lists_its_personas_in_file_order_and_keeps_the_wanted_ones(tmp_path: Path) -> None:
    personas = write(tmp_path / "p.jsonl", [person("cy"), person("ana"), person("bo")])
    qa = write(tmp_path / "q.jsonl", [row("bo", "q1"), row("cy", "q2"), row("ana", "q3")])
    every = PersonaDataset.from_jsonl(personas, qa)
    assert every.persona_ids == ("cy", "ana", "bo") == tuple(each.id for each in every)
    assert (len(every), every[1], every.personas[2]) == (3, every.get_persona("ana"), every.get_persona("bo"))
    some = PersonaDataset.from_jsonl(personas, qa, persona_ids=["bo", "cy"])
    assert some.persona_ids == ("cy", "bo")
    assert [pair.qid for pair in some.get_qa("bo")] == ["q1"]
    with pytest.raises(InputError, match="no persona 'ana'"):
        some.get_qa("ana")
    with pytest.raises(InputError, match="no persona 'anna'; did you mean 'ana'"):
        PersonaDataset.from_jsonl(personas, qa, persona_ids=["anna"])


def test_filters_keep_rows_of_that_kind_in_file_order(tmp_path: Path) -> None:
    kinds = [(t, i, s) for t in ("explicit", "implicit") for i in ("mcq", "frq") for s in ("individual", "shared")]
    rows = [row("ana", f"q{n}", type=t, item_type=i, scope=s) for n, (t, i, s) in enumerate(kinds * 2)]
    data = dataset(tmp_path, rows)

    def qids(**filters: str) -> list[str]:
        return [pair.qid for pair in data.get_qa("ana", **filters)]

    assert qids() == [f"q{n}" for n in range(16)]
    assert qids(type="implicit") == [f"q{n}" for n in (4, 5, 6, 7, 12, 13, 14, 15)]
    assert qids(item_type="frq", scope="shared") == ["q3", "q7", "q11", "q15"]
    assert qids(type="explicit", item_type="mcq", scope="individual") == ["q0", "q8"]
    assert data.get_qa("bo") == []
    with pytest.raises(InputError, match="unknown type 'implict'; did you mean 'implicit'"):
        qids(type="implict")


# --- bad files -----------------------------------------------------------------------------------------------------

GOOD = json.dumps(row("ana", "q1"))


def changed(**changes: Any) -> str:
    return json.dumps({key: value for key, value in {**row("ana", "q2"), **changes}.items() if value != "absent"})


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        (changed(question=3), r"field `question`: Expected `str`, got `int`"),
        (changed(answer="absent"), r"missing required field `answer`"),
        (changed(type="explict"), r"field `type`: Invalid enum value 'explict'"),
        (changed(item_type="essay"), r"field `item_type`: Invalid enum value 'essay'"),
        (changed(scope=""), r"field `scope`: Invalid enum value ''"),
        (changed(choices=["a", 4]), r"field `choices\[1\]`: Expected `str`, got `int`"),
        (changed(correct_choice_index=True), r"field `correct_choice_index`: Expected `int \| null`, got `bool`"),
        (changed(qid=""), r"field `qid`: Expected `str` of length >= 1"),
        (changed(id=7), r"field `id`: Expected `str`, got `int`"),
        (changed(id="absent"), r"missing required field `id`"),
        (changed(qid="q1"), r"persona 'ana' has a second question with the qid 'q1'"),
        (changed()[:-1], r"not valid JSON: .*truncated.*it begins with .*ana"),
        (changed() + " x", r"not valid JSON"),
        ("[1, 2]", r"Expected `object`, got `array`"),
        ("qid,question", r"not valid JSON: .*it begins with 'qid,question'"),
        (changed(tags="TAGS").replace('"TAGS"', "[" * 10**5 + "]" * 10**5), r"nested too deeply"),
        (changed()[:-1] + ', "id": "bo"}', r"field `id` is given twice: 'ana' and 'bo'"),
    ],
)
def test_a_bad_qa_line_is_reported_by_file_line_and_field(tmp_path: Path, line: str, seen: str) -> None:
    data = dataset(tmp_path, [])
    (tmp_path / "qa.jsonl").write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(InputError, match=rf"qa\.jsonl, line 3: .*{seen}"):
        data.get_qa("ana")


def test_text_that_is_not_utf8_is_reported(tmp_path: Path) -> None:
    data = dataset(tmp_path, [])
    (tmp_path / "qa.jsonl").write_bytes(GOOD.encode() + b"\n" + changed(answer="Zo").encode().replace(b"Zo", b"Zo\xeb"))
    with pytest.raises(InputError, match=r"qa\.jsonl, line 2: not UTF-8"):
        data.get_qa("ana")


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        (json.dumps(person("ana")), r"a second persona with the id 'ana'"),
        (json.dumps(person("")), r"field `id`: Expected `str` of length >= 1"),
        (json.dumps(person("bo", persona="Bo")), r"field `persona`: Expected `object`, got `str`"),
        (json.dumps(person("bo", templated_view=None)), r"field `templated_view`: Expected `str`, got `null`"),
        (json.dumps(person("bo", persona={"x": 0})).replace("0", "[" * 10**5 + "]" * 10**5), r"nested too deeply"),
    ],
)
def test_a_bad_persona_line_is_reported_when_the_data_set_is_opened(tmp_path: Path, line: str, seen: str) -> None:
    path = tmp_path / "people.jsonl"
    path.write_text(json.dumps(person("ana")) + "\n" + line)
    with pytest.raises(InputError, match=rf"people\.jsonl, line 2: .*{seen}"):
        PersonaDataset.from_jsonl(path, tmp_path / "qa.jsonl")


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset(tmp_path, [row("ana", "q1"), row("ana", "q2", answer="x" * 500)])
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 400)
    with pytest.raises(InputError, match=r"qa\.jsonl, line 2: longer than 400 bytes"):
        data.get_qa("ana")


def test_a_folder_given_as_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        PersonaDataset.from_jsonl(tmp_path, tmp_path)


def test_a_pipe_or_a_name_no_file_can_have_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, seen in ((tmp_path / "pipe", "pipe or a device"), ("nul\0", "null"), ("x" * 300, "too long")):
        with pytest.raises(InputError, match=f"cannot be read .*{seen}"):
            PersonaDataset.from_jsonl(path, path)
    with pytest.raises(InputError, match="neither a local folder nor available"):
        PersonaDataset.from_hub("x" * 300)


# --- the split -----------------------------------------------------------------------------------------------------

qa_rows = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(["explicit", "implicit"]),
            "item_type": st.sampled_from(["mcq", "frq"]),
            "scope": st.sampled_from(["individual", "shared"]),
            "bank_id": st.sampled_from([None, "", "b1", "b2", "b3"]),
            "related_frq_qids": st.none() | st.lists(st.integers(0, 20).map(lambda n: f"q{n}"), max_size=2),
        }
    ),
    max_size=20,
)


def naive_split(rows: list[Row], n_train: int | None, seed: int | None) -> tuple[list[str], list[str]]:
    """The rule of the split read aloud, on raw rows, giving qids."""
    test = [each for each in rows if each["item_type"] == "mcq" and each["scope"] == "shared"]
    train = []
    for each in rows:
        if each["item_type"] != "frq" or each["scope"] != "individual":
            continue
        leaks = False
        for other in test:
            if each["bank_id"] and each["bank_id"] == other["bank_id"]:
                leaks = True
            if each["qid"] in (other["related_frq_qids"] or []):
                leaks = True
        if not leaks:
            train.append(each["qid"])
    if seed is not None:
        random.Random(seed).shuffle(train)
    return train if n_train is None else train[:n_train], [each["qid"] for each in test]


@settings(max_examples=60, deadline=None)
@given(drawn=qa_rows, n_train=st.none() | st.integers(1, 25), seed=st.none() | st.integers(0, 5))
def test_the_split_is_the_rule_read_aloud(drawn: list[Row], n_train: int | None, seed: int | None) -> None:
    rows = [row("ana", f"q{n}", **each) for n, each in enumerate(drawn)]
    with tempfile.TemporaryDirectory() as folder:
        train, test = dataset(Path(folder), rows).train_test_split("ana", n_train, seed)
    assert ([pair.qid for pair in train], [pair.qid for pair in test]) == naive_split(rows, n_train, seed)


@pytest.mark.parametrize("n_train", [0, -3])
def test_training_on_nothing_is_refused(tmp_path: Path, n_train: int) -> None:
    with pytest.raises(InputError, match=f"n_train is {n_train}"):
        dataset(tmp_path, [row("ana", "q1")]).train_test_split("ana", n_train)


# --- the hub -------------------------------------------------------------------------------------------------------


def hub_files(folder: Path, *, bank: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "dataset_personas.jsonl", [person("ana")])
    tested = {"item_type": "mcq", "scope": "shared", "bank_id": "b1"}
    own = {**tested, "bank_id": "b2", "related_frq_qids": ["f2"]}
    rows = [row("ana", "m1", **tested), row("ana", "m2", **own), *(row("ana", f"f{n}") for n in range(1, 5))]
    write(folder / "dataset_qa.jsonl", rows)
    if bank:
        items = [{"bank_id": "b1", "related_frq_qids": ["f1"]}, {"bank_id": "b2", "related_frq_qids": ["f3"]}, {}]
        (folder / "implicit_shared_mc_bank.json").write_text(json.dumps({"version": 2, "items": items}))


def trained_on(data: PersonaDataset) -> list[str]:
    return [pair.qid for pair in data.train_test_split("ana", seed=None)[0]]


def test_a_bank_adds_related_questions_to_rows_without_their_own(tmp_path: Path) -> None:
    hub_files(tmp_path, bank=False)
    assert trained_on(PersonaDataset.from_hub(tmp_path)) == ["f1", "f3", "f4"]
    hub_files(tmp_path, bank=True)
    assert trained_on(PersonaDataset.from_hub(str(tmp_path))) == ["f3", "f4"]


def test_a_bank_of_one_id_many_times_is_read_in_one_go(tmp_path: Path) -> None:
    path = tmp_path / "bank.json"
    items = [{"bank_id": "b1", "related_frq_qids": [f"f{index}"]} for index in range(30_000)]
    path.write_text(json.dumps({"items": items}))
    assert related_frq_qids(path) == {"b1": tuple(f"f{index}" for index in range(30_000))}


def test_a_local_folder_has_no_revision_and_must_hold_the_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dataset_personas\.jsonl: cannot be read"):
        PersonaDataset.from_hub(tmp_path)
    with pytest.raises(InputError, match="local folder, which has no revision 'v1'"):
        PersonaDataset.from_hub(tmp_path, revision="v1")
    (tmp_path / "implicit_shared_mc_bank.json").write_text('{"items": [{"bank_id": 3}]}')
    with pytest.raises(InputError, match=r"bank\.json, line 1: field `items\[0\]\.bank_id`"):
        PersonaDataset.from_hub(tmp_path)


@pytest.fixture
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, no network; returns where the files of commit `c0ffee` of `lab/people` lie."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "datasets--lab--people"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("c0ffee")
    return repo / "snapshots" / "c0ffee"


def test_a_hub_data_set_is_read_from_the_cache_at_its_revision(offline_cache: Path) -> None:
    hub_files(offline_cache, bank=True)
    assert trained_on(PersonaDataset.from_hub("lab/people")) == ["f3", "f4"]
    with pytest.raises(InputError, match="neither a local folder nor available from the hub"):
        PersonaDataset.from_hub("lab/people", revision="v2")


def test_without_network_the_bank_may_be_missing_only_if_the_hub_has_none(offline_cache: Path) -> None:
    hub_files(offline_cache, bank=False)
    with pytest.raises(InputError, match=r"implicit_shared_mc_bank\.json of lab/people"):
        PersonaDataset.from_hub("lab/people")
    absent = offline_cache.parents[1] / ".no_exist" / "c0ffee" / "implicit_shared_mc_bank.json"
    absent.parent.mkdir(parents=True)
    absent.touch()
    assert trained_on(PersonaDataset.from_hub("lab/people")) == ["f1", "f3", "f4"]


def test_the_questions_of_a_hub_data_set_are_fetched_late(offline_cache: Path) -> None:
    hub_files(offline_cache, bank=True)
    (offline_cache / "dataset_qa.jsonl").unlink()
    data = PersonaDataset.from_hub("lab/people")
    with pytest.raises(InputError, match=r"dataset_qa\.jsonl of lab/people"):
        data.get_qa("ana")


def test_a_name_that_is_neither_folder_nor_repository_is_refused() -> None:
    with pytest.raises(InputError, match=r"no/such/folder: neither a local folder"):
        PersonaDataset.from_hub("no/such/folder")


# --- the bundled data and the import -------------------------------------------------------------------------------


def test_every_bundled_persona_can_be_split_and_said() -> None:
    data = PersonaDataset.bundled()
    assert BASELINE_PERSONA_ID in data.persona_ids
    assert len(data) >= 9
    for persona in data:
        train, test = data.train_test_split(persona.id, seed=None)
        prompts = {system_prompt(persona, variant) for variant in ("templated", "biography")}
        said = {question_text(pair) + answer_text(pair) for pair in data.get_qa(persona.id)}
        assert len(said) >= 24
        assert train
        assert {pair.type for pair in train} == {"explicit", "implicit"}
        assert {pair.type for pair in test} == {"explicit", "implicit"}
        assert all(prompts)


def test_the_leakage_filter_has_work_in_the_bundled_data() -> None:
    data = PersonaDataset.bundled()
    for persona in data:
        train, test = data.train_test_split(persona.id)
        candidates = data.get_qa(persona.id, item_type="frq", scope="individual")
        dropped = [pair for pair in candidates if pair not in train]
        by_bank = {pair.bank_id for pair in test if pair.bank_id}
        by_qid = {qid for pair in test for qid in pair.related_frq_qids}
        assert any(pair.bank_id in by_bank for pair in dropped)
        assert any(pair.qid in by_qid for pair in dropped)


def test_importing_samples_loads_neither_torch_nor_the_hub_client() -> None:
    code = "import sys, tl_persona.data.dataset; print({'torch', 'huggingface_hub', 'transformers'} & set(sys.modules))"
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
