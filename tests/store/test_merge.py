"""Merging stores: what is copied, what is refused, and that sharded extraction gives what one process gives."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import PROVENANCE, VECTORS, read_as_the_reference_does, write_as_the_reference_does

from tl_persona.cli.main import main
from tl_persona.data.dataset import PersonaDataset
from tl_persona.data.shards import Shard
from tl_persona.errors import CorruptFileError, InputError, NotStoredError, StoreError, StoreMismatchError
from tl_persona.provenance import Provenance
from tl_persona.store import PersonaVectorStore
from tl_persona.store.header import SUFFIX
from tl_persona.store.merge import MergedFolder, OnConflict, merge_stores

MODEL = "org/tiny"
PLACE = Path("org__tiny", "answer_mean", "templated")
OTHER_PROMPTS = msgspec.structs.replace(PROVENANCE, prompts_digest="another")


def fill(
    root: Path,
    *persona_ids: str,
    vectors: torch.Tensor = VECTORS,
    provenance: Provenance | None = PROVENANCE,
    variant: str = "templated",
    strategy: str = "answer_mean",
) -> PersonaVectorStore:
    with PersonaVectorStore(MODEL, root) as store:
        for persona_id in persona_ids:
            store.save(
                variant, persona_id, f"Name of {persona_id}", vectors, ["q1", "q2"], strategy, provenance=provenance
            )
    return store


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob(f"*{SUFFIX}"))}


def counts(done: list[MergedFolder]) -> tuple[int, int, int, int]:
    (one,) = done
    return one.copied, one.same, one.replaced, one.left


# What goes where


def test_two_stores_become_one_with_the_very_same_files(tmp_path: Path) -> None:
    fill(tmp_path / "a", "p1", "p3")
    fill(tmp_path / "b", "p2", variant="biography")
    fill(tmp_path / "b", "p2", strategy="answer_last")
    done = merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    assert contents(tmp_path / "all") == contents(tmp_path / "a") | contents(tmp_path / "b")
    assert [("/".join(each.folder.parts[-2:]), each.copied) for each in done] == [
        ("answer_last/templated", 1),
        ("answer_mean/biography", 1),
        ("answer_mean/templated", 2),
    ]


def test_the_manifest_of_the_target_is_complete(tmp_path: Path) -> None:
    fill(tmp_path / "all", "p1")
    store = fill(tmp_path / "a", "p2")
    merge_stores([tmp_path / "a"], tmp_path / "all")
    folder = tmp_path / "all" / store.path_of("templated", "p2").parent.relative_to(tmp_path / "a")
    found = read_as_the_reference_does(folder)
    assert {persona_id: (name, ids) for persona_id, (name, ids, _) in found.items()} == {
        "p1": ("Name of p1", ["q1", "q2"]),
        "p2": ("Name of p2", ["q1", "q2"]),
    }
    assert found["p2"][2].equal(VECTORS)


@settings(max_examples=15)  # each writes a dozen durable files
@given(st.lists(st.sets(st.sampled_from("abcdef"), min_size=1), min_size=1, max_size=3))
def test_a_merge_in_one_go_equals_one_store_after_the_other(parts: list[set[str]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        sources = [root / str(index) for index in range(len(parts))]
        for source, persona_ids in zip(sources, parts, strict=True):
            fill(source, *persona_ids)
        merge_stores(sources, root / "at-once")
        for source in reversed(sources):
            merge_stores([source], root / "in-turn")
        assert contents(root / "at-once") == contents(root / "in-turn")
        assert PersonaVectorStore(MODEL, root / "at-once").list_personas(["templated"]) == sorted(set().union(*parts))


def test_merging_again_changes_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "a", "p1", "p2")
    assert counts(merge_stores([tmp_path / "a"], tmp_path / "all")) == (2, 0, 0, 0)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "all").rglob(f"*{SUFFIX}")}
    assert counts(merge_stores([tmp_path / "a"], tmp_path / "all")) == (0, 2, 0, 0)
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_sources_are_left_as_they_were(tmp_path: Path) -> None:
    fill(tmp_path / "a", "p1")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}
    merge_stores([tmp_path / "a"], tmp_path / "all")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")} == before


def test_what_another_library_stored_keeps_its_names(tmp_path: Path) -> None:
    write_as_the_reference_does(tmp_path / "a" / PLACE, {"p1": ("Ada", ["q7"], VECTORS)})
    fill(tmp_path / "b", "p2", provenance=None)
    for _ in range(2):
        merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    store = PersonaVectorStore(MODEL, tmp_path / "all")
    assert store.persona_names(["p1", "p2"], ["templated"]) == {"p1": "Ada", "p2": "Name of p2"}
    assert store.persona_sample_ids("templated", "p1") == ["q7"]
    assert contents(tmp_path / "all").keys() == {str(PLACE / "p1.safetensors"), str(PLACE / "p2.safetensors")}


@pytest.mark.parametrize("saved_meanwhile", [False, True])
@pytest.mark.parametrize("on_conflict", ["error", "keep", "replace"])
def test_a_merge_that_was_killed_knows_the_names_when_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_conflict: OnConflict, saved_meanwhile: bool
) -> None:
    write_as_the_reference_does(tmp_path / "a" / PLACE, {"p1": ("Ada", ["q7"], VECTORS), "p2": ("Bo", ["q8"], VECTORS)})
    manifests = set()
    for kill_at in (None, 1, 2, 3):  # two files, then the manifest
        target = tmp_path / str(kill_at)
        if on_conflict == "replace":
            write_as_the_reference_does(target / PLACE, {"p1": ("Old", ["q0"], -VECTORS), "p3": ("Cy", [], VECTORS)})
        with killed_at(kill_at, monkeypatch) as killed:
            merge_stores([tmp_path / "a"], target, on_conflict)
        assert killed == [kill_at] * (kill_at is not None)
        if saved_meanwhile:
            fill(target, "p9", provenance=None)
        merge_stores([tmp_path / "a"], target, on_conflict)
        manifests.add((target / PLACE / "manifest.json").read_text())
    (text,) = manifests
    personas = json.loads(text)["personas"]
    assert personas["p1"] == {"name": "Ada", "sample_ids": ["q7"]}
    assert personas["p2"] == {"name": "Bo", "sample_ids": ["q8"]}
    assert len(personas) == 2 + (on_conflict == "replace") + saved_meanwhile


@contextmanager
def killed_at(call: int | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Ends what is in it when a file gets its name for the `call`-th time; the list then holds that number."""
    calls, killed = itertools.count(1), []
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        number = next(calls)
        if number == call:
            killed.append(number)
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(os, "replace", replace)
        yield killed


