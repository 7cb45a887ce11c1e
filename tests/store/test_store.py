"""What the store keeps, finds, compares and refuses. Damage, kills and concurrency are in `test_store_damage`."""

import enum
import hashlib
import itertools
import json
import os
import struct
import warnings
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stores import MODEL, PROVENANCE, VECTORS, read_as_the_reference_does, save, write_as_the_reference_does

from tl_persona.errors import InputError, NonFiniteError, NotStoredError, StoreError, StoreMismatchError
from tl_persona.store import PersonaVectorStore, manifest
from tl_persona.store.file import decode, describe, encode
from tl_persona.store.header import read_header

# What goes in comes out


@given(
    rows=st.integers(1, 4).flatmap(
        lambda width: st.lists(
            st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=width, max_size=width),
            min_size=1,
            max_size=4,
        )
    ),
    name=st.text(max_size=20),
    sample_ids=st.lists(st.text(max_size=8), max_size=4),
)
def test_encode_then_decode_is_identity(rows: list[list[float]], name: str, sample_ids: list[str]) -> None:
    vectors = torch.tensor(rows, dtype=torch.float32)
    data = encode(vectors, persona_id="p", persona_name=name, sample_ids=sample_ids)
    header, loaded = decode(data, Path("p.safetensors"), "p")
    assert loaded.numpy().tobytes() == vectors.numpy().tobytes()
    assert (header.persona_name, header.sample_ids, header.shape) == (name, sample_ids, tuple(vectors.shape))


def test_a_saved_vector_comes_back_with_all_that_is_known_of_it(store: PersonaVectorStore) -> None:
    folder = save(store)
    assert folder == store.root_dir / "org__tiny" / "answer_mean" / "templated"
    assert store.load("templated", "p1").equal(VECTORS)
    assert store.persona_sample_ids("templated", "p1") == ["q1", "q2"]
    assert store.persona_names(["p1"], ["templated"]) == {"p1": "Ada"}
    assert store.provenance("templated", "p1") == PROVENANCE
    assert store.stored_digest("templated", "p1") == PROVENANCE.digest()


def test_any_floating_dtype_is_stored_as_float32(store: PersonaVectorStore) -> None:
    third = torch.full((2, 3), 1 / 3, dtype=torch.float64, requires_grad=True)
    save(store, "f64", vectors=third)
    save(store, "bf16", vectors=third.to(torch.bfloat16))
    save(store, "transposed", vectors=third.T.contiguous().T)
    assert store.load("templated", "f64").unique().tolist() == [struct.unpack("<f", struct.pack("<f", 1 / 3))[0]]
    assert store.load("templated", "bf16").unique().tolist() == [0.333984375]  # 171 / 512, the nearest with 8 bits
    assert store.load("templated", "transposed").dtype is torch.float32


def test_the_same_vectors_make_the_same_file(store: PersonaVectorStore, tmp_path: Path) -> None:
    other = PersonaVectorStore(MODEL, tmp_path / "other")
    save(store)
    save(other, provenance=msgspec.structs.replace(PROVENANCE, notes=dict(reversed(PROVENANCE.notes.items()))))
    assert store.path_of("templated", "p1").read_bytes() == other.path_of("templated", "p1").read_bytes()


def test_the_file_format_is_the_documented_one(store: PersonaVectorStore) -> None:
    body = struct.pack("<2f", 1.5, -2.0)
    before = (
        '{"__metadata__":{"format":"tl_persona.persona_vector","format_version":"1",',
        '"persona_id":"p","persona_name":"\\u00c9va","sample_ids":"[\\"q\\"]","sha256":"'
        + hashlib.sha256(body).hexdigest()
        + '"},"activations":{"data_offsets":[0,8],"dtype":"F32","shape":[1,2]}}',
    )
    header_sha256 = hashlib.sha256("".join(before).encode()).hexdigest()
    header = f'"header_sha256":"{header_sha256}",'.join(before).encode()
    header += b" " * (-len(header) % 8)
    golden = struct.pack("<Q", len(header)) + header + body

    save(store, "p", persona_name="Éva", vectors=torch.tensor([[1.5, -2.0]]), sample_ids=["q"], provenance=None)
    path = store.path_of("templated", "p")
    assert path.read_bytes() == golden
    assert (path.parent / "manifest.json").read_text() == (
        '{\n  "format_version": 1,\n  "num_layers": 1,\n  "hidden_size": 2,\n  "personas": {\n    "p": '
        '{"name": "\\u00c9va", "sample_ids": ["q"]}\n  }\n}\n'
    )


