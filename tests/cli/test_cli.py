"""The command line: what it saves, what it says, and how it ends."""

import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import tl_persona
from tl_persona.cli.main import main
from tl_persona.data.dataset import PersonaDataset
from tl_persona.data.personas import Persona, QAPair
from tl_persona.store import PersonaVectorStore

Row = dict[str, Any]
NAMES = {"mara": ("Mara", "Holt"), "odo": ("Odo", "[/b] :sob:"), "baseline_assistant": ("Assistant", "")}


def frq(persona: str, number: int, kind: str, answer: str, **more: Any) -> Row:
    fixed = {"item_type": "frq", "scope": "individual", "question": f"Question {number}, {persona}?"}
    return {"id": persona, "qid": f"{persona}-{number}", "type": kind, **fixed, "answer": answer, **more}


def questions(persona: str) -> list[Row]:
    choice = {"item_type": "mcq", "scope": "shared", "choices": ["Tea", "Rain"], "correct_choice_index": 1}
    return [
        frq(persona, 1, "explicit", "By the sea."),
        frq(persona, 2, "explicit", "In the evening.", bank_id="b1"),
        frq(persona, 3, "implicit", "I read, and I listen to the wind."),
        frq(persona, 4, "implicit", "I keep it short."),
        frq(persona, 5, "explicit", "Rain", bank_id="b1", **choice),
    ]


