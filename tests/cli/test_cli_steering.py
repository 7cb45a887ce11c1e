"""`tl-persona caa`, `steer` and `show`: what they save and say, and how they end."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tl_persona import extract_caa_vectors, load_model, load_pairs
from tl_persona.cli.main import main
from tl_persona.data.contrast import ContrastPairDataset
from tl_persona.statistics.directions import pca_direction
from tl_persona.vectors import SteeringVector, SteeringVectorSet

RAW = [
    {"positive": "I read by the sea in the evening.", "negative": "There is wind from the west."},
    {"positive": "Tea, please.", "negative": "Give me the rain and the wind!"},
    {"positive": "You are kind, and you speak plainly.", "negative": "Mara kept the light."},
    {"positive": "What is your name?", "negative": "No."},
]


class CommandLine:
    """Runs `tl-persona` on a tiny model in a folder; what was printed is in `out` and `err`, with single spaces."""

    def __init__(self, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.model, self._capsys = folder, model, capsys
        self.output = folder / "vectors"
        self.pairs = folder / "pairs.json"
        ContrastPairDataset("plainness", RAW).save(self.pairs)

    def __call__(self, command: str, *options: object) -> int:
        given = [] if command == "show" else ["--model", self.model, "--kind", "bridge"]
        self._capsys.readouterr()
        try:
            code = main([command, *map(str, given), *map(str, options)])
        except SystemExit as stop:
            code = int(stop.code or 0)
        self.out, self.err = (" ".join(text.split()) for text in self._capsys.readouterr())
        return code

    def caa(self, *options: object) -> int:
        return self("caa", "--pairs", self.pairs, "--output", self.output, *options)

    def steer(self, *options: object) -> int:
        return self("steer", "--vector", self.output, "--max-new-tokens", 5, *options)

    def saved(self) -> SteeringVectorSet:
        return SteeringVectorSet.load(self.output)


@pytest.fixture
def cli(tmp_path: Path, tiny_chat: Path, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(tmp_path, tiny_chat, capsys)


# --- caa -----------------------------------------------------------------------------------------------------------


@pytest.mark.tl
def test_caa_saves_what_the_function_gives_and_prints_each_layer(cli: CommandLine) -> None:
    assert cli.caa("--layers", "0:2") == 0
    expected = extract_caa_vectors(load_model(cli.model, "bridge"), None, ContrastPairDataset.load(cli.pairs), "0:2")
    saved = cli.saved()
    assert (saved.behavior, saved.model_name, saved.layers) == ("plainness", "tiny-chat", [0, 1])
    for vector in saved:
        assert torch.equal(vector.vector, expected[vector.layer_index].vector)
        assert vector.metadata == expected[vector.layer_index].metadata
        assert vector.provenance == expected[vector.layer_index].provenance
        auc = vector.metadata["statistics"]["auc"]
        assert re.search(rf"{vector.layer_index} {vector.norm:.4g} [-\d. ]+ {auc:.2f} \[", cli.out)
    best = expected.get_best("separation")
    assert f"best layer: {best.layer_index} ({best.hook_name}, norm {best.norm:.4g}), by held-out separation" in cli.out
    assert expected.best_layer().reason in cli.out
    assert f"saved in {cli.output}" in cli.out


@pytest.mark.tl
def test_caa_saves_nothing_where_the_pairs_do_not_differ(cli: CommandLine) -> None:
    sides = [[{"role": "user", "content": "Sea?"}, {"role": "assistant", "content": said}] for said in ("Yes.", "No.")]
    ContrastPairDataset("plainness", [dict(zip(("positive", "negative"), sides, strict=True))]).save(cli.pairs)
    assert cli.caa("--token-position", "answer_previous") == 2
    assert "every pair for 'plainness' (1 pair) have the same activation at token_position" in cli.err
    assert not cli.output.exists()


@pytest.mark.tl
def test_caa_takes_bundled_pairs_and_passes_its_options_on(cli: CommandLine) -> None:
    given = ["--token-position", "mean", "--direction", "pca", "--batch-size", 3, "--seed", 1, "--dtype", "float64"]
    assert (
        cli("caa", "--behavior", "humor", "--layers", 2, "blocks.0.hook_resid_pre", "--output", cli.output, *given) == 0
    )
    expected = extract_caa_vectors(
        load_model(cli.model, "bridge", "float64"),
        None,
        load_pairs("humor"),
        [2, "blocks.0.hook_resid_pre"],
        "mean",
        direction=pca_direction,
        seed=1,
        batch_size=3,
    )
    assert cli.saved().layers == [0, 2]
    for vector in cli.saved():
        assert torch.equal(vector.vector, expected[vector.layer_index].vector)
        assert (vector.behavior, vector.extraction_method) == ("humor", "pca")
        assert vector.metadata == expected[vector.layer_index].metadata
        assert vector.provenance is not None and vector.provenance.dtype == "float64"


@pytest.mark.tl
def test_an_int_is_a_token_position_too(cli: CommandLine) -> None:
    assert cli.caa("--token-position", "-2", "--layers", "1") == 0
    assert cli.saved()[1].metadata["token_position"] == -2


@pytest.mark.tl
def test_include_first_is_passed_on(cli: CommandLine) -> None:
    assert cli.caa("--token-position", "mean", "--layers", "1") == 0
    without = cli.saved()[1]
    assert cli.caa("--token-position", "mean", "--layers", "1", "--include-first") == 0
    assert (without.metadata["include_first"], cli.saved()[1].metadata["include_first"]) == (False, True)
    expected = extract_caa_vectors(load_model(cli.model, "bridge"), None, RAW, [1], "mean", include_first=True)
    assert torch.equal(cli.saved()[1].vector, expected[1].vector) and not torch.equal(
        without.vector, expected[1].vector
    )


@pytest.mark.tl
def test_too_few_pairs_to_judge_a_layer_by_are_said_so(cli: CommandLine) -> None:
    ContrastPairDataset("plainness", RAW[:1]).save(cli.pairs)
    assert cli.caa() == 0
    assert "1 pair: statistics need at least 4" in cli.out
    assert "by norm, which says little: too few pairs for a held-out separation" in cli.out


@pytest.mark.usefixtures("never_loads")
def test_what_is_wrong_without_a_model_is_told_before_one_is_loaded(cli: CommandLine) -> None:
    assert cli("caa", "--behavior", "refusl", "--output", cli.output) == 2
    assert "did you mean refusal" in cli.err
    assert cli("caa", "--pairs", cli.folder / "none.json", "--output", cli.output) == 1
    assert "there is no such file of contrast pairs" in cli.err
    cli.output.write_text("in the way")
    assert cli.caa() == 2
    assert "--output" in cli.err and "is a file" in cli.err


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one of the arguments --behavior --pairs is required"),
        (["--behavior", "humor", "--pairs", "x.json"], "not allowed with argument"),
        (["--behavior", "humor", "--direction", "mean"], "invalid choice: 'mean'"),
        (["--behavior", "humor", "--batch-size", "0"], "0 is not a positive number"),
    ],
)
def test_arguments_of_caa_that_cannot_be_are_refused(options: list[str], message: str, cli: CommandLine) -> None:
    assert cli("caa", "--output", cli.output, *options) == 2
    assert message in cli.err


@pytest.mark.tl
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "3"], "there is no layer 3: the model has layers 0 to 2"),
        (["--token-position", "middle"], "unknown token_position 'middle'"),
        (["--token-position", "answer_mean"], "needs a chat"),
    ],
)
def test_choices_that_the_model_or_the_pairs_lack_end_with_2_and_save_nothing(
    options: list[str], message: str, cli: CommandLine
) -> None:
    assert cli.caa(*options) == 2
    assert message in cli.err and not cli.output.exists()


# --- steer ---------------------------------------------------------------------------------------------------------


def answered(folder: Path, prompt: str, layer: int, shift: torch.Tensor) -> str:
    """The oracle: greedy generation of the Hugging Face model, a hook written by hand on one decoder layer."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    length = ids.shape[1]
    handle = model.model.layers[layer].register_forward_hook(
        lambda _m, _a, out: (out[0] + shift, *out[1:]) if isinstance(out, tuple) else out + shift
    )
    with torch.no_grad():
        for _ in range(5):
            chosen = model(ids, use_cache=False).logits[:, -1:].argmax(dim=-1)
            ids = torch.cat([ids, chosen], dim=1)
            if int(chosen) == tokenizer.eos_token_id:
                break
    handle.remove()
    return " ".join(tokenizer.decode(ids[0, length:], skip_special_tokens=True).split())