def test_the_default_root_lies_under_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(PersonaVectorStore(MODEL))
    assert (tmp_path / "artifacts/activations/org__tiny/answer_mean/templated/p1.safetensors").is_file()


# The published layout, both ways


def test_readers_of_the_published_layout_read_our_folders(store: PersonaVectorStore) -> None:
    save(store, "p1")
    folder = save(store, "p2", vectors=-VECTORS, persona_name="Bo 🦉", sample_ids=["q9"], provenance=None)
    found = read_as_the_reference_does(folder)
    assert found.keys() == {"p1", "p2"}
    assert found["p2"][:2] == ("Bo 🦉", ["q9"])
    assert found["p1"][2].equal(VECTORS)
    assert found["p2"][2].equal(-VECTORS)


def test_folders_in_the_published_layout_are_read_whole(store: PersonaVectorStore) -> None:
    folder = store.root_dir / "org__tiny" / "answer_mean" / "biography"
    write_as_the_reference_does(folder, {"a": ("Ann", ["x"], VECTORS), "b": ("", [], VECTORS.to(torch.bfloat16))})
    assert store.available_variants() == ["biography"]
    assert store.list_personas(["biography"]) == ["a", "b"]
    assert store.persona_names(["b", "a"], ["biography"]) == {"a": "Ann"}
    assert store.persona_sample_ids("biography", "a") == ["x"]
    assert store.list_layers(["biography"]) == [0, 1]
    assert store.load("biography", "a").equal(VECTORS)
    assert store.load("biography", "b").dtype is torch.float32
    assert store.provenance("biography", "a") is None
    assert store.stored_digest("biography", "a") is None
    assert store.status("biography", "a", PROVENANCE).state == "differs"
    seen = describe(folder / "a.safetensors")
    assert (seen.persona_id, seen.persona_name, seen.sample_ids, seen.checksum_ok) == ("a", "Ann", ("x",), None)


def test_saving_into_another_librarys_folder_keeps_what_it_knows(store: PersonaVectorStore) -> None:
    folder = store.root_dir / "org__tiny" / "answer_mean" / "templated"
    write_as_the_reference_does(folder, {"a": ("Ann", ["x"], VECTORS)})
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"num_layers"', '"made_by": "them", "num_layers"'))
    save(store, "p1")
    assert read_as_the_reference_does(folder)["a"][:2] == ("Ann", ["x"])
    assert json.loads((folder / "manifest.json").read_text())["made_by"] == "them"
    os.utime(folder / "a.safetensors", ns=(1, 1))  # as copying the folder does
    save(store, "p2")
    assert store.persona_names(["a"], ["templated"]) == {"a": "Ann"}


# Finding


