"""Steering vectors: arithmetic and its refusals, choosing a layer, files of ours and of rotalabs-steer."""

import hashlib
import itertools
import json
import math
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tl_persona.errors import (
    CorruptFileError,
    InputError,
    MissingDependencyError,
    NonFiniteError,
    NotStoredError,
    StoreError,
)
from tl_persona.files import read_bytes
from tl_persona.provenance import Provenance
from tl_persona.vectors import SteeringVector, SteeringVectorSet, set_files
from tl_persona.vectors.rotalabs import read_rotalabs
from tl_persona.vectors.table import facts_of
from tl_persona.vectors.vector import as_fields

PROVENANCE = Provenance(
    model_name="tiny",
    revision="abc",
    dtype="float32",
    weights="unprocessed",
    hook_names=("blocks.3.hook_resid_post",),
    strategy="last",
    prompts_digest="d",
    sample_ids=("0", "1"),
    notes={"torch": "2", "nested": [1, None]},
)

components = st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=8).map(torch.tensor)
nonzero = components.filter(lambda vector: bool(vector.norm() > 1e-3))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text('aé\n"'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc"), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def any_vector(draw: st.DrawFn) -> SteeringVector:
    layer = draw(st.integers(0, 99))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    return SteeringVector(
        draw(st.text(max_size=5)),
        layer,
        draw(components).to(dtype),
        draw(st.text(max_size=5)),
        draw(st.sampled_from(["caa", "pca"])),
        draw(st.dictionaries(st.text("abc"), json_values, max_size=3)),
        hook_name=draw(st.sampled_from([None, f"blocks.{layer}.hook_resid_mid", "hook_embed"])),
        provenance=draw(st.sampled_from([None, PROVENANCE])),
    )


def a_vector(layer: int = 3, values: Any = (3.0, 4.0), model: str = "tiny", **rest: Any) -> SteeringVector:
    return SteeringVector("calm", layer, torch.tensor(values), model, **rest)


def with_statistics(layer: int, **statistics: Any) -> SteeringVector:
    return a_vector(layer, (float(layer + 1), 0.0), metadata={"num_pairs": 8, "statistics": statistics})


def a_set(*layers: int) -> SteeringVectorSet:
    return SteeringVectorSet("calm", [a_vector(layer, (float(layer), 1.0)) for layer in layers])


def write_rotalabs(stem: Path, tensor: Any, **changes: Any) -> None:
    """A vector as rotalabs-steer saves it: a JSON file, and the tensor pickled by torch."""
    data = {
        "behavior": "calm",
        "layer_index": 3,
        "model_name": "org/model",
        "extraction_method": "caa",
        "metadata": {"num_pairs": 2, "created_at": "2025-01-01T00:00:00"},
        "vector_shape": [2],
    }
    stem.with_suffix(".json").write_text(json.dumps({**data, **changes}))
    torch.save(tensor, stem.with_suffix(".pt"))


def made(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path


def assert_same(found: SteeringVector, expected: SteeringVector) -> None:
    names = ("behavior", "layer_index", "model_name", "extraction_method", "metadata", "hook_name", "provenance")
    for name in names:
        assert getattr(found, name) == getattr(expected, name), name
    assert found.vector.dtype == expected.vector.dtype
    assert torch.equal(found.vector, expected.vector)


def test_the_positional_order_and_the_defaults_are_the_references() -> None:
    vector = SteeringVector("calm", 7, torch.tensor([3.0, 4.0]), "tiny", "pca", {"num_pairs": 2})
    assert (vector.behavior, vector.layer_index, vector.model_name) == ("calm", 7, "tiny")
    assert (vector.extraction_method, vector.metadata) == ("pca", {"num_pairs": 2})
    assert (vector.norm, vector.dim, vector.hook_name) == (5.0, 2, "blocks.7.hook_resid_post")
    assert (a_vector().extraction_method, a_vector().metadata, a_vector().provenance) == ("caa", {}, None)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(2, 2), r"got torch.float32 of shape \(2, 2\); it must be one non-empty, 1-D floating-point tensor"),
        (torch.ones(2, dtype=torch.int64), "got torch.int64"),
        ([1.0, 2.0], "got list"),
        (torch.ones(0), r"of shape \(0,\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_vector_is_refused(tensor: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SteeringVector("calm", 3, tensor, "tiny")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_vector_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(NonFiniteError, match="layer 3: the vector holds NaN or infinity"):
        a_vector(values=(1.0, bad))


@pytest.mark.parametrize("layer", [-1, True, 1.0])
@pytest.mark.usefixtures("unchecked")
def test_a_layer_that_is_no_index_is_refused(layer: Any) -> None:
    with pytest.raises(InputError, match="the layer must be an int from 0"):
        SteeringVector("calm", layer, torch.ones(2), "tiny")


def test_a_hook_of_another_block_is_refused() -> None:
    with pytest.raises(InputError, match=r"layer 3: its hook 'blocks.4.hook_resid_pre' sits in block 4"):
        a_vector(3, hook_name="blocks.4.hook_resid_pre")
    assert a_vector(3, hook_name="blocks.3.hook_resid_pre").hook_name == "blocks.3.hook_resid_pre"


@settings(deadline=None)
@given(nonzero)
def test_normalize_has_norm_1_and_keeps_the_direction(tensor: Tensor) -> None:
    vector = SteeringVector("calm", 3, tensor, "tiny", metadata={"num_pairs": 2})
    unit = vector.normalize()
    assert unit.norm == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(unit.vector * vector.norm, tensor, rtol=1e-5, atol=1e-5)
    assert unit.metadata == {"num_pairs": 2, "normalized": True}
    assert "normalized" not in vector.metadata


def test_a_zero_vector_cannot_be_normalized() -> None:
    with pytest.raises(InputError, match=r"'calm' at blocks.3.hook_resid_post is zero"):
        a_vector(values=(0.0, 0.0)).normalize()


@settings(deadline=None)
@given(nonzero, st.floats(-8, 8))
def test_scaling_by_multiplication_division_and_scale_agree(tensor: Tensor, factor: float) -> None:
    vector = SteeringVector("calm", 3, tensor, "tiny")
    assert torch.equal((vector * factor).vector, tensor * factor)
    assert torch.equal((factor * vector).vector, vector.scale(factor).vector)
    torch.testing.assert_close((vector / 4.0).vector, tensor / 4)
    assert torch.equal((-vector).vector, -tensor)


def test_scale_factors_are_recorded_and_multiply() -> None:
    assert a_vector().scale(2.0).scale(3.0).metadata == {"scale_factor": 6.0}


def test_statistics_survive_a_positive_factor_and_not_a_reversal() -> None:
    vector = with_statistics(3, auc=0.9)
    assert vector.scale(2.0).metadata["statistics"] == {"auc": 0.9}
    for changed in (-vector, vector * 0, vector.scale(-1.0), vector + vector):
        assert "statistics" not in changed.metadata
    assert vector.metadata["statistics"] == {"auc": 0.9}


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_factor_that_is_not_finite_is_refused(factor: float) -> None:
    with pytest.raises(InputError, match="cannot scale by"):
        a_vector() * factor
    with pytest.raises(InputError, match="cannot divide by zero"):
        a_vector() / 0


def test_vectors_of_one_hook_add_and_subtract() -> None:
    other = SteeringVector("humor", 3, torch.tensor([1.0, -1.0]), "tiny", "pca")
    total, difference = a_vector() + other, a_vector() - other
    assert total.vector.tolist() == [4.0, 3.0]
    assert difference.vector.tolist() == [2.0, 5.0]
    assert (total.behavior, total.extraction_method) == ("calm + humor", "caa + pca")
    assert (difference.behavior, (a_vector() + a_vector()).behavior) == ("calm - humor", "calm")
    assert total.metadata == {"joined": ["calm", "+", "humor"]}
    assert (a_vector(provenance=PROVENANCE) + a_vector(provenance=PROVENANCE)).provenance is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (a_vector(model="other"), "model 'tiny' and 'other'"),
        (a_vector(4), "hook 'blocks.3.hook_resid_post' and 'blocks.4.hook_resid_post'"),
        (a_vector(3, hook_name="blocks.3.hook_resid_pre"), "hook .*post' and .*pre'"),
        (a_vector(values=(1.0, 2.0, 3.0)), "width 2 and 3"),
    ],
)
def test_vectors_of_different_models_or_hooks_do_not_add(other: SteeringVector, message: str) -> None:
    for operation in (lambda: a_vector() + other, lambda: a_vector() - other):
        with pytest.raises(InputError, match=message):
            operation()


