"""Kills, full disks, damaged files, future versions and several writers: nothing is lost, nothing wrong is read."""

import errno
import hashlib
import json
import multiprocessing
import os
import re
import resource
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from stores import PROVENANCE, VECTORS, expect_store_error, folder_of, in_child, read_as_the_reference_does, save

from tl_persona import files
from tl_persona.errors import CorruptFileError, StoreError, StoreMismatchError
from tl_persona.files import write_atomically
from tl_persona.store import PersonaVectorStore, manifest
from tl_persona.store.file import decode, encode

FILE = encode(VECTORS, persona_id="p1", persona_name="Ada", sample_ids=["q1", "q2"], provenance=PROVENANCE)


def die(*_: object, **__: object) -> None:
    os._exit(9)


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The system itself refuses to write on, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Kills


def test_a_kill_between_tensor_and_manifest_loses_nothing(store: PersonaVectorStore) -> None:
    save(PersonaVectorStore("org/tiny", store.root_dir), "p1")

    def killed() -> None:
        manifest.record = die
        save(store, "p2", persona_name="Bo", vectors=-VECTORS)

    assert in_child(killed) == 9
    assert list(read_as_the_reference_does(folder_of(store))) == ["p1"]
    assert store.list_personas(["templated"]) == ["p1", "p2"]
    assert store.persona_names(["p2"], ["templated"]) == {"p2": "Bo"}
    assert store.status("templated", "p2", PROVENANCE).state == "same"
    store.flush()  # A re-run that skips all that is there completes the index all the same.
    assert list(read_as_the_reference_does(folder_of(store))) == ["p1", "p2"]


def test_a_kill_in_the_middle_of_a_file_leaves_the_old_one(store: PersonaVectorStore) -> None:
    save(store, "p1")

    def killed() -> None:
        os.replace = die
        save(store, "p1", vectors=-VECTORS)

    assert in_child(killed) == 9
    leftovers = [name for name in os.listdir(folder_of(store)) if name.startswith(".tmp-")]
    assert len(leftovers) == 1
    assert store.load("templated", "p1").equal(VECTORS)
    assert store.list_personas(["templated"]) == ["p1"]
    save(store, "p2")
    assert not (folder_of(store) / leftovers[0]).exists()


def test_a_kill_while_an_entry_is_appended_loses_nothing(
    store: PersonaVectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, "p0")
    monkeypatch.setattr(manifest, "SMALL", 0)
    monkeypatch.setattr(manifest, "PENDING_SHARE", 0)
    save(store, "p1")
    pending = folder_of(store) / "manifest.pending"
    pending.write_bytes(pending.read_bytes()[:-40])
    save(store, "p2")
    assert len(pending.read_bytes().splitlines()) == 1  # The cut line has swallowed the next one.
    assert store.list_personas(["templated"]) == ["p0", "p1", "p2"]
    assert store.persona_names(["p1", "p2"], ["templated"]) == {"p1": "Ada", "p2": "Ada"}


