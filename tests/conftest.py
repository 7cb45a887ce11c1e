"""Fixtures that every test may use; the models behind them are built by `tiny`."""

import beartype  # noqa: F401, I001 - before anything that imports nnsight, which breaks a beartype imported after it

import os

os.environ["TL_PERSONA_CACHE"] = "off"  # no test may live on what another run kept
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test may reach a hub
# Threads cost a tiny model more than they save, twenty times more where tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import releases

# A slow or busy machine is no failure.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")


def pytest_report_header() -> str:
    return "releases: " + ", ".join(f"{name} {version}" for name, version in releases.installed().items())


TERMINAL = {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "25"}
"""What rich, argparse and tqdm take for the terminal, whichever one the tests are started from, or none."""

NOT_OURS = (
    *("NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "COLORTERM", "PYTHON_COLORS"),
    *("TTY_COMPATIBLE", "TTY_INTERACTIVE", "JUPYTER_COLUMNS", "JUPYTER_LINES"),
    *("SLURM_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "NDIF_"),
)
"""How names of variables begin that make a program write more colour or wider lines, run a shard, or ask a server."""


@pytest.fixture(scope="session", autouse=True)
def same_surroundings() -> Iterator[None]:
    """The same terminal on every machine and no cluster, for what tests print and for the processes they start."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in TERMINAL.items():
            patch.setenv(name, value)
        for name in [name for name in os.environ if name.startswith(NOT_OURS)]:
            patch.delenv(name)
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a `HookedTransformer` where TransformerLens has none, and what is heavy unless asked for."""
    from kinds import HAS_HOOKED_TRANSFORMER

    kept, left_out = [], []
    for item in items:
        if item.get_closest_marker("hooked"):
            item.add_marker("tl")
        wanted = HAS_HOOKED_TRANSFORMER or not item.get_closest_marker("hooked")
        wanted = wanted and ("TL_PERSONA_HEAVY" in os.environ or not item.get_closest_marker("heavy"))
        (kept if wanted else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if "TL_PERSONA_RESULT" in os.environ:
        releases.leave_result(Path(os.environ["TL_PERSONA_RESULT"]), config.option.markexpr, terminalreporter.stats)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switch the type checks of test runs off, for input that they would refuse before the package can."""
    import jaxtyping

    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the folder of a tiny model by its family (see `tiny.FAMILIES`, `tiny.ODD_FAMILIES`), built at first use."""
    from tiny import build_tiny

    built: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in built:
            built[family] = build_tiny(family, tmp_path_factory.mktemp("model"))
        return built[family]

    return folder_of


@pytest.fixture(scope="session")
def tiny_llama(tiny_model: Callable[[str], Path]) -> Path:
    """Llama-like, rotary positions, grouped heads; ChatML with a system role."""
    return tiny_model("llama")


@pytest.fixture(scope="session")
def tiny_gpt2(tiny_model: Callable[[str], Path]) -> Path:
    """GPT-2-like, learned positions, a context of 512 tokens; ChatML with a system role."""
    return tiny_model("gpt2")


@pytest.fixture(scope="session")
def tiny_gemma(tiny_model: Callable[[str], Path]) -> Path:
    """Gemma-2-like, norms before and after, capped scores; a template without a system role, with a rendered BOS."""
    return tiny_model("gemma")


@pytest.fixture
def unscaled_gpt2(tmp_path: Path) -> Path:
    """A configuration that a TransformerBridge does not read: scores are not scaled."""
    from tiny import build_tiny

    folder = build_tiny("gpt2", tmp_path / "unscaled")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"scale_attn_weights": False}))
    return folder


@pytest.fixture(scope="session")
def tiny_hooked(tiny_model: Callable[[str], Path]) -> Callable[[str, str], Any]:
    """Give a tiny model by family and kind (`hooked` or `bridge`), booted at first use; leave it as you found it."""
    from tiny import hooked_gemma

    from tl_persona import load_model

    booted: dict[tuple[str, str], Any] = {}

    def model_of(family: str, kind: str) -> Any:
        if (family, kind) not in booted:
            by_hand = (family, kind) == ("gemma", "hooked")
            folder = tiny_model(family)
            booted[family, kind] = hooked_gemma(folder) if by_hand else load_model(folder, kind=kind)
        return booted[family, kind]

    return model_of


@pytest.fixture(scope="session")
def tiny_hf(tiny_model: Callable[[str], Path]) -> Callable[[str], Any]:
    """Give the plain Hugging Face model of a family, loaded at first use; leave it as you found it."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded: dict[str, Any] = {}

    def model_of(family: str) -> Any:
        if family not in loaded:
            loaded[family] = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32).eval()
        return loaded[family]

    return model_of


@pytest.fixture(scope="session")
def smollm2() -> Iterator[tuple[Any, Any]]:
    """The real model's weights and tokenizer, read from the file once; the processors are shared out among workers."""
    import torch

    from tl_persona.models.checkpoints import find_checkpoint, load_hf_model, load_tokenizer

    threads = torch.get_num_threads()
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    found = find_checkpoint("smollm2")
    yield load_hf_model(found, dtype=torch.float32), load_tokenizer(found)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def smollm2_hooked(smollm2: tuple[Any, Any]) -> Callable[[str], Any]:
    """Give `load_model("smollm2", kind)` without reading the file again; leave it as you found it."""
    from tl_persona import load_model

    weights = smollm2[0]
    booted: dict[str, Any] = {}

    def model_of(kind: str) -> Any:
        if kind not in booted:
            shared = {id(tensor): tensor for tensor in (*weights.parameters(), *weights.buffers())}
            twin = copy.deepcopy(weights, shared)  # a bridge rewires the modules it is given
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("tl_persona.loading.load_hf_model", lambda *_args, **_options: twin)
                booted[kind] = load_model("smollm2", kind=kind)
        return booted[kind]

    return model_of


@pytest.fixture
def tiny_chat(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model's folder under a name that artifacts are filed under, and a wide terminal without colour."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("NO_COLOR", "1")
    return shutil.copytree(tiny_llama, tmp_path / "tiny-chat")


@pytest.fixture
def never_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test where the command line loads a model."""

    def fail(*_args: Any, **_options: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("tl_persona.cli.inputs.load_model", fail)


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes of a few tokens are worth a pass, and rows hold a few texts."""
    monkeypatch.setattr("tl_persona.plan.plan.MIN_SHARED", 4)
    monkeypatch.setattr("tl_persona.plan.rows.WORTH_CACHING", 8)
    monkeypatch.setattr("tl_persona.plan.rows.PACKED_ROW_TOKENS", 40)
    monkeypatch.setattr("tl_persona.plan.rows.CACHED_ROWS", 3)


@pytest.fixture
def store(tmp_path: Path) -> Any:
    """An empty store of the tiny model of `stores`."""
    from stores import MODEL

    from tl_persona.store import PersonaVectorStore

    return PersonaVectorStore(MODEL, tmp_path / "root")