def test_vectors_of_different_revisions_or_processed_weights_do_not_add() -> None:
    import msgspec

    for field, value in (("revision", "def"), ("weights", "fold_ln")):
        changed = a_vector(provenance=msgspec.structs.replace(PROVENANCE, **{field: value}))
        with pytest.raises(InputError, match=f"{field} '.*' and '{value}'"):
            a_vector(provenance=PROVENANCE) + changed
        assert (a_vector() + changed).norm == 10.0  # nothing known of one side: nothing to refuse


def test_arithmetic_with_anything_else_is_a_type_error() -> None:
    for operation in (lambda: a_vector() + 1, lambda: a_vector() * "x", lambda: a_vector() / None):  # type: ignore[operator]
        with pytest.raises(TypeError):
            operation()


def test_to_changes_the_dtype_and_refuses_an_overflow() -> None:
    vector = a_vector(values=(1e5, 1.0))
    assert vector.to(torch.float64).vector.dtype == torch.float64
    assert vector.to("cpu", torch.bfloat16).vector.dtype == torch.bfloat16
    with pytest.raises(NonFiniteError, match=r"overflows torch\.float16"):
        vector.to(dtype=torch.float16)
    assert a_set(1, 2).to(torch.float64)[2].vector.dtype == torch.float64


def test_a_vector_with_a_gradient_is_detached() -> None:
    assert not SteeringVector("calm", 3, torch.ones(2, requires_grad=True), "tiny").vector.requires_grad