def test_a_file_is_durable_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        events.append("fsync folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "fsync file")
        fsync(handle)

    def noted_replace(source: Path, target: Path) -> None:
        events.append(f"{source.name[:5]} becomes {target.name}, {source.stat().st_size} bytes")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_atomically(tmp_path / "x", b"data")
    assert events == ["fsync file", ".tmp- becomes x, 4 bytes", "fsync folder"]


# A file system that refuses


def test_a_full_disk_leaves_what_was_there(store: PersonaVectorStore) -> None:
    save(store, "p1", provenance=None)
    before = sorted(os.listdir(folder_of(store)))
    with files_no_larger_than(100), pytest.raises(StoreError, match=r"p1.safetensors.*too large") as caught:
        save(store, "p1", vectors=-VECTORS, provenance=None)
    assert isinstance(caught.value.__cause__, OSError)
    assert sorted(os.listdir(folder_of(store))) == before
    assert store.load("templated", "p1").equal(VECTORS)


def test_a_manifest_that_cannot_be_written_does_not_cost_the_vectors(
    store: PersonaVectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if target.name == "manifest.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(StoreError, match=r"manifest\.json"):
            save(store, "p1")
    assert store.load("templated", "p1").equal(VECTORS)
    assert store.list_personas(["templated"]) == ["p1"]


def test_a_root_where_no_folder_can_be_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match="cannot create the folder"):
        save(PersonaVectorStore("m", tmp_path / "file" / "root"))
    (tmp_path / "m" / "answer_mean").mkdir(parents=True)
    (tmp_path / "m" / "answer_mean" / "templated").write_text("not a folder")
    with pytest.raises(StoreError, match="templated"):
        save(PersonaVectorStore("m", tmp_path))
    with pytest.raises(StoreError, match="Not a directory"):
        PersonaVectorStore("m", tmp_path).list_personas(["templated"])


def test_a_read_only_folder_is_read_and_not_written(store: PersonaVectorStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, "p1")
    real_open = os.open

    def read_only(path: object, flags: int, *rest: object, **options: object) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real_open(path, flags, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", read_only)  # A user who is root may write anywhere, so permissions are feigned.
    with pytest.raises(StoreError, match="cannot lock"):
        save(store, "p2")
    assert store.status("templated", "p1", PROVENANCE).state == "same"
    store.flush()
    assert store.list_personas(["templated"]) == ["p1"]


def test_a_lock_that_is_never_given_back_is_an_error_and_no_hang(
    store: PersonaVectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, "p1")
    monkeypatch.setattr(files, "SECONDS", 0.05)
    with manifest.locked(folder_of(store)):
        assert in_child(lambda: expect_store_error(lambda: save(store, "p2"), "another process")) == 0


# Damaged files


@given(position=st.integers(0, len(FILE) - 1), flip=st.integers(1, 255))
def test_no_flipped_byte_changes_what_is_read(position: int, flip: int) -> None:
    damaged = bytearray(FILE)
    damaged[position] ^= flip
    try:
        header, vectors = decode(bytes(damaged), Path("p1.safetensors"), "p1")
    except StoreError:
        return
    # One kind of blank for another, in the padding, says nothing else.
    assert FILE[position : position + 1] == b" "
    assert vectors.equal(VECTORS)
    assert header.provenance == PROVENANCE


def test_a_flipped_bit_is_always_found() -> None:
    for position in range(len(FILE)):
        damaged = bytearray(FILE)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(StoreError, match=r"p1\.safetensors"):
            decode(bytes(damaged), Path("p1.safetensors"), "p1")


def test_a_file_cut_anywhere_is_damaged_and_so_is_a_longer_one(tmp_path: Path) -> None:
    path = tmp_path / "p1.safetensors"
    for length in (*range(0, len(FILE), 7), len(FILE) - 1):
        with pytest.raises(CorruptFileError, match="damaged"):
            decode(FILE[:length], path, "p1")
    with pytest.raises(CorruptFileError, match="damaged"):
        decode(FILE + b"\0", path, "p1")


@given(
    header=st.binary(max_size=40)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["__metadata__", "activations", "dtype", "shape", "data_offsets", "format", "sha256"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    ).map(lambda value: json.dumps(value).encode())
)
def test_arbitrary_bytes_are_damaged_and_never_another_error(header: bytes) -> None:
    with pytest.raises(StoreError):
        decode(len(header).to_bytes(8, "little") + header, Path("x.safetensors"))
    with pytest.raises(StoreError):
        decode(header, Path("x.safetensors"))


def test_deeply_nested_and_oversized_headers_are_damaged() -> None:
    deep = b'{"activations":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    with pytest.raises(CorruptFileError, match="header cannot be read"):
        decode(len(deep).to_bytes(8, "little") + deep, Path("x.safetensors"))
    with pytest.raises(CorruptFileError, match="do not begin with"):
        decode((1 << 60).to_bytes(8, "little") + b"{}", Path("x.safetensors"))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"other": torch.ones(2, 3)}, "no tensor named 'activations'"),
        ({"activations": torch.ones(3)}, r"shape \(3,\), not \(layer, d_model\)"),
        ({"activations": torch.ones(2, 3, dtype=torch.int32)}, "I32, not floating point"),
        ({"activations": torch.ones(2, 3).to(torch.float8_e4m3fn)}, "F8_E4M3, not floating point of 16, 32 or 64 bits"),
    ],
)
def test_another_librarys_file_without_vectors_says_what_it_holds(
    store: PersonaVectorStore, tensors: dict[str, torch.Tensor], words: str
) -> None:
    save(store, "p1")
    path = store.path_of("templated", "p2")
    save_file(tensors, str(path))
    with pytest.raises(CorruptFileError, match=f"{re.escape(str(path))}.*{words}"):
        store.load("templated", "p2")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_another_librarys_numbers_are_those_that_torch_makes_float32_of(
    store: PersonaVectorStore, dtype: torch.dtype
) -> None:
    vectors = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    folder_of(store).mkdir(parents=True)
    save_file({"activations": vectors}, str(store.path_of("templated", "p1")))
    found = store.load("templated", "p1")
    assert found.dtype == torch.float32 and found.equal(vectors.to(torch.float32))