@pytest.mark.tl
def test_steer_prints_both_texts_of_every_prompt_side_by_side(cli: CommandLine) -> None:
    assert cli.caa() == 0
    vector = cli.saved().get_best()
    prompts = ["Who are [you]?", "Tea :tea: or rain?", "And now?"]
    assert cli.steer("--coefficient", 60, "--prompt", *prompts[:2], "--prompt", prompts[2]) == 0
    for prompt in prompts:
        plain = answered(cli.model, prompt, 0, torch.zeros(()))
        steered = answered(cli.model, prompt, vector.layer_index, 60 * vector.vector)
        assert plain != steered
        assert f"> {prompt}" in cli.out
        assert re.search(rf"│ {re.escape(plain)} *│ {re.escape(steered)} *│", cli.out)
    assert f"plainness, layer {vector.layer_index}, add +60" in cli.out


@pytest.mark.tl
def test_one_coefficient_is_the_vector_itself_and_zero_changes_nothing(cli: CommandLine) -> None:
    assert cli.caa("--layers", "1") == 0
    assert cli.steer("--prompt", "Who?") == 0
    assert "layer 1, add +1 " in cli.out
    assert cli.steer("--prompt", "Who?", "--coefficient", "0") == 0
    plain = answered(cli.model, "Who?", 0, torch.zeros(()))
    assert re.search(rf"│ {re.escape(plain)} *│ {re.escape(plain)} *│", cli.out)


