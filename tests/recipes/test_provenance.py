"""What a provenance compares, and what a run does with vectors that an earlier version stored."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from span_oracle import BY_NAME

from tl_persona import ContrastPair, Persona, QAPair, extract_caa_vectors, run_extraction
from tl_persona.cli.main import main
from tl_persona.provenance import Provenance, conflicts, text_digest
from tl_persona.store import PersonaVectorStore

OLD: dict[str, Any] = {
    "model_name": "org/tiny",
    "revision": None,
    "dtype": "float32",
    "weights": "unprocessed",
    "hook_names": ("blocks.0.hook_resid_post",),
    "strategy": "answer_mean",
    "prompts_digest": text_digest(["one"]),
    "sample_ids": ("q1",),
}


def test_without_tokens_the_digest_is_that_of_earlier_versions() -> None:
    canonical = json.dumps(OLD, sort_keys=True, separators=(",", ":"))
    assert Provenance(**OLD).digest() == hashlib.sha256(canonical.encode()).hexdigest()


def test_tokens_decide_where_both_sides_know_them_and_the_template_never_does() -> None:
    known = OLD | {"weights_digest": "values:1"}
    old, new = Provenance(**known), Provenance(**known, tokens_digest="t1", template_digest="a")
    assert old.differences(new) == new.differences(old) == []
    other = msgspec.structs.replace(new, template_digest="b")
    assert new.differences(other) == [] and new.digest() == other.digest()
    moved = msgspec.structs.replace(new, tokens_digest="t2")
    assert new.differences(moved) == ["tokens_digest: 't1' is now 't2'"]
    assert len({old.digest(), new.digest(), moved.digest()}) == 3


def test_a_provenance_of_an_earlier_version_is_read() -> None:
    assert msgspec.json.decode(json.dumps(OLD), type=Provenance) == Provenance(**OLD)


def given(revision: str | None = None, weights_digest: str | None = None, **more: Any) -> Provenance:
    return Provenance(**OLD | {"revision": revision, "weights_digest": weights_digest} | more)


def judged(recorded: Provenance, current: Provenance) -> str:
    """`same`, `unknown` or `conflict`, the other way round too."""
    found = set()
    for one, other in ((recorded, current), (current, recorded)):
        known, all_lines = conflicts(one, other), one.differences(other)
        assert known == all_lines[: len(known)]
        found.add("conflict" if known else "unknown" if all_lines else "same")
    (verdict,) = found
    return verdict


@pytest.mark.parametrize(
    ("recorded", "current", "verdict"),
    [
        (("abc", None), ("abc", None), "same"),
        (("abc", None), ("def", None), "conflict"),
        (("tensors-1", None), ("tensors-1", None), "same"),
        (("tensors-1", None), ("tensors-2", None), "conflict"),
        # The revision decides where both have one: other dtypes give other values of the same weights.
        (("abc", "values:1"), ("abc", "values:2"), "same"),
        (("abc", "values:1"), ("def", "values:1"), "conflict"),
        ((None, "values:1"), (None, "values:1"), "same"),
        ((None, "values:1"), (None, "values:2"), "conflict"),
        (("abc", "values:1"), (None, "values:1"), "same"),
        (("abc", "values:1"), (None, "values:2"), "conflict"),
        (("files-1", "values:1"), ("abc", "values:1"), "same"),
        # Nothing that both sides have.
        ((None, None), (None, None), "unknown"),
        (("abc", None), (None, None), "unknown"),
        (("abc", None), (None, "values:1"), "unknown"),
        ((None, "values:1"), (None, "HookedTransformer values:1"), "unknown"),
        ((None, "values:1"), (None, "served:1"), "unknown"),
        (("files-1", None), ("files-1", None), "unknown"),
        (("files-1", None), ("files-2", None), "unknown"),
        (("files-1", None), ("tensors-1", None), "unknown"),
    ],
)
def test_weights_are_compared_by_what_both_sides_know_and_else_unknown(
    recorded: tuple[str | None, str | None], current: tuple[str | None, str | None], verdict: str
) -> None:
    assert judged(given(*recorded), given(*current)) == verdict


@pytest.mark.parametrize(
    ("recorded", "current", "verdict"),
    [
        ("", "", "same"),
        ("3f", "3f", "same"),
        ("3f", "", "conflict"),
        ("3f", "4a", "conflict"),
        ("unknown", "unknown", "unknown"),
        ("unknown", "", "unknown"),
        ("unknown", "3f", "unknown"),
    ],
)
def test_interventions_that_are_not_known_are_equal_to_nothing(recorded: str, current: str, verdict: str) -> None:
    assert judged(given("abc", interventions=recorded), given("abc", interventions=current)) == verdict


@pytest.mark.parametrize(
    ("notes", "current", "verdict"),
    [
        ({}, "", "same"),
        ({}, "3f", "conflict"),
        ({"hooks": "of the caller"}, "", "unknown"),
        ({"hooks": "of the caller"}, "unknown", "unknown"),
    ],
)
def test_files_of_earlier_versions_tell_of_hooks_in_their_notes(
    notes: dict[str, str], current: str, verdict: str
) -> None:
    assert judged(given("abc", notes=notes), given("abc", interventions=current)) == verdict


def test_reasons_say_what_was_seen_on_both_sides() -> None:
    plain = given(None, "values:1", interventions="")
    assert plain.differences(given("abc", "values:2", interventions="3f", dtype="bfloat16")) == [
        "weights_digest: 'values:1' is now 'values:2'",
        "interventions: 'none' is now '3f'",
        "dtype: 'float32' is now 'bfloat16'",
    ]
    assert given().differences(plain) == ["which weights it is of is not recorded"]
    assert plain.differences(given()) == ["which weights the model has now is not known"]
    (line,) = plain.differences(given("abc"))
    assert "'values:1' and revision 'abc' do not compare" in line
    (before,) = given("abc", interventions="unknown").differences(given("abc"))
    (now,) = given("abc").differences(given("abc", interventions="unknown"))
    assert "was on the model" in before and "is on the model" in now


def test_the_digest_has_what_decides_of_the_weights_and_the_interventions() -> None:
    assert given().digest() == Provenance(**OLD).digest() == given(interventions="").digest()
    assert given("abc").digest() == given("abc", "values:1").digest()
    by_values = [given(None, "values:1"), given(None, "values:2"), given("files-1", "values:2"), given("abc")]
    acted_on = [given("abc", interventions=each) for each in ("3f", "4a", "unknown")]
    assert len({each.digest() for each in [given(), *by_values, *acted_on]}) == 8


# --- in a store ----------------------------------------------------------------------------------------------------

PERSONA = Persona("p", {"first_name": "Ada"}, "You like tea.", "Tea.")
PAIRS = [QAPair(f"q{index}", "explicit", "frq", "individual", f"Tea {index}?", "Yes, tea.") for index in range(2)]


class Run:
    """`run_extraction` into one store, everything filled in."""

    def __init__(self, model: Any, root: Path) -> None:
        self.model, self.root = model, root
        self.store = PersonaVectorStore("org/tiny", root)

    def __call__(self, persona: Persona = PERSONA, pairs: list[QAPair] = PAIRS, **options: Any) -> Any:
        given = {"persona": persona, "activations_dir": self.root, "show_progress": False, **options}
        return run_extraction(self.model, "org/tiny", pairs, ["templated"], **given)[0]

    def recorded(self, strategy: str = "answer_mean") -> Provenance:
        found = self.store.provenance("templated", "p", strategy)
        assert found is not None
        return found


@pytest.fixture
def run(tiny_hooked: Callable[[str, str], Any], tmp_path: Path) -> Run:
    return Run(tiny_hooked("llama", "bridge"), tmp_path / "store")


@pytest.mark.tl
def test_the_digest_of_the_chat_template_is_recorded(run: Run) -> None:
    run()
    template = run.model.tokenizer.chat_template
    assert run.recorded().template_digest == hashlib.sha256(template.encode()).hexdigest()


@pytest.mark.tl
def test_a_vector_of_an_earlier_version_is_skipped_and_left_as_it_is(run: Run) -> None:
    run()
    vectors = run.store.load("templated", "p")
    old = msgspec.structs.replace(run.recorded(), tokens_digest=None, template_digest=None)
    run.store.save("templated", "p", "Ada", vectors, old.sample_ids, provenance=old)
    result = run()
    assert not result.extracted and result.reasons == ()
    assert run.recorded().tokens_digest is None


@pytest.mark.tl
def test_a_template_that_renders_the_same_extracts_nothing_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    before = run.recorded()
    same = run.model.tokenizer.chat_template + "{# a remark #}"
    monkeypatch.setattr(run.model.tokenizer, "chat_template", same)
    assert not run().extracted
    assert run(force=True).extracted
    assert run.recorded().template_digest == hashlib.sha256(same.encode()).hexdigest() != before.template_digest
    assert run.recorded().digest() == before.digest()


@pytest.mark.tl
def test_the_same_text_with_other_tokens_counting_is_extracted_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the template joins both, a sentence may go from the persona to the question without a trace in the text."""
    monkeypatch.setattr(run.model.tokenizer, "chat_template", BY_NAME["system_dropped"].template)
    monkeypatch.setattr("tl_persona.extraction.system_prompt", lambda persona, _variant: persona.templated_view)
    long, short = (
        Persona("p", {"first_name": "Ada"}, view, "") for view in ("You like tea.\n\nTell me.", "You like tea.")
    )
    questions = ("Tea?", "Tell me.\n\nTea?")
    asked = [QAPair("q1", "explicit", "frq", "individual", question, "Yes.") for question in questions]
    assert run(long, asked[:1], mask_strategy="persona_mean").extracted
    before = run.recorded("persona_mean")
    again = run(short, asked[1:], mask_strategy="persona_mean")
    assert run.recorded("persona_mean").prompts_digest == before.prompts_digest
    assert again.extracted and [line.split(":")[0] for line in again.reasons] == ["tokens_digest"]


