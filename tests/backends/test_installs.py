"""Booting a model starts no process: not for what TransformerLens would install, and texts come out right without it.

What is really started is seen by an audit hook of the interpreter, which knows nothing of how the package refuses.
"""

import copy
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracle import block_outputs, relative_error
from tiny import FAMILIES, SIZES, VOCAB_SIZE, build_tokenizer

from tl_persona import extract_activations, load_model
from tl_persona.backends.local import boot, installs
from tl_persona.backends.local.installs import ProcessRefused, install_advice, no_processes
from tl_persona.errors import MissingDependencyError, ModelError

STARTS = {"subprocess.Popen", "os.system", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.spawn"}

_SIGHT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _gemma3() -> Any:
    text = transformers.Gemma3TextConfig(**SIZES, sliding_window=16, query_pre_attn_scalar=8)
    special = {"image_token_index": 399, "boi_token_index": 398, "eoi_token_index": 397}
    config = transformers.Gemma3Config(text_config=text, vision_config=_SIGHT, mm_tokens_per_image=4, **special)
    return transformers.Gemma3ForConditionalGeneration(config)


def _llava() -> Any:
    text, sight = transformers.LlamaConfig(**SIZES), transformers.CLIPVisionConfig(**_SIGHT)
    config = transformers.LlavaConfig(text_config=text, vision_config=sight, image_token_index=399)
    return transformers.LlavaForConditionalGeneration(config)


def _idefics3() -> Any:
    text = transformers.LlamaConfig(**SIZES, pad_token_id=0)
    config = transformers.Idefics3Config(text_config=text, vision_config=_SIGHT, image_token_id=399)
    return transformers.Idefics3ForConditionalGeneration(config)


def _qwen2_audio() -> Any:
    hearing = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    config = transformers.Qwen2AudioConfig(
        text_config=transformers.Qwen2Config(**sizes),
        audio_config=hearing | {"num_mel_bins": 8, "max_source_positions": 10},
        audio_token_index=399,
    )
    return transformers.Qwen2AudioForConditionalGeneration(config)


def _qwen2_vl() -> Any:
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
    sight = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
    config = transformers.Qwen2_5_VLConfig(text_config=sizes | {"rope_parameters": rope}, vision_config=sight)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


MULTIMODAL: dict[str, Callable[[], Any]] = {
    "gemma3": _gemma3,
    "llava": _llava,
    "idefics3": _idefics3,
    "qwen2 audio": _qwen2_audio,
}
"""Families that read more than text, and that TransformerLens tries to load a processor for."""


@pytest.fixture(scope="module")
def audited() -> list[str]:
    """Everything that this process starts from now on: an audit hook cannot be taken out again."""
    seen: list[str] = []
    sys.addaudithook(lambda event, details: seen.append(f"{event} {details}") if event in STARTS else None)
    return seen


@pytest.fixture
def started(audited: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a test starts, where torchvision is missing and pip would find no package."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("UV_OFFLINE", "1")
    audited.clear()
    yield audited
    audited.clear()


def multimodal(make: Callable[[], Any], folder: Path) -> tuple[Any, Any]:
    """A random model that believes it came from a place that has no processor, and a tokenizer that is in `folder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
    model.config.architectures = [type(model).__name__]
    model.config._name_or_path = str(folder / "nothing")
    build_tokenizer(FAMILIES["llama"]).save_pretrained(folder)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def texts() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Texts with a beginning in common, longer than the window; no id is an image's."""
    generator = torch.Generator().manual_seed(1)
    beginning, *ends = (torch.randint(10, VOCAB_SIZE - 10, (n,), generator=generator) for n in (20, 5, 12, 9))
    ids = [torch.cat([beginning, end]) for end in ends]
    return ids, [torch.arange(len(each)) > 2 for each in ids]


def means_of(hf_model: Any) -> torch.Tensor:
    ids, masks = texts()
    means = [block_outputs(hf_model, each)[:, mask].mean(dim=1) for each, mask in zip(ids, masks, strict=True)]
    return torch.stack(means).mean(dim=0)


@pytest.mark.tl
@pytest.mark.parametrize("family", MULTIMODAL)
def test_a_multimodal_model_is_adopted_as_it_reads_text_and_no_process_starts(
    family: str, started: list[str], tmp_path: Path
) -> None:
    hf_model, tokenizer = multimodal(MULTIMODAL[family], tmp_path)
    if not hasattr(hf_model, "model"):  # Qwen2 Audio in transformers 5.9, in which TransformerLens cannot find its way
        with pytest.raises(ModelError, match="TransformerLens has no bridge for Qwen2Audio"):
            boot.bridge(copy.deepcopy(hf_model), tokenizer)
        assert type(boot.adopt(hf_model, tokenizer)).__name__ == "TransformersModel"
        return
    expected = means_of(hf_model)
    found = extract_activations(boot.adopt(hf_model, tokenizer), *texts())
    assert not started
    assert relative_error(found, expected) < 1e-5


@pytest.mark.tl
@pytest.mark.parametrize("kind", ["auto", "bridge", pytest.param("hooked", marks=pytest.mark.hooked)])
def test_a_multimodal_model_is_loaded_right_or_refused_and_no_process_starts(
    kind: Any, started: list[str], tmp_path: Path
) -> None:
    hf_model, _ = multimodal(_gemma3, tmp_path)
    hf_model.save_pretrained(tmp_path)
    if kind == "hooked":
        with pytest.raises(ModelError, match="use kind='bridge'"):
            load_model(tmp_path, kind=kind)
    else:
        model = load_model(tmp_path, kind=kind)
        assert relative_error(extract_activations(model, *texts()), means_of(hf_model)) < 1e-5
    assert not started


@pytest.mark.tl
def test_a_family_whose_bridge_needs_torchvision_is_refused_with_the_command_that_leaves_torch_alone(
    started: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hf_model, tokenizer = multimodal(_qwen2_vl, tmp_path)
    advice = r"pip install --no-deps 'torchvision==[\d.]+\.\*' pillow"
    with pytest.raises(MissingDependencyError, match=advice):
        boot.bridge(copy.deepcopy(hf_model), tokenizer)
    assert type(boot.adopt(hf_model, tokenizer)).__name__ == "TransformersModel"
    assert re.search(rf"{advice}.*Taking the transformers model itself instead", caplog.text)
    assert not started


@pytest.mark.tl
def test_whatever_transformer_lens_would_run_is_not_run(
    started: list[str], tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it comes to the idea: an error of its own makes it go on, ours ends the boot."""
    from transformer_lens.model_bridge import TransformerBridge

    def installing(*_args: Any, **_options: Any) -> None:
        subprocess.check_call([sys.executable, "-m", "pip", "install", "torchvision"])

    monkeypatch.setattr(TransformerBridge, "boot_transformers", installing)
    with pytest.raises(ModelError, match=r"booting a model starts no process: .* -m pip install torchvision"):
        load_model(tiny_llama, kind="bridge")
    assert not started


@pytest.mark.parametrize(
    ("torch_version", "command"),
    [
        ("2.13.0+cpu", "'torchvision==0.28.*' pillow --extra-index-url https://download.pytorch.org/whl/cpu`"),
        ("2.6.0+cu124", "'torchvision==0.21.*' pillow --extra-index-url https://download.pytorch.org/whl/cu124`"),
        ("2.9.1", "'torchvision==0.24.*' pillow`"),
        ("3.0.0", "'torchvision' pillow`"),
    ],
)
def test_the_torchvision_to_install_is_the_one_made_for_this_torch(
    torch_version: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", torch_version)
    advice = install_advice(ImportError("Adapter needs the optional torchvision library."))
    assert f"`pip install --no-deps {command}" in advice and f"torch {torch_version} as it is" in advice


def test_another_missing_package_is_named_as_python_names_it() -> None:
    assert "`pip install --no-deps timm`" in install_advice(ModuleNotFoundError("No module named 'timm'", name="timm"))


# --- the guard -------------------------------------------------------------------------------------------------------


def _true() -> list[str]:
    return [sys.executable, "-c", ""]


WAYS: dict[str, Callable[[], Any]] = {
    "run": lambda: subprocess.run(_true()),
    "call": lambda: subprocess.call(args=_true()),
    "check_output": lambda: subprocess.check_output(_true()),
    "Popen": lambda: subprocess.Popen(_true()).wait(),
    "a shell": lambda: os.system("true"),
    "a pipe": lambda: os.popen("true").close(),
    "spawnv": lambda: os.spawnv(os.P_WAIT, sys.executable, _true()),
    "posix_spawn": lambda: os.waitpid(os.posix_spawn(sys.executable, _true(), os.environ), 0),
    "a worker": lambda: _worked(multiprocessing.get_context("spawn").Process()),
    "a forked worker": lambda: _worked(multiprocessing.get_context("fork").Process()),
}


def _worked(process: Any) -> None:
    process.start()
    process.join()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork beside threads
def test_no_way_to_start_a_process_is_left_open_and_all_are_afterwards(way: str, started: list[str]) -> None:
    with no_processes(), pytest.raises(ProcessRefused, match="starts no process"):
        WAYS[way]()
    assert not started
    WAYS[way]()
    assert started or way == "a worker"  # which Python starts below what it audits


def test_code_that_can_do_without_a_process_goes_on() -> None:
    """As Python's own does, that asks `uname` for the processor."""
    with no_processes(), pytest.raises(OSError):
        subprocess.check_output(["uname", "-p"])


def test_another_thread_starts_what_it_likes_while_a_model_is_booted() -> None:
    results: list[int] = []
    with no_processes():
        thread = threading.Thread(target=lambda: results.append(subprocess.run(_true()).returncode))
        thread.start()
        thread.join()
    assert results == [0]


def test_threads_that_boot_at_once_refuse_each_for_itself_and_leave_no_trace() -> None:
    before = subprocess.run, subprocess.Popen.__init__, os.fork, os.system
    first_is_out, second_is_in, seen = threading.Event(), threading.Event(), []

    def second() -> None:
        with no_processes():
            second_is_in.set()
            first_is_out.wait(60)
            try:
                subprocess.run(_true())
            except ProcessRefused:
                seen.append("refused")

    thread = threading.Thread(target=second)
    with no_processes():
        with no_processes():
            thread.start()
            assert second_is_in.wait(60)
        with pytest.raises(ProcessRefused):
            subprocess.run(_true())
    assert subprocess.run(_true()).returncode == 0
    first_is_out.set()
    thread.join()
    assert seen == ["refused"]
    assert before == (subprocess.run, subprocess.Popen.__init__, os.fork, os.system)


def test_what_somebody_else_puts_in_its_place_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "system", os.system)  # put back when the test ends

    def theirs(command: str) -> int:
        return 7

    with no_processes():
        os.system = theirs
    assert os.system("true") == 7 and installs._inside == 0