class CommandLine:
    """Runs `tl-persona extract` on a tiny model and three personas, all in one folder."""

    def __init__(self, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.model, self._capsys = folder, model, capsys
        self.root = folder / "store"
        self.personas = [
            {
                "id": persona,
                "persona": {"first_name": first, "last_name": last},
                "templated_view": f"Name: {first}\nHome: the coast",
                "biography_view": f"{first} lives by the sea.",
            }
            for persona, (first, last) in NAMES.items()
        ]
        self.questions = [row for persona in NAMES for row in questions(persona)]

    def __call__(self, *options: object, personas: bool = True) -> int:
        """The exit code; what was printed is in `out` and `err`, with its line breaks as spaces."""
        given: list[object] = ["extract", "--model", self.model, "--activations-dir", self.root]
        if personas:
            for name, rows in {"personas": self.personas, "qa": self.questions}.items():
                path = self.folder / f"{name}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
                given += [f"--{name}", path]
        return self.run(*given, *options)

    def run(self, *argv: object) -> int:
        self._capsys.readouterr()
        code = main([str(argument) for argument in argv])
        self.out, self.err = (" ".join(text.split()) for text in self._capsys.readouterr())
        return code

    def saved(self) -> list[str]:
        return sorted(str(path.relative_to(self.root / self.model.name)) for path in self.root.rglob("*.safetensors"))

    def path(self, persona: str = "mara", variant: str = "templated", strategy: str = "answer_mean") -> Path:
        return self.root / self.model.name / strategy / variant / f"{persona}.safetensors"

    def vectors(self, *names: str) -> Tensor:
        return safetensors.torch.load(self.path(*names).read_bytes())["activations"]

    def sample_ids(self, persona: str = "mara") -> list[str] | None:
        return PersonaVectorStore(self.model.name, self.root).persona_sample_ids("templated", persona)


@pytest.fixture
def cli(tmp_path: Path, tiny_chat: Path, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(tmp_path, tiny_chat, capsys)


# --- extract -------------------------------------------------------------------------------------------------------


@pytest.mark.tl
def test_extract_saves_every_persona_and_variant_and_sums_it_up(cli: CommandLine) -> None:
    assert cli() == 0
    assert cli.saved() == sorted(
        f"answer_mean/{variant}/{persona}.safetensors" for variant in ("templated", "biography") for persona in NAMES
    )
    for persona in NAMES:
        assert cli.vectors(persona).shape == (3, 32) and bool(cli.vectors(persona).isfinite().all())
        for variant in ("templated", "biography"):
            assert re.search(rf"{persona} │ {variant} │ 5 │ [\d,]+ │ 1 │ 0 │ answer_mean/{variant} ", cli.out)
    assert str(cli.root / "tiny-chat") in cli.out
    manifest = json.loads((cli.path().parent / "manifest.json").read_text())
    assert (manifest["num_layers"], manifest["hidden_size"]) == (3, 32)
    assert manifest["personas"]["odo"]["name"] == "Odo [/b] :sob:"
    assert manifest["personas"]["mara"]["sample_ids"] == [f"mara-{number}" for number in range(1, 6)]


@pytest.mark.tl
def test_a_second_run_keeps_what_is_stored_and_force_does_not(cli: CommandLine) -> None:
    assert cli("--persona-id", "mara") == 0
    written = cli.path().stat().st_mtime_ns
    assert cli("--persona-id", "mara") == 0
    assert re.search(r"mara │ templated │ 5 │ [\d,]+ │ 0 │ 1 │", cli.out) and cli.err == ""
    assert cli.path().stat().st_mtime_ns == written
    assert cli("--persona-id", "mara", "--force") == 0
    assert re.search(r"mara │ templated │ 5 │ [\d,]+ │ 1 │ 0 │", cli.out)
    assert cli.path().stat().st_mtime_ns > written


@pytest.mark.tl
def test_flags_take_several_values(cli: CommandLine) -> None:
    assert cli(
        "--persona-id", "odo", "mara", "odo", "--variants", "biography", "templated",
        "--mask-strategy", "answer_last", "persona_mean", "--layers", "0", "blocks.2.*resid_post",
    ) == 0  # fmt: skip
    assert cli.saved() == sorted(
        f"{strategy}/{variant}/{persona}.safetensors"
        for strategy in ("answer_last", "persona_mean")
        for variant in ("biography", "templated")
        for persona in ("mara", "odo")
    )
    assert cli.vectors("odo", "biography", "answer_last").shape == (2, 32)
    assert re.search(r"odo │ biography │ 5 │ [\d,]+ │ 2 │ 0 │ <strategy>/biography ", cli.out)


@pytest.mark.tl
def test_all_strategies_have_a_name_of_their_own(cli: CommandLine) -> None:
    assert cli("--persona-id", "mara", "--variants", "templated", "--mask-strategy", "all") == 0
    assert cli.saved() == sorted(f"{strategy}/templated/mara.safetensors" for strategy in tl_persona.MaskStrategy)


@pytest.mark.tl
def test_a_sample_of_personas_is_the_first_ones(cli: CommandLine) -> None:
    assert cli("--sample-size", "2", "--variants", "templated") == 0
    assert cli.saved() == [f"answer_mean/templated/{persona}.safetensors" for persona in ("mara", "odo")]


@pytest.mark.tl
@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        (["--qa-type", "explicit"], {1, 2, 5}),
        (["--qa-type", "implicit"], {3, 4}),
        (["--qa-type", "all"], {1, 2, 3, 4, 5}),
        (["--n-train", "9"], {1, 3, 4}),  # 2 shares its bank id with the test question, 5
        (["--n-train", "9", "--qa-type", "implicit"], {3, 4}),
    ],
)
def test_questions_are_chosen_by_type_and_split(options: list[str], numbers: set[int], cli: CommandLine) -> None:
    assert cli("--persona-id", "mara", "--variants", "templated", *options) == 0
    assert set(cli.sample_ids() or ()) == {f"mara-{number}" for number in numbers}


@pytest.mark.tl
def test_the_train_split_is_the_data_sets_own(cli: CommandLine) -> None:
    for seed in (0, 1, 2):
        assert cli("--persona-id", "mara", "--variants", "templated", "--n-train", "2", "--seed", seed) == 0
        data = PersonaDataset.from_jsonl(cli.folder / "personas.jsonl", cli.folder / "qa.jsonl")
        train, _ = data.train_test_split("mara", n_train=2, seed=seed)
        assert cli.sample_ids() == [pair.qid for pair in train]


@pytest.mark.tl
def test_the_bundled_personas_and_a_folder_of_data_need_no_files_named(cli: CommandLine) -> None:
    options = ["--persona-id", "baseline_assistant", "--n-train", "2", "--variants", "templated"]
    assert cli(*options, personas=False) == 0
    bundled, _ = PersonaDataset.bundled().train_test_split("baseline_assistant", n_train=2)
    assert cli.sample_ids("baseline_assistant") == [pair.qid for pair in bundled]
    cli("--sample-size", "1", "--variants", "templated")
    folder = cli.folder / "data"
    folder.mkdir()
    shutil.copy(cli.folder / "personas.jsonl", folder / "dataset_personas.jsonl")
    shutil.copy(cli.folder / "qa.jsonl", folder / "dataset_qa.jsonl")
    assert cli("--dataset", folder, "--persona-id", "mara", "--variants", "templated", personas=False) == 0
    assert re.search(r"mara │ templated │ 5 │ [\d,]+ │ 0 │ 1 │", cli.out)