@settings(max_examples=40, deadline=None)
@given(any_vector())
def test_save_then_load_is_identity(vector: SteeringVector) -> None:
    with tempfile.TemporaryDirectory() as folder:
        written = vector.save(Path(folder) / "new" / "layer_0.5")
        assert written == Path(folder) / "new" / "layer_0.5.safetensors"
        assert_same(SteeringVector.load(Path(folder) / "new" / "layer_0.5"), vector)
        assert os.listdir(written.parent) == [written.name]


def test_the_same_vector_makes_the_same_bytes_in_the_specified_format(tmp_path: Path) -> None:
    contents = (
        '{"behavior": "calm", "extraction_method": "caa", "hook_name": "blocks.3.hook_resid_post", "layer_index": 3, '
        '"metadata": {"num_pairs": 2}, "model_name": "org/m", "provenance": null}'
    )
    body = bytes.fromhex("0000803f000000c0")  # 1.0 and -2.0, little-endian float32
    header = (
        '{"__metadata__":{"contents":'
        + json.dumps(contents)
        + ',"contents_sha256":"'
        + hashlib.sha256(contents.encode()).hexdigest()
        + '","format":"tl_persona.steering_vector","format_version":"1","sha256":"'
        + hashlib.sha256(body).hexdigest()
        + '"},"vector":{"data_offsets":[0,8],"dtype":"F32","shape":[2]}}'
    ).encode()
    header += b" " * (-len(header) % 8)
    golden = len(header).to_bytes(8, "little") + header + body
    vector = SteeringVector("calm", 3, torch.tensor([1.0, -2.0]), "org/m", metadata={"num_pairs": 2})
    assert vector.save(tmp_path / "v").read_bytes() == golden
    (tmp_path / "golden.safetensors").write_bytes(golden)
    assert_same(SteeringVector.load(tmp_path / "golden.safetensors"), vector)


def test_the_file_is_plain_safetensors_for_others(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = a_vector().save(tmp_path / "v.safetensors")
    assert load_file(path)["vector"].tolist() == [3.0, 4.0]


@pytest.mark.parametrize("spelling", ["v", "v.safetensors", "v.pt", "v.json"])
def test_every_spelling_saves_and_loads_one_safetensors_file(tmp_path: Path, spelling: str) -> None:
    a_vector().save(tmp_path / spelling)
    assert os.listdir(tmp_path) == ["v.safetensors"]
    assert_same(SteeringVector.load(str(tmp_path / spelling)), a_vector())


def test_every_altered_byte_is_noticed_or_harmless(tmp_path: Path) -> None:
    path = a_vector(metadata={"statistics": {"auc": 0.9}}, provenance=PROVENANCE).save(tmp_path / "v")
    whole = path.read_bytes()
    expected = SteeringVector.load(path)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = SteeringVector.load(path)
        except StoreError:
            continue
        assert_same(found, expected)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = a_vector().save(tmp_path / "v")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptFileError, match=str(path)):
            SteeringVector.load(path)