@pytest.mark.tl
def test_a_layer_of_a_set_or_a_single_file_may_be_named(cli: CommandLine) -> None:
    assert cli.caa() == 0
    other = next(layer for layer in range(3) if layer != cli.saved().get_best().layer_index)
    assert cli.steer("--prompt", "Who?", "--layer", other) == 0 and f"layer {other}, add +1" in cli.out
    file = cli.output / f"layer_{other}.safetensors"
    assert cli("steer", "--vector", file, "--prompt", "Who?", "--max-new-tokens", 2) == 0
    assert f"layer {other}, add +1" in cli.out


@pytest.mark.tl
@pytest.mark.parametrize(
    ("options", "how"), [(["--mode", "ablate"], "ablate"), (["--mode", "clamp", "--coefficient", "-3.5"], "clamp -3.5")]
)
def test_other_modes_are_named_over_their_column(options: list[str], how: str, cli: CommandLine) -> None:
    assert cli.caa("--layers", "1") == 0
    assert cli.steer("--prompt", "Who?", *options) == 0
    assert f"layer 1, {how} " in cli.out


@pytest.mark.usefixtures("never_loads")
def test_a_vector_that_cannot_steer_is_refused_before_the_model_is_loaded(cli: CommandLine) -> None:
    SteeringVectorSet("calm", [SteeringVector("calm", layer, torch.ones(32), "tiny-chat") for layer in (0, 1)]).save(
        cli.output
    )
    for options, code, message in [
        (["--layer", 2], 2, "has layers 0, 1"),
        (["--layer", 0, "--mode", "ablate", "--coefficient", "2"], 2, "mode 'ablate' takes no coefficient"),
        (["--layer", 0, "--coefficient", "nan"], 1, "the coefficient is nan"),
        (["--layer", 0, "--max-new-tokens", "0"], 2, "0 is not a positive number"),
        (["--vector", cli.folder / "none"], 1, "no steering vector is there"),
        (["--vector", cli.output / "layer_0.safetensors", "--layer", 1], 2, "is a vector of layer 0"),
    ]:
        assert cli.steer("--prompt", "Who?", *options) == code
        assert message in cli.err


@pytest.mark.tl
def test_a_vector_of_another_model_is_refused(cli: CommandLine) -> None:
    SteeringVector("calm", 1, torch.ones(32), "another").save(cli.folder / "vector")
    assert cli.steer("--prompt", "Who?", "--vector", cli.folder / "vector") == 2
    assert "is of model 'another'" in cli.err


@pytest.mark.tl
def test_a_model_without_a_chat_template_cannot_answer(cli: CommandLine) -> None:
    SteeringVector("calm", 1, torch.ones(32), "tiny-chat").save(cli.folder / "vector")
    (cli.model / "chat_template.jinja").unlink()
    assert cli.steer("--prompt", "Who?", "--vector", cli.folder / "vector") == 2
    assert "no chat template" in cli.err


# --- show ----------------------------------------------------------------------------------------------------------


