"""What is too deep, too long, closed to us or no path at all: one clear error, or the files instead of their index."""

import json
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stores import (
    PROVENANCE,
    VECTORS,
    expect_store_error,
    folder_of,
    in_child,
    read_as_the_reference_does,
    save,
    write_as_the_reference_does,
)

from tl_persona.checking import check_saved
from tl_persona.errors import StoreError
from tl_persona.files import write_atomically
from tl_persona.store import PersonaVectorStore
from tl_persona.store.merge import merge_stores

# Indexes that nest


@pytest.mark.parametrize("depth", [33, 500, 900, 950, 970, 980, 990])
def test_a_manifest_that_nests_too_deep_is_a_broken_one(store: PersonaVectorStore, depth: int) -> None:
    folder = save(store, "p1")
    nested = "[" * depth + "]" * depth
    (folder / "manifest.json").write_text(f'{{"num_layers": 2, "hidden_size": 3, "x": {nested}, "personas": {{}}}}')
    with pytest.warns(UserWarning, match=r"manifest.json is damaged"):
        save(store, "p2")
    assert (folder / "manifest.json.damaged").read_text().count("[") == depth
    assert list(read_as_the_reference_does(folder)) == ["p1", "p2"]


def test_what_others_wrote_into_a_manifest_may_nest(store: PersonaVectorStore) -> None:
    folder = save(store, "p1")
    nested = json.loads('{"a": ' * 16 + "[" * 16 + "]" * 16 + "}" * 16)
    manifest_file = folder / "manifest.json"
    manifest_file.write_text(json.dumps(json.loads(manifest_file.read_text()) | {"x": nested}))
    save(store, "p2")
    assert json.loads(manifest_file.read_text())["x"] == nested


@pytest.mark.filterwarnings("ignore:.*is damaged")
@pytest.mark.parametrize("depth", [1, 500, 950, 970, 980, 990])
def test_sample_ids_that_are_lists_are_not_believed(store: PersonaVectorStore, depth: int) -> None:
    nested = "[" * depth + "]" * depth
    folder = folder_of(store)
    write_as_the_reference_does(folder, {"p1": ("Ada", ["q1"], VECTORS)})
    (folder / "manifest.json").write_text(
        f'{{"num_layers": 2, "hidden_size": 3, "personas": {{"p1": {{"name": "Ada", "sample_ids": [{nested}]}}}}}}'
    )
    assert store.persona_sample_ids("templated", "p1") is None
    assert store.rebuild_manifest("templated") == ["p1"]
    assert read_as_the_reference_does(folder)["p1"][:2] == ("", [])


@pytest.mark.parametrize("depth", [1, 500, 950, 970, 980, 990])
def test_a_pending_entry_that_nests_is_read_from_its_file_again(store: PersonaVectorStore, depth: int) -> None:
    folder, status = save(store, "p1"), store.path_of("templated", "p1").stat()
    nested = "[" * depth + "]" * depth
    (folder / "manifest.pending").write_text(
        f'{{"id": "p1", "entry": {{"name": "Eve", "sample_ids": [], "z": {nested}}},'
        f' "file": [{status.st_size}, {status.st_mtime_ns}, {status.st_ino}]}}\n'
    )
    assert store.persona_names(["p1"], ["templated"]) == {"p1": "Ada"}
    store.flush()
    assert list(json.loads((folder / "manifest.json").read_text())["personas"]["p1"]) == [
        "name", "sample_ids", "digest"
    ]  # fmt: skip


# Files with holes, which can be of any length


HUGE = 40 * 2**30


def in_little_memory(work: Callable[[], object]) -> None:
    """Run `work` in a process that may have 2 GiB more than this one."""

    def limited() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 * 2**30,) * 2)
        work()

    assert in_child(limited) == 0


def test_a_vector_of_another_length_than_its_header_says_is_damaged_unread(store: PersonaVectorStore) -> None:
    path = save(store, "p1") / "p1.safetensors"
    with path.open("r+b") as file:
        file.truncate(HUGE)

    def read() -> None:
        expect_store_error(lambda: store.load("templated", "p1"), "header promises")
        assert store.status("templated", "p1", PROVENANCE).state == "corrupt"
        assert [problem.kind for problem in check_saved(path).problems] == ["damaged"]

    in_little_memory(read)


def test_a_vector_that_fits_into_no_memory_is_one_clear_error(store: PersonaVectorStore) -> None:
    path = store.path_of("templated", "p1")
    path.parent.mkdir(parents=True)
    rows = HUGE // 4096
    text = json.dumps({"activations": {"dtype": "F32", "shape": [rows, 1024], "data_offsets": [0, HUGE]}}).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + HUGE)

    def read() -> None:
        expect_store_error(lambda: store.load("templated", "p1"), "do not fit into the memory")
        (problem,) = check_saved(path).problems
        assert (problem.kind, "memory" in problem.what) == ("unreadable", True)

    in_little_memory(read)


def test_an_index_of_any_length_costs_no_memory(store: PersonaVectorStore) -> None:
    folder = save(store, "p1")
    (folder / "manifest.pending").touch()
    os.truncate(folder / "manifest.pending", HUGE)

    def read() -> None:
        assert store.list_personas(["templated"]) == ["p1"]  # the files are the truth
        os.truncate(folder / "manifest.json", HUGE)
        expect_store_error(lambda: store.list_personas(["templated"]), "manifest.json: it has 42949672960 bytes")
        assert [problem.kind for problem in check_saved(folder).problems] == ["unreadable"]

    in_little_memory(read)


# What the system will not say


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder that another user can reach, which those below `tmp_path` are not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o000])
@pytest.mark.parametrize("closed", ["org__tiny", "org__tiny/answer_mean", "org__tiny/answer_mean/templated"])
def test_a_closed_folder_is_one_clear_error(open_to_all: Path, closed: str, mode: int) -> None:
    store = PersonaVectorStore("org/tiny", open_to_all / "root")

    def use() -> None:
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)  # the superuser may go everywhere
        save(store, "p1")
        os.chmod(store.root_dir / closed, mode)
        for call in (
            lambda: store.load("templated", "p1"),
            lambda: store.list_personas(["templated"]),
            lambda: store.rebuild_manifest("templated"),
            lambda: save(store, "p2"),
            lambda: check_saved(store.path_of("templated", "p1")),
            lambda: merge_stores([store.root_dir], open_to_all / "merged"),
            lambda: merge_stores([store.root_dir, store.root_dir], open_to_all / "root" / "inner"),
            lambda: store.push_to_hub("me/vectors"),
            store.flush,
        ):
            expect_store_error(call, "Permission denied")
        try:
            assert check_saved(store.root_dir, repair=True).problems
        except StoreError as error:
            assert "Permission denied" in str(error)
        os.chmod(store.root_dir / closed, 0o700)
        assert store.load("templated", "p1").equal(VECTORS)

    assert in_child(use) == 0


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800"])
def test_a_root_that_no_path_can_be_is_one_clear_error(tmp_path: Path, name: str) -> None:
    store = PersonaVectorStore("m", tmp_path / name)
    for call in (
        lambda: store.load("templated", "p1"),
        lambda: store.list_personas(["templated"]),
        lambda: store.rebuild_manifest("templated"),
        lambda: save(store, "p1"),
        lambda: check_saved(store.root_dir),
        lambda: merge_stores([store.root_dir], tmp_path / "merged"),
        lambda: merge_stores([tmp_path], store.root_dir),
        lambda: write_atomically(store.root_dir, b"x"),
    ):
        with pytest.raises(StoreError):
            call()