def test_a_file_of_a_later_version_asks_for_an_upgrade(tmp_path: Path) -> None:
    path = a_vector().save(tmp_path / "v")
    path.write_bytes(path.read_bytes().replace(b'"format_version":"1"', b'"format_version":"2"'))
    with pytest.raises(StoreError, match="format version '2', this package reads '1': upgrade"):
        SteeringVector.load(path)


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "v.safetensors"
    save_file({"vector": torch.ones(2)}, path)
    with pytest.raises(CorruptFileError, match=r"its format is None, not 'tl_persona\.steering_vector'"):
        SteeringVector.load(path)


@pytest.mark.parametrize("shape", [(0, 2**64 - 1), (0, 2**63 - 1, 2**63 - 1), (0,)])
def test_a_tensor_beside_the_vector_is_refused_whatever_its_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = a_vector().save(tmp_path / "v")
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    header["extra"] = {"dtype": "F32", "shape": shape, "data_offsets": [8, 8]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[start:])
    with pytest.raises(CorruptFileError, match=r"'extra'.*not one 'vector', non-empty, 1-D and floating-point"):
        SteeringVector.load(path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.int8])
def test_numbers_that_torch_cannot_calculate_with_are_no_vector(tmp_path: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import save

    if dtype.is_floating_point:
        with pytest.raises(InputError, match=f"got {dtype} of shape"):
            SteeringVector("calm", 3, torch.ones(2).to(dtype), "tiny")
    path = a_vector().save(tmp_path / "v")
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    path.write_bytes(save({"vector": torch.ones(2).to(dtype)}, header))
    with pytest.raises(CorruptFileError, match="not one 'vector', non-empty, 1-D and floating-point"):
        SteeringVector.load(path)


def test_a_hook_of_more_digits_than_python_counts_is_no_block(tmp_path: Path) -> None:
    hook = f"blocks.{'9' * 5000}.hook_resid_post"
    path = a_vector(hook_name=hook).save(tmp_path / "v")
    assert SteeringVector.load(path).hook_name == hook


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800"])
def test_names_that_no_file_can_have_are_our_errors(tmp_path: Path, name: str) -> None:
    for load in (
        lambda: SteeringVector.load(tmp_path / name),
        lambda: SteeringVector.load(tmp_path / f"{name}.safetensors"),
        lambda: SteeringVector.load(tmp_path / f"{name}.pt"),
        lambda: SteeringVectorSet.load(tmp_path / name),
        lambda: SteeringVectorSet.import_gguf(tmp_path / name),
    ):
        with pytest.raises(StoreError, match="cannot"):
            load()


def test_a_key_that_is_no_unicode_is_not_what_is_expected_there(tmp_path: Path) -> None:
    write_rotalabs(tmp_path / "v", torch.ones(2), **{"\ud800behavior": "calm"})
    with pytest.raises(CorruptFileError, match=r"v\.json: not what is expected there"):
        SteeringVector.load(tmp_path / "v.pt")


def test_a_file_of_holes_that_claims_any_size_is_not_read(tmp_path: Path) -> None:
    a_set(1).save(tmp_path)
    for name in ("v.safetensors", "v.json", "v.gguf", "metadata.json"):
        with open(tmp_path / name, "r+b" if name == "metadata.json" else "wb") as file:
            file.truncate(2**42)
    for load in (
        lambda: SteeringVector.load(tmp_path / "v.safetensors"),
        lambda: read_rotalabs(tmp_path / "v.json", tmp_path / "v.pt"),
        lambda: SteeringVectorSet.import_gguf(tmp_path / "v.gguf"),
        lambda: SteeringVectorSet.load(tmp_path),
    ):
        with pytest.raises(StoreError, match="it has 4398046511104 bytes, and 268435456 are the most"):
            load()


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotStoredError, match=r"neither v.safetensors nor v.json"):
        SteeringVector.load(tmp_path / "v")
    with pytest.raises(NotStoredError, match=r"v.safetensors: there is no such file"):
        SteeringVector.load(tmp_path / "v.safetensors")
    with pytest.raises(NotStoredError, match=r"is a folder; read a set of vectors with SteeringVectorSet.load"):
        SteeringVector.load(tmp_path)
    with pytest.raises(NotStoredError, match=r"metadata.json: there is no such file"):
        SteeringVectorSet.load(tmp_path / "none")


