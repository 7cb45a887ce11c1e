"""Persona extraction as a whole: the numbers are the oracle's, stored vectors are trusted only when they are still
right, and bad input is refused before the model runs."""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from kinds import BOTH_KINDS
from mara import MARA, QUESTIONS, VARIANTS, frq
from oracle import block_outputs, mean_activations, relative_error, watched
from tiny import GPT2_CONTEXT, N_LAYERS
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import tl_persona
from tl_persona import load_model
from tl_persona.data.personas import Persona, QAPair, system_prompt
from tl_persona.errors import HookError, InputError, MaskError, NonFiniteError, PromptError, StoreMismatchError
from tl_persona.extraction import ExtractionResult, MaskStrategy, extract_activations, prepare_inputs, run_extraction
from tl_persona.models.checkpoints import find_checkpoint, load_hf_model, load_tokenizer
from tl_persona.store import PersonaVectorStore

Boot = Callable[[str, str], Any]


BASELINE = Persona("baseline_assistant", {"first_name": "Assistant"}, "You are an assistant.", "You are an assistant.")


@dataclass
class Setting:
    """One model, one store, and `run_extraction` with everything filled in."""

    model: Any
    root: Path
    name: str = "org/tiny"

    def run(self, **changes: Any) -> list[ExtractionResult]:
        given = {"persona": MARA, "activations_dir": self.root, "show_progress": False}
        positional = {"qa_pairs": QUESTIONS, "variants": ["templated"]}
        for name in positional:
            positional[name] = changes.pop(name, positional[name])
        model = changes.pop("model", self.model)
        return run_extraction(model, self.name, *positional.values(), **{**given, **changes})

    def load(self, strategy: str = "answer_mean", variant: str = "templated", persona: str = "mara") -> Tensor:
        return PersonaVectorStore(self.name, self.root, strategy).load(variant, persona)

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*.safetensors"))


@pytest.fixture
def setting(tiny_hooked: Boot, tmp_path: Path) -> Setting:
    return Setting(tiny_hooked("llama", "bridge"), tmp_path / "store")


def expected_vectors(hf_model: Any, tokenizer: Any, persona: Persona, variant: str) -> dict[MaskStrategy, Tensor]:
    """The oracle's vector for every strategy; each prompt runs once, whole and alone."""
    system = system_prompt(persona, variant)
    runs = [block_outputs(hf_model, prompt.input_ids) for prompt in prepare_inputs(tokenizer, system, QUESTIONS)]
    vectors = {}
    for strategy in MaskStrategy:
        masks = [prompt.token_mask for prompt in prepare_inputs(tokenizer, system, QUESTIONS, strategy)]
        means = [outputs[:, mask].mean(dim=1) for outputs, mask in zip(runs, masks, strict=True)]
        # A system prompt reads nothing of the question after it, so all questions give it the same residuals.
        vectors[strategy] = means[0] if strategy.persona_only else torch.stack(means).mean(dim=0)
    return vectors


# --- the numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.tl
@BOTH_KINDS
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_all_strategies_layers_and_variants_equal_the_oracle(
    family: str, kind: str, tiny_hooked: Boot, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    setting = Setting(tiny_hooked(family, kind), tmp_path)
    hf_model = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32).eval()
    setting.run(variants=VARIANTS, mask_strategy=list(MaskStrategy))
    for variant in VARIANTS:
        for strategy, expected in expected_vectors(hf_model, setting.model.tokenizer, MARA, variant).items():
            assert relative_error(setting.load(strategy, variant), expected) < 1e-5


