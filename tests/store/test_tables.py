"""A store as one tensor, as a pandas frame and as a numpy file: the same numbers in a documented order."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tl_persona.errors import CorruptFileError, NotStoredError, StoreMismatchError
from tl_persona.provenance import Provenance
from tl_persona.store import PersonaVectorStore

LAYERS, WIDTH = 3, 4


def vectors_of(number: int) -> Tensor:
    """Row i of persona n is n, i, n, i: every entry tells whose and which layer it is."""
    return torch.tensor([[number, layer, number, layer] for layer in range(LAYERS)], dtype=torch.float32)


@pytest.fixture
def store(tmp_path: Path) -> PersonaVectorStore:
    filled = PersonaVectorStore("org/model", tmp_path / "store")
    with filled:
        for number, persona_id in enumerate(["cy", "ada", "bo", "baseline_assistant"]):
            filled.save("templated", persona_id, persona_id.title(), vectors_of(number), ["q1", "q2"])
        filled.save("biography", "ada", "Ada", vectors_of(7), ["q1"])
    return filled


def test_rows_come_sorted_by_id_without_the_plain_assistant(store: PersonaVectorStore) -> None:
    assert store.load_matrix("templated").tolist() == torch.stack([vectors_of(i) for i in (1, 2, 0)]).tolist()


def test_the_plain_assistant_comes_when_asked_for(store: PersonaVectorStore) -> None:
    numbers = store.load_matrix("templated", include_baseline=True)[:, 0, 0].tolist()
    assert numbers == [1, 3, 2, 0]  # ada, baseline_assistant, bo, cy


def test_the_callers_order_is_kept(store: PersonaVectorStore) -> None:
    ids = ["cy", "baseline_assistant", "ada"]
    matrix = store.load_matrix("templated", ids)
    for row, persona_id in zip(matrix, ids, strict=True):
        assert torch.equal(row, store.load("templated", persona_id))


def test_another_strategy_is_read_when_named(store: PersonaVectorStore) -> None:
    store.save("templated", "ada", "Ada", vectors_of(9), ["q1"], "persona_mean")
    assert store.load_matrix("templated", mask_strategy="persona_mean").tolist() == [vectors_of(9).tolist()]


def test_nothing_to_stack_is_an_error_that_names_what_was_looked_for(store: PersonaVectorStore) -> None:
    with pytest.raises(NotStoredError, match="stored for spoken and answer_mean"):
        store.load_matrix("spoken")
    with pytest.raises(NotStoredError):
        store.load_matrix("templated", [])
    with pytest.raises(NotStoredError, match="nobody"):
        store.load_matrix("templated", ["ada", "nobody"])


def test_vectors_of_two_shapes_are_not_stacked(store: PersonaVectorStore, tmp_path: Path) -> None:
    other = PersonaVectorStore("org/model", tmp_path / "other")
    other.save("templated", "zoe", "Zoe", torch.ones(LAYERS + 1, WIDTH), ["q1"])
    path = store.path_of("templated", "zoe")
    path.write_bytes(other.path_of("templated", "zoe").read_bytes())
    with pytest.raises(StoreMismatchError, match=r"'zoe' has vectors of shape \(4, 4\)"):
        store.load_matrix("templated", ["ada", "zoe"])


def test_an_altered_file_is_found(store: PersonaVectorStore) -> None:
    path = store.path_of("templated", "bo")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"bo\.safetensors"):
        store.load_matrix("templated")


def test_a_frame_has_a_row_for_each_variant_persona_and_layer(store: PersonaVectorStore) -> None:
    frame = store.to_dataframe(include_baseline=True)
    assert frame.index.names == ["variant", "persona_id", "layer"]
    assert len(frame) == (4 + 1) * LAYERS and list(frame.columns) == list(range(WIDTH))
    for (variant, persona_id, layer), row in frame.iterrows():
        assert row.tolist() == store.load(variant, persona_id)[layer].tolist()
    assert {str(kind) for kind in frame.dtypes} == {"float32"}


def test_a_frame_takes_the_variants_that_hold_something(tmp_path: Path) -> None:
    store = PersonaVectorStore("org/model", tmp_path)
    store.save("biography", "ada", "Ada", vectors_of(1), ["q1"])
    assert set(store.to_dataframe().index.get_level_values("variant")) == {"biography"}
    with pytest.raises(NotStoredError, match="nothing is stored of org/model"):
        PersonaVectorStore("org/model", tmp_path, variants=["templated"]).to_dataframe()


def test_one_layer_of_a_frame_is_what_scikit_learn_takes(store: PersonaVectorStore) -> None:
    layer = store.to_dataframe(["templated"]).xs(2, level="layer")
    assert layer.to_numpy().tolist() == store.load_matrix("templated")[:, 2].tolist()


def test_variants_of_two_widths_make_no_frame(store: PersonaVectorStore) -> None:
    store.save("spoken", "ada", "Ada", torch.ones(LAYERS, WIDTH + 1), ["q1"])
    with pytest.raises(StoreMismatchError, match="different widths"):
        store.to_dataframe(["templated", "spoken"])


def test_a_numpy_file_holds_the_matrix_and_who_and_what_it_is(store: PersonaVectorStore, tmp_path: Path) -> None:
    hooks = tuple(f"blocks.{i}.hook_resid_post" for i in range(LAYERS))
    provenance = Provenance(
        model_name="org/model", revision=None, dtype="float32", weights="unprocessed", hook_names=hooks,
        strategy="answer_mean", prompts_digest="d", sample_ids=("q1", "q2"),
    )  # fmt: skip
    store.save("templated", "ada", "Ada Ö", vectors_of(1), ["q1", "q2"], provenance=provenance)
    file = store.export_npz(tmp_path / "out" / "vectors", "templated", ["ada", "cy"])
    assert file == tmp_path / "out" / "vectors.npz"
    with np.load(file, allow_pickle=False) as found:
        assert found["vectors"].dtype == np.float32
        assert found["vectors"].tolist() == [vectors_of(1).tolist(), vectors_of(0).tolist()]
        assert found["persona_ids"].tolist() == ["ada", "cy"]
        assert found["persona_names"].tolist() == ["Ada Ö", "Cy"]
        assert found["hook_names"].tolist() == list(hooks)
        assert [str(found[name]) for name in ("model_name", "variant", "mask_strategy")] == [
            "org/model", "templated", "answer_mean",
        ]  # fmt: skip


def test_the_same_vectors_make_the_same_numpy_file(store: PersonaVectorStore, tmp_path: Path) -> None:
    one, two = (store.export_npz(tmp_path / name, "templated") for name in ("one.npz", "two.npz"))
    assert one.read_bytes() == two.read_bytes()
    with np.load(one) as found:
        assert found["hook_names"].tolist() == []  # saved without provenance


def test_reading_all_of_a_store_warns_of_nothing(store: PersonaVectorStore) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.load_matrix("templated")
        store.to_dataframe()