@pytest.mark.parametrize("value", [math.nan, {1}, object()])
def test_metadata_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path, value: object) -> None:
    with pytest.raises(InputError, match="no JSON form"):
        a_vector(metadata={"k": value}).save(tmp_path / "new" / "v")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("spelling", ["layer_3", "layer_3.json", "layer_3.pt"])
def test_a_vector_of_rotalabs_steer_loads_by_any_of_its_names(tmp_path: Path, spelling: str) -> None:
    write_rotalabs(tmp_path / "layer_3", torch.tensor([1.0, -2.0]))
    expected = SteeringVector(
        "calm",
        3,
        torch.tensor([1.0, -2.0]),
        "org/model",
        metadata={"num_pairs": 2, "created_at": "2025-01-01T00:00:00"},
    )
    assert_same(SteeringVector.load(tmp_path / spelling), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cut", [slice(None), slice(3, 400), slice(300, 301), slice(0, 1)])
@pytest.mark.parametrize("trained", [False, True])
def test_a_vector_that_torch_saved_has_the_numbers_that_torch_loads(
    tmp_path: Path, dtype: torch.dtype, cut: slice, trained: bool
) -> None:
    vector = torch.randn(500, dtype=dtype)[cut].requires_grad_(trained)
    write_rotalabs(tmp_path / "layer_3", vector)
    found = SteeringVector.load(tmp_path / "layer_3").vector
    assert found.dtype == dtype and not found.requires_grad
    assert torch.equal(found, torch.load(tmp_path / "layer_3.pt", weights_only=True).detach())


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(2, 2), "holds no plain 1-D tensor of floats.*describes something else"),
        (torch.ones(0), "claims numbers 0 to 0 of 0"),
        (torch.ones(6)[::2], "describes something else, or numbers that do not lie side by side"),
        (torch.ones(1).expand(2), "do not lie side by side"),
        (torch.ones(2, dtype=torch.int32), "asks for 'torch IntStorage'"),
        (torch.ones(2).to(torch.float8_e4m3fn), "asks for"),
        (torch.tensor([1.0, math.nan]), "NaN"),
        (torch.ones(2).to_sparse(), "asks for 'torch._utils _rebuild_sparse_tensor'"),
        ({"vector": torch.ones(2)}, "describes something else"),
        (Payload(), "asks for 'posix mkdir'"),
    ],
)
def test_a_pt_file_with_anything_but_a_vector_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rotalabs(tmp_path / "layer_3", tensor)
    with pytest.raises(CorruptFileError, match=message) as caught:
        SteeringVector.load(tmp_path / "layer_3")
    assert str(tmp_path / "layer_3.pt") in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_damaged_files_of_rotalabs_steer_are_named(tmp_path: Path) -> None:
    stem = tmp_path / "layer_3"
    write_rotalabs(stem, torch.ones(2))
    whole = stem.with_suffix(".pt").read_bytes()
    stem.with_suffix(".pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFileError, match=r"layer_3.pt: holds no plain 1-D tensor of floats"):
        SteeringVector.load(stem)
    stem.with_suffix(".pt").unlink()
    with pytest.raises(NotStoredError, match=r"layer_3.pt: there is no such file, though layer_3.json is there"):
        SteeringVector.load(stem)
    stem.with_suffix(".json").write_text("{")
    with pytest.raises(CorruptFileError, match=r"layer_3.json: not JSON"):
        SteeringVector.load(stem)
    stem.with_suffix(".json").write_text('{"behavior": "calm", "layer_index": "3", "model_name": "m"}')
    with pytest.raises(CorruptFileError, match=r"layer_3.json: .*layer_index"):
        SteeringVector.load(stem)


def test_a_set_is_ordered_by_layer() -> None:
    vectors = a_set(9, 2, 5)
    assert vectors.layers == [2, 5, 9] == [vector.layer_index for vector in vectors]
    assert (len(vectors), vectors.model_name, vectors[5].vector.tolist()) == (3, "tiny", [5.0, 1.0])
    assert vectors.get(5) is vectors[5]
    assert vectors.get(4) is None
    with pytest.raises(KeyError, match=r"no vector for layer 4; there are \[2, 5, 9\]"):
        vectors[4]
    assert SteeringVectorSet("calm").model_name is None


def test_a_vector_at_the_same_hook_takes_the_place_of_the_earlier_one() -> None:
    vectors = a_set(1)
    vectors.add(a_vector(1, (7.0, 7.0)))
    assert [vector.vector.tolist() for vector in vectors] == [[7.0, 7.0]]


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (SteeringVector("humor", 2, torch.ones(2), "tiny"), "does not belong in a set for behavior 'calm'"),
        (a_vector(2, model="other"), "model 'other', not 'tiny'"),
        (a_vector(2, (1.0, 2.0, 3.0)), "width 3, not 2"),
        (a_vector(1, hook_name="blocks.1.hook_resid_pre"), "make one set for each kind of hook"),
    ],
)
def test_a_vector_that_does_not_belong_is_refused(vector: SteeringVector, message: str) -> None:
    vectors = a_set(1)
    with pytest.raises(InputError, match=message):
        vectors.add(vector)
    assert vectors.layers == [1]
    with pytest.raises(InputError, match=message):
        SteeringVectorSet("calm", [a_vector(1), vector])