def test_personas_are_those_of_every_requested_variant(store: PersonaVectorStore) -> None:
    for persona_id in ("b", "a", "baseline_assistant"):
        save(store, persona_id, "templated")
    save(store, "b", "biography", persona_name="Beatrix")
    save(store, "baseline_assistant", "biography")
    with pytest.warns(UserWarning, match=r"1 persona\(s\)"):
        assert store.list_personas() == ["b"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.list_personas(warn_missing=False, include_baseline=True) == ["b", "baseline_assistant"]
        assert store.list_personas(("templated",)) == ["a", "b"]
        assert store.list_personas(["templated", "absent"]) == []
        assert store.list_personas([]) == []


def test_names_follow_the_asked_order_and_the_first_variant(store: PersonaVectorStore) -> None:
    save(store, "a", "templated", persona_name="")
    save(store, "b", "templated", persona_name="Bo")
    save(store, "a", "biography", persona_name="Ann")
    save(store, "b", "biography", persona_name="Beatrix")
    assert list(store.persona_names(["b", "nobody", "a"]).items()) == [("b", "Bo"), ("a", "Ann")]
    assert store.persona_names(["b"], ["templated", "absent"]) == {}


def test_layers_are_those_all_variants_share(store: PersonaVectorStore) -> None:
    save(store, "a", "templated")
    save(store, "a", "biography", vectors=torch.ones(5, 3), provenance=None)
    assert store.list_layers(["biography"]) == [0, 1, 2, 3, 4]
    assert store.list_layers(["templated", "biography"], ["a"]) == [0, 1]
    assert store.list_layers(["templated"], ["a", "nobody"]) == []
    assert store.list_layers(["templated", "absent"]) == []


def test_a_strategy_may_be_given_to_the_store_or_to_the_call(store: PersonaVectorStore, tmp_path: Path) -> None:
    save(store, "a", mask_strategy="answer_last")
    last = PersonaVectorStore(MODEL, tmp_path / "root", "answer_last")
    assert last.list_personas(["templated"]) == ["a"]
    assert store.list_personas(["templated"]) == []
    assert store.list_personas(["templated"], mask_strategy="answer_last") == ["a"]
    assert PersonaVectorStore(MODEL, tmp_path / "root", None).path_of("v", "a").parts[-3] == "answer_mean"


def test_every_call_looks_where_its_own_strategy_says(store: PersonaVectorStore) -> None:
    last = msgspec.structs.replace(
        PROVENANCE, strategy="answer_last", hook_names=PROVENANCE.hook_names[:1], sample_ids=("q9",)
    )
    save(store, "a")
    save(store, "a", "biography")
    for persona_id in ("a", "b"):
        save(
            store,
            persona_id,
            mask_strategy="answer_last",
            persona_name="Bo",
            vectors=-VECTORS[:1],
            sample_ids=["q9"],
            provenance=last,
        )
    assert store.load("templated", "a", "answer_last").equal(-VECTORS[:1])
    assert store.persona_names(["a"], ["templated"], "answer_last") == {"a": "Bo"}
    assert store.persona_sample_ids("templated", "a", "answer_last") == ["q9"]
    assert store.list_layers(["templated"], mask_strategy="answer_last") == [0]
    assert store.available_variants(mask_strategy="answer_last") == ["templated"]
    assert store.provenance("templated", "a", "answer_last") == last
    assert store.stored_digest("templated", "a", "answer_last") == last.digest()
    assert store.status("templated", "a", last, "answer_last").state == "same"
    assert store.rebuild_manifest("templated", "answer_last") == ["a", "b"]
    assert store.rebuild_manifest("templated") == ["a"]


def test_the_variants_in_use_are_those_that_were_asked_for(store: PersonaVectorStore) -> None:
    save(store, "a", "templated")
    save(store, "a", "biography")
    save(store, "a", "own")
    assert store.available_variants() == ["templated", "biography"]
    assert store.available_variants(["own", "absent", "biography"]) == ["own", "biography"]


def test_a_missing_vector_is_a_missing_file(store: PersonaVectorStore) -> None:
    for ask in (store.load, store.provenance):
        with pytest.raises(FileNotFoundError, match="nobody"):
            ask("templated", "nobody")
    with pytest.raises(NotStoredError):
        describe(store.root_dir / "nobody.safetensors")
    assert store.persona_sample_ids("templated", "nobody") is None
    assert store.stored_digest("templated", "nobody") is None


def test_describe_tells_norms_in_float64_and_provenance(store: PersonaVectorStore) -> None:
    save(store)
    seen = describe(str(store.path_of("templated", "p1")))
    assert (seen.persona_id, seen.persona_name, seen.shape, seen.dtype) == ("p1", "Ada", (2, 3), "F32")
    assert seen.layer_norms == (3.0, 5.0)
    assert seen.provenance == PROVENANCE
    assert seen.checksum_ok is True


# Is it still the right one?


def test_status_says_absent_same_differs_or_corrupt(store: PersonaVectorStore) -> None:
    absent = store.status("templated", "p1", PROVENANCE)
    assert (absent.state, absent.reasons) == ("absent", ())
    save(store)
    assert store.status("templated", "p1", PROVENANCE).state == "same"
    elsewhere = msgspec.structs.replace(PROVENANCE, notes={"backend": "remote"})
    assert store.status("templated", "p1", elsewhere).state == "same"
    changed = store.status("templated", "p1", msgspec.structs.replace(PROVENANCE, dtype="bfloat16", revision="def"))
    assert changed.state == "differs"
    assert changed.reasons == ("revision: 'abc' is now 'def'", "dtype: 'float32' is now 'bfloat16'")
    save(store, provenance=None)
    unknown = store.status("templated", "p1", PROVENANCE)
    assert (unknown.state, unknown.reasons) == ("differs", ("the file does not record what it was computed from",))
    store.path_of("templated", "p1").write_bytes(b"\0" * 30)
    damaged = store.status("templated", "p1", PROVENANCE)
    assert damaged.state == "corrupt"
    assert "p1.safetensors" in damaged.reasons[0]


def test_a_digest_is_read_without_the_tensor_and_status_reads_it(store: PersonaVectorStore) -> None:
    save(store)
    path = store.path_of("templated", "p1")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert store.stored_digest("templated", "p1") == PROVENANCE.digest()
    assert store.status("templated", "p1", PROVENANCE).state == "corrupt"
    assert describe(path).checksum_ok is False


# Refusals


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_refused_naming_the_layer(store: PersonaVectorStore, bad: float) -> None:
    vectors = VECTORS.clone()
    vectors[1, 2] = bad
    with pytest.raises(NonFiniteError, match=r"'p1': layer 1 \(blocks.1.hook_resid_post\)"):
        save(store, vectors=vectors)
    assert not store.root_dir.exists()


def test_numbers_beyond_float32_are_refused(store: PersonaVectorStore) -> None:
    with pytest.raises(NonFiniteError, match="layer 0 and 1 more"):
        save(store, vectors=torch.full((2, 3), 1e39, dtype=torch.float64), provenance=None)


@pytest.mark.parametrize(
    "vectors", [torch.ones(3), torch.ones(1, 2, 3), torch.ones(2, 3, dtype=torch.int64), torch.ones(0, 3)]
)
def test_only_floating_matrices_are_vectors(store: PersonaVectorStore, vectors: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"'p1'.*\(layer, d_model\)"):
        save(store, vectors=vectors, provenance=None)


def test_provenance_must_be_that_of_the_vectors(store: PersonaVectorStore) -> None:
    with pytest.raises(InputError, match="2 hooks for vectors of 3 layers"):
        save(store, vectors=torch.ones(3, 3))
    with pytest.raises(InputError, match="sample_ids"):
        save(store, sample_ids=["q2", "q1"])
    with pytest.raises(InputError, match="provenance cannot be written"):
        save(store, provenance=msgspec.structs.replace(PROVENANCE, notes={"model": object()}))


def test_texts_must_be_text(store: PersonaVectorStore) -> None:
    with pytest.raises(InputError, match="lone surrogate"):
        save(store, persona_name="\ud800")
    with pytest.raises(InputError, match="not a list of ids"):
        save(store, sample_ids="q1", provenance=None)


BAD_NAMES = ["", ".", "..", "../x", "a/b", "/etc", "a\\b", "nul\0", "tab\t", ".hidden", "x" * 201, "é" * 101]
BAD_NAMES += ["manifest", "Manifest", "\ud800", "\x85"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_leave_the_folder_or_the_system_are_refused(tmp_path: Path, name: str) -> None:
    store = PersonaVectorStore(MODEL, tmp_path / "root")
    for call in (
        lambda: save(store, name),
        lambda: save(store, "p", name),
        lambda: save(store, "p", mask_strategy=name),
        lambda: store.load("templated", name),
        lambda: store.list_personas([name]),
        lambda: PersonaVectorStore(MODEL, tmp_path, name),
    ):
        with pytest.raises(InputError, match="Choose a plain name"):
            call()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["", "/abs/model", "../up", "org/../up", "a\\b", "a\n", "org/", "a//b", "a/" + "b" * 200]
)
def test_model_names_that_leave_the_root_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="model name"):
        PersonaVectorStore(name, tmp_path)