@pytest.mark.parametrize(("on_conflict", "name"), [("error", "Theirs"), ("keep", "Theirs"), ("replace", "Ours")])
def test_what_the_target_calls_a_persona_stays_unless_it_is_to_be_replaced(
    tmp_path: Path, on_conflict: OnConflict, name: str
) -> None:
    write_as_the_reference_does(tmp_path / "a" / PLACE, {"p1": ("Ours", ["q7"], VECTORS)})
    write_as_the_reference_does(tmp_path / "all" / PLACE, {"p1": ("Theirs", ["q7"], VECTORS)})
    merge_stores([tmp_path / "a"], tmp_path / "all", on_conflict)
    assert PersonaVectorStore(MODEL, tmp_path / "all").persona_names(["p1"], ["templated"]) == {"p1": name}


def test_a_source_that_says_nothing_takes_no_name_away(tmp_path: Path) -> None:
    write_as_the_reference_does(tmp_path / "a" / PLACE, {"p1": ("", [], VECTORS)})
    write_as_the_reference_does(tmp_path / "all" / PLACE, {"p1": ("Theirs", ["q7"], VECTORS)})
    merge_stores([tmp_path / "a"], tmp_path / "all", "replace")
    assert PersonaVectorStore(MODEL, tmp_path / "all").persona_names(["p1"], ["templated"]) == {"p1": "Theirs"}


def test_a_damaged_manifest_of_the_target_is_kept_beside_the_new_one(tmp_path: Path) -> None:
    write_as_the_reference_does(tmp_path / "a" / PLACE, {"p1": ("Ada", ["q7"], VECTORS)})
    folder = fill(tmp_path / "all", "p2", provenance=None).path_of("templated", "p2").parent
    (folder / "manifest.json").write_text("{by hand")
    with pytest.warns(UserWarning, match="is damaged"):
        merge_stores([tmp_path / "a"], tmp_path / "all")
    assert (folder / "manifest.json.damaged").read_text() == "{by hand"
    assert list(json.loads((folder / "manifest.json").read_text())["personas"]) == ["p1", "p2"]


