"""`tl-persona preview`: what it prints, and that it needs no model for it."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_families import FAMILIES
from templates import BEHAVIOURS
from tiny import FAMILIES as MODELS
from tiny import build_tokenizer
from tokenizer_kinds import fast_tokenizer

from tl_persona import ContrastPairDataset, PersonaDataset, load_pairs
from tl_persona.cli.main import main
from tl_persona.data.personas import system_prompt
from tl_persona.prompts.masks import MaskStrategy

TYPED = ["--system", "You are Mara.", "--user", "Who are you?", "--answer", "I am Mara."]


@pytest.fixture(autouse=True)
def wide_terminal_without_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Callable[[str], str]:
    """Give a folder that holds nothing but the files of one of the tiny models' tokenizers, by family."""

    def folder_of(family: str) -> str:
        folder = tmp_path / f"only-{family}"
        build_tokenizer(MODELS[family]).save_pretrained(folder)
        assert not [*folder.glob("*.safetensors"), *folder.glob("config.json")]
        return str(folder)

    return folder_of


Shown = Callable[..., str]


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Shown:
    """Run the command and give what it prints."""

    def run(*arguments: str, code: int = 0) -> str:
        assert main(["preview", *arguments]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    return run


def test_a_folder_with_tokenizer_files_alone_is_enough(tokenizer_folder: Callable[[str], str], shown: Shown) -> None:
    out = shown("--model", tokenizer_folder("llama"), *TYPED)
    for strategy in MaskStrategy:
        assert f"\n{strategy}  " in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if "as given" in line}
    text = (
        "<|im_start|>system\nYou are Mara.<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    )
    starts = {"persona": text.index("You"), "question": text.index("Who"), "answer": len(text)}
    lengths = {"persona": len("You are Mara."), "question": len("Who are you?"), "answer": len("I am Mara.")}
    assert {name: row[1] for name, row in rows.items()} == {
        name: f"{start}-{start + lengths[name]}" for name, start in starts.items()
    }


def test_weights_beside_the_tokenizer_are_not_touched(tiny_llama: Path, tmp_path: Path) -> None:
    """In a process of its own: the file of weights is not opened, nor is what would run them imported."""
    folder = shutil.copytree(tiny_llama, tmp_path / "chat")
    (folder / "model.safetensors").write_bytes(b"not weights")
    program = (
        "import sys\nfrom tl_persona.cli.main import main\n"
        f"opened = []\nsys.addaudithook(lambda event, args: event == 'open' and opened.append(str(args[0])))\n"
        f"code = main(['preview', '--model', {str(folder)!r}, *{TYPED!r}])\n"
        "assert code == 0, code\n"
        "assert any(name.endswith('tokenizer.json') for name in opened), 'the hook sees no files'\n"
        "assert not [name for name in opened if name.endswith('.safetensors')], opened\n"
        "assert 'transformer_lens' not in sys.modules and 'nnsight' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("never_loads")
@pytest.mark.slow
def test_the_demo_models_tokenizer_is_read_out_of_its_file(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    assert "\nanswer_mean  " in shown("--model", "smollm2", *TYPED)


def test_any_sample_of_a_data_set_is_shown(tokenizer_folder: Callable[[str], str], shown: Shown) -> None:
    dataset = PersonaDataset.bundled()
    persona = list(dataset)[2]
    pair = dataset.get_qa(persona.id)[3]
    chosen = ["--persona-id", persona.id, "--variant", "biography", "--question", "4"]
    out = shown("--model", tokenizer_folder("llama"), *chosen, "--mask-strategy", "answer_mean", "--full")
    assert f"{persona.name} · biography" in out
    printed = re.sub(r"\s+", " ", out.replace("↵", " "))
    for text in (system_prompt(persona, "biography"), pair.question):
        assert re.sub(r"\s+", " ", text) in printed
    first = shown("--model", tokenizer_folder("llama"))
    assert f"{next(iter(dataset)).name} · templated" in first


def test_a_data_set_of_ones_own_is_read(tokenizer_folder: Callable[[str], str], shown: Shown, tmp_path: Path) -> None:
    persona = {"id": "p", "persona": {"first_name": "Ada"}, "templated_view": "You like tea.", "biography_view": "Tea."}
    pair = {"id": "p", "qid": "q", "type": "explicit", "item_type": "frq", "scope": "individual"}
    files = {"personas": persona, "qa": {**pair, "question": "Tea or milk?", "answer": "Tea, please."}}
    for name, record in files.items():
        (tmp_path / name).write_text(json.dumps(record) + "\n", encoding="utf-8")
    paths = ["--personas", str(tmp_path / "personas"), "--qa", str(tmp_path / "qa")]
    out = shown("--model", tokenizer_folder("llama"), *paths, "--full", "--mask-strategy", "answer_mean")
    assert "You like tea." in out and "Tea or milk?" in out and "Tea, please." in out


def test_what_the_template_writes_and_changes_is_told(tokenizer_folder: Callable[[str], str], shown: Shown) -> None:
    gemma = shown("--model", tokenizer_folder("gemma"), "--system", " You. ", "--user", "Who?", "--answer", "A ")
    assert re.search(r"answer .* white space at the ends stripped", gemma)
    assert re.search(r"written before the persona +<bos><start_of_turn>user↵ *\n", gemma)
    assert re.search(r"written before the question +↵↵ *\n", gemma)
    assert "the template takes no system message" in gemma
    qwen = shown("--model", tokenizer_folder("qwen3"), *TYPED)
    assert re.search(r"written before the answer +<\|im_end\|>↵<\|im_start\|>assistant↵<think>↵↵</think>↵↵ *\n", qwen)
    assert "the template takes no system message" not in qwen
    assert "character for character" in qwen


def test_a_cut_content_and_its_added_tokens_are_told(shown: Shown, tmp_path: Path) -> None:
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.chat_template = next(family for family in FAMILIES if family.name == "deepseek").template
    tokenizer.save_pretrained(tmp_path)
    typed = ["--system", "You <think>", "--user", "Who?", "--answer", "<think>Hm.</think>A"]
    out = shown("--model", str(tmp_path), *typed)
    assert re.search(r"answer .* cut by the template", out)
    assert re.search(r"persona .* as given; one token each: <think>", out)
    assert "the template cut a text: what is left of it was seen between markers" in out


def test_a_chat_without_system_prompt_may_be_typed(tokenizer_folder: Callable[[str], str], shown: Shown) -> None:
    out = shown("--model", tokenizer_folder("llama"), "--user", "Who?", "--answer", "A")
    assert "persona_mean  sample 'typed': persona_mean selects none" in out
    assert "written before the question  <|im_start|>user↵" in re.sub(r" +$", "", out, flags=re.MULTILINE)
    assert "before the persona" not in out


def test_either_side_of_a_contrast_pair_is_shown(
    tokenizer_folder: Callable[[str], str], shown: Shown, tmp_path: Path
) -> None:
    folder = tokenizer_folder("llama")
    pair = load_pairs("refusal")[2]
    for side in ("positive", "negative"):
        out = shown("--model", folder, "--behavior", "refusal", "--pair", "3", "--side", side, "--full")
        assert f"refusal · pair 3 · {side}" in out
        answer = getattr(pair, side)[-1]["content"]
        assert re.sub(r"\s+", "", answer) in re.sub(r"\s+", "", out)
    own = ContrastPairDataset("calm")
    question = {"role": "user", "content": "Ready?"}
    own.add_pair(*([question, {"role": "assistant", "content": answer}] for answer in ("Breathe.", "Hurry!")))
    own.add_pair("Easy.", "Quick!")
    own.save(tmp_path / "calm.json")
    assert "Breathe." in shown("--model", folder, "--pairs", str(tmp_path / "calm.json"))
    err = shown("--model", folder, "--pairs", str(tmp_path / "calm.json"), "--pair", "2", code=2)
    assert "pair 2 of calm is plain text" in err


def test_a_chat_of_several_turns_is_read_from_a_file(
    tokenizer_folder: Callable[[str], str], shown: Shown, tmp_path: Path
) -> None:
    texts = [("user", "Who?"), ("assistant", "Mara."), ("user", "Truly?"), ("assistant", "Yes.")]
    (tmp_path / "chat.json").write_text(
        json.dumps({"messages": [{"role": role, "content": text} for role, text in texts]})
    )
    out = shown("--model", tokenizer_folder("llama"), "--chat", str(tmp_path / "chat.json"), "--full")
    assert re.search(r"written before the message 2 +", out)
    assert re.search(r"\nquestion +\d+-\d+ ", out) and all(text in out for _, text in texts)
    (tmp_path / "chat.json").write_text('{"role": "user"}')
    assert "chat.json, line 1" in shown(
        "--model", tokenizer_folder("llama"), "--chat", str(tmp_path / "chat.json"), code=2
    )


def test_a_strategy_that_selects_nothing_is_told_among_all_and_refused_alone(
    tokenizer_folder: Callable[[str], str], shown: Shown
) -> None:
    folder = tokenizer_folder("mistral")
    out = shown("--model", folder, *TYPED)
    assert "question_last_special  sample 'typed': question_last_special needs a special token" in out
    assert "\nanswer_mean  " in out
    err = shown("--model", folder, *TYPED, "--mask-strategy", "question_last_special", code=2)
    assert "question_last_special needs a special token" in err


def test_keywords_reach_the_template_as_json_or_text(shown: Shown, tmp_path: Path) -> None:
    tokenizer = fast_tokenizer("byte_level")
    behaviour = next(behaviour for behaviour in BEHAVIOURS if behaviour.name == "keyword")
    tokenizer.chat_template = str(behaviour.template) + "{{ note }}"
    tokenizer.save_pretrained(tmp_path)
    on = shown("--model", str(tmp_path), *TYPED, "--template-kwarg", "enable_thinking=true")
    off = shown(
        "--model", str(tmp_path), *TYPED, "--template-kwarg", "enable_thinking=false", "--template-kwarg", "note=a=b"
    )
    assert "/think" in on and "/think" not in off
    assert re.search(r"written at the end +<\|end\|>a=b *\n", off)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--user", "Who?"], "--user and --answer go together"),
        (["--system", "You."], "--user and --answer go together"),
        ([*TYPED, "--persona-id", "p1"], "--persona-id goes without --system"),
        ([*TYPED, "--question", "1"], "--question goes without --system"),
        (["--question", "100000"], "there is no --question 100000"),
        (["--persona-id", "nobody"], "nobody"),
        (["--behavior", "refusal", "--question", "1"], "--question goes without --behavior"),
        (["--chat", "chat.json", "--side", "negative"], "--side goes without --chat"),
        (["--side", "negative"], "--pair and --side go with --behavior or --pairs"),
        (["--behavior", "refusal", "--pair", "1000"], "refusal has 32 pairs, so there is no --pair 1000"),
        (["--behavior", "refused"], "did you mean refusal"),
        (["--chat", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--variant", "sung"], "sung"),
        (["--mask-strategy", "answer_maen"], "did you mean answer_mean"),
        (["--template-kwarg", "thinking"], "is not NAME=VALUE"),
        (["--template-kwarg", "a=1", "--template-kwarg", "a=2"], "a is given twice"),
        (["--template-kwarg", "tokenize=true"], "tokenize"),
        (["--personas", "somewhere"], "--personas and --qa go together"),
        (["--user", "Who?", "--answer", "<|im_end|>"], "control token"),
    ],
)
def test_what_cannot_be_shown_is_refused_with_the_reason(
    arguments: list[str], fault: str, tokenizer_folder: Callable[[str], str], shown: Shown
) -> None:
    assert fault in shown("--model", tokenizer_folder("llama"), *arguments, code=2)


def test_a_model_that_is_not_there_is_refused(shown: Shown, tmp_path: Path) -> None:
    assert "there is no model at" in shown("--model", str(tmp_path / "none"), *TYPED, code=2)
    assert "config.json" in shown("--model", str(tmp_path), *TYPED, code=2)


def test_an_empty_data_set_is_refused(tokenizer_folder: Callable[[str], str], shown: Shown, tmp_path: Path) -> None:
    for name in ("personas", "qa"):
        (tmp_path / name).write_text("", encoding="utf-8")
    paths = ["--personas", str(tmp_path / "personas"), "--qa", str(tmp_path / "qa")]
    assert "tl-persona: error: " in shown("--model", tokenizer_folder("llama"), *paths, code=2)