def test_the_best_layer_separates_best_and_is_not_the_longest() -> None:
    vectors = SteeringVectorSet(
        "calm",
        [
            with_statistics(1, auc=0.7, d_prime=0.5, split_half=0.9),
            with_statistics(4, auc=0.95, d_prime=2.0, split_half=0.6),
            with_statistics(8, auc=0.8, d_prime=1.0, split_half=0.7),
        ],
    )
    assert vectors.get_best().layer_index == 4
    assert vectors.get_best("separation").layer_index == 4
    assert vectors.get_best(metric="split_half").layer_index == 1
    assert vectors.get_best("norm").layer_index == 8


def test_equal_aucs_are_told_apart_by_d_prime_and_then_the_lowest_layer_wins() -> None:
    vectors = [with_statistics(layer, auc=1.0, d_prime=d) for layer, d in ((7, 3.0), (5, 4.0), (6, 4.0), (2, None))]
    assert SteeringVectorSet("calm", vectors).get_best().layer_index == 5
    assert SteeringVectorSet("calm", [a_vector(9), a_vector(3)]).get_best("norm").layer_index == 3


def test_a_set_without_statistics_falls_back_to_the_norm_and_says_so() -> None:
    for vectors in (a_set(1, 5, 2), SteeringVectorSet("calm", [with_statistics(5, auc=None, note="1 pair")])):
        with pytest.warns(UserWarning, match="taken by norm, which mostly finds the deepest layer"):
            assert vectors.get_best().layer_index == 5


def test_a_metric_that_is_missing_names_those_that_are_there() -> None:
    vectors = SteeringVectorSet(
        "calm", [with_statistics(1, auc=0.9, split_half=0.5), with_statistics(2, split_half=0.4)]
    )
    for metric in (None, "separation"):
        with pytest.raises(
            InputError, match=r"no separation at layers \[2\]; available at all layers: split_half, norm"
        ):
            vectors.get_best(metric)
    with pytest.raises(InputError, match="unknown metric 'size'; there are separation, split_half, norm"):
        vectors.get_best("size")
    with pytest.raises(InputError, match="the set for 'calm' is empty"):
        SteeringVectorSet("calm").get_best()


def test_no_warning_where_separation_is_there() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SteeringVectorSet("calm", [with_statistics(1, auc=0.9)]).get_best()


def test_the_summary_has_a_row_a_layer_with_its_interval() -> None:
    found = with_statistics(2, auc=0.954, auc_low=0.9, auc_high=1.0, split_half=0.5, agreement=1.0, note=None)
    table = SteeringVectorSet("calm", [a_vector(7), found]).summary()
    assert [(row["layer"], row["norm"], row["auc"]) for row in table.rows] == [(2, 3.0, 0.954), (7, 5.0, None)]
    lines = str(table).splitlines()
    assert lines[0].split() == [
        *("layer", "hook", "pairs", "norm", "split", "half", "agreement", "AUC", "d'"),
        *("outliers", "largest", "share", "note"),
    ]
    assert lines[1].split() == ["2", "blocks.2.hook_resid_post", "8", "3", "0.50", "1.00", "0.95", "[0.90,", "1.00]"]
    assert lines[2].split() == ["7", "blocks.7.hook_resid_post", "5"]
    assert lines[0].index("AUC") == lines[1].index("0.95")