def test_entries_that_others_added_to_the_target_manifest_are_kept(tmp_path: Path) -> None:
    write_as_the_reference_does(tmp_path / "a" / PLACE, {"p1": ("Ada", ["q7"], VECTORS)})
    path = fill(tmp_path / "all", "p2", provenance=None).path_of("templated", "p2").with_name("manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"licence": "CC0"}))
    merge_stores([tmp_path / "a"], tmp_path / "all")
    assert json.loads(path.read_text())["licence"] == "CC0"


# Conflicts


def test_the_same_inputs_with_other_rounding_are_no_conflict(tmp_path: Path) -> None:
    kept = fill(tmp_path / "all", "p1")
    fill(tmp_path / "a", "p1", vectors=VECTORS * (1 + 1e-6))
    assert counts(merge_stores([tmp_path / "a"], tmp_path / "all")) == (0, 1, 0, 0)
    assert kept.load("templated", "p1").equal(VECTORS)


def test_a_conflict_names_both_files_and_the_difference_and_writes_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "all", "p1")
    fill(tmp_path / "a", "p0", "p1", provenance=OTHER_PROMPTS)
    before = contents(tmp_path / "all")
    with pytest.raises(StoreMismatchError) as raised:
        merge_stores([tmp_path / "a"], tmp_path / "all")
    message = str(raised.value)
    place = PLACE / "p1.safetensors"
    assert str(tmp_path / "all" / place) in message and str(tmp_path / "a" / place) in message
    assert "prompts_digest: " in message and "now 'another'" in message
    assert contents(tmp_path / "all") == before


def test_two_sources_can_conflict_too(tmp_path: Path) -> None:
    fill(tmp_path / "a", "p1", "p2")
    fill(tmp_path / "b", "p1", "p2", provenance=OTHER_PROMPTS)
    with pytest.raises(StoreMismatchError, match="and 1 more such file"):
        merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize(("choice", "holder"), [("keep", "all"), ("replace", "b")])
def test_a_conflict_is_settled_as_asked(tmp_path: Path, choice: str, holder: str) -> None:
    for factor, root in enumerate(("all", "a", "b"), start=1):
        changed = msgspec.structs.replace(PROVENANCE, prompts_digest=root)
        fill(tmp_path / root, "p1", vectors=VECTORS * factor, provenance=changed)
    expected = contents(tmp_path / holder)
    done = merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "all", choice)  # type: ignore[arg-type]
    assert counts(done) == ((0, 0, 0, 1) if choice == "keep" else (0, 0, 1, 0))
    assert contents(tmp_path / "all") == expected
    digest = PersonaVectorStore(MODEL, tmp_path / "all").stored_digest("templated", "p1")
    index = json.loads((done[0].folder / "manifest.json").read_text())
    assert index["personas"]["p1"]["digest"] == digest


def test_without_provenance_equal_files_are_the_same_and_others_conflict(tmp_path: Path) -> None:
    fill(tmp_path / "all", "p1", provenance=None)
    fill(tmp_path / "a", "p1", provenance=None)
    fill(tmp_path / "b", "p1", provenance=None, vectors=VECTORS * 2)
    fill(tmp_path / "c", "p1")
    assert counts(merge_stores([tmp_path / "a"], tmp_path / "all")) == (0, 1, 0, 0)
    for other in ("b", "c"):
        with pytest.raises(StoreMismatchError, match="were not computed from the same"):
            merge_stores([tmp_path / other], tmp_path / "all")


# Refusals


@pytest.mark.parametrize(
    ("what", "vectors", "provenance"),
    [
        ("shape", VECTORS[:, :2], PROVENANCE),
        (
            "hook_names",
            VECTORS,
            msgspec.structs.replace(PROVENANCE, hook_names=("blocks.0.hook_mlp_out", "hook_embed")),
        ),
        ("weights", VECTORS, msgspec.structs.replace(PROVENANCE, weights="fold_ln")),
        ("revision", VECTORS, msgspec.structs.replace(PROVENANCE, revision="def")),
        ("interventions", VECTORS, msgspec.structs.replace(PROVENANCE, interventions="3f")),
    ],
)
@pytest.mark.parametrize("into", ["a filled target", "an empty target"])
@pytest.mark.parametrize("choice", ["error", "replace"])
def test_vectors_that_do_not_fit_one_folder_are_refused(
    tmp_path: Path, what: str, vectors: torch.Tensor, provenance: Provenance, into: str, choice: str
) -> None:
    fill(tmp_path / "all" if into == "a filled target" else tmp_path / "a", "p1")
    fill(tmp_path / "b", "p2", vectors=vectors, provenance=provenance)
    sources = [path for path in (tmp_path / "a", tmp_path / "b") if path.exists()]
    before = contents(tmp_path / "all")
    with pytest.raises(StoreMismatchError, match=f"their {what} are"):
        merge_stores(sources, tmp_path / "all", choice)  # type: ignore[arg-type]
    assert contents(tmp_path / "all") == before


