"""GGUF control vectors as files: what is written, what comes back, what is refused. In llama.cpp: test_llama_cpp."""

import os
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_persona.cli.main import main
from tl_persona.errors import (
    CorruptFileError,
    InputError,
    MissingDependencyError,
    NonFiniteError,
    NotStoredError,
    StoreError,
)
from tl_persona.provenance import Provenance
from tl_persona.vectors import SteeringVector, SteeringVectorSet

PROVENANCE = Provenance(
    model_name="org/tiny",
    revision="abc",
    dtype="float32",
    weights="unprocessed",
    hook_names=("blocks.3.hook_resid_post",),
    strategy="last",
    prompts_digest="d",
    sample_ids=("0", "1"),
)


def a_vector(layer: int, values: Any = (3.0, -4.0), **rest: Any) -> SteeringVector:
    return SteeringVector("calm", layer, torch.tensor(values), "org/tiny", **rest)


def a_set(*layers: int) -> SteeringVectorSet:
    return SteeringVectorSet("calm", [a_vector(layer, (float(layer), -1.5)) for layer in layers])


def write_gguf(path: Path, tensors: dict[str, np.ndarray], architecture: str = "controlvector", **texts: str) -> Path:
    """A control vector as another program writes it, without keys of ours."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, text in texts.items():
        writer.add_string(key.replace("__", "."), text)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_file_has_what_llama_cpp_and_repeng_look_for(tmp_path: Path) -> None:
    written = a_set(7, 2).export_gguf(tmp_path / "new" / "calm")
    assert written == tmp_path / "new" / "calm.gguf"
    assert os.listdir(tmp_path / "new") == ["calm.gguf"]
    reader = gguf.GGUFReader(written)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "org/tiny"
    assert reader.get_field("controlvector.layer_count").contents() == 2
    kinds = {tensor.name: (tensor.tensor_type, tensor.data.tolist()) for tensor in reader.tensors}
    f32 = gguf.GGMLQuantizationType.F32
    assert kinds == {"direction.2": (f32, [2.0, -1.5]), "direction.7": (f32, [7.0, -1.5])}


def test_layers_and_the_hint_are_the_callers_choice(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(a_set(0, 2, 7).export_gguf(tmp_path / "v.gguf", layers=[7], model_hint="llama"))
    assert [tensor.name for tensor in reader.tensors] == ["direction.7"]
    assert reader.get_field("controlvector.model_hint").contents() == "llama"


def test_the_same_set_makes_the_same_bytes(tmp_path: Path) -> None:
    one, other = (a_set(*layers).export_gguf(tmp_path / f"{layers}") for layers in ((2, 7), (7, 2)))
    assert one.read_bytes() == other.read_bytes()


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(st.integers(1, 99), st.lists(st.floats(-6e4, 6e4, width=16), min_size=3, max_size=3), min_size=1),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    st.text(max_size=4),
)
def test_what_is_exported_comes_back_as_it_was_in_float32(
    directions: dict[int, list[float]], dtype: torch.dtype, behavior: str
) -> None:
    metadata = {"num_pairs": 2, "statistics": {"auc": 0.9}, "note": 'é\n"'}
    vectors = SteeringVectorSet(
        behavior,
        [
            SteeringVector(behavior, layer, torch.tensor(values, dtype=dtype), "org/tiny", "pca", metadata)
            for layer, values in directions.items()
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        found = SteeringVectorSet.import_gguf(vectors.export_gguf(Path(folder, "v.gguf")))
    assert (found.behavior, found.layers) == (behavior, sorted(directions))
    for vector in found:
        original = vectors[vector.layer_index]
        assert vector.vector.dtype == torch.float32
        assert torch.equal(vector.vector.double(), original.vector.double())
        assert (vector.model_name, vector.extraction_method, vector.metadata) == ("org/tiny", "pca", metadata)


def test_provenance_comes_back(tmp_path: Path) -> None:
    vectors = SteeringVectorSet("calm", [a_vector(3, provenance=PROVENANCE)])
    assert SteeringVectorSet.import_gguf(vectors.export_gguf(tmp_path / "v"))[3].provenance == PROVENANCE


def test_a_vector_of_block_0_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"at blocks\.0\.hook_resid_post: a GGUF control vector has no direction 0"):
        a_set(0, 1).export_gguf(tmp_path / "v")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "mlp_out"])
def test_what_is_no_output_of_a_block_is_refused(tmp_path: Path, site: str) -> None:
    vectors = SteeringVectorSet("calm", [a_vector(3, hook_name=f"blocks.3.hook_{site}")])
    with pytest.raises(InputError, match=rf"hook_{site} has no counterpart in llama.cpp.*blocks\.3\.hook_resid_post"):
        vectors.export_gguf(tmp_path / "v")


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the set is empty"):
        SteeringVectorSet("calm").export_gguf(tmp_path / "v")
    with pytest.raises(InputError, match=r"no vector for layers \[5\] of 'calm'; there are \[2\]"):
        a_set(2).export_gguf(tmp_path / "v", layers=[5])
    large = SteeringVector("calm", 2, torch.tensor([1e39], dtype=torch.float64), "org/tiny")
    with pytest.raises(NonFiniteError, match="overflows float32"):
        SteeringVectorSet("calm", [large]).export_gguf(tmp_path / "v")
    assert os.listdir(tmp_path) == []


def test_a_file_of_another_program_comes_in_under_the_names_given(tmp_path: Path) -> None:
    directions = {f"direction.{layer}": np.array([layer, 0.5], dtype=np.float32) for layer in (11, 3)}
    path = write_gguf(tmp_path / "happy.gguf", directions, controlvector__model_hint="llama")
    found = SteeringVectorSet.import_gguf(path)
    assert (found.behavior, found.model_name, found.layers) == ("happy", "llama", [3, 11])
    assert found[11].vector.tolist() == [11.0, 0.5]
    assert (found[3].extraction_method, found[3].hook_name) == ("gguf", "blocks.3.hook_resid_post")
    named = SteeringVectorSet.import_gguf(path, behavior="joy", model_name="org/tiny")
    assert (named.behavior, named.model_name) == ("joy", "org/tiny")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"direction.0": np.ones(2, np.float32)}, "'direction.0' is no direction of a block from 1 on"),
        ({"direction.-1": np.ones(2, np.float32)}, "is no direction"),
        ({"direction.01": np.ones(2, np.float32)}, "is no direction"),
        ({"blk.1.weight": np.ones(2, np.float32)}, "is no direction"),
        ({"direction.1": np.ones(2, np.float16)}, "direction.1 is not F32"),
        ({"direction.1": np.ones((2, 2), np.float32)}, r"direction.1 is of shape \(2, 2\)"),
        ({"direction.1": np.array([np.nan, 1], np.float32)}, "NaN"),
        ({"direction.1": np.ones(2, np.float32), "direction.2": np.ones(3, np.float32)}, "width"),
        ({}, "holds no direction"),
    ],
)
def test_what_llama_cpp_would_not_take_is_refused(tmp_path: Path, tensors: dict[str, np.ndarray], message: str) -> None:
    path = write_gguf(tmp_path / "v.gguf", tensors)
    with pytest.raises(CorruptFileError, match=message) as caught:
        SteeringVectorSet.import_gguf(path)
    assert str(path) in str(caught.value)


def test_a_model_is_not_taken_for_a_control_vector(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "v.gguf", {"direction.1": np.ones(2, np.float32)}, architecture="llama")
    with pytest.raises(CorruptFileError, match="its architecture is 'llama', not 'controlvector'"):
        SteeringVectorSet.import_gguf(path)


def test_every_truncation_and_every_altered_direction_is_noticed(tmp_path: Path) -> None:
    path = a_set(2, 7).export_gguf(tmp_path / "v")
    whole = path.read_bytes()
    place = whole.index(np.array([7.0, -1.5], dtype="<f4").tobytes())
    for length in (*range(0, place, 7), place, place + 7):  # behind the last number there is only padding
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptFileError):
            SteeringVectorSet.import_gguf(path)
    path.write_bytes(whole[:place] + b"\x01" + whole[place + 1 :])
    with pytest.raises(CorruptFileError, match="do not fit their checksum: the file was altered"):
        SteeringVectorSet.import_gguf(path)


def test_every_altered_byte_is_noticed_or_harmless(tmp_path: Path) -> None:
    vectors = SteeringVectorSet("calm", [a_vector(2, metadata={"num_pairs": 2}, provenance=PROVENANCE)])
    path = vectors.export_gguf(tmp_path / "v")
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        try:
            found = SteeringVectorSet.import_gguf(path)
        except StoreError:
            continue
        assert found.layers == [2], f"byte {place}"
        for name in ("behavior", "model_name", "extraction_method", "metadata", "provenance"):
            assert getattr(found[2], name) == getattr(vectors[2], name), f"byte {place}: {name}"
        assert torch.equal(found[2].vector, vectors[2].vector), f"byte {place}"


def test_a_file_of_a_later_version_asks_for_an_upgrade(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "v.gguf", {"direction.1": np.ones(2, np.float32)}, tl_persona__format_version="2")
    with pytest.raises(StoreError, match="format version '2', this package reads '1': upgrade"):
        SteeringVectorSet.import_gguf(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotStoredError, match=r"none\.gguf: there is no such file"):
        SteeringVectorSet.import_gguf(tmp_path / "none.gguf")


def test_what_cannot_be_opened_as_a_file_is_our_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / f"{'x' * 300}.gguf"):
        with pytest.raises(StoreError, match=r"cannot read .*(directory|too long)"):
            SteeringVectorSet.import_gguf(path)
    closed = a_set(1).export_gguf(tmp_path / "v")
    with pytest.raises(NotStoredError, match="there is no such file"):
        SteeringVectorSet.import_gguf(closed / "v.gguf")


def test_without_gguf_files_are_read_and_writing_one_names_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = a_set(1).export_gguf(tmp_path / "v")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert SteeringVectorSet.import_gguf(path)[1].vector.tolist() == [1.0, -1.5]
    with pytest.raises(MissingDependencyError, match=r'pip install "tl-persona\[gguf\]"'):
        a_set(1).export_gguf(tmp_path / "w")


def test_numbers_and_lists_of_numbers_among_the_metadata_are_passed_over(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.floats", [0.5, 1.5])
    writer.add_float64("a.float", 0.25)
    writer.add_bool("a.flag", True)
    writer.add_custom_alignment(64)
    writer.add_array("a.texts", ["one", "two"])
    writer.add_tensor("direction.3", np.array([1.0, 2.0], np.float32))
    writer.add_tensor("direction.5", np.array([3.0, 4.0], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = SteeringVectorSet.import_gguf(tmp_path / "v.gguf")
    assert {vector.layer_index: vector.vector.tolist() for vector in found} == {3: [1.0, 2.0], 5: [3.0, 4.0]}


@pytest.mark.parametrize(
    "claim",
    [
        struct.pack("<QQ", 1 << 60, 0),  # tensors
        struct.pack("<QQ", 0, 1 << 60),  # keys
        struct.pack("<QQQ", 0, 1, 1 << 60),  # the length of a key
        struct.pack("<QQQ1sIQ", 0, 1, 1, b"k", 8, 1 << 60),  # the length of a text
        struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 8, 1 << 60),  # a list of texts
        struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 0, 1 << 60),  # a list of bytes
        struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 9, 1),  # a list of lists
        struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 1 << 60, 0, 0),  # a tensor's length
        struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 2, 0, 1 << 60),  # where a tensor lies
        struct.pack("<QQ", 9, 0)  # nine tensors of the same bytes
        + b"".join(struct.pack("<Q1sIQIQ", 1, bytes([65 + i]), 1, 16, 0, 0) for i in range(9))
        + bytes(128),
    ],
)
def test_claims_beyond_the_file_are_refused_at_once(tmp_path: Path, claim: bytes) -> None:
    (tmp_path / "v.gguf").write_bytes(b"GGUF" + struct.pack("<I", 3) + claim)
    with pytest.raises(CorruptFileError, match="not a whole GGUF file"):
        SteeringVectorSet.import_gguf(tmp_path / "v.gguf")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_control_vector_or_an_error_of_ours(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "v.gguf").write_bytes(b"GGUF" + struct.pack("<I", 3) + data)
        with pytest.raises(StoreError):
            SteeringVectorSet.import_gguf(Path(folder, "v.gguf"))


# --- the command line ----------------------------------------------------------------------------------------------


def test_the_command_writes_the_chosen_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_set(0, 1, 2, 7).save(tmp_path / "set")
    file = tmp_path / "calm.gguf"
    assert main(["export", str(tmp_path / "set"), "-o", str(file), "--layers", "1:3", "7"]) == 0
    assert "calm, gguf, layers 1, 2, 7" in capsys.readouterr().out
    assert SteeringVectorSet.import_gguf(file).layers == [1, 2, 7]


def test_the_command_takes_the_best_layer_and_reads_gguf_files(tmp_path: Path) -> None:
    by_layer = {2: 0.7, 5: 0.9}
    vectors = [a_vector(layer, metadata={"statistics": {"auc": auc}}) for layer, auc in by_layer.items()]
    SteeringVectorSet("calm", vectors).save(tmp_path / "set")
    file = tmp_path / "calm.gguf"
    assert main(["export", str(tmp_path / "set"), "-o", str(file), "--layers", "best", "--model-hint", "llama"]) == 0
    assert gguf.GGUFReader(file).get_field("controlvector.model_hint").contents() == "llama"
    for name in ("tl_persona", "rotalabs"):
        assert main(["export", str(file), "-o", str(tmp_path / name), "--format", name]) == 0
        back = SteeringVectorSet.load(tmp_path / name)
        assert (back.behavior, back.layers, back[5].vector.tolist()) == ("calm", [5], [3.0, -4.0])
        assert back[5].metadata == {"statistics": {"auc": 0.9}}


def test_the_command_exports_a_single_vector(tmp_path: Path) -> None:
    path = a_vector(3).save(tmp_path / "v")
    assert main(["export", str(path), "-o", str(tmp_path / "v.gguf")]) == 0
    assert SteeringVectorSet.import_gguf(tmp_path / "v.gguf").layers == [3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "out"], "--output out does not tell the format: name a .gguf file, or pass --format"),
        (["-o", "out.gguf"], "has no direction 0"),
        (["-o", "out.gguf", "--layers", "9"], "9"),
    ],
)
def test_what_the_command_cannot_do_exits_with_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    a_set(0, 1).save("set")
    assert main(["export", "set", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(os.listdir()) == ["set"]