def test_a_dtype_nobody_knows_is_damage() -> None:
    text = b'{"activations":{"data_offsets":[0,4],"dtype":"F33","shape":[1,1]}}'
    with pytest.raises(CorruptFileError, match="its tensor is F33, not floating point"):
        decode(len(text).to_bytes(8, "little") + text + bytes(4), Path("x.safetensors"))


def test_a_header_that_vouches_for_nonsense_is_damage(store: PersonaVectorStore) -> None:
    metadata = {"format": "tl_persona.persona_vector", "format_version": "1", "persona_id": "p1", "sample_ids": "3"}
    header = {"__metadata__": metadata, "activations": {"data_offsets": [0, 4], "dtype": "F32", "shape": [1, 1]}}
    metadata["sha256"] = hashlib.sha256(bytes(4)).hexdigest()
    whole = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    metadata["header_sha256"] = hashlib.sha256(whole).hexdigest()
    text = json.dumps(header).encode()
    store.path_of("templated", "p1").parent.mkdir(parents=True)
    store.path_of("templated", "p1").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert store.load("templated", "p1").tolist() == [[0.0]]
    with pytest.raises(CorruptFileError, match="sample_ids cannot be read"):
        store.persona_sample_ids("templated", "p1")


def test_a_folder_in_the_place_of_a_file_is_one_clear_error(store: PersonaVectorStore) -> None:
    save(store, "p1")
    store.path_of("templated", "p2").mkdir()
    assert store.list_personas(["templated"]) == ["p1"]
    for call in (
        lambda: store.load("templated", "p2"),
        lambda: store.provenance("templated", "p2"),
        lambda: save(store, "p2"),
    ):
        with pytest.raises(StoreError, match=r"p2\.safetensors: Is a directory"):
            call()
    (folder_of(store) / "manifest.json").unlink()
    (folder_of(store) / "manifest.json").mkdir()
    for call in (lambda: store.list_personas(["templated"]), lambda: save(store, "p3")):
        with pytest.raises(StoreError, match=r"manifest\.json: Is a directory"):
            call()


def test_a_link_in_the_place_of_the_pending_entries_is_not_followed(
    store: PersonaVectorStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, "p1")
    (tmp_path / "precious").write_text("precious")
    (folder_of(store) / "manifest.pending").symlink_to(tmp_path / "precious")
    monkeypatch.setattr(manifest, "SMALL", 0)
    with pytest.raises(StoreError, match="the vectors themselves are saved"):
        save(store, "p2")
    assert (tmp_path / "precious").read_text() == "precious"
    assert store.load("templated", "p2").equal(VECTORS)


def test_a_link_in_the_place_of_the_manifest_is_not_followed(store: PersonaVectorStore, tmp_path: Path) -> None:
    folder = save(store, "p1")
    secret = tmp_path / "secret.json"
    secret.write_text('{"num_layers": 9, "hidden_size": 3, "secret": "s", "personas": {}}')
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to(secret)
    with pytest.warns(UserWarning, match=r"manifest.json is damaged \(it is a symbolic link\)"):
        save(store, "p2")
    assert (folder / "manifest.json.damaged").readlink() == secret
    assert "secret" not in (folder / "manifest.json").read_text()
    assert list(read_as_the_reference_does(folder)) == ["p1", "p2"]


def test_asking_the_status_of_what_is_not_there_leaves_no_folder(store: PersonaVectorStore) -> None:
    with store:
        assert store.status("templated", "p1", PROVENANCE).state == "absent"
    assert not store.root_dir.exists()