@pytest.mark.parametrize("between", [[], [msgspec.structs.replace(PROVENANCE, revision=None)]])
def test_models_are_told_apart_by_their_values_whatever_lies_between(tmp_path: Path, between: list[Provenance]) -> None:
    one = msgspec.structs.replace(PROVENANCE, weights_digest="values:1")
    other = msgspec.structs.replace(PROVENANCE, revision=None, weights_digest="values:2")
    parts = [PROVENANCE, *between, one, msgspec.structs.replace(one, weights_digest="values:3"), other]
    for number, provenance in enumerate(parts):
        fill(tmp_path / str(number), f"p{number}", provenance=provenance)
    *alike, last = [tmp_path / str(number) for number in range(len(parts))]
    merge_stores(alike, tmp_path / "all")  # one revision, and what another dtype made of it
    with pytest.raises(StoreMismatchError, match=r"their weights_digest are 'values:2' and 'values:[13]'"):
        merge_stores([*alike, last], tmp_path / "apart")


def test_of_unknown_weights_equal_files_are_the_same_and_others_conflict(tmp_path: Path) -> None:
    old = msgspec.structs.replace(PROVENANCE, revision="files-1")
    for root, factor in (("all", 1), ("a", 1), ("b", 2)):
        fill(tmp_path / root, "p1", provenance=old, vectors=VECTORS * factor)
    assert counts(merge_stores([tmp_path / "a"], tmp_path / "all")) == (0, 1, 0, 0)
    with pytest.raises(StoreMismatchError, match="which weights it is of is not recorded"):
        merge_stores([tmp_path / "b"], tmp_path / "all")
    assert counts(merge_stores([tmp_path / "b"], tmp_path / "all", "replace")) == (0, 0, 1, 0)


def test_a_damaged_file_is_not_copied(tmp_path: Path) -> None:
    path = fill(tmp_path / "a", "p1").path_of("templated", "p1")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"p1\.safetensors is damaged"):
        merge_stores([tmp_path / "a"], tmp_path / "all")
    assert contents(tmp_path / "all") == {}


def test_a_target_that_links_elsewhere_is_not_written_through(tmp_path: Path) -> None:
    fill(tmp_path / "a", "p1")
    (tmp_path / "all").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "all" / "org__tiny").symlink_to(tmp_path / "outside")
    with pytest.raises(StoreError, match="outside"):
        merge_stores([tmp_path / "a"], tmp_path / "all")
    assert not any((tmp_path / "outside").iterdir())


@pytest.mark.parametrize("linked", ["org__tiny", "org__tiny/answer_mean", str(PLACE), f"{PLACE}/p1.safetensors"])
def test_a_source_that_links_elsewhere_is_not_read_through(tmp_path: Path, linked: str) -> None:
    fill(tmp_path / "a", "p1", "p2")
    (tmp_path / "a" / linked).rename(tmp_path / "outside")
    (tmp_path / "a" / linked).symlink_to(tmp_path / "outside")
    with pytest.raises(StoreError, match=r"symbolic link to .*outside"):
        merge_stores([tmp_path / "a"], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_links_within_a_source_are_read(tmp_path: Path) -> None:
    fill(tmp_path / "a", "p1")
    (tmp_path / "a" / PLACE).with_name("biography").symlink_to("templated")
    (tmp_path / "link").symlink_to("a")
    assert [done.copied for done in merge_stores([tmp_path / "link"], tmp_path / "all")] == [1, 1]


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "a", "p1")
    for wrong in (tmp_path / "absent", tmp_path, tmp_path / "a" / "org__tiny"):
        with pytest.raises(NotStoredError, match="name the root of a store"):
            merge_stores([tmp_path / "a", wrong], tmp_path / "all")
    with pytest.raises(InputError, match="is the target itself"):
        merge_stores([tmp_path / "a"], tmp_path / "b" / ".." / "a")
    with pytest.raises(InputError, match="at least one"):
        merge_stores([], tmp_path / "all")


def test_an_unknown_choice_is_refused(tmp_path: Path, unchecked: None) -> None:
    fill(tmp_path / "a", "p1")
    with pytest.raises(InputError, match="choose error, keep, replace"):
        merge_stores([tmp_path / "a"], tmp_path / "all", "newest")  # type: ignore[arg-type]


# The command line


def test_the_merge_command_reports_each_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "a", "p1")
    fill(tmp_path / "b", "p2", "p3")
    assert main(["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--into", str(tmp_path / "all")]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "org__tiny" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        *("org__tiny", "answer_mean", "templated"),
        *("3", "0", "0", "0"),
    ]


