"""Runs that are killed, or refused by the file system, at any instant: nothing is lost and a re-run ends the same.

Two ways of finding the instants. A real extraction is killed from outside at random times; a few saves are stopped, or
refused, at every single call to the file system, counted by the interpreter's own audit events.
"""

import errno
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mara import MARA, QUESTIONS, VARIANTS
from safetensors.torch import load_file
from stores import PROVENANCE, VECTORS, save

from tl_persona import files
from tl_persona.data.personas import Persona
from tl_persona.errors import StoreError
from tl_persona.extraction import run_extraction
from tl_persona.store import PersonaVectorStore, manifest
from tl_persona.vectors import SteeringVector, SteeringVectorSet

MODEL = "org/tiny"
STRATEGIES = ("answer_mean", "persona_last")
PERSONAS = [MARA, Persona("odo", {"first_name": "Odo"}, "Name: Odo", "Odo keeps bees, and says little.")]

WRITING = {"open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "os.link", "os.symlink", "os.rmdir"}
"""The audit events of calls that change a file system, and of those that may."""


def in_child(work: Callable[[], object], kill_after: float | None = None) -> int:
    """Run `work` in a forked process; returns its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    give_up = time.monotonic() + 120
    while time.monotonic() < give_up:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the child neither ended nor failed within two minutes")


def artifacts(root: Path) -> dict[str, bytes]:
    """Everything under `root` that a run is for; the lock and the times of the files on this disk are not."""
    aside = (manifest.LOCK, ".manifest.times")
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in aside
    }


def check_readable(root: Path, allowed: list[dict[str, bytes]]) -> int:
    """Open the store as users and other programs do; every vector listed is one of those allowed. Returns how many."""
    listed = 0
    for folder in sorted(root.glob("*/*/*")):
        store = PersonaVectorStore(MODEL, root, folder.parent.name)
        for persona_id in store.list_personas([folder.name], include_baseline=True):
            loaded = store.load(folder.name, persona_id)
            data = store.path_of(folder.name, persona_id).read_bytes()
            name = str((folder / f"{persona_id}.safetensors").relative_to(root))
            assert data in [files[name] for files in allowed if name in files], f"{name} is none of the expected files"
            assert loaded.isfinite().all()
            listed += 1
        if (folder / "manifest.json").exists():
            index = json.loads((folder / "manifest.json").read_text())
            for persona_id in index["personas"]:
                vectors = load_file(str(folder / f"{persona_id}.safetensors"))["activations"]
                assert list(vectors.shape) == [index["num_layers"], index["hidden_size"]]
    return listed


# A real extraction, killed at random instants


def extract(model: Any, root: Path, questions: int = 3) -> None:
    manifest.SMALL = 1_000  # A few entries are above it, so that both ways of indexing take part.
    with PersonaVectorStore(MODEL, root) as store:
        for persona in PERSONAS:
            run_extraction(
                model,
                MODEL,
                QUESTIONS[:questions],
                VARIANTS,
                persona=persona,
                mask_strategy=STRATEGIES,
                store=store,
                show_progress=False,
            )


@pytest.fixture
def runs(
    tiny_hooked: Callable[[str, str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, dict[str, bytes], dict[str, bytes], float]:
    """A warm model, what an undisturbed run of it and an earlier, shorter one leave, and the seconds a run takes."""
    monkeypatch.setattr(manifest, "SMALL", manifest.SMALL)
    model = tiny_hooked("llama", "bridge")
    extract(model, tmp_path / "earlier", questions=2)
    begun = time.monotonic()
    assert in_child(lambda: extract(model, tmp_path / "whole")) == 0
    seconds = time.monotonic() - begun
    whole = artifacts(tmp_path / "whole")
    assert len([name for name in whole if name.endswith(".safetensors")]) == 8
    return model, whole, artifacts(tmp_path / "earlier"), seconds


@pytest.mark.slow
@pytest.mark.tl
@pytest.mark.parametrize("n_kills", [10, pytest.param(100, marks=pytest.mark.heavy)])
def test_an_extraction_killed_at_random_instants_loses_nothing(
    n_kills: int, runs: tuple[Any, dict[str, bytes], dict[str, bytes], float], tmp_path: Path
) -> None:
    model, whole, earlier, seconds = runs
    seed = int(os.environ.get("TL_PERSONA_KILL_SEED", random.SystemRandom().randrange(10**6)))
    print(f"TL_PERSONA_KILL_SEED={seed} draws these instants again; a run takes {seconds:.2f} s")
    instants = random.Random(seed)
    kills, found = 0, set()
    while kills < n_kills:
        root = tmp_path / f"run-{kills}"
        over_an_earlier_run = kills % 2 == 1
        if over_an_earlier_run:
            shutil.copytree(tmp_path / "earlier", root)
        if in_child(lambda root=root: extract(model, root), kill_after=instants.uniform(0, seconds)) == 0:
            shutil.rmtree(root)
            seconds *= 0.7
            continue
        seconds *= 1.1  # so that kills come at every stage, however busy the machine becomes
        kills += 1
        found.add(check_readable(root, [whole, earlier] if over_an_earlier_run else [whole]))
        assert in_child(lambda root=root: extract(model, root)) == 0
        assert artifacts(root) == whole
        shutil.rmtree(root)
    # A few kills may come at one stage by chance; every single call is met by the tests below.
    assert n_kills < 50 or len(found) > 3, "the kills all came at the same stage: they say little"


@pytest.mark.slow
@pytest.mark.tl
def test_two_processes_extracting_the_same_into_one_store_leave_what_one_does(
    runs: tuple[Any, dict[str, bytes], dict[str, bytes], float], tmp_path: Path
) -> None:
    model, whole, _, _ = runs
    root = tmp_path / "shared"

    other = os.fork()
    if other == 0:
        os._exit(in_child(lambda: extract(model, root)))
    assert in_child(lambda: extract(model, root)) == 0
    assert os.waitpid(other, 0)[1] == 0
    assert artifacts(root) == whole


# A few saves, stopped at every call to the file system


def saves(root: Path) -> None:
    """Replace one vector, add two, and complete the index: as many kinds of writing as there are."""
    manifest.SMALL, manifest.PENDING_SHARE = 64 * 1024, 8
    with PersonaVectorStore(MODEL, root) as store:
        save(store, "p1", vectors=-VECTORS)
        manifest.SMALL, manifest.PENDING_SHARE = 0, 1
        save(store, "p2", persona_name="Bo")
        save(store, "p3", "biography")


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A store with two vectors, one of which `saves` replaces."""
    with PersonaVectorStore(MODEL, tmp_path / "begun") as store:
        save(store, "p1")
        save(store, "p0")
    return tmp_path / "begun"


def on_calls(act: Callable[[str], object], *, only_writing: bool = False) -> None:
    """From now on, in this process, call `act` with the name of every call to the file system, before it is made."""
    fsync = os.fsync

    def noted_fsync(handle: int) -> None:
        act("fsync")
        fsync(handle)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if str(path).startswith(os.environ["PYTEST_BASE"]) and (writes or not only_writing):
                act("open")
        elif event in WRITING or (event == "os.scandir" and not only_writing):
            act(event)

    os.fsync = noted_fsync
    sys.addaudithook(hook)  # It stays as long as the process does, which is why all of this happens in a child.


def counted_calls(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[str, bytes], dict[str, bytes]]:
    """How many calls `saves` makes, and the artifacts before and after it."""
    monkeypatch.setenv("PYTEST_BASE", str(root.parent))
    for name in ("SMALL", "PENDING_SHARE"):
        monkeypatch.setattr(manifest, name, getattr(manifest, name))  # `saves` changes them
    log, copy = root.parent / "calls", root.parent / "counted"
    shutil.copytree(root, copy)

    def counted() -> None:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT)
        on_calls(lambda event: os.write(handle, b"."))
        saves(copy)

    assert in_child(counted) == 0
    assert log.stat().st_size > 60, "hardly any call was noticed"
    return log.stat().st_size, artifacts(root), artifacts(copy)