def test_the_name_that_is_refused_is_called_what_it_stands_for(store: PersonaVectorStore) -> None:
    for kind, names in (
        ("persona id", ("templated", "a/b")),
        ("prompt variant", ("a/b", "p1")),
        ("mask strategy", ("templated", "p1", "a/b")),
    ):
        with pytest.raises(InputError, match=f"{kind} 'a/b' cannot name a file"):
            store.path_of(*names)


def test_a_strategy_of_another_librarys_enumeration_is_known_by_its_value(store: PersonaVectorStore) -> None:
    theirs = enum.Enum("MaskStrategy", {"ANSWER_LAST": "answer_last"})
    assert store.path_of("templated", "p1", theirs["ANSWER_LAST"]) == store.path_of("templated", "p1", "answer_last")


def test_unusual_but_harmless_names_are_kept(store: PersonaVectorStore) -> None:
    for persona_id in ("x" * 200, "a.b", "Ünï 🦉", "a b", "-rf", "a:b", "manifest2"):
        save(store, persona_id)
        assert store.load("templated", persona_id).equal(VECTORS)
    assert len(store.list_personas(["templated"])) == 7


def test_on_windows_names_that_are_drives_devices_or_other_names_there_are_refused(
    store: PersonaVectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tl_persona.store.folder._ON_WINDOWS", True)
    for name in (
        "C:",
        "D:evil",
        "a:b",
        "NUL",
        "nul.x",
        "Con",
        "com1",
        "LPT9.tar.gz",
        "AUX .x",
        "p1.",
        "p1 ",
        "a?b",
        "a*",
    ):
        with pytest.raises(InputError, match="Windows"):
            store.path_of("templated", name)
        with pytest.raises(InputError, match="Windows"):
            PersonaVectorStore(f"org/{name}", store.root_dir)
    for name in ("console", "a.b", "nul-1", "com10", "-rf"):
        assert store.path_of("templated", name).name == f"{name}.safetensors"


@pytest.mark.parametrize("shape", [(3, 3), (2, 4)])
def test_a_folder_has_one_shape(store: PersonaVectorStore, shape: tuple[int, int]) -> None:
    save(store)
    with pytest.raises(StoreMismatchError, match=rf"\(2, 3\).*\({shape[0]}, {shape[1]}\)"):
        save(store, "p2", vectors=torch.ones(shape), provenance=None)
    assert store.list_personas(["templated"]) == ["p1"]
    save(store, "p2", "biography", vectors=torch.ones(shape), provenance=None)


def test_a_manifest_of_another_shape_is_a_mismatch_though_no_file_is_left(store: PersonaVectorStore) -> None:
    folder = store.root_dir / "org__tiny" / "answer_mean" / "templated"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"num_layers": 9, "hidden_size": 3, "personas": {}}')
    with pytest.raises(StoreMismatchError, match=r"\(9, 3\).*\(2, 3\)"):
        save(store)