@pytest.mark.tl
def test_show_describes_a_set_and_each_of_its_files(cli: CommandLine) -> None:
    assert cli.caa("--layers", "0:2") == 0
    saved = cli.saved()
    assert cli("show", cli.output) == 0
    assert "steering vectors for plainness" in cli.out and f"best layer: {saved.get_best().layer_index} " in cli.out
    for vector in saved:
        assert f"{vector.layer_index} {vector.norm:.4g} " in cli.out
    assert cli("show", cli.output / "layer_1.safetensors") == 0
    found = saved[1]
    assert found.provenance is not None
    for row in (
        "behavior plainness",
        "hook blocks.1.hook_resid_post (layer 1)",
        "model tiny-chat",
        "method caa",
        f"norm {found.norm:.4g}",
        "num_pairs 4",
        "token_position last",
        f"auc {found.metadata['statistics']['auc']:.3f}",
        f"texts 8, digest {found.provenance.prompts_digest}",
    ):
        assert row in cli.out


def test_show_has_the_outlying_tokens_where_there_are_some(cli: CommandLine) -> None:
    counts = {"tokens": 12, "texts": 9, "largest_share": 0.876}
    loud = SteeringVector("calm", 1, torch.ones(2), "m", metadata={"outliers": counts})
    quiet = SteeringVector("calm", 2, torch.ones(2), "m", metadata={"outliers": {**counts, "tokens": 0}})
    SteeringVectorSet("calm", [loud, quiet]).save(cli.output)
    assert cli("show", cli.output) == 0
    assert "outliers largest share" in cli.out and " 12 0.88 " in cli.out
    SteeringVectorSet("calm", [quiet]).save(cli.output)
    assert cli("show", cli.output) == 0
    assert "outliers" not in cli.out
    loud.save(cli.folder / "loud")
    assert cli("show", cli.folder / "loud.safetensors") == 0
    assert "outliers largest_share 0.876, texts 9, tokens 12" in cli.out


def test_show_reads_vectors_of_rotalabs_steer_and_says_what_it_does_not_know(cli: CommandLine) -> None:
    fields = {"behavior": "calm [b]", "layer_index": 4, "model_name": "org/m", "metadata": {"num_pairs": 3}}
    (cli.folder / "layer_4.json").write_text(json.dumps(fields))
    torch.save(torch.tensor([3.0, 4.0]), cli.folder / "layer_4.pt")
    assert cli("show", cli.folder / "layer_4.pt") == 0
    for row in ("behavior calm [b]", "norm 5", "num_pairs 3", "provenance none recorded"):
        assert row in cli.out
    (cli.folder / "metadata.json").write_text(json.dumps({"behavior": "calm [b]", "layers": [4]}))
    assert cli("show", cli.folder) == 0
    assert "steering vectors for calm [b]" in cli.out and "best layer: 4" in cli.out


def deep_set() -> SteeringVectorSet:
    """Twelve layers, of which the last separates best."""
    return SteeringVectorSet(
        "calm",
        [
            SteeringVector(
                "calm",
                layer,
                torch.ones(2),
                "tiny",
                metadata={"statistics": {"auc": 1.0, "auc_low": 1.0, "auc_high": 1.0, "d_prime": float(layer)}},
            )
            for layer in range(12)
        ],
    )


def test_show_and_export_say_what_is_doubtful_about_the_best_layer(cli: CommandLine) -> None:
    deep_set().save(cli.folder / "deep")
    assert cli("show", cli.folder / "deep") == 0
    assert "best layer: 11 (blocks.11.hook_resid_post, norm 1.414), by held-out separation: by d', as other" in cli.out
    assert "none of the 11 others tie with it" in cli.out
    assert "warning: the best layer for 'calm' lies in the last tenth of 12 layers" in cli.out
    assert main(["export", str(cli.folder / "deep"), "--output", str(cli.folder / "one"), "--format", "tl_persona",
                 "--layers", "best"]) == 0  # fmt: skip
    assert SteeringVectorSet.load(cli.folder / "one").layers == [11]


def test_show_ends_with_1_for_a_folder_without_a_set_and_for_a_damaged_vector(
    cli: CommandLine, tiny_model: Callable[[str], Path]
) -> None:
    assert cli("show", tiny_model("llama")) == 1
    assert "metadata.json: there is no such file" in cli.err
    path = SteeringVector("calm", 1, torch.ones(32), "m").save(cli.folder / "vector")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert cli("show", path) == 1
    assert "was altered" in cli.err