def test_a_cut_tensor_shows_in_the_size_alone(store: PersonaVectorStore) -> None:
    save(store, "p1")
    store.path_of("templated", "p1").write_bytes(FILE[:-4])
    assert store.stored_digest("templated", "p1") is None
    with pytest.raises(CorruptFileError, match=f"has {len(FILE) - 4} bytes where its header promises {len(FILE)}"):
        store.provenance("templated", "p1")


def test_hidden_files_are_no_vectors(store: PersonaVectorStore) -> None:
    folder = save(store, "p1")
    (folder / "._p1.safetensors").write_bytes(b"what some systems put beside a file")
    assert store.list_personas(["templated"]) == ["p1"]


def test_a_damaged_neighbour_is_left_out_with_a_warning_and_replaced_by_saving(store: PersonaVectorStore) -> None:
    save(store, "p1")
    path = store.path_of("templated", "p2")
    path.write_bytes(FILE[:200])
    with pytest.warns(UserWarning, match=r"p2.safetensors is damaged"):
        assert store.list_personas(["templated"]) == ["p1"]
    with pytest.raises(CorruptFileError, match="Extract it again"):
        store.load("templated", "p2")
    save(store, "p2")
    assert store.list_personas(["templated"]) == ["p1", "p2"]


def test_a_renamed_file_is_not_taken_for_another_persona(store: PersonaVectorStore) -> None:
    save(store, "p1")
    store.path_of("templated", "p1").rename(store.path_of("templated", "p2"))
    with pytest.raises(CorruptFileError, match="holds persona 'p1'"):
        store.load("templated", "p2")
    assert store.stored_digest("templated", "p2") is None
    assert store.status("templated", "p2", PROVENANCE).state == "corrupt"


def test_a_stray_file_of_another_shape_is_named(store: PersonaVectorStore) -> None:
    save(store, "p1")
    other = encode(torch.ones(4, 3), persona_id="p2", persona_name="", sample_ids=[])
    store.path_of("templated", "p2").write_bytes(other)
    with pytest.raises(StoreMismatchError, match=r"p2.safetensors holds vectors of shape \(4, 3\)"):
        store.list_personas(["templated"])


def test_index_entries_follow_the_files(store: PersonaVectorStore) -> None:
    for persona_id in ("p1", "p2", "p3"):
        save(store, persona_id)
    store.path_of("templated", "p1").unlink()
    renamed = encode(VECTORS, persona_id="p2", persona_name="Boadicea", sample_ids=["q7"])
    store.path_of("templated", "p2").write_bytes(renamed)
    assert store.list_personas(["templated"]) == ["p2", "p3"]
    assert store.persona_names(["p1", "p2", "p3"], ["templated"]) == {"p2": "Boadicea", "p3": "Ada"}


def test_a_clock_that_jumps_back_hides_nothing(store: PersonaVectorStore) -> None:
    save(store, "p1", persona_name="Ada")
    written = store.path_of("templated", "p1").stat()
    save(store, "p1", persona_name="Bea")
    os.utime(store.path_of("templated", "p1"), ns=(written.st_atime_ns, written.st_mtime_ns - 10**15))
    assert store.persona_names(["p1"], ["templated"]) == {"p1": "Bea"}


# Damaged and future indexes


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"personas": 3}', '{"num_layers": 2}', "\udcff", '{"personas": ' + "[" * 10_000]
)
def test_a_broken_manifest_is_rebuilt_from_the_files_and_said_so(store: PersonaVectorStore, text: str) -> None:
    save(store, "p1")
    (folder_of(store) / "manifest.json").write_text(text, errors="surrogateescape")
    with pytest.warns(UserWarning, match=r"manifest.json is damaged"):
        assert store.list_personas(["templated"]) == ["p1"]
    with pytest.warns(UserWarning, match=r"manifest.json is damaged"):
        save(store, "p2")
    assert list(read_as_the_reference_does(folder_of(store))) == ["p1", "p2"]