@pytest.mark.tl
def test_verbose_shows_masks_even_where_names_look_like_markup(cli: CommandLine) -> None:
    assert cli("--persona-id", "odo", "--variants", "templated", "--verbose") == 0
    assert "Odo [/b] :sob: · templated" in cli.out and "legend:" in cli.out
    assert "answer_mean sample odo-1 (of 5):" in cli.out


@pytest.mark.tl
@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--kind", "bridge"], "TransformerBridge"),
        pytest.param(["--kind", "hooked"], "HookedTransformer", marks=pytest.mark.hooked),
    ],
)
def test_kind_and_dtype_are_those_asked_for(options: list[str], name: str, cli: CommandLine) -> None:
    assert cli("--persona-id", "mara", "--variants", "templated", *options, "--dtype", "bfloat16") == 0
    recorded = PersonaVectorStore("tiny-chat", cli.root).provenance("templated", "mara")
    assert recorded is not None
    assert (recorded.notes["model_class"], recorded.dtype) == (name, "bfloat16")


# --- extracted again -----------------------------------------------------------------------------------------------


def retrain(cli: CommandLine) -> None:
    weights = safetensors.torch.load_file(cli.model / "model.safetensors")
    changed = {name: tensor * 1.5 for name, tensor in weights.items()}
    safetensors.torch.save_file(changed, cli.model / "model.safetensors", {"format": "pt"})


def rewrite_persona(cli: CommandLine) -> None:
    cli.personas[0]["templated_view"] += "\nManner: short"


def drop_question(cli: CommandLine) -> None:
    cli.questions = [row for row in cli.questions if row["qid"] != "mara-4"]


def truncate_file(cli: CommandLine) -> None:
    cli.path().write_bytes(cli.path().read_bytes()[:-5])


@pytest.mark.tl
@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        (retrain, [], r"revision: 'tensors-\w+' is now 'tensors-\w+'"),
        (rewrite_persona, [], "prompts_digest: "),
        (drop_question, [], "sample_ids: 5 entries is now 4 entries"),
        (truncate_file, [], r"mara\.safetensors"),
        (lambda _cli: None, ["--dtype", "bfloat16"], "dtype: 'float32' is now 'bfloat16'"),
    ],
)
def test_what_would_come_out_different_is_extracted_again_and_why_is_said(
    change: Callable[[CommandLine], None], options: list[str], reason: str, cli: CommandLine
) -> None:
    chosen = ["--persona-id", "mara", "odo", "--variants", "templated"]
    assert cli(*chosen) == 0
    before = cli.vectors()
    change(cli)
    assert cli(*chosen, *options) == 0
    assert re.search(f"mara templated answer_mean: extracted again: .*{reason}", cli.err)
    assert torch.equal(cli.vectors(), before) == (change is truncate_file)
    assert cli(*chosen, *options) == 0
    assert cli.err == "" and re.search(r"mara │ templated │ \d │ [\d,]+ │ 0 │ 1 │", cli.out)