@pytest.mark.tl
def test_steering_vectors_record_the_template_of_chats_and_none_of_raw_texts(run: Run) -> None:
    raw = [ContrastPair("yes, tea", "no tea"), ContrastPair("good tea", "bad tea")]
    question = {"role": "user", "content": "Tea?"}
    chats = [
        ContrastPair(*([question, {"role": "assistant", "content": side}] for side in (pair.positive, pair.negative)))
        for pair in raw
    ]
    digests = []
    for pairs in (raw, chats):
        (vector,) = extract_caa_vectors(run.model, None, pairs, [0], show_progress=False)
        assert vector.provenance is not None
        digests.append(vector.provenance.template_digest)
    assert digests == [None, hashlib.sha256(run.model.tokenizer.chat_template.encode()).hexdigest()]


@pytest.mark.tl
@pytest.mark.parametrize("command", ["extract", "caa"])
def test_the_command_line_passes_keywords_to_the_template(command: str, tiny_chat: Path, tmp_path: Path) -> None:
    template = BY_NAME["phi4"].template
    keyword = ["--template-kwarg", f"chat_template={template}"]
    if command == "extract":
        pick = ["--persona-id", "baseline_assistant", "--n-train", "1", "--variants", "templated"]
        where = ["--activations-dir", str(tmp_path / "out")]
    else:
        chat = [{"role": "user", "content": "Tea?"}]
        sides = {
            name: [*chat, {"role": "assistant", "content": text}]
            for name, text in (("positive", "Yes"), ("negative", "No"))
        }
        (tmp_path / "pairs.json").write_text(json.dumps({"behavior": "tea", "pairs": [sides, sides]}), encoding="utf-8")
        pick = ["--pairs", str(tmp_path / "pairs.json"), "--layers", "0"]
        where = ["--output", str(tmp_path / "out")]
    assert main([command, "--model", str(tiny_chat), "--kind", "bridge", *pick, *keyword, *where]) == 0
    digest = hashlib.sha256(str(template).encode()).hexdigest()
    files = [path for path in (tmp_path / "out").rglob("*.safetensors")]
    assert files and all(digest.encode() in path.read_bytes() for path in files)