@given(
    fields=st.dictionaries(
        st.sampled_from(["num_layers", "hidden_size", "hook_names", "extra"]),
        st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3) | st.lists(st.integers(), max_size=2),
    ),
    entry=st.none()
    | st.integers()
    | st.dictionaries(
        st.sampled_from(["name", "sample_ids", "file", "digest"]), st.none() | st.text(max_size=3) | st.just([])
    ),
    pending=st.binary(max_size=30) | st.sampled_from([b'{"id": "p1"}\n', b'{"id": [], "entry": 3}\n', b"3\n"]),
)
def test_nonsense_in_the_index_never_hides_a_file(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, object], entry: object, pending: bytes
) -> None:
    store = PersonaVectorStore("m", tmp_path_factory.mktemp("nonsense"))
    folder_of(store).mkdir(parents=True)
    store.path_of("templated", "p1").write_bytes(FILE)
    index = fields | {"personas": {"p1": entry, "gone": entry}}
    (folder_of(store) / "manifest.json").write_text(json.dumps(index))
    (folder_of(store) / "manifest.pending").write_bytes(pending)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert store.list_personas(["templated"]) == ["p1"]
        assert store.persona_names(["p1"], ["templated"]) == {"p1": "Ada"}
        assert store.list_layers(["templated"]) == [0, 1]


@pytest.mark.parametrize("version", ["2", '"2"', "null"])
def test_a_manifest_of_a_later_version_is_left_alone(store: PersonaVectorStore, version: str) -> None:
    folder = save(store, "p1")
    text = (folder / "manifest.json").read_text().replace('"format_version": 1', f'"format_version": {version}')
    (folder / "manifest.json").write_text(text)
    for call in (
        lambda: store.list_personas(["templated"]),
        lambda: save(store, "p2"),
        lambda: store.rebuild_manifest("templated"),
    ):
        with pytest.raises(StoreError, match="upgrade tl_persona"):
            call()
    assert (folder / "manifest.json").read_text() == text


def test_nothing_is_saved_beside_a_manifest_of_a_later_version(store: PersonaVectorStore) -> None:
    folder_of(store).mkdir(parents=True)
    (folder_of(store) / "manifest.json").write_text('{"format_version": 2, "personas": {}}')
    with pytest.raises(StoreError, match="upgrade tl_persona"):
        save(store, "p1")
    assert not store.path_of("templated", "p1").exists()


def test_a_vector_of_a_later_version_is_neither_read_nor_replaced(store: PersonaVectorStore) -> None:
    folder = save(store, "p1")
    path = folder / "p1.safetensors"
    text = b'{"__metadata__":{"format":"tl_persona.persona_vector","format_version":"2"},'
    text += b'"activations":{"data_offsets":[0,24],"dtype":"F32","shape":[2,3]}}'
    later = len(text).to_bytes(8, "little") + text + bytes(24)
    path.write_bytes(later)
    for call in (
        lambda: store.load("templated", "p1"),
        lambda: store.status("templated", "p1", PROVENANCE),
        lambda: save(store, "p1"),
    ):
        with pytest.raises(StoreError, match="upgrade tl_persona") as caught:
            call()
        assert not isinstance(caught.value, CorruptFileError)
    assert path.read_bytes() == later


# Several writers


def test_writers_in_several_processes_lose_nothing(store: PersonaVectorStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "SMALL", 8 * 1024)  # So that both ways of indexing take part.

    def writer(name: str) -> None:
        with PersonaVectorStore("org/tiny", store.root_dir) as own:
            for number in range(25):
                save(own, f"{name}{number:02d}", persona_name=f"{name} {number}", vectors=VECTORS * (number + 1))

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=writer, args=(name,)) for name in "abcd"]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0, 0, 0]

    found = read_as_the_reference_does(folder_of(store))
    assert found.keys() == {f"{name}{number:02d}" for name in "abcd" for number in range(25)}
    for persona_id, (name, _, vectors) in found.items():
        number = int(persona_id[1:])
        assert name == f"{persona_id[0]} {number}"
        assert vectors.equal(VECTORS * (number + 1))
    assert not [name for name in os.listdir(folder_of(store)) if name.startswith(files.TEMPORARY_PREFIX)]


def test_two_first_writers_of_different_shapes_cannot_both_win(store: PersonaVectorStore) -> None:
    def writer(layers: int) -> None:
        try:
            save(store, f"p{layers}", vectors=torch.ones(layers, 3), provenance=None)
        except StoreMismatchError:
            os._exit(3)
        os._exit(0)

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=writer, args=(layers,)) for layers in (2, 4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert sorted(child.exitcode or 0 for child in children) == [0, 3]
    assert len(store.list_personas(["templated"])) == 1