def test_a_conflict_fails_the_merge_command_unless_it_is_settled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "all", "p1")
    fill(tmp_path / "a", "p1", provenance=OTHER_PROMPTS)
    arguments = ["merge", str(tmp_path / "a"), "--into", str(tmp_path / "all")]
    assert main(arguments) == 1
    assert "--on-conflict" in capsys.readouterr().err
    assert main([*arguments, "--on-conflict", "replace"]) == 0
    assert contents(tmp_path / "all") == contents(tmp_path / "a")


# Shards of one extraction


def extract(model: Path, root: Path, *more: str) -> list[str]:
    return [
        *("extract", "--model", str(model), "--kind", "bridge", "--activations-dir", str(root)),
        # Which samples share a pass follows from the free memory otherwise, and with it the last bits.
        *("--n-train", "2", "--batch-tokens", "2048", *more),
    ]


def launched(arguments: list[str], **environ: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tl_persona", *arguments],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def results(root: Path) -> dict[str, bytes]:
    """Every artifact, and every manifest, byte for byte."""
    names = (f"*{SUFFIX}", "manifest.json")
    return {str(path.relative_to(root)): path.read_bytes() for name in names for path in sorted(root.rglob(name))}


@pytest.mark.tl
@pytest.mark.slow
def test_shards_running_at_once_in_one_store_equal_one_process(tmp_path: Path, tiny_llama: Path) -> None:
    shared = [
        # Two tasks of a SLURM array whose ids are 3 and 5.
        launched(
            extract(tiny_llama, tmp_path / "shared", "--shard", "auto"),
            SLURM_ARRAY_TASK_ID=task,
            SLURM_ARRAY_TASK_MIN="3",
            SLURM_ARRAY_TASK_MAX="5",
            SLURM_ARRAY_TASK_STEP="2",
            SLURM_ARRAY_TASK_COUNT="2",
        )
        for task in ("3", "5")
    ]
    outputs = [process.communicate(timeout=300)[0] for process in shared]
    assert [process.returncode for process in shared] == [0, 0], outputs
    total = len(PersonaDataset.bundled())
    assert f"shard 0/2 (SLURM_ARRAY_TASK_ID): {(total + 1) // 2} of {total} personas" in outputs[0]
    assert f"shard 1/2 (SLURM_ARRAY_TASK_ID): {total // 2} of {total} personas" in outputs[1]

    assert main(extract(tiny_llama, tmp_path / "whole")) == 0
    whole = results(tmp_path / "whole")
    assert len(whole) == 2 * total + 2
    assert results(tmp_path / "shared") == whole
    assert not list((tmp_path / "shared").rglob("manifest.pending"))


@pytest.mark.tl
def test_shards_in_roots_of_their_own_merge_into_what_one_process_gives(tmp_path: Path, tiny_llama: Path) -> None:
    chosen = ("--persona-id", *PersonaDataset.bundled().persona_ids[:3], "--variants", "templated")
    for index in range(2):
        root = tmp_path / f"machine-{index}"
        assert main(extract(tiny_llama, root, *chosen, "--shard", f"{index}/2")) == 0
        stored = {path.stem for path in root.rglob(f"*{SUFFIX}")}
        assert stored == set(Shard(index, 2).of(PersonaDataset.bundled().persona_ids[:3]))
    merge_stores([tmp_path / "machine-0", tmp_path / "machine-1"], tmp_path / "merged")
    assert main(extract(tiny_llama, tmp_path / "whole", *chosen)) == 0
    assert results(tmp_path / "merged") == results(tmp_path / "whole")

    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "merged").rglob(f"*{SUFFIX}")}
    assert main(extract(tiny_llama, tmp_path / "merged", *chosen)) == 0  # a later run finds everything done
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_a_shard_without_personas_succeeds_and_loads_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "no-such-model"
    assert main(extract(missing, tmp_path / "out", "--sample-size", "2", "--shard", "2/3")) == 0
    assert "shard 2/3 (--shard): 0 of 2 personas" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_batch_script_that_forgot_srun_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert main(extract(tmp_path / "no-such-model", tmp_path / "out", "--shard", "auto")) == 2  # the model is missing
    assert "put srun before it" in capsys.readouterr().err


def test_a_bad_shard_ends_the_command_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "SLURM_PROCID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for text in ("3/3", "auto"):
        assert main(extract(tmp_path / "no-such-model", tmp_path / "out", "--shard", text)) == 2
        assert "--shard" in capsys.readouterr().err