@pytest.mark.tl
def test_an_interrupted_run_ends_with_130_and_is_completed_by_the_next(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = PersonaVectorStore.save

    def interrupted(self: PersonaVectorStore, variant: str, persona_id: str, *rest: Any, **options: Any) -> Path:
        if persona_id == "odo":
            raise KeyboardInterrupt
        return save(self, variant, persona_id, *rest, **options)

    with monkeypatch.context() as patched:
        patched.setattr(PersonaVectorStore, "save", interrupted)
        assert cli("--variants", "templated") == 130
    assert "run again to continue" in cli.err
    assert cli.saved() == ["answer_mean/templated/mara.safetensors"]
    assert list(json.loads((cli.path().parent / "manifest.json").read_text())["personas"]) == ["mara"]
    assert cli("--variants", "templated") == 0
    assert re.search(r"mara │ templated │ 5 │ [\d,]+ │ 0 │ 1 │.*odo │ templated │ 5 │ [\d,]+ │ 1 │ 0 │", cli.out)
    assert len(cli.saved()) == 3


# --- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.tl
def test_skip_failed_goes_on_and_ends_with_1(cli: CommandLine) -> None:
    cli.questions[7]["answer"] = " "
    cli.questions[7]["qid"] = "[/red] bad"
    assert cli("--variants", "templated", "--skip-failed") == 1
    assert cli.saved() == [f"answer_mean/templated/{name}.safetensors" for name in ("baseline_assistant", "mara")]
    assert re.search(r"odo failed: sample '\[/red\] bad': the answer is empty", cli.err)
    assert "1 of 3 personas failed: odo" in cli.err
    assert "odo │" not in cli.out


@pytest.mark.tl
def test_without_skip_failed_the_first_failure_ends_the_run_and_keeps_what_is_done(cli: CommandLine) -> None:
    cli.questions[7]["answer"] = " "
    assert cli("--variants", "templated") == 2
    assert cli.saved() == ["answer_mean/templated/mara.safetensors"]
    assert "tl-persona: error: sample 'odo-3': the answer is empty" in cli.err


@pytest.mark.tl
def test_skip_failed_passes_over_a_persona_whose_questions_are_all_filtered_out(cli: CommandLine) -> None:
    cli.questions = [row for row in cli.questions if row["id"] != "odo" or row["type"] == "explicit"]
    assert cli("--variants", "templated", "--qa-type", "implicit", "--skip-failed") == 1
    assert "odo failed: persona 'odo': no question is left" in cli.err
    assert len(cli.saved()) == 2


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--persona-id", "mra"], "no persona 'mra'"),
        (["--mask-strategy", "answer_middle"], "unknown mask strategy 'answer_middle'"),
        (["--mask-strategy", "answer_mean", "answer_mean"], "named twice"),
        (["--variants", "templated", "poem"], "no variant 'poem'"),
        (["--model", "/no/such/model"], "there is no model at /no/such/model"),
        (["--persona-id", "odo", "--qa-type", "implicit", "--n-train", "1"], "persona 'odo': no question"),
        (["--dataset", "somewhere"], "--dataset goes without --personas and --qa"),
    ],
)
def test_bad_choices_end_with_2_before_the_model_is_loaded(options: list[str], message: str, cli: CommandLine) -> None:
    cli.questions = [row for row in cli.questions if row["id"] != "odo" or row["type"] == "explicit"]
    assert cli(*options) == 2
    assert cli.err.startswith("tl-persona: error: ") and message in cli.err
    assert "Traceback" not in cli.err and not cli.root.exists()


@pytest.mark.usefixtures("never_loads")
def test_a_file_alone_and_a_bad_line_end_with_2(cli: CommandLine) -> None:
    assert cli("--personas", cli.folder / "personas.jsonl", personas=False) == 2
    assert "--personas and --qa go together" in cli.err
    cli.questions[1]["type"] = "guessed"
    assert cli() == 2
    assert "qa.jsonl" in cli.err and re.search(r"\b2\b", cli.err) and "type" in cli.err