def test_the_summary_has_the_outlying_tokens_of_each_layer_and_their_largest_share() -> None:
    metadata = {"outliers": {"tokens": 3, "texts": 2, "largest_share": 0.876}}
    vectors = SteeringVectorSet(
        "calm", [a_vector(1, metadata=metadata), a_vector(2, metadata={"outliers": "not checked"})]
    )
    table = vectors.summary()
    assert [(row["outliers"], row["largest_share"]) for row in table.rows] == [(3, 0.876), (None, None)]
    assert str(table).splitlines()[1].split()[-2:] == ["3", "0.88"]
    told = [facts_of(as_fields(vector)) for vector in vectors]
    assert [(facts["outliers"], facts.get("largest share")) for facts in told] == [("3", "0.88"), ("not checked", None)]


def test_the_summary_escapes_what_it_shows_in_a_notebook() -> None:
    table = SteeringVectorSet("calm", [with_statistics(1, note="<b>")]).summary()
    assert "&lt;b&gt;" in table._repr_html_() and "<b>" not in table._repr_html_()


def test_the_summary_becomes_a_pandas_frame() -> None:
    frame = SteeringVectorSet("calm", [with_statistics(2, auc=0.9), a_vector(7)]).summary().to_pandas()
    assert frame.index.tolist() == [2, 7]
    assert frame.loc[2, "auc"] == 0.9
    assert frame["norm"].tolist() == [3.0, 5.0]


def test_without_pandas_the_install_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingDependencyError, match="pip install pandas"):
        a_set(1).summary().to_pandas()


@settings(max_examples=15, deadline=None)
@given(st.sets(st.integers(0, 60), max_size=4), st.dictionaries(st.text("abc"), json_values, max_size=2))
def test_a_saved_set_loads_as_it_was(layers: set[int], metadata: dict[str, Any]) -> None:
    vectors = SteeringVectorSet("calm", [a_vector(layer, (float(layer), 1.0), metadata=metadata) for layer in layers])
    with tempfile.TemporaryDirectory() as folder:
        vectors.save(folder)
        found = SteeringVectorSet.load(folder)
    assert (found.behavior, found.layers) == ("calm", sorted(layers))
    for vector in found:
        assert_same(vector, vectors[vector.layer_index])


def test_the_folder_has_the_references_file_names_and_metadata(tmp_path: Path) -> None:
    a_set(10, 2).save(tmp_path / "set")
    shown = sorted(name for name in os.listdir(tmp_path / "set") if name != ".set.lock")
    assert shown == ["layer_10.safetensors", "layer_2.safetensors", "metadata.json"]
    metadata = json.loads((tmp_path / "set" / "metadata.json").read_text())
    assert (metadata["behavior"], metadata["layers"], metadata["model_name"]) == ("calm", [2, 10], "tiny")
    digest = hashlib.sha256((tmp_path / "set" / "layer_2.safetensors").read_bytes()).hexdigest()
    assert metadata["sha256"]["2"] == digest


def test_layers_of_an_older_set_in_the_folder_are_not_picked_up(tmp_path: Path) -> None:
    a_set(1, 2, 3).save(tmp_path)
    a_set(2).save(tmp_path)
    assert SteeringVectorSet.load(tmp_path).layers == [2]


def test_a_set_half_overwritten_by_a_killed_run_is_noticed(tmp_path: Path) -> None:
    a_set(1, 2).save(tmp_path)
    a_vector(1, (9.0, 9.0)).save(tmp_path / "layer_1")
    with pytest.raises(CorruptFileError, match=r"layer_1.safetensors is not the file saved with .*save the set again"):
        SteeringVectorSet.load(tmp_path)


def test_a_set_that_names_a_layer_twice_is_refused_and_one_that_is_saved_to_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_set(1, 2).save(tmp_path)
    metadata = tmp_path / "metadata.json"
    whole = metadata.read_text()
    metadata.write_text(whole.replace("1,", "1, 1,", 1))
    with pytest.raises(CorruptFileError, match=r"metadata.json: names a layer twice"):
        SteeringVectorSet.load(tmp_path)
    metadata.write_text(whole)
    (tmp_path / "layer_1.safetensors").unlink()
    counter = itertools.count()
    read = read_bytes
    monkeypatch.setattr(set_files, "read_bytes", lambda path: read(path) + b" " * (next(counter) % 7))
    with pytest.raises(StoreError, match="is saved to without end"):
        SteeringVectorSet.load(tmp_path)