def test_files_tell_their_shape_when_the_manifest_is_gone(store: PersonaVectorStore) -> None:
    (save(store) / "manifest.json").unlink()
    with pytest.raises(StoreMismatchError, match=r"\(2, 3\).*\(4, 3\)"):
        save(store, "p2", vectors=torch.ones(4, 3), provenance=None)
    assert not store.path_of("templated", "p2").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("hook_names", ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre")), ("weights", "fold_ln")],
)
def test_a_folder_has_one_kind_of_vector(store: PersonaVectorStore, field: str, value: object) -> None:
    save(store)
    with pytest.raises(StoreMismatchError, match=field):
        save(store, "p2", provenance=msgspec.structs.replace(PROVENANCE, **{field: value}))


def test_symbolic_links_out_of_the_store_are_not_written_through(store: PersonaVectorStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "p1.safetensors").write_bytes(b"precious")
    folder = save(store, "p2")
    (folder / "p1.safetensors").symlink_to(outside / "p1.safetensors")
    (folder.parent / "biography").symlink_to(outside, target_is_directory=True)
    (folder.parent / "circle").symlink_to(folder.parent / "circle")
    for variant in ("templated", "biography"):
        with pytest.raises(StoreError, match="outside"):
            save(store, "p1", variant)
    with pytest.raises(StoreError, match="circle"):
        save(store, "p1", "circle")
    assert os.listdir(outside) == ["p1.safetensors"]
    assert (outside / "p1.safetensors").read_bytes() == b"precious"


@pytest.mark.filterwarnings("ignore:left out")
def test_links_within_the_store_are_read_and_others_left_out(store: PersonaVectorStore, tmp_path: Path) -> None:
    folder = save(store)
    inside = save(store, "p2", "biography") / "p2.safetensors"
    outside = save(PersonaVectorStore(MODEL, tmp_path / "elsewhere"), "p3") / "p3.safetensors"
    (folder / "p2.safetensors").symlink_to(inside)
    (folder / "p3.safetensors").symlink_to(outside)
    (folder / "p4.safetensors").symlink_to(folder / "p4.safetensors")
    with pytest.warns(UserWarning, match=r"left out: .*p3\.safetensors is a symbolic link to .*elsewhere"):
        assert store.list_personas(["templated"]) == ["p1", "p2"]
    with pytest.warns(UserWarning, match="left out"):
        assert store.rebuild_manifest("templated") == ["p1", "p2"]
    with pytest.raises(StoreError, match="outside"):
        store.load("templated", "p3")


def test_a_root_that_is_a_link_is_the_users_choice(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "disk", target_is_directory=True)
    save(PersonaVectorStore(MODEL, tmp_path / "root"))
    assert PersonaVectorStore(MODEL, tmp_path / "disk").load("templated", "p1").equal(VECTORS)