def test_a_kill_at_any_call_to_the_file_system_loses_nothing(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, before, whole = counted_calls(begun, monkeypatch)
    for stop in range(1, calls + 1):
        root = begun.parent / "killed"
        shutil.copytree(begun, root)

        def killed(root: Path = root, stop: int = stop) -> None:
            numbers = itertools.count(1)
            on_calls(lambda event: os.kill(os.getpid(), signal.SIGKILL) if next(numbers) == stop else None)
            saves(root)

        assert in_child(killed) == -signal.SIGKILL
        assert check_readable(root, [before, whole]) >= 2
        saves(root)
        assert artifacts(root) == whole, f"after a kill at call {stop}"
        shutil.rmtree(root)


@pytest.mark.parametrize("problem", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_refusal_at_any_call_to_the_file_system_is_one_clear_error_and_loses_nothing(
    begun: Path, monkeypatch: pytest.MonkeyPatch, problem: int
) -> None:
    calls, before, whole = counted_calls(begun, monkeypatch)
    root = begun.parent / "refused"

    def refused() -> None:
        number = stop = 0

        def refuse(event: str) -> None:
            nonlocal number
            number += 1
            if number == stop:
                raise OSError(problem, os.strerror(problem))

        on_calls(refuse)
        for chosen in range(1, calls + 1):
            stop = 0
            shutil.copytree(begun, root)
            number, stop = 0, chosen
            try:
                saves(root)
            except StoreError as error:
                assert os.strerror(problem) in str(error) and str(root) in str(error), error
            assert number >= stop
            stop = 0
            assert check_readable(root, [before, whole]) >= 2
            saves(root)
            assert artifacts(root) == whole, f"after a refusal at call {chosen}"
            shutil.rmtree(root)

    assert in_child(refused) == 0


def test_a_read_only_disk_is_read_in_full_and_refuses_in_one_sentence(
    begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write anywhere, whatever the permissions say, so the refusal comes from an audit hook.
    monkeypatch.setenv("PYTEST_BASE", str(begun.parent))
    before = artifacts(begun)

    def read_only() -> None:
        def refuse(event: str) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        on_calls(refuse, only_writing=True)
        with PersonaVectorStore(MODEL, begun) as store:
            assert store.list_personas(["templated"]) == ["p0", "p1"]
            assert store.load("templated", "p1").equal(VECTORS)
            assert store.status("templated", "p1", PROVENANCE).state == "same"
        for call in (lambda: save(store, "p1"), lambda: save(store, "new"), lambda: save(store, "p1", "biography")):
            with pytest.raises(StoreError, match=f"{begun}.*Read-only file system"):
                call()

    assert in_child(read_only) == 0
    assert artifacts(begun) == before


def test_a_file_that_was_replaced_within_one_tick_of_the_clock_is_indexed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files of one size, time and inode: what a coarse clock and a reused inode can give."""
    monkeypatch.setattr("tl_persona.store.manifest.facts_of", lambda stat: (stat.st_size, 7, 7))
    for small in (10**6, 0):
        monkeypatch.setattr(manifest, "SMALL", small)
        monkeypatch.setattr(manifest, "PENDING_SHARE", 0)
        with PersonaVectorStore(MODEL, tmp_path / str(small)) as store:
            save(store, "p1", persona_name="Ada", provenance=None)
            save(store, "p1", persona_name="Bea", provenance=None)
            assert store.persona_names(["p1"], ["templated"]) == {"p1": "Bea"}
        index = json.loads((store.path_of("templated", "p1").parent / "manifest.json").read_text())
        assert index["personas"]["p1"]["name"] == "Bea"


def test_a_damaged_index_is_kept_beside_the_new_one(tmp_path: Path) -> None:
    store = PersonaVectorStore(MODEL, tmp_path)
    folder = save(store, "p1")
    for number, text in enumerate(("{", "[]"), start=1):
        (folder / "manifest.json").write_text(text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save(store, "p1")
        assert len(list(folder.glob("manifest.json.damaged*"))) == number
    assert (folder / "manifest.json.damaged").read_text() == "{"
    assert (folder / "manifest.json.damaged-2").read_text() == "[]"
    assert not list(folder.glob(f"{files.TEMPORARY_PREFIX}*"))
    assert store.load("templated", "p1").equal(torch.tensor(VECTORS.tolist()))


# A set of steering vectors, put in the place of another


def a_set(first: int) -> SteeringVectorSet:
    values = {layer: torch.tensor([first, layer], dtype=torch.float32) for layer in range(first, first + 3)}
    return SteeringVectorSet("calm", [SteeringVector("calm", layer, value, "tiny") for layer, value in values.items()])


def vectors_of(folder: Path) -> dict[int, list[float]]:
    return {vector.layer_index: vector.vector.tolist() for vector in SteeringVectorSet.load(folder)}


@pytest.mark.parametrize("problem", [None, errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_set_is_the_older_or_the_newer_one_whatever_stops_its_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: int | None
) -> None:
    monkeypatch.setenv("PYTEST_BASE", str(tmp_path))
    older, newer = a_set(1), a_set(2)  # two of the layers are in both
    folder = tmp_path / "set"
    older.save(folder)
    before, after = vectors_of(folder), {vector.layer_index: vector.vector.tolist() for vector in newer}
    assert before != after

    def stopped(stop: int) -> None:
        def refuse(event: str) -> None:
            if next(numbers) == stop:
                if problem is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(problem, os.strerror(problem))

        numbers = itertools.count(1)
        on_calls(refuse)
        try:
            newer.save(folder)
        except StoreError as error:
            os._exit(17 if str(folder) in str(error) else 18)

    codes, newer_there = [], []
    for stop in range(1, 40):
        codes.append(in_child(lambda stop=stop: stopped(stop)))
        newer_there.append(vectors_of(folder) == after)
        assert newer_there[-1] or (vectors_of(folder) == before and codes[-1] != 0)
        older.save(folder)
        assert vectors_of(folder) == before
    failures = [code for code in codes if code]
    assert len(failures) > 20 and set(failures) == {-signal.SIGKILL if problem is None else 17}
    assert codes[-1] == 0, "there are more calls than were tried"
    assert False in newer_there and any(there for there, code in zip(newer_there, codes, strict=True) if code)
    older.save(folder)
    assert {path.name for path in folder.iterdir() if path.name != ".set.lock"} == {
        "metadata.json",
        *(f"layer_{layer}.safetensors" for layer in (1, 2, 3, 4)),  # 4 is of the newer one, and not read
    }


def test_two_processes_that_save_a_set_at_once_leave_one_of_theirs_and_a_reader_never_sees_another(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "set"
    both = [a_set(1), a_set(2)]
    whole = [{vector.layer_index: vector.vector.tolist() for vector in one} for one in both]
    both[0].save(folder)
    writers = []
    for one in both:
        writers.append(os.fork())
        if not writers[-1]:
            os._exit(in_child(lambda one=one: [one.save(folder) for _ in range(40)]))
    reads = 0
    while os.waitpid(writers[0], os.WNOHANG) == (0, 0):
        assert vectors_of(folder) in whole
        reads += 1
    assert os.waitpid(writers[1], 0)[1] == 0
    assert vectors_of(folder) in whole and reads > 3