@contextmanager
def all_processors() -> Iterator[None]:
    """The suite runs on one thread, which is right for tiny models only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any, dict[MaskStrategy, Tensor]]:
    """The real model's weights, read from the file once, its tokenizer, and the oracle's vectors."""
    with all_processors():
        found = find_checkpoint("smollm2")
        weights, tokenizer = load_hf_model(found, dtype=torch.float32), load_tokenizer(found)
        return weights, tokenizer, expected_vectors(weights, tokenizer, MARA, "biography")


@pytest.mark.tl
@pytest.mark.slow
@BOTH_KINDS
def test_a_real_chat_model_equals_the_oracle_in_all_strategies_and_layers(
    kind: str,
    smollm2: tuple[Any, Any, dict[MaskStrategy, Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, tokenizer, expected_by_strategy = smollm2
    ours = copy.deepcopy(weights)  # a bridge rewires the modules it is given
    monkeypatch.setattr("tl_persona.loading.load_hf_model", lambda *_args, **_options: ours)
    monkeypatch.setattr("tl_persona.loading.load_tokenizer", lambda *_args, **_options: tokenizer)
    with all_processors():
        setting = Setting(load_model("smollm2", kind=kind), tmp_path, "SmolLM2-135M-Instruct")
        setting.run(variants=["biography"], mask_strategy=list(MaskStrategy))
    assert set(expected_by_strategy) == set(MaskStrategy)
    for strategy, expected in expected_by_strategy.items():
        assert expected.shape == (30, 576)
        assert relative_error(setting.load(strategy, "biography"), expected) < 1e-5


@pytest.mark.tl
def test_a_hugging_face_model_gives_the_same_vectors(setting: Setting, tiny_llama: Path, tmp_path: Path) -> None:
    hf_model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    setting.run()
    plain = Setting(hf_model, tmp_path / "plain")
    with pytest.raises(PromptError, match="the model has no tokenizer"):
        plain.run()
    plain.run(tokenizer=AutoTokenizer.from_pretrained(tiny_llama))
    assert relative_error(plain.load(), setting.load()) < 1e-6


@pytest.mark.tl
def test_every_sample_weighs_the_same_however_many_tokens_it_has(setting: Setting, tiny_llama: Path) -> None:
    hf_model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    texts = [torch.arange(20, 23), torch.arange(40, 95)]
    masks = [torch.tensor([False, True, False]), torch.ones(55, dtype=torch.bool)]
    vectors = extract_activations(setting.model, texts, masks)
    assert vectors.dtype == torch.float32
    assert relative_error(vectors, mean_activations(hf_model, zip(texts, masks, strict=True))) < 1e-5


@pytest.mark.tl
@pytest.mark.usefixtures("unchecked")
def test_ids_and_masks_may_be_lists(setting: Setting) -> None:
    ids, mask = torch.arange(30, 36), torch.tensor([True, False, True, True, False, False])
    from_lists = extract_activations(setting.model, [ids.tolist()], [[1, 0, 1, 1, 0, 0]])  # type: ignore[list-item]
    assert torch.equal(from_lists, extract_activations(setting.model, [ids], [mask]))


@pytest.mark.tl
def test_chosen_layers_are_those_rows_of_all_layers(setting: Setting) -> None:
    ids, masks = [torch.arange(30, 50)], [torch.ones(20, dtype=torch.bool)]
    everything = extract_activations(setting.model, ids, masks)
    for layers, rows in {-1: [2], "0:2": [0, 1], "blocks.1.hook_resid_post": [1]}.items():
        assert relative_error(extract_activations(setting.model, ids, masks, layers=layers), everything[rows]) < 1e-6
    chosen = extract_activations(setting.model, ids, masks, layers=[2, lambda name: name == "blocks.0.hook_resid_post"])
    assert relative_error(chosen, everything[[2, 0]]) < 1e-6


# --- what runs -----------------------------------------------------------------------------------------------------


def positions_run(setting: Setting, **options: Any) -> int:
    """Positions that the first block computes for a run into a fresh store."""
    fresh = Setting(setting.model, setting.root / str(len(list(setting.root.glob("*")))), setting.name)
    fresh.root.mkdir(parents=True)
    fresh.run(**options)  # a first run may also prove a shortcut
    with watched(setting.model) as positions:
        fresh.run(force=True, **options)
    return positions["blocks.0.mlp"]


@pytest.mark.tl
def test_all_strategies_come_out_of_the_passes_of_one(setting: Setting, tmp_path: Path) -> None:
    one = positions_run(setting, mask_strategy=MaskStrategy.ANSWER_MEAN)
    assert positions_run(setting, mask_strategy=list(MaskStrategy)) == one
    setting.run(mask_strategy=list(MaskStrategy))
    for strategy in MaskStrategy:
        alone = Setting(setting.model, tmp_path / strategy)
        alone.run(mask_strategy=strategy)
        assert relative_error(alone.load(strategy), setting.load(strategy)) < 1e-6


@pytest.mark.tl
def test_a_persona_only_strategy_runs_one_question(setting: Setting) -> None:
    persona_only = [MaskStrategy.PERSONA_MEAN, MaskStrategy.PERSONA_LAST]
    one_question = positions_run(setting, qa_pairs=QUESTIONS[:1])
    assert positions_run(setting, mask_strategy=persona_only) < one_question  # no further than the persona's last token
    assert positions_run(setting) > one_question
    for result in setting.run(mask_strategy=persona_only):
        assert result.n_questions == 1
    assert PersonaVectorStore("org/tiny", setting.root).persona_sample_ids("templated", "mara", "persona_last") == [
        "q-short"
    ]


@pytest.mark.tl
def test_a_persona_only_strategy_reads_no_answer_it_does_not_need(setting: Setting) -> None:
    (result,) = setting.run(qa_pairs=[QUESTIONS[0], frq("empty", "Why?", "")], mask_strategy="persona_mean")
    assert result.n_questions == 1


@pytest.mark.tl
def test_batch_tokens_bound_a_pass_and_change_nothing(setting: Setting, tmp_path: Path) -> None:
    setting.run()
    small = Setting(setting.model, tmp_path / "small")
    small.run(batch_tokens=64)
    assert relative_error(small.load(), setting.load()) < 1e-6


# --- results and artifacts -----------------------------------------------------------------------------------------


@pytest.mark.tl
def test_results_say_what_was_done_and_where(setting: Setting) -> None:
    results = setting.run(variants=VARIANTS, mask_strategy=["persona_last", "answer_mean"])
    prompts = prepare_inputs(setting.model.tokenizer, system_prompt(MARA, "templated"), QUESTIONS)
    assert [(result.variant, result.strategy) for result in results] == [
        (variant, strategy) for variant in VARIANTS for strategy in ("persona_last", "answer_mean")
    ]
    assert [result.n_questions for result in results] == [1, 4, 1, 4]
    assert results[1].n_tokens == sum(len(prompt.input_ids) for prompt in prompts)
    assert results[0].n_tokens == len(prompts[0].input_ids)
    assert {result.persona_name for result in results} == {"Mara Holt"}
    assert all(result.extracted and result.reasons == () for result in results)
    for result in results:
        assert result.output_dir == setting.root / "org__tiny" / result.strategy / result.variant
        assert (result.output_dir / "mara.safetensors").is_file()
        assert (result.output_dir / "manifest.json").is_file()


@pytest.mark.tl
@BOTH_KINDS
def test_provenance_tells_what_decides_the_vector_and_how_it_ran(
    kind: str, tiny_hooked: Boot, tiny_llama: Path, tmp_path: Path
) -> None:
    setting = Setting(tiny_hooked("llama", kind), tmp_path)
    setting.run(layers=[0, 2])
    recorded = PersonaVectorStore(setting.name, setting.root).provenance("templated", "mara")
    assert recorded is not None
    assert (recorded.model_name, recorded.dtype, recorded.weights) == ("org/tiny", "float32", "unprocessed")
    assert recorded.revision == find_checkpoint(tiny_llama).revision
    assert recorded.hook_names == ("blocks.0.hook_resid_post", "blocks.2.hook_resid_post")
    assert recorded.sample_ids == tuple(question.qid for question in QUESTIONS)
    assert recorded.notes["model_class"] == {"bridge": "TransformerBridge", "hooked": "HookedTransformer"}[kind]
    assert recorded.notes["torch"].startswith(torch.__version__.split("+")[0])


@pytest.mark.tl
def test_status_is_told_of_every_vector(setting: Setting) -> None:
    told: list[tuple[str, str, str]] = []
    setting.run(variants=VARIANTS, on_status=lambda *event: told.append(event))
    setting.run(
        variants=("biography",), mask_strategy=["answer_mean", "answer_last"], on_status=lambda *e: told.append(e)
    )
    assert [(job, state) for job, state, _ in told] == [
        ("local", "COMPLETED"), ("local", "COMPLETED"), ("local", "SKIPPED"), ("local", "COMPLETED")
    ]  # fmt: skip
    assert [text for _, _, text in told][1:3] == ["mara biography answer_mean"] * 2


@pytest.mark.tl
def test_verbose_shows_the_masks_of_every_variant_and_strategy(
    setting: Setting, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    setting.run(variants=VARIANTS, mask_strategy=["answer_last", "persona_last"], verbose=True)
    shown = capsys.readouterr().out
    assert [shown.count(text) for text in ("Mara Holt · templated", "Mara Holt · biography", "legend:")] == [1, 1, 2]
    assert shown.count("answer_last  sample q-short (of 4): 1 of ") == 2
    assert shown.count("persona_last  sample q-short (of 1): 1 of ") == 2
    setting.run(force=True)
    assert capsys.readouterr().out == ""


@pytest.mark.tl
def test_a_store_of_the_callers_is_used_and_left_to_the_caller_to_flush(setting: Setting) -> None:
    with PersonaVectorStore(setting.name, setting.root) as store:
        setting.run(store=store, activations_dir=None)
        setting.run(store=store, activations_dir=None, persona=BASELINE)
    assert store.list_personas(["templated"], include_baseline=True) == ["baseline_assistant", "mara"]
    assert '"baseline_assistant"' in (setting.root / "org__tiny/answer_mean/templated/manifest.json").read_text()


# --- what is stored already ----------------------------------------------------------------------------------------


@pytest.mark.tl
def test_what_is_stored_and_unchanged_is_not_run_again(setting: Setting) -> None:
    setting.run(variants=VARIANTS)
    before = [(path, (setting.root / path).stat().st_mtime_ns) for path in setting.files()]
    with watched(setting.model) as positions:
        results = setting.run(variants=VARIANTS)
    assert not any(positions.values())
    assert [(result.extracted, result.n_questions) for result in results] == [(False, 4), (False, 4)]
    assert [(path, (setting.root / path).stat().st_mtime_ns) for path in setting.files()] == before


@pytest.mark.tl
def test_force_runs_what_is_stored_again(setting: Setting) -> None:
    setting.run()
    stored = setting.load()
    with watched(setting.model) as positions:
        (result,) = setting.run(force=True)
    assert result.extracted and positions["blocks.2.mlp"] > 0
    assert torch.equal(setting.load(), stored)


@pytest.mark.tl
def test_only_the_missing_strategies_of_a_variant_are_run(setting: Setting) -> None:
    setting.run(mask_strategy=["answer_mean", "answer_last"])
    results = setting.run(mask_strategy=["answer_last", "persona_last", "answer_mean"])
    assert [result.extracted for result in results] == [False, True, False]


@pytest.mark.tl
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"persona": Persona("mara", MARA.persona, "Name: Mara Holt")}, "prompts_digest:"),
        ({"qa_pairs": QUESTIONS[:3]}, "sample_ids: 4 entries is now 3 entries"),
        ({"qa_pairs": [*QUESTIONS[:3], frq("q-twice", "Are you Mara Holt?", "I am.")]}, "prompts_digest:"),
        ({"qa_pairs": QUESTIONS[::-1]}, "prompts_digest:"),
    ],
)
def test_a_changed_selection_is_extracted_again_with_the_reason(
    changes: dict[str, Any], reason: str, setting: Setting
) -> None:
    setting.run()
    (result,) = setting.run(**changes)
    assert result.extracted and any(line.startswith(reason) for line in result.reasons)
    fresh = Setting(setting.model, setting.root / "fresh")
    fresh.run(**changes)
    assert torch.equal(setting.load(), fresh.load())
    assert not setting.run(**changes)[0].extracted


@pytest.mark.tl
def test_another_dtype_is_extracted_again_with_the_reason(setting: Setting, tiny_llama: Path) -> None:
    setting.run()
    (result,) = setting.run(model=load_model(tiny_llama, kind="bridge", dtype="bfloat16"))
    assert result.extracted and "dtype: 'float32' is now 'bfloat16'" in result.reasons


@pytest.mark.tl
def test_another_chat_template_is_extracted_again(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    setting.run()
    template = setting.model.tokenizer.chat_template
    monkeypatch.setattr(setting.model.tokenizer, "chat_template", template.replace("}}\n{{", "}}:\n{{"))
    (result,) = setting.run()
    assert result.extracted and result.reasons[0].startswith("prompts_digest:")


@pytest.mark.tl
@pytest.mark.parametrize("damage", [lambda data: data[:-7], lambda data: data[:40], lambda data: data[:-1] + b"\x7f"])
def test_a_damaged_file_is_extracted_again_and_said_to_be(damage: Callable[[bytes], bytes], setting: Setting) -> None:
    setting.run(variants=VARIANTS)
    stored = setting.load()
    path = setting.root / "org__tiny/answer_mean/templated/mara.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    damaged, untouched = setting.run(variants=VARIANTS)
    assert damaged.extracted and not untouched.extracted
    assert len(damaged.reasons) == 1 and str(path) in damaged.reasons[0]
    assert torch.equal(setting.load(), stored)


@pytest.mark.tl
def test_a_run_that_is_interrupted_is_continued_by_the_next(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    personas = [Persona(f"p{index}", {"first_name": f"P{index}"}, f"Number: {index}") for index in range(4)]
    save = PersonaVectorStore.save

    def interrupted_at_p2(self: PersonaVectorStore, variant: str, persona_id: str, *rest: Any, **options: Any) -> Path:
        if persona_id == "p2":
            raise KeyboardInterrupt
        return save(self, variant, persona_id, *rest, **options)

    monkeypatch.setattr(PersonaVectorStore, "save", interrupted_at_p2)

    def run_all() -> list[bool]:
        with PersonaVectorStore(setting.name, setting.root, variants=["templated"]) as store:
            return [setting.run(persona=each, store=store)[0].extracted for each in personas]

    with pytest.raises(KeyboardInterrupt):
        run_all()
    store = PersonaVectorStore(setting.name, setting.root, variants=["templated"])
    assert store.list_personas() == ["p0", "p1"]
    monkeypatch.undo()
    assert run_all() == [False, False, True, True]
    assert store.list_personas() == ["p0", "p1", "p2", "p3"]
    assert all(bool(store.load("templated", each.id).isfinite().all()) for each in personas)


# --- calls written for the reference -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ForeignPersona:
    """A record of another library: the same attribute names, its own class."""

    id: str
    name: str
    templated_view: str
    biography_view: str
    persona: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ForeignQA:
    id: str
    qid: str
    type: str
    item_type: str
    scope: str
    question: str
    answer: str
    choices: list[str] = field(default_factory=list)
    correct_choice_index: int | None = None
    bank_id: str | None = None
    related_frq_qids: list[str] = field(default_factory=list)


@pytest.mark.tl
def test_reference_calls_work_with_records_of_another_library(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    foreign = ForeignPersona("mara", "Mara Holt", MARA.templated_view, MARA.biography_view)
    foreign_pairs = [
        ForeignQA(pair.id, pair.qid, pair.type, pair.item_type, pair.scope, pair.question, pair.answer,
                  list(pair.choices), pair.correct_choice_index)
        for pair in QUESTIONS
    ]  # fmt: skip
    results = run_extraction(
        model=setting.model,
        model_name="google/gemma-2-9b-it",
        qa_pairs=foreign_pairs,
        variants=("templated", "biography"),
        persona=foreign,
        mask_strategy=MaskStrategy.ANSWER_MEAN,
        remote=False,
    )
    folder = Path("artifacts/activations/google__gemma-2-9b-it/answer_mean")
    assert [result.output_dir for result in results] == [folder / "templated", folder / "biography"]
    setting.run(variants=VARIANTS)
    stored = PersonaVectorStore("google/gemma-2-9b-it")
    for variant in VARIANTS:
        assert torch.equal(stored.load(variant, "mara"), setting.load(variant=variant))


@pytest.mark.tl
def test_the_low_level_reference_call_gives_the_recipes_vector(setting: Setting) -> None:
    setting.run()
    prepared = prepare_inputs(setting.model.tokenizer, system_prompt(MARA, "templated"), QUESTIONS)
    vectors = tl_persona.extract_activations(
        setting.model,
        input_ids_list=[prompt.input_ids for prompt in prepared],
        token_masks=[prompt.token_mask for prompt in prepared],
        remote=False,
    )
    assert relative_error(vectors, setting.load()) < 1e-6


# --- bad input -----------------------------------------------------------------------------------------------------


@dataclass
class Refusal:
    """Runs something that must fail before the model does any work, and gives the error."""

    setting: Setting

    def of(self, kind: type[Exception], call: Callable[[], object]) -> str:
        with watched(self.setting.model) as positions, pytest.raises(kind) as caught:
            call()
        assert not any(positions.values()), "the model ran"
        assert self.setting.files() == []
        return str(caught.value)


@pytest.fixture
def refused(setting: Setting) -> Refusal:
    return Refusal(setting)


@pytest.mark.tl
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (frq("q-bad", "Why?", "  \n"), "the answer is empty"),
        (frq("q-bad", " ", "Because."), "the question is empty"),
        (frq("q-bad", "Why?", "Because<|im_end|>"), "<|im_end|>"),
        (QAPair("q-bad", "explicit", "mcq", "shared", "Tea?", "Yes", ("Yes",), 3), "correct_choice_index 3"),
    ],
)
def test_a_question_that_cannot_be_said_is_named_before_the_model_runs(
    bad: QAPair, message: str, refused: Refusal
) -> None:
    text = refused.of(InputError, lambda: refused.setting.run(qa_pairs=[*QUESTIONS, bad]))
    assert "'q-bad'" in text and message in text


@pytest.mark.tl
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("ids", "mask", "kind", "message"),
    [
        (torch.arange(5), torch.zeros(5), MaskError, "a mask selects 0 of 5 tokens"),
        (torch.arange(5), torch.ones(4), InputError, "5 token ids but a mask over 4 positions"),
        (torch.arange(5)[None], torch.ones(5), InputError, "must be 1-D, got shape (1, 5)"),
        (torch.arange(5), torch.ones(1, 5), InputError, "5 token ids"),
        (torch.arange(0), torch.ones(0), InputError, "no tokens"),
        (torch.arange(5.0), torch.ones(5), InputError, "must be integers, got torch.float32"),
        (torch.arange(2049) % 90, torch.ones(2049), InputError, "2049 tokens, the model's context is 2048"),
        (torch.tensor([1, 2, 10**6]), torch.ones(3), InputError, "from 1 to 1000000, but the model has"),
        (torch.tensor([1, -2, 3]), torch.ones(3), InputError, "from -2 to 3, but the model has"),
    ],
)
def test_ids_and_masks_that_cannot_run_are_named_by_their_place(
    ids: Tensor, mask: Tensor, kind: type[InputError], message: str, refused: Refusal
) -> None:
    good = torch.arange(20, 25)
    text = refused.of(
        kind, lambda: extract_activations(refused.setting.model, [good, ids], [torch.ones(5, dtype=torch.bool), mask])
    )
    assert "sample '1'" in text and message in text


@pytest.mark.tl
def test_lists_of_different_lengths_are_refused(refused: Refusal) -> None:
    ids, model = torch.arange(20, 25), refused.setting.model
    one_mask = [torch.ones(5, dtype=torch.bool)]
    assert "2 samples but 1 masks" in refused.of(InputError, lambda: extract_activations(model, [ids, ids], one_mask))
    assert "no sample to run" in refused.of(InputError, lambda: extract_activations(model, [], []))


@pytest.mark.tl
@BOTH_KINDS
def test_a_prompt_longer_than_the_context_is_named_before_the_model_runs(
    kind: str, tiny_hooked: Boot, tmp_path: Path
) -> None:
    refused = Refusal(Setting(tiny_hooked("gpt2", kind), tmp_path))
    long = frq("q-long", "Go on?", "And the sea, and the wind. " * 60)
    text = refused.of(InputError, lambda: refused.setting.run(qa_pairs=[QUESTIONS[0], long]))
    assert "'q-long'" in text and f"the model's context is {GPT2_CONTEXT}" in text


@pytest.mark.tl
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_strategy": "answer_middle"}, "unknown mask strategy 'answer_middle', did you mean answer_mean?"),
        ({"mask_strategy": []}, "no mask strategy"),
        ({"variants": ["templated", "poem"]}, "persona 'mara' has no variant 'poem'; it has: biography, templated"),
        ({"variants": "templated"}, "pass a sequence such as ('templated',)"),
        ({"variants": []}, "no prompt variant"),
        ({"persona": Persona("bo", {}, "Name: Bo"), "variants": VARIANTS}, "persona 'bo': its biography view is empty"),
        ({"qa_pairs": []}, "persona 'mara': no question is left"),
        ({"layers": 7}, "there is no layer 7"),
        ({"layers": "blocks.1.hook_resid_pst"}, "blocks.1.hook_resid_post"),
        ({"persona": Persona("../mara", {}, "Name: Mara")}, "../mara"),
    ],
)
def test_an_unknown_choice_is_refused_before_the_model_runs(
    changes: dict[str, Any], message: str, refused: Refusal
) -> None:
    text = refused.of(HookError if "layers" in changes else InputError, lambda: refused.setting.run(**changes))
    assert message in text


@pytest.mark.tl
def test_a_bad_second_variant_is_found_before_the_first_one_runs(refused: Refusal) -> None:
    spoiled = Persona("mara", MARA.persona, MARA.templated_view, "Mara says <|im_end|> a lot.")
    text = refused.of(PromptError, lambda: refused.setting.run(persona=spoiled, variants=VARIANTS))
    assert "<|im_end|>" in text


@pytest.mark.tl
def test_a_tokenizer_without_a_chat_template_is_refused(refused: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refused.setting.model.tokenizer, "chat_template", None)
    assert "no chat template" in refused.of(PromptError, refused.setting.run)


@pytest.mark.tl
def test_a_tokenizer_that_is_not_fast_is_refused(refused: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = refused.setting.model.tokenizer
    slow = type("SlowTokenizer", (type(tokenizer),), {"is_fast": False})
    monkeypatch.setattr(tokenizer, "__class__", slow)
    assert "SlowTokenizer is not a fast tokenizer" in refused.of(PromptError, refused.setting.run)


@pytest.mark.tl
def test_a_question_that_ends_in_plain_text_has_no_special_token_to_read(tiny_hooked: Boot, tmp_path: Path) -> None:
    refused = Refusal(Setting(tiny_hooked("mistral", "bridge"), tmp_path))
    strategies = ["answer_mean", "question_last_special"]
    text = refused.of(MaskError, lambda: refused.setting.run(mask_strategy=strategies))
    assert "'q-short'" in text and "question_last" in text


@pytest.mark.tl
@BOTH_KINDS
def test_a_vector_with_holes_is_never_stored(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    setting = Setting(load_model(tiny_llama, kind=kind), tmp_path)
    handle = setting.model.blocks[1].mlp.register_forward_hook(lambda _m, _a, output: output * float("nan"))
    with pytest.raises(NonFiniteError, match=r"sample 'q-[a-z]+'.*blocks\.1\.hook_resid_post.*NaN or infinity"):
        setting.run()
    assert setting.files() == []
    handle.remove()
    assert setting.run()[0].extracted


@pytest.mark.tl
def test_a_folder_of_other_dimensions_is_left_as_it_is(setting: Setting) -> None:
    with PersonaVectorStore(setting.name, setting.root) as store:
        store.save("templated", "other", "Other", torch.ones(N_LAYERS + 2, 8), ["q"])
    with pytest.raises(StoreMismatchError, match=r"\(5, 8\).*\(3, 32\)"):
        setting.run()
    assert setting.files() == ["org__tiny/answer_mean/templated/other.safetensors"]


def test_more_than_one_name_is_public_where_the_reference_has_it() -> None:
    for name in ("MaskStrategy", "run_extraction", "extract_activations", "prepare_inputs", "ExtractionResult"):
        assert getattr(tl_persona, name) is globals()[name]


@pytest.mark.tl
def test_reasoning_counts_or_does_not_and_is_noted(setting: Setting) -> None:
    reasoned = [
        msgspec.structs.replace(each, answer=f"<think>{each.question}</think>{each.answer}") for each in QUESTIONS
    ]
    included = setting.run(qa_pairs=reasoned)[0]
    counted, strategy = setting.load(), "answer_mean"
    store = PersonaVectorStore(setting.name, setting.root, strategy)
    assert store.provenance("templated", "mara").notes["reasoning"] == "include"
    excluded = setting.run(qa_pairs=reasoned, reasoning="exclude")[0]
    assert included.extracted and excluded.extracted and excluded.reasons[0].startswith("tokens_digest: ")
    assert store.provenance("templated", "mara").notes["reasoning"] == "exclude"
    prompts = prepare_inputs(setting.model.tokenizer, system_prompt(MARA, "templated"), reasoned, reasoning="exclude")
    expected = extract_activations(
        setting.model, [prompt.input_ids for prompt in prompts], [prompt.token_mask for prompt in prompts]
    )
    assert relative_error(setting.load(), expected) < 1e-6 < 1e-2 < relative_error(counted, expected)
    setting.run()
    assert "reasoning" not in store.provenance("templated", "mara").notes