@pytest.mark.parametrize("digest", ["\0", "\ud800", "", "../../x", "0" * 63, "A" * 64, "0" * 64 + "\n", "g" * 64])
def test_a_checksum_that_is_none_is_refused_before_it_names_a_file(tmp_path: Path, digest: str) -> None:
    a_set(1).save(tmp_path)
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    metadata["sha256"]["1"] = digest
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(CorruptFileError, match=r"metadata.json: not what is expected there"):
        SteeringVectorSet.load(tmp_path)


@pytest.mark.parametrize("name", ["metadata.json", "layer_1.safetensors", "layer_3.json", "layer_3.pt", ".set.next"])
def test_nothing_of_a_set_is_read_through_a_link_that_leads_out(tmp_path: Path, name: str) -> None:
    folder, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    if name.startswith("layer_3"):
        write_rotalabs(made(folder) / "layer_3", torch.ones(2))
        (folder / "metadata.json").write_text('{"behavior": "calm", "layers": [3]}')
    else:
        a_set(1).save(folder)
    if name == ".set.next":  # as a killed save leaves it
        digest = json.loads((folder / "metadata.json").read_text())["sha256"]["1"]
        (folder / "layer_1.safetensors").rename(made(folder / name) / f"{digest}.safetensors")
    assert len(SteeringVectorSet.load(folder)) == 1
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(StoreError, match=r"is a symbolic link to .*elsewhere.*outside"):
        SteeringVectorSet.load(folder)


def test_a_set_is_not_written_through_a_link_and_may_lie_behind_one(tmp_path: Path) -> None:
    (made(tmp_path / "set") / ".set.next").symlink_to(made(tmp_path / "elsewhere"))
    with pytest.raises(StoreError, match="outside"):
        a_set(1).save(tmp_path / "set")
    assert os.listdir(tmp_path / "elsewhere") == []
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    a_set(1).save(tmp_path / "link")
    assert SteeringVectorSet.load(tmp_path / "link").layers == [1]


def test_a_vector_saved_into_the_folder_of_a_set_that_is_being_saved_is_not_swept_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def save_the_set_first(source: Any, target: Any) -> None:
        monkeypatch.setattr(os, "replace", replace)
        a_set(1).save(tmp_path)
        replace(source, target)

    a_set(1).save(tmp_path)
    monkeypatch.setattr(os, "replace", save_the_set_first)
    a_vector(9).save(tmp_path / "alone")
    assert SteeringVector.load(tmp_path / "alone").layer_index == 9


def test_a_set_of_rotalabs_steer_loads_and_warns_when_asked_for_its_best(tmp_path: Path) -> None:
    a_set(3).save(tmp_path)  # an older set of ours in the folder is not mixed in
    for layer in (3, 11):
        write_rotalabs(tmp_path / f"layer_{layer}", torch.tensor([float(layer), 0.0]), layer_index=layer)
    metadata = {"behavior": "calm", "layers": [3, 11], "model_name": "org/model"}
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    found = SteeringVectorSet.load(tmp_path)
    assert (found.layers, found.model_name, found[3].vector.tolist()) == ([3, 11], "org/model", [3.0, 0.0])
    with pytest.warns(UserWarning, match="taken by norm"):
        assert found.get_best().layer_index == 11


def test_a_set_whose_files_contradict_its_metadata_is_refused(tmp_path: Path) -> None:
    write_rotalabs(tmp_path / "layer_3", torch.ones(2), layer_index=4)
    source = tmp_path / "metadata.json"
    source.write_text('{"behavior": "calm", "layers": [3]}')
    with pytest.raises(CorruptFileError, match="the file of layer 3 holds layer 4"):
        SteeringVectorSet.load(tmp_path)
    write_rotalabs(tmp_path / "layer_3", torch.ones(2), behavior="humor")
    with pytest.raises(CorruptFileError, match=r"layer 3: .*does not belong in a set for behavior 'calm'"):
        SteeringVectorSet.load(tmp_path)
    source.write_text('{"behavior": "calm", "layers": ["../x"]}')
    with pytest.raises(CorruptFileError, match=r"metadata.json: .*layers"):
        SteeringVectorSet.load(tmp_path)
    source.write_text(
        '{"format": "tl_persona.steering_vector_set", "format_version": "9", "behavior": "", "layers": []}'
    )
    with pytest.raises(StoreError, match="upgrade"):
        SteeringVectorSet.load(tmp_path)
