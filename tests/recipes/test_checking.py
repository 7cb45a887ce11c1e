"""`tl-persona verify`: everything that can be wrong with what is saved is named, and repair loses nothing."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from stores import MODEL, PROVENANCE, VECTORS, save, write_as_the_reference_does

from tl_persona import files
from tl_persona.checking import Checkup, check_saved
from tl_persona.cli.main import main
from tl_persona.errors import NotStoredError, StoreError
from tl_persona.store import PersonaVectorStore, manifest
from tl_persona.store.file import encode
from tl_persona.vectors import SteeringVector, SteeringVectorSet

PLACE = Path("org__tiny", "answer_mean", "templated")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with PersonaVectorStore(MODEL, tmp_path / "root") as store:
        for persona_id in ("p1", "p2", "p3"):
            save(store, persona_id)
    return tmp_path / "root"


def kinds(found: Checkup) -> list[tuple[str, str]]:
    return [(problem.path.name, problem.kind) for problem in found.problems]


def rewritten(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Alter the header of a file of ours and make its checksum fit again, as somebody else's program could."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    change(header["__metadata__"])
    del header["__metadata__"]["header_sha256"]
    canonical = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    header["__metadata__"]["header_sha256"] = hashlib.sha256(canonical).hexdigest()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


def test_a_sound_store_has_no_problems_at_any_level(root: Path) -> None:
    for path in (root, root / "org__tiny", root / PLACE, root / PLACE / "p1.safetensors"):
        found = check_saved(path)
        assert (found.problems, found.repairs) == ((), ())
        assert found.n_files == (3 if path.is_dir() else 1)
        assert (found.n_unrecorded, found.n_without_provenance) == (0, 0)


def flip_last(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_last, "checksum of its tensor"),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "bytes where its header promises"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"Ada"', b'"Eve"')), "checksum of its header"),
        (lambda path: path.write_bytes(b""), "0 bytes do not begin"),
        (lambda path: path.write_bytes(path.with_name("p1.safetensors").read_bytes()), "holds persona 'p1'"),
    ],
)
def test_damage_is_named_and_moved_aside(root: Path, damage: Callable[[Path], object], words: str) -> None:
    bad = root / PLACE / "p2.safetensors"
    damage(bad)
    damaged = bad.read_bytes()
    found = check_saved(root)
    assert kinds(found) == [("p2.safetensors", "damaged")]
    assert words in found.problems[0].what
    assert bad.read_bytes() == damaged, "looking changed something"

    repaired = check_saved(root, repair=True)
    assert kinds(repaired) == [("p2.safetensors", "damaged")]
    assert not repaired.problems[0].repaired
    assert not bad.exists()
    assert bad.with_name("p2.safetensors.damaged").read_bytes() == damaged
    assert list(json.loads((root / PLACE / "manifest.json").read_text())["personas"]) == ["p1", "p3"]
    assert check_saved(root).problems == ()
    assert PersonaVectorStore(MODEL, root).status("templated", "p2", PROVENANCE).state == "absent"


def test_what_was_moved_aside_before_is_not_overwritten(root: Path) -> None:
    bad = root / PLACE / "p2.safetensors"
    for content in (b"first", b"second"):
        bad.write_bytes(content)
        check_saved(root, repair=True)
    assert bad.with_name("p2.safetensors.damaged").read_bytes() == b"first"
    assert bad.with_name("p2.safetensors.damaged-2").read_bytes() == b"second"


def test_a_vector_saved_again_since_it_was_looked_at_is_not_moved(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tl_persona.store import manifest

    bad = root / PLACE / "p2.safetensors"
    whole = bad.read_bytes()
    flip_last(bad)
    locked = manifest.locked

    def locked_after_another_process(folder: Path) -> object:
        bad.write_bytes(whole)
        return locked(folder)

    monkeypatch.setattr(manifest, "locked", locked_after_another_process)
    check_saved(root, repair=True)
    assert bad.read_bytes() == whole
    assert not list(bad.parent.glob("*.damaged"))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.unlink(), "3 entries of files that it does not have: 'p1', 'p2', 'p3'"),
        (lambda path: path.write_text("{"), "it is damaged"),
        (lambda path: path.write_text(path.read_text().replace("Ada", "Eve")), "3 entries not as their files say"),
        (lambda path: path.write_text(path.read_text().replace('"num_layers": 2', '"num_layers": 9')), "shape (9, 3)"),
        (lambda path: path.with_name("p2.safetensors").unlink(), "1 entries without a file: 'p2'"),
    ],
)
def test_an_index_that_is_behind_is_named_and_written_anew(
    root: Path, spoil: Callable[[Path], object], words: str
) -> None:
    path = root / PLACE / "manifest.json"
    right = path.read_bytes()
    spoil(path)
    found = check_saved(root)
    assert kinds(found) == [("manifest.json", "index")]
    assert words in found.problems[0].what
    repaired = check_saved(root, repair=True)
    assert [problem.repaired for problem in repaired.problems] == [True]
    assert "written anew from" in repaired.repairs[0]
    assert check_saved(root).problems == ()
    if path.with_name("p2.safetensors").exists():
        assert path.read_bytes() == right


def test_a_manifest_of_a_later_version_is_left_as_it_is(root: Path) -> None:
    path = root / PLACE / "manifest.json"
    path.write_text('{"format_version": 2}')
    flip_last(path.with_name("p1.safetensors"))
    found = check_saved(root, repair=True)
    assert kinds(found) == [("manifest.json", "unreadable"), ("p1.safetensors", "damaged")]
    assert "upgrade" in found.problems[0].what
    assert any("left as it is" in line for line in found.repairs)
    assert path.read_text() == '{"format_version": 2}'
    assert not any(problem.repaired for problem in found.problems)


def test_a_vector_of_a_later_version_is_not_touched(root: Path) -> None:
    path = root / PLACE / "p1.safetensors"
    rewritten(path, lambda metadata: metadata.update(format_version="2"))
    later = path.read_bytes()
    found = check_saved(root, repair=True)
    assert ("p1.safetensors", "unreadable") in kinds(found)
    assert path.read_bytes() == later


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1.0])
def test_numbers_that_are_none_are_found_in_every_dtype(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    vectors = torch.full((3, 4), -2.5, dtype=dtype)
    vectors[1, 3] = bad
    path = tmp_path / "p.safetensors"
    save_file({"activations": vectors}, str(path))
    found = check_saved(path)
    assert found.n_unrecorded == 1
    assert [problem.what for problem in found.problems] == ([] if bad == 1.0 else ["layer 1 holds NaN or infinity"])


def test_a_dtype_that_is_no_number_of_ours_and_a_wrong_size_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    save_file({"activations": torch.ones(2, 3, dtype=torch.int32)}, str(path))
    assert "not floating point" in check_saved(path).problems[0].what
    text = b'{"activations":{"data_offsets":[0,8],"dtype":"F32","shape":[2,3]}}'
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    assert "8 bytes are no F32 of shape (2, 3)" in check_saved(path).problems[0].what


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda metadata: metadata.update(digest="0" * 64), "digest is not that of its provenance"),
        (lambda metadata: metadata.update(sample_ids='["q1"]'), "sample ids are not those of its provenance"),
        (lambda metadata: metadata.update(provenance="{"), "provenance cannot be read"),
    ],
)
def test_a_header_at_odds_with_itself_is_found(
    root: Path, change: Callable[[dict[str, object]], None], words: str
) -> None:
    rewritten(root / PLACE / "p1.safetensors", change)
    assert any(words in problem.what for problem in check_saved(root / PLACE / "p1.safetensors").problems)


def test_provenance_of_other_layers_is_found(tmp_path: Path) -> None:
    path = tmp_path / "p1.safetensors"
    path.write_bytes(encode(VECTORS, persona_id="p1", persona_name="", sample_ids=["q1", "q2"], provenance=PROVENANCE))
    three = msgspec.structs.replace(PROVENANCE, hook_names=("a", "b", "c"))
    text = msgspec.json.encode(three).decode()
    rewritten(path, lambda metadata: metadata.update(provenance=text, digest=three.digest()))
    (problem,) = check_saved(path).problems
    assert problem.what == "its provenance names 3 hooks for 2 layers"


def test_a_vector_in_the_place_of_another_model_or_strategy_is_found(root: Path) -> None:
    moved = root / "org__other" / "answer_last" / "templated"
    (root / PLACE).rename(moved.parent.mkdir(parents=True) or moved)
    found = {(problem.kind, problem.what) for problem in check_saved(root).problems}
    assert found == {
        ("provenance", "it lies under the model 'org__other', but is of 'org__tiny'"),
        ("provenance", "it lies under the strategy 'answer_last', but is of 'answer_mean'"),
    }
    assert check_saved(moved).problems == (), "a copied folder says nothing about places"


def test_vectors_that_do_not_fit_their_neighbours_are_named_and_stay(root: Path) -> None:
    other = msgspec.structs.replace(PROVENANCE, weights="fold_ln")
    for persona_id, vectors, provenance in (("p8", torch.ones(4, 3), None), ("p9", VECTORS, other)):
        ids = [] if provenance is None else list(provenance.sample_ids)
        data = encode(vectors, persona_id=persona_id, persona_name="", sample_ids=ids, provenance=provenance)
        (root / PLACE / f"{persona_id}.safetensors").write_bytes(data)
    found = check_saved(root, repair=True)
    assert [name for name, kind in kinds(found) if kind == "misfit"] == ["p8.safetensors", "p9.safetensors"]
    assert [problem.what for problem in found.problems if problem.kind == "misfit"] == [
        "its shape does not fit p1.safetensors: (4, 3), there (2, 3)",
        "its weights does not fit p1.safetensors: 'fold_ln', there 'unprocessed'",
    ]
    assert (root / PLACE / "p8.safetensors").exists() and (root / PLACE / "p9.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"revision": "def"}, "its revision does not fit p1.safetensors: 'def', there 'abc'"),
        ({"interventions": "3f"}, "its interventions does not fit p1.safetensors: '3f', there 'none'"),
        ({"revision": None, "weights_digest": "values:1"}, None),
        ({"interventions": "unknown"}, None),
        ({"notes": {"hooks": "of the caller"}}, None),
    ],
)
def test_neighbours_that_are_known_to_be_of_another_model_do_not_fit(
    root: Path, changes: dict[str, object], words: str | None
) -> None:
    with PersonaVectorStore(MODEL, root) as store:
        save(store, "p9", provenance=msgspec.structs.replace(PROVENANCE, **changes))
    found = [(problem.path.name, problem.kind, problem.what) for problem in check_saved(root).problems]
    assert found == ([] if words is None else [("p9.safetensors", "misfit", words)])


def test_each_kind_of_digest_is_compared_with_the_first_that_has_it(tmp_path: Path) -> None:
    known = [("abc", None), ("abc", "values:1"), (None, "served:1"), (None, "values:1"), (None, "values:2")]
    with PersonaVectorStore(MODEL, tmp_path) as store:
        for number, (revision, digest) in enumerate(known):
            provenance = msgspec.structs.replace(PROVENANCE, revision=revision, weights_digest=digest)
            save(store, f"p{number}", provenance=provenance)
    (problem,) = check_saved(tmp_path).problems
    assert (problem.path.name, problem.kind) == ("p4.safetensors", "misfit")
    assert problem.what == "its weights_digest does not fit p1.safetensors: 'values:2', there 'values:1'"


BRIDGE_OF_COHERE = {
    "model_class": "TransformerBridge",
    "architecture": "CohereForCausalLM",
    "transformer-lens": "3.9.0",
}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({}, "0.28"),
        ({"architecture": "HunYuanDenseV1ForCausalLM", "transformer-lens": "3.9.2"}, "0.052"),
        ({"architecture": "BloomForCausalLM", "model_class": "HookedTransformer"}, "0.13"),
        ({"architecture": "BloomForCausalLM"}, None),
        ({"architecture": "LlamaForCausalLM"}, None),
        ({"architecture": None}, None),
        ({"transformer-lens": "4.3.0"}, None),
        ({"transformer-lens": "3.90.0"}, None),
        ({"check": "compared with transformers"}, None),
        ({"check": "not compared: no room"}, "0.28"),
    ],
)
def test_numbers_of_a_class_that_is_known_to_be_wrong_are_named(
    changes: dict[str, object], error: str | None, tmp_path: Path
) -> None:
    notes = {name: value for name, value in (BRIDGE_OF_COHERE | changes).items() if value is not None}
    provenance = msgspec.structs.replace(PROVENANCE, notes=notes)
    with PersonaVectorStore(MODEL, tmp_path / "personas") as store:
        save(store, "p1", provenance=provenance)
    SteeringVectorSet("calm", [SteeringVector("calm", 1, torch.ones(3), MODEL, provenance=provenance)]).save(
        tmp_path / "set"
    )
    found = check_saved(tmp_path)
    assert found.n_files == 2
    assert kinds(found) == ([] if error is None else [("p1.safetensors", "wrong"), ("layer_1.safetensors", "wrong")])
    for problem in found.problems:
        assert f"{notes['model_class']} of TransformerLens {notes['transformer-lens']} is wrong" in problem.what
        assert f"by {error} of" in problem.what


def test_another_librarys_folder_is_checked_as_far_as_it_goes(tmp_path: Path) -> None:
    write_as_the_reference_does(tmp_path / PLACE, {"a": ("Ann", ["x"], VECTORS), "b": ("Bo", [], VECTORS)})
    found = check_saved(tmp_path)
    assert (found.problems, found.n_files, found.n_unrecorded, found.n_without_provenance) == ((), 2, 2, 2)


def test_repair_keeps_what_only_a_broken_manifest_knew(tmp_path: Path) -> None:
    write_as_the_reference_does(tmp_path / PLACE, {"a": ("Ann", ["x"], VECTORS)})
    path = tmp_path / PLACE / "manifest.json"
    path.write_text(path.read_text()[:-3])
    broken = path.read_text()
    check_saved(tmp_path, repair=True)
    assert path.with_name("manifest.json.damaged").read_text() == broken
    assert check_saved(tmp_path).problems == ()


def test_links_that_lead_out_are_named_and_not_followed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.safetensors").write_bytes(b"x")
    (root / "org__tiny" / "answer_mean" / "biography").symlink_to(tmp_path / "outside")
    (root / PLACE / "p9.safetensors").symlink_to(tmp_path / "outside" / "secret.safetensors")
    found = check_saved(root, repair=True)
    assert sorted(kinds(found)) == [("biography", "link"), ("p9.safetensors", "link")]
    assert found.n_files == 3
    assert (tmp_path / "outside" / "secret.safetensors").read_bytes() == b"x"


def test_a_manifest_that_is_a_link_is_made_a_file_again(root: Path, tmp_path: Path) -> None:
    path = root / PLACE / "manifest.json"
    right = path.read_bytes()
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    found = check_saved(root)
    assert kinds(found) == [("manifest.json", "index")]
    assert "symbolic link" in found.problems[0].what
    assert [problem.repaired for problem in check_saved(root, repair=True).problems] == [True]
    assert not path.is_symlink()
    assert path.read_bytes() == (tmp_path / "elsewhere.json").read_bytes() == right
    assert check_saved(root).problems == ()


# While others save


@pytest.mark.parametrize("persona_id", ["p9", "p1"])
def test_a_save_during_the_check_is_no_flaw_of_the_index(root: Path, persona_id: str) -> None:
    """A file that was not there when the folder was listed, and one that was another when it was read."""

    def saves(done: int, total: int) -> None:
        with PersonaVectorStore(MODEL, root) as store:
            save(store, persona_id, persona_name=f"Ada {done}")

    assert check_saved(root, on_progress=saves).problems == ()


def test_a_save_that_has_not_come_to_its_index_is_waited_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / PLACE
    entered, released = threading.Event(), threading.Event()
    real = manifest.undisturbed

    def saver() -> None:
        with manifest.locked(folder):
            data = encode(VECTORS, persona_id="p9", persona_name="Ada", sample_ids=["q1"])
            files.write_atomically(folder / "p9.safetensors", data)
            entered.set()
            released.wait(60)
            manifest.record(folder, folder / "p9.safetensors")

    def looked_at_again(folder: Path) -> AbstractContextManager[None]:
        released.set()
        return real(folder)

    monkeypatch.setattr(manifest, "undisturbed", looked_at_again)
    thread = threading.Thread(target=saver)
    thread.start()
    assert entered.wait(60)
    try:
        assert check_saved(root).problems == ()
    finally:
        released.set()
        thread.join(60)


def test_an_index_is_checked_though_its_lock_cannot_be_had(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / PLACE / "manifest.json").unlink()
    monkeypatch.setattr(files, "SECONDS", 0.05)
    with manifest.locked(root / PLACE), ThreadPoolExecutor(1) as pool:
        assert kinds(pool.submit(check_saved, root).result(60)) == [("manifest.json", "index")]


def test_a_check_writes_nothing(root: Path) -> None:
    (root / PLACE / "manifest.json").unlink()
    (root / PLACE / ".manifest.lock").unlink()
    before = sorted(os.listdir(root / PLACE))
    assert kinds(check_saved(root)) == [("manifest.json", "index")]
    assert sorted(os.listdir(root / PLACE)) == before


def test_where_nothing_is_saved_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotStoredError, match="nothing is stored at"):
        check_saved(tmp_path / "absent")
    with pytest.raises(NotStoredError, match="holds no vectors"):
        check_saved(tmp_path)


def test_a_folder_that_cannot_be_listed_is_one_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refused)
    with pytest.raises(StoreError, match=r"cannot list .*Permission denied"):
        check_saved(root)


# Steering vectors


def steering_set(folder: Path) -> Path:
    vectors = SteeringVectorSet("calm")
    for layer in (1, 2):
        vectors.add(SteeringVector("calm", layer, torch.ones(3) * layer, MODEL))
    vectors.save(folder)
    return folder


def test_a_set_of_steering_vectors_is_checked_file_by_file_and_as_a_whole(tmp_path: Path) -> None:
    folder = steering_set(tmp_path / "set")
    assert (check_saved(folder).problems, check_saved(folder).n_files) == ((), 2)
    data = bytearray((folder / "layer_1.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "layer_1.safetensors").write_bytes(data)
    (folder / "layer_2.safetensors").write_bytes(b"")
    assert kinds(check_saved(folder, repair=True)) == [
        ("layer_1.safetensors", "damaged"),
        ("layer_2.safetensors", "damaged"),
    ]
    assert (folder / "layer_2.safetensors").exists()

    other = steering_set(tmp_path / "other")
    (other / "layer_1.safetensors").write_bytes((other / "layer_2.safetensors").read_bytes())
    assert kinds(check_saved(other)) == [("metadata.json", "damaged")]
    (other / "layer_1.safetensors").unlink()
    assert kinds(check_saved(other)) == [("metadata.json", "damaged")]


@pytest.mark.parametrize("name", ["layer_1.json", "layer_1.pt", "metadata.json"])
def test_links_of_a_set_that_lead_out_are_named_and_not_followed(tmp_path: Path, name: str) -> None:
    folder, outside = tmp_path / "set", tmp_path / "outside" / "file"
    folder.mkdir()
    outside.parent.mkdir()
    (folder / "metadata.json").write_text('{"behavior": "calm", "layers": [1]}')
    (folder / "layer_1.json").write_text('{"behavior": "calm", "layer_index": 1, "model_name": "m"}')
    torch.save(torch.ones(3), folder / "layer_1.pt")
    assert check_saved(folder).problems == ()
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    assert kinds(check_saved(tmp_path / "set")) == [(name, "link")]


def test_a_steering_vector_beside_persona_vectors_is_none_of_them(root: Path) -> None:
    vector = SteeringVector("calm", 1, torch.ones(3), MODEL).save(root / PLACE / "steering.safetensors")
    found = check_saved(root, repair=True)
    assert (found.n_files, found.problems) == (4, ())
    flip_last(vector)
    assert kinds(check_saved(vector)) == [("steering.safetensors", "damaged")]


# The command


def test_the_command_prints_what_is_wrong_and_exits_with_one(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["verify", str(root)]) == 0
    assert capsys.readouterr().out == "3 files checked, 0 problems\n"
    flip_last(root / PLACE / "p2.safetensors")
    (root / PLACE / "manifest.json").write_text("{")
    assert main(["verify", str(root)]) == 1
    printed = capsys.readouterr().out
    assert "org__tiny/answer_mean/templated/p2.safetensors" in printed
    assert "the checksum of its tensor does not fit" in printed
    assert "3 files checked, 2 problems" in printed
    assert main(["verify", str(root), "--repair"]) == 1, "a vector is missing now"
    assert "p2.safetensors.damaged, extract it again" in capsys.readouterr().out
    assert main(["verify", str(root)]) == 0
    (root / PLACE / "manifest.json").write_text("{")
    assert main(["verify", str(root), "--repair"]) == 0, "an index that is whole again is no problem"
    assert main(["verify", str(root / "absent")]) == 1
    assert "nothing is stored at" in capsys.readouterr().err


def test_progress_ends_where_the_files_end(root: Path) -> None:
    seen: list[tuple[int, int]] = []
    check_saved(root, on_progress=lambda done, total: seen.append((done, total)))
    size = sum(path.stat().st_size for path in (root / PLACE).glob("*.safetensors"))
    assert seen[-1] == (size, size)
    assert [total for _, total in seen] == [size] * 3
    assert np.all(np.diff([done for done, _ in seen]) > 0)


def test_a_store_is_verified_without_torch(root: Path) -> None:
    code = (
        "import sys\nfrom tl_persona.cli.main import main\n"
        f"assert main(['verify', {str(root)!r}, '--repair']) == 0\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
