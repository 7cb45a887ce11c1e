"""Which weights a stored vector is of and what acted on the model: what is skipped, computed again, or refused."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from kinds import BOTH_KINDS
from oracle import relative_error
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tl_persona import ContrastPair, Persona, QAPair, SteeringVector, extract_caa_vectors, run_extraction
from tl_persona.backends import open_backend
from tl_persona.backends.local import inspection
from tl_persona.backends.local.backend import LocalBackend
from tl_persona.checking import check_saved
from tl_persona.errors import StoreMismatchError
from tl_persona.models.facts import ModelFacts
from tl_persona.provenance import Provenance
from tl_persona.store import PersonaVectorStore, core, folder

pytestmark = pytest.mark.tl

Boot = Callable[[str, str], Any]
NAME = "org/tiny"
PERSONAS = [
    Persona(f"p{index}", {"first_name": f"P{index}"}, f"Number: {index}", f"I am {index}.") for index in range(4)
]
PAIRS = [QAPair(f"q{index}", "explicit", "frq", "individual", f"Tea {index}?", "Yes, tea.") for index in range(2)]
WAYS_OUT = r"model_name.*activations_dir \(--activations-dir\).*force=True \(--force\)"


class Runs:
    """`run_extraction` into one store, everything filled in."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, model: Any, persona: int = 0, name: str = NAME, **options: Any) -> tuple[bool, tuple[str, ...]]:
        """Whether the vector was computed, and why what was stored could not stay."""
        given = {"persona": PERSONAS[persona], "activations_dir": self.root, "show_progress": False, **options}
        (result,) = run_extraction(model, name, PAIRS, ["templated"], **given)
        return result.extracted, result.reasons

    def load(self, persona: int = 0, name: str = NAME) -> Tensor:
        return PersonaVectorStore(name, self.root).load("templated", PERSONAS[persona].id)

    def recorded(self, persona: int = 0, name: str = NAME) -> Provenance:
        found = PersonaVectorStore(name, self.root).provenance("templated", PERSONAS[persona].id)
        assert found is not None
        return found

    def rerecord(self, persona: int = 0, **changes: Any) -> None:
        """Writes the stored vector again with another provenance, as another version would have."""
        provenance = msgspec.structs.replace(self.recorded(persona), **changes)
        with PersonaVectorStore(NAME, self.root) as store:
            who, vectors = PERSONAS[persona], self.load(persona)
            store.save("templated", who.id, who.name, vectors, provenance.sample_ids, provenance=provenance)


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "store")


@pytest.fixture
def model(tiny_hooked: Boot) -> Any:
    return tiny_hooked("llama", "bridge")