def test_ids_that_a_file_system_may_take_for_one_another_are_not_overwritten(store: PersonaVectorStore) -> None:
    save(store, "Ada")
    # What a case-insensitive file system shows under the second name.
    store.path_of("templated", "Ada").rename(store.path_of("templated", "ada"))
    with pytest.raises(StoreMismatchError, match="'Ada'"):
        save(store, "ada")


# The index


def count_rewrites(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    rewritten: list[Path] = []
    rewrite = manifest.rewrite

    def counted(folder: Path, **options: Any) -> manifest.Index:
        rewritten.append(folder)
        return rewrite(folder, **options)

    monkeypatch.setattr(manifest, "rewrite", counted)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # What is counted here is work, not waiting for the disk.
    return rewritten


def test_the_manifest_is_rewritten_ever_more_rarely(store: PersonaVectorStore, monkeypatch: pytest.MonkeyPatch) -> None:
    rewritten = count_rewrites(monkeypatch)
    ids = ["s" * 100] * 40  # An entry of 4 KB: 16 of them are small (64 KiB).
    counts = []
    for number in range(256):
        save(store, f"p{number:03d}", sample_ids=ids, provenance=None)
        if number + 1 in (16, 32, 64, 128, 256):
            counts.append(len(rewritten))
    assert counts[0] == 16
    # From 16 on each rewriting stands for growth by an eighth, so a doubling takes log(2) / log(9/8) = 5.9 of them.
    assert all(later - earlier <= 6 for earlier, later in itertools.pairwise(counts))
    assert counts[-1] > counts[-2]

    folder = store.path_of("templated", "p000").parent
    assert len(read_as_the_reference_does(folder)) < 256
    assert len(PersonaVectorStore(MODEL, store.root_dir).list_personas(["templated"])) == 256
    with store:
        pass
    assert read_as_the_reference_does(folder).keys() == {f"p{number:03d}" for number in range(256)}
    assert not (folder / "manifest.pending").exists()
    before = len(rewritten)
    store.flush()
    assert len(rewritten) == before


def test_pending_entries_are_counted_across_store_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewritten = count_rewrites(monkeypatch)
    for number in range(64):
        store = PersonaVectorStore(MODEL, tmp_path)
        save(store, f"p{number}", sample_ids=["s" * 100] * 40, provenance=None)
    assert 16 < len(rewritten) <= 16 + 12


def test_pending_entries_are_newer_than_the_manifest_and_spare_the_headers(
    store: PersonaVectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(store, "p1", persona_name="Ada")
    monkeypatch.setattr(manifest, "SMALL", 0)
    monkeypatch.setattr(manifest, "PENDING_SHARE", 0)
    save(store, "p1", persona_name="Beatrix")
    save(store, "p2", persona_name="Cleo")
    assert len((folder / "manifest.pending").read_text().splitlines()) == 2

    def unwanted(path: Path, persona_id: str | None = None) -> None:
        raise AssertionError(f"{path} is indexed, and was read all the same")

    monkeypatch.setattr(manifest, "read_header", unwanted)
    assert store.persona_names(["p1", "p2"], ["templated"]) == {"p1": "Beatrix", "p2": "Cleo"}


def test_rebuilding_a_manifest_reads_every_file_though_nothing_seems_to_have_changed(
    store: PersonaVectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store:
        save(store, "p1")
        save(store, "p2")
    read: list[str] = []
    real = read_header
    monkeypatch.setattr(manifest, "read_header", lambda path, *more: read.append(path.stem) or real(path, *more))
    assert store.list_personas(["templated"]) == ["p1", "p2"] and read == []
    assert store.rebuild_manifest("templated") == ["p1", "p2"] and sorted(read) == ["p1", "p2"]


def test_a_rebuilt_manifest_says_what_the_files_say(store: PersonaVectorStore) -> None:
    save(store, "p2")
    folder = save(store, "p1")
    right = (folder / "manifest.json").read_bytes()
    wrong = right.replace(b'"Ada"', b'"Eve"').replace(b'"num_layers": 2', b'"num_layers": 7')
    (folder / "manifest.json").write_bytes(wrong)
    with pytest.warns(UserWarning, match=r"\(7, 3\)"):
        assert store.rebuild_manifest("templated") == ["p1", "p2"]
    assert (folder / "manifest.json").read_bytes() == right
    with pytest.raises(NotStoredError):
        store.rebuild_manifest("absent")