def test_the_questions_of_one_persona_are_held_at_a_time(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[weakref.ref[QAPair]] = []

    class Watched(QAPair, frozen=True, weakref=True):
        def __post_init__(self) -> None:
            super().__post_init__()
            read.append(weakref.ref(self))

    held: dict[str, list[str]] = {}

    def pretend(*_args: Any, persona: Persona, **_options: Any) -> list[Any]:
        held[persona.id] = [pair.qid for reference in read if (pair := reference()) is not None]
        return []

    monkeypatch.setattr("tl_persona.data.dataset.QAPair", Watched)
    monkeypatch.setattr("tl_persona.cli.extract.load_for_backend", lambda *_: object())
    monkeypatch.setattr("tl_persona.cli.extract.run_extraction", pretend)
    assert cli() == 0
    assert held == {persona: [f"{persona}-{number}" for number in range(1, 6)] for persona in NAMES}


@pytest.mark.parametrize("options", [[], ["--skip-failed"]])
def test_a_file_that_changes_while_personas_run_ends_the_run_and_is_named(
    options: list[str], cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def pretend(*_args: Any, persona: Persona, **_options: Any) -> list[Any]:
        ran.append(persona.id)
        with (cli.folder / "qa.jsonl").open("a") as file:
            file.write(json.dumps(frq("odo", 6, "explicit", "Late.")) + "\n")
        return []

    monkeypatch.setattr("tl_persona.cli.extract.load_for_backend", lambda *_: object())
    monkeypatch.setattr("tl_persona.cli.extract.run_extraction", pretend)
    assert cli(*options) == 2
    assert ran == ["mara"]
    assert re.search(r"error: .*qa\.jsonl: the file was changed after it was opened", cli.err)


@pytest.mark.tl
def test_an_unknown_layer_ends_with_2_and_names_near_ones(cli: CommandLine) -> None:
    assert cli("--layers", "blocks.0.hook_resid_pst") == 2
    assert "blocks.0.hook_resid_post" in cli.err and cli.saved() == []


@pytest.mark.tl
def test_vectors_of_another_model_in_the_folder_end_with_1(cli: CommandLine) -> None:
    with PersonaVectorStore("tiny-chat", cli.root) as store:
        store.save("templated", "other", "Other", torch.ones(2, 8), ["q"])
    assert cli("--persona-id", "mara", "--variants", "templated") == 1
    assert "(2, 8)" in cli.err and "(3, 32)" in cli.err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["extract"],
        ["reshape"],
        ["extract", "--model", "m", "--sample-size", "0"],
        ["extract", "--model", "m", "--n-train", "many"],
        ["extract", "--model", "m", "--qa-type", "both"],
        ["extract", "--model", "m", "--persona-id", "a", "--sample-size", "2"],
        ["extract", "--model", "m", "--persona-id"],
        ["show"],
    ],
)
def test_bad_arguments_end_with_2_and_the_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert "usage: tl-persona" in capsys.readouterr().err


def test_help_and_version_end_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, shown in {("--help",): "extract", ("extract", "--help"): "--skip-failed", ("--version",): "0."}.items():
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 0
        assert shown in capsys.readouterr().out


# --- show ----------------------------------------------------------------------------------------------------------


@pytest.mark.tl
def test_show_says_what_a_file_says_of_itself(cli: CommandLine) -> None:
    assert cli("--persona-id", "odo", "--variants", "templated") == 0
    vectors = cli.vectors("odo")
    assert cli.run("show", cli.path("odo")) == 0
    for fact in ("Odo [/b] :sob: (odo)", "3 layers x 32 d_model, F32", "checksum ok", "5: odo-1, odo-2 ... odo-5",
                 "tiny-chat (tensors-", "unprocessed", "answer_mean", "blocks.1.hook_resid_post"):  # fmt: skip
        assert fact in cli.out
    for layer, norm in enumerate(vectors.double().norm(dim=1).tolist()):
        assert re.search(rf"blocks\.{layer}\.hook_resid_post {re.escape(f'{norm:.4g}')} █", cli.out)


def test_show_tells_an_altered_tensor_by_its_exit_code(cli: CommandLine) -> None:
    with PersonaVectorStore("tiny-chat", cli.root) as store:
        store.save("templated", "mara", "Mara", torch.ones(3, 32), ["q"])
    data = bytearray(cli.path().read_bytes())
    data[-2] ^= 1
    cli.path().write_bytes(bytes(data))
    assert cli.run("show", cli.path()) == 1
    assert "WRONG" in cli.out


def test_show_reads_a_file_of_another_library(cli: CommandLine) -> None:
    path = cli.folder / "theirs.safetensors"
    safetensors.torch.save_file({"activations": torch.zeros(2, 4)}, path)
    assert cli.run("show", path) == 0
    assert "none recorded" in cli.out and "2 layers x 4 d_model" in cli.out


def test_show_of_what_is_not_there_ends_with_1(cli: CommandLine) -> None:
    assert cli.run("show", cli.folder / "nothing.safetensors") == 1
    assert "tl-persona: error:" in cli.err and "nothing.safetensors" in cli.err


def test_no_librarys_bar_is_drawn_where_there_is_no_terminal() -> None:
    code = (
        "from tl_persona.cli.main import main; main(['show', 'nothing']); import tqdm; [*tqdm.tqdm(range(9), 'a bar')]"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "nothing" in done.stderr
    assert "a bar" not in done.stderr