@contextmanager
def hooked(model: Any) -> Iterator[None]:
    """A hook that is not of the package pushes the first block's output."""
    hook = model.hook_dict["blocks.0.hook_resid_post"]
    handle = hook.register_forward_hook(lambda _module, _args, output: output + 1.0)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def no_pass(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def pool(*_: Any) -> None:
        raise AssertionError("the model ran")

    with monkeypatch.context() as patch:
        patch.setattr(LocalBackend, "pool", pool)
        yield


def values_of(model: Any) -> str:
    """Of the model that runs: some releases lay a matrix out in parts."""
    hasher = hashlib.sha256()
    for parameter in dict.fromkeys(model.parameters()):
        hasher.update(parameter.detach().numpy().tobytes())
    return f"values:{hasher.hexdigest()[:16]}"


@pytest.fixture
def by_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are known by their values and by nothing else."""
    facts_of = inspection.facts_of

    def known(model: Any) -> ModelFacts:
        return dataclasses.replace(facts_of(model), revision=None, weights_digest=values_of(model))

    monkeypatch.setattr(inspection, "facts_of", known)


@pytest.fixture
def three(tiny_llama: Path) -> list[Any]:
    """A transformers model, the same trained a little further, and one with a smaller matrix; none has a revision."""
    models = [AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval() for _ in range(3)]
    with torch.no_grad():
        models[1].model.layers[0].mlp.up_proj.weight.add_(0.05)
        models[2].model.layers[1].self_attn.v_proj.weight.mul_(0.5)
    return models


# --- which weights --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("by_values")
def test_models_in_memory_under_names_of_their_own_are_each_skipped(
    three: list[Any], tiny_llama: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    for number, each in enumerate(three):
        assert runs(each, name=f"lab/{number}", tokenizer=tokenizer) == (True, ())
    vectors = [runs.load(name=f"lab/{number}") for number in range(3)]
    assert min(relative_error(vectors[one], vectors[0]) for one in (1, 2)) > 1e-3
    with no_pass(monkeypatch):
        for number, each in enumerate(three):
            assert runs(each, name=f"lab/{number}", tokenizer=tokenizer) == (False, ())


@pytest.mark.usefixtures("by_values")
@pytest.mark.parametrize("persona", [0, 1])
def test_another_model_under_the_same_name_is_refused_before_it_runs(
    persona: int, three: list[Any], tiny_llama: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The persona that is stored, and one that would lie beside her."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    first, second, _ = three
    runs(first, tokenizer=tokenizer)
    path = runs.root / "org__tiny/answer_mean/templated/p0.safetensors"
    before = path.read_bytes()
    with no_pass(monkeypatch), pytest.raises(StoreMismatchError, match=WAYS_OUT) as raised:
        runs(second, persona, tokenizer=tokenizer)
    assert str(path) in str(raised.value)
    there, here = (open_backend(each, tokenizer=tokenizer).facts.weights_digest for each in (first, second))
    assert f"weights_digest: {there!r} is now {here!r}" in str(raised.value)
    assert path.read_bytes() == before
    assert runs(second, persona, name="org/second", tokenizer=tokenizer) == (True, ())
    assert runs(second, persona, activations_dir=runs.root / "second", tokenizer=tokenizer) == (True, ())


@pytest.mark.usefixtures("by_values")
def test_force_replaces_a_persona_and_verify_names_the_neighbours(
    three: list[Any], tiny_llama: Path, runs: Runs
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    first, second, _ = three
    for persona in (0, 1):
        runs(first, persona, tokenizer=tokenizer)
    left = runs.load(1)
    assert runs(second, force=True, tokenizer=tokenizer)[0]
    there, here = (open_backend(each, tokenizer=tokenizer).facts.weights_digest for each in (first, second))
    assert runs.recorded().weights_digest == here != there and runs.load(1).equal(left)
    (problem,) = check_saved(runs.root).problems
    assert (problem.path.name, problem.kind) == ("p1.safetensors", "misfit")
    assert f"{there!r}, there {here!r}" in problem.what
    with PersonaVectorStore(NAME, runs.root) as store:
        assert runs(second, force=True, store=store, tokenizer=tokenizer)[0]
        with pytest.raises(StoreMismatchError, match=r"p1\.safetensors is of another model"):
            runs(second, 1, store=store, tokenizer=tokenizer)  # her own, whatever was saved beside it since
    assert runs(second, 1, force=True, tokenizer=tokenizer)[0]
    assert check_saved(runs.root).problems == ()
    assert runs(second, tokenizer=tokenizer) == (False, ())


@pytest.mark.usefixtures("by_values")
def test_a_strategy_or_variant_in_conflict_keeps_the_others_from_running_too(
    three: list[Any], tiny_llama: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    first, second, _ = three
    runs(first, tokenizer=tokenizer)
    chosen = [(["biography", "templated"], "answer_mean"), (["templated"], ["answer_last", "answer_mean"])]
    for variants, strategies in chosen:
        given: dict[str, Any] = {"persona": PERSONAS[0], "activations_dir": runs.root, "tokenizer": tokenizer}
        with no_pass(monkeypatch), pytest.raises(StoreMismatchError):
            run_extraction(second, NAME, PAIRS, variants, mask_strategy=strategies, show_progress=False, **given)
    assert [path.name for path in runs.root.rglob("*.safetensors")] == ["p0.safetensors"]


def test_a_vector_of_unknown_weights_is_computed_again_once(model: Any, runs: Runs) -> None:
    runs(model)
    right = runs.load()
    for changes in ({"revision": None}, {"revision": "files-0123"}):
        runs.rerecord(**changes, weights_digest=None, interventions=None)
        assert runs(model) == (True, ("which weights it is of is not recorded",))
        assert runs.load().equal(right)
        assert runs(model) == (False, ())


def test_a_model_of_unknown_weights_is_computed_every_time(
    model: Any, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = dataclasses.replace(inspection.facts_of(model), revision=None, weights_digest=None)
    monkeypatch.setattr(inspection, "facts_of", lambda _model: facts)
    runs(model)
    for _ in range(2):
        assert runs(model) == (True, ("which weights it is of is not recorded",))


# --- what acted on the model ----------------------------------------------------------------------------------------


def test_what_ran_under_a_foreign_hook_is_computed_again_without_it(model: Any, runs: Runs, tmp_path: Path) -> None:
    plain = Runs(tmp_path / "plain")
    plain(model)
    with hooked(model):
        runs(model)
        assert runs.recorded().interventions == "unknown"
        pushed = runs.load()
        extracted, (reason,) = runs(model)
        assert extracted and reason.startswith("interventions: ")
    assert relative_error(pushed, plain.load()) > 0.1
    extracted, (reason,) = runs(model)
    assert extracted and "was on the model" in reason
    assert runs.recorded().interventions == "" and relative_error(runs.load(), plain.load()) < 1e-5
    assert runs(model) == (False, ())


def test_a_plain_vector_is_not_taken_for_one_under_a_foreign_hook(model: Any, runs: Runs) -> None:
    runs(model)
    before = runs.load()
    with hooked(model):
        extracted, (reason,) = runs(model)
    assert extracted and "is on the model" in reason
    assert relative_error(runs.load(), before) > 0.1


def test_files_of_earlier_versions_that_ran_under_a_hook_are_computed_again(model: Any, runs: Runs) -> None:
    with hooked(model):
        runs(model)
    assert runs.recorded().notes["hooks"] == "of the caller"
    runs.rerecord(interventions=None)
    assert runs(model)[0]
    runs.rerecord(interventions=None)
    assert runs(model) == (False, ())


def test_a_steered_vector_is_never_taken_for_the_plain_models(model: Any, runs: Runs, tmp_path: Path) -> None:
    plain = Runs(tmp_path / "plain")
    plain(model)
    vector = SteeringVector("calm", 1, torch.ones(model.cfg.d_model), model.cfg.model_name)
    with vector.steer(model, 4.0):
        runs(model)
        assert runs(model) == (False, ())  # the same vector acts again
    assert relative_error(runs.load(), plain.load()) > 1e-2
    with vector.steer(model, 2.0):
        assert runs(model)[0]
    extracted, (reason,) = runs(model)
    assert extracted and re.fullmatch(r"interventions: '[0-9a-f]{16}' is now 'none'", reason)
    assert relative_error(runs.load(), plain.load()) < 1e-5


@pytest.mark.parametrize(("stored", "now"), [("3f", ""), ("", "3f"), ("3f", "4a")])
def test_known_interventions_replace_a_personas_own_vector_and_do_not_lie_beside_others(
    stored: str, now: str, model: Any, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    acting = [stored]
    monkeypatch.setattr(LocalBackend, "interventions", property(lambda _self: acting[0]))
    runs(model)
    assert runs.recorded().interventions == stored and runs(model) == (False, ())
    acting[0] = now
    line = f"interventions: '{stored or 'none'}' is now '{now or 'none'}'"
    with no_pass(monkeypatch), pytest.raises(StoreMismatchError, match=f"{line}.*{WAYS_OUT}"):
        runs(model, 1)
    assert runs(model, 1, force=True)[0]
    assert runs.recorded(1).interventions == now
    assert runs(model, 0) == (True, (line,))  # beside one of its own kind


@BOTH_KINDS
def test_a_backend_says_what_acts_on_the_model_at_the_moment(kind: str, tiny_hooked: Boot) -> None:
    model = tiny_hooked("llama", kind)
    backend = open_backend(model)
    assert backend.interventions == ""
    with hooked(model):
        assert backend.interventions == "unknown"
    assert backend.interventions == ""
    assert backend.notes["architecture"] == backend.facts.architecture == "LlamaForCausalLM"


def test_steering_vectors_record_both(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = dataclasses.replace(inspection.facts_of(model), revision=None, weights_digest="values:1")
    monkeypatch.setattr(inspection, "facts_of", lambda _model: facts)
    pairs = [ContrastPair("yes, tea", "no tea"), ContrastPair("good tea", "bad tea")]

    def found() -> Provenance:
        (vector,) = extract_caa_vectors(model, None, pairs, [0], show_progress=False)
        assert vector.provenance is not None
        return vector.provenance

    plain = found()
    assert (plain.revision, plain.weights_digest, plain.interventions) == (None, "values:1", "")
    assert plain.notes["architecture"] == "LlamaForCausalLM"
    with hooked(model):
        assert found().interventions == "unknown"


# --- what it costs --------------------------------------------------------------------------------------------------


def fill(runs: Runs, count: int, **changes: Any) -> None:
    """`count` copies of persona p0's vector, under other ids."""
    provenance = msgspec.structs.replace(runs.recorded(), **changes)
    vectors = runs.load()
    with PersonaVectorStore(NAME, runs.root) as store:
        for number in range(count):
            store.save("templated", f"n{number}", "", vectors, provenance.sample_ids, provenance=provenance)


@pytest.mark.parametrize(("changes", "most"), [({}, 2), ({"revision": "files-1"}, 1 + 8)])
def test_a_look_at_a_folder_reads_as_much_however_much_is_in_it(
    changes: dict[str, Any], most: int, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for size in (12, 60):
        runs = Runs(tmp_path / str(size))
        runs(model)
        fill(runs, size, **changes)
        current = runs.recorded()
        (runs.root / "org__tiny/answer_mean/templated/p0.safetensors").unlink()
        read: list[Path] = []
        with monkeypatch.context() as patch:
            watch_headers(patch, read)
            PersonaVectorStore(NAME, runs.root).refuse_conflict("templated", "new", current)
        counts.append(len(read))
    assert counts[0] == counts[1] <= most


def test_a_store_for_many_personas_reads_their_neighbours_once(
    model: Any, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs(model, 0)
    current = runs.recorded()
    store, read = PersonaVectorStore(NAME, runs.root), list[Path]()
    watch_headers(monkeypatch, read)
    for persona in ("a", "b", "c"):
        store.refuse_conflict("templated", persona, current)
    names = [path.name for path in read]
    assert names == ["a.safetensors", "p0.safetensors", "b.safetensors", "c.safetensors"]
    other = msgspec.structs.replace(current, revision="another")
    with pytest.raises(StoreMismatchError, match=r"p0\.safetensors"):
        store.refuse_conflict("templated", "d", other)
    (runs.root / "org__tiny/answer_mean/templated/p0.safetensors").unlink()
    store.refuse_conflict("templated", "d", other)


def watch_headers(patch: pytest.MonkeyPatch, read: list[Path]) -> None:
    for module in (core, folder):
        real = module.read_header

        def counted(path: Path, *rest: Any, real: Any = real) -> Any:
            read.append(path)
            return real(path, *rest)

        patch.setattr(module, "read_header", counted)
