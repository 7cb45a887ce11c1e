"""Sets and stores on the Hugging Face hub and back, through the hub's own client and a stand-in for the hub."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_standin import TOKEN, Hub, running_hub
from huggingface_hub import constants

from tl_persona.errors import (
    CorruptFileError,
    InputError,
    NotStoredError,
    StoreError,
    StoreMismatchError,
)
from tl_persona.provenance import Provenance
from tl_persona.store import PersonaVectorStore
from tl_persona.vectors import SteeringVector, SteeringVectorSet

PROVENANCE = Provenance(
    model_name="org/tiny",
    revision="abc",
    dtype="float32",
    weights="unprocessed",
    hook_names=("blocks.0.hook_resid_post", "blocks.1.hook_resid_post"),
    strategy="answer_mean",
    prompts_digest="digest-of-texts",
    sample_ids=("q1", "q2", "q3"),
    notes={"torch": "2.13"},
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of our own; the client of this process talks to it and to nothing else."""
    with running_hub() as standin:
        for name, value in {
            "ENDPOINT": standin.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": standin.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": True,  # its uploads take another protocol, of another client
        }.items():
            monkeypatch.setattr(constants, name, value)
        for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(variable, raising=False)
        yield standin


def a_set(*layers: int, behavior: str = "calm", model: str = "org/tiny", **rest: Any) -> SteeringVectorSet:
    statistics = {"split_half": 0.5, "auc": 0.954, "auc_low": 0.9, "auc_high": 1.0, "d_prime": 2.5}
    metadata = {"num_pairs": 8, "statistics": statistics}
    return SteeringVectorSet(
        behavior,
        [
            SteeringVector(behavior, layer, torch.tensor([3.0, float(layer)]), model, metadata=metadata, **rest)
            for layer in layers
        ],
    )


def a_store(root: Path, model: str = "org/tiny", provenance: Provenance | None = PROVENANCE) -> PersonaVectorStore:
    store = PersonaVectorStore(model, root)
    with store:
        for variant, factor in (("templated", 1.0), ("biography", 2.0)):
            for number in (1, 2):
                vectors = factor * number * torch.ones(2, 3)
                store.save(variant, f"p{number}", f"Ada {number}", vectors, ["q1", "q2", "q3"], provenance=provenance)
    return store


def front_matter(card: str) -> dict[str, Any]:
    import yaml

    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


# --- sets ----------------------------------------------------------------------------------------------------------


def test_a_pushed_set_comes_back_as_it_was(hub: Hub) -> None:
    vectors = a_set(1, 4, provenance=PROVENANCE)
    address = vectors.push_to_hub("me/calm", token=TOKEN)
    assert address == f"{hub.endpoint}/me/calm/commit/{hub.model('me/calm').branches['main']}"
    found = SteeringVectorSet.from_hub("me/calm")
    assert (found.behavior, found.layers) == ("calm", [1, 4])
    for vector in found:
        original = vectors[vector.layer_index]
        assert torch.equal(vector.vector, original.vector)
        assert (vector.metadata, vector.provenance) == (original.metadata, PROVENANCE)


def test_the_repository_has_the_files_of_save_and_a_card_in_one_commit(hub: Hub, tmp_path: Path) -> None:
    a_set(1, 4).push_to_hub("me/calm", token=TOKEN)
    repository = hub.model("me/calm")
    assert repository.messages == ["initial commit", "Steering vectors for calm"]
    files = repository.at("main")[1]
    a_set(1, 4).save(tmp_path / "saved")
    saved = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir() if path.name != ".set.lock"}
    assert {name: data for name, data in files.items() if name not in (".gitattributes", "README.md")} == saved
    assert not repository.private


def test_the_card_of_a_set_says_what_it_is_and_how_good(hub: Hub) -> None:
    a_set(1, 4, provenance=PROVENANCE).push_to_hub("me/calm", token=TOKEN, license="cc-by-4.0")
    card = hub.model("me/calm").at("main")[1]["README.md"].decode()
    assert front_matter(card) == {
        "library_name": "tl_persona",
        "tags": ["tl_persona", "steering-vectors"],
        "license": "cc-by-4.0",
        "base_model": "org/tiny",
    }
    assert "| 4 | 5 | 8 | 0.50 | 0.95 [0.90, 1.00] | 2.50 |" in card  # norm of (3, 4) is 5
    assert "| method | caa |" in card
    assert "| model | org/tiny, revision abc |" in card
    assert "| texts | 3, digest digest-of-texts |" in card
    assert 'SteeringVectorSet.from_hub("me/calm")' in card
    assert "cc-by-4.0. The licences of the model" in card


def test_a_card_keeps_names_text_whatever_they_hold(hub: Hub) -> None:
    name = 'x\n---\nlicense: mit\n| <script> [a](b) "q"'
    a_set(1, behavior=name, model=name).push_to_hub("me/odd", token=TOKEN)
    card = hub.model("me/odd").at("main")[1]["README.md"].decode()
    assert front_matter(card) == {"library_name": "tl_persona", "tags": ["tl_persona", "steering-vectors"]}
    assert card.count("\n---\n") == 1  # the end of the front matter, and no other
    text = re.sub(r"```.*?```", "", card, flags=re.DOTALL)
    assert "<script>" not in text.replace("\\<", "").replace("\\>", "") and "](b)" not in text.replace("\\]", "")
    assert "None is stated." in card
    assert SteeringVectorSet.from_hub("me/odd").behavior == name


def test_a_private_repository_is_asked_for_and_a_second_push_updates_it(hub: Hub) -> None:
    a_set(1, 4).push_to_hub("me/calm", token=TOKEN, private=True)
    assert hub.model("me/calm").private
    a_set(4).push_to_hub("me/calm", token=TOKEN)
    assert SteeringVectorSet.from_hub("me/calm").layers == [4]


def test_a_revision_is_a_branch_or_a_commit(hub: Hub) -> None:
    a_set(1).push_to_hub("me/calm", token=TOKEN)
    first = hub.model("me/calm").branches["main"]
    hub.model("me/calm").branches["trial"] = first
    a_set(2).push_to_hub("me/calm", token=TOKEN, revision="trial")
    assert SteeringVectorSet.from_hub("me/calm").layers == [1]
    assert SteeringVectorSet.from_hub("me/calm", revision="trial").layers == [2]
    a_set(3).push_to_hub("me/calm", token=TOKEN)
    assert SteeringVectorSet.from_hub("me/calm", revision=first).layers == [1]
    with pytest.raises(NotStoredError, match=r"cannot fetch model 'me/calm': .*check the id, the revision"):
        SteeringVectorSet.from_hub("me/calm", revision="gone")


def test_nothing_but_the_files_of_a_set_is_fetched(hub: Hub, tmp_path: Path) -> None:
    a_set(1).push_to_hub("me/calm", token=TOKEN)
    hub.model("me/calm").commit(
        {
            "layer_1.pt": b"pickle",
            "code.py": b"raise SystemExit",
            "../../outside.safetensors": b"x",
            "sub/layer_1.safetensors": b"x",
            "layer_1.safetensors.pt": b"x",
        }
    )
    hub.requests.clear()
    assert SteeringVectorSet.from_hub("me/calm").layers == [1]
    fetched = {request.rsplit("/", 1)[1] for request in hub.requests if "/resolve/" in request}
    assert fetched == {"metadata.json", "layer_1.safetensors"}


def test_a_set_that_was_tampered_with_is_refused(hub: Hub) -> None:
    a_set(1, 4).push_to_hub("me/calm", token=TOKEN)
    files = hub.model("me/calm").at("main")[1]
    hub.model("me/calm").commit({"layer_4.safetensors": files["layer_1.safetensors"]})
    with pytest.raises(CorruptFileError, match="is not the file saved with"):
        SteeringVectorSet.from_hub("me/calm")


def test_a_set_in_the_format_of_pickles_is_not_read(hub: Hub, tmp_path: Path) -> None:
    folder = a_set(1).export_rotalabs(tmp_path / "theirs")
    hub.model("me/pickled").commit({path.name: path.read_bytes() for path in folder.iterdir()})
    with pytest.raises(NotStoredError, match="no such file"):
        SteeringVectorSet.from_hub("me/pickled")


def test_what_is_not_there_or_not_allowed_is_told(hub: Hub) -> None:
    with pytest.raises(NotStoredError, match=r"cannot fetch model 'me/none': .*check the id"):
        SteeringVectorSet.from_hub("me/none")
    hub.model("me/empty")
    with pytest.raises(NotStoredError, match=r"model 'me/empty' holds no set of steering vectors: it has no metadata"):
        SteeringVectorSet.from_hub("me/empty")
    with pytest.raises(InputError, match="cannot push to model 'no such / id'"):
        a_set(1).push_to_hub("no such / id", token=TOKEN)
    with pytest.raises((StoreError, NotStoredError), match=r"cannot push to model 'me/calm'"):
        a_set(1).push_to_hub("me/calm", token="hf_wrong")
    with pytest.raises(InputError, match="the set for 'calm' is empty: there is nothing to push"):
        SteeringVectorSet("calm").push_to_hub("me/calm", token=TOKEN)


def test_a_hub_out_of_reach_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StoreError, match=r"cannot push to model 'me/calm': Cannot reach .*offline mode is enabled"):
        a_set(1).push_to_hub("me/calm", token=TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match=r"cannot fetch model 'me/calm': .*refused"):
        SteeringVectorSet.from_hub("me/calm")


# --- stores --------------------------------------------------------------------------------------------------------


def test_a_pushed_store_comes_back_as_it_was(hub: Hub, tmp_path: Path) -> None:
    store = a_store(tmp_path / "here")
    address = store.push_to_hub("me/personas", token=TOKEN)
    assert address.startswith(f"{hub.endpoint}/datasets/me/personas/commit/")
    found = PersonaVectorStore.from_hub("me/personas", tmp_path / "there")
    assert (found.model_name, found.root_dir) == ("org/tiny", tmp_path / "there")
    assert found.list_personas() == ["p1", "p2"]
    assert found.persona_names(["p2"]) == {"p2": "Ada 2"}
    for variant in ("templated", "biography"):
        for persona in ("p1", "p2"):
            assert torch.equal(found.load(variant, persona), store.load(variant, persona))
            assert found.provenance(variant, persona) == PROVENANCE
    files = [path for path in (tmp_path / "there").rglob("*.safetensors")]
    assert len(files) == 4 and not any(path.is_symlink() for path in files)


def test_the_repository_has_the_layout_of_the_store_and_a_card(hub: Hub, tmp_path: Path) -> None:
    store = a_store(tmp_path)
    store.save("biography", "p3", "Cy", torch.ones(2, 3), ["q1"], mask_strategy="answer_last")  # index not flushed
    a_store(tmp_path, model="org/other")
    store.push_to_hub("me/personas", token=TOKEN, license="mit")
    files = hub.dataset("me/personas").at("main")[1]
    places = {"answer_mean/templated": 2, "answer_mean/biography": 2, "answer_last/biography": 1}
    assert sum(name.endswith(".safetensors") for name in files) == 5
    for place, count in places.items():
        manifest = json.loads(files[f"org__tiny/{place}/manifest.json"])
        assert len(manifest["personas"]) == count and manifest["hidden_size"] == 3
        for persona in manifest["personas"]:
            within = tmp_path / "org__tiny" / place / f"{persona}.safetensors"
            assert files[f"org__tiny/{place}/{persona}.safetensors"] == within.read_bytes()
    card = files["README.md"].decode()
    assert front_matter(card)["base_model"] == "org/tiny" and front_matter(card)["license"] == "mit"
    assert "| answer\\_mean | templated | 2 | 2 | 3 |" in card
    assert "| texts | 3, digest digest-of-texts |" in card
    assert 'PersonaVectorStore.from_hub("me/personas")' in card


def test_a_store_of_another_library_goes_there_and_back_with_its_names(hub: Hub, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "here" / "org__tiny" / "answer_mean" / "templated"
    folder.mkdir(parents=True)
    save_file({"activations": torch.ones(2, 3)}, folder / "p1.safetensors")
    entry = {"name": "Ada", "sample_ids": ["q1"]}
    (folder / "manifest.json").write_text(json.dumps({"num_layers": 2, "hidden_size": 3, "personas": {"p1": entry}}))
    PersonaVectorStore("org/tiny", tmp_path / "here").push_to_hub("me/theirs", token=TOKEN)
    found = PersonaVectorStore.from_hub("me/theirs", tmp_path / "there")
    assert (found.model_name, found.persona_names(["p1"], ["templated"])) == ("org/tiny", {"p1": "Ada"})
    assert found.persona_sample_ids("templated", "p1") == ["q1"]


def test_one_model_of_several_is_named(hub: Hub, tmp_path: Path) -> None:
    for name in ("org/tiny", "org/other"):
        a_store(tmp_path / "here", name, None).push_to_hub("me/both", token=TOKEN)
    with pytest.raises(InputError, match="org__other, org__tiny: name one by model_name"):
        PersonaVectorStore.from_hub("me/both", tmp_path / "there")
    found = PersonaVectorStore.from_hub("me/both", tmp_path / "there", model_name="org/other")
    assert found.list_personas() == ["p1", "p2"]
    assert os.listdir(tmp_path / "there") == ["org__other"]
    with pytest.raises(NotStoredError, match="dataset 'me/both' holds no vectors of org/third"):
        PersonaVectorStore.from_hub("me/both", tmp_path / "there", model_name="org/third")


def test_names_that_would_leave_the_store_are_not_fetched(hub: Hub, tmp_path: Path) -> None:
    store = a_store(tmp_path / "here")
    store.push_to_hub("me/personas", token=TOKEN)
    stolen = store.path_of("templated", "p1").read_bytes()
    odd = [
        "../x/y/p.safetensors",
        "org__tiny/../templated/p.safetensors",
        "org__tiny/answer_mean/../p.safetensors",
        "/org__tiny/answer_mean/p.safetensors",
        "org__tiny/answer_mean/templated/..safetensors",
        "org__tiny/answer_mean/templated/.hidden.safetensors",
        "org__tiny/answer_mean/templated/a\\b.safetensors",
        "org__tiny/answer_mean/templated/deeper/p.safetensors",
        "org__tiny/answer_mean/templated/p.pt",
        "org__tiny/answer_mean/templated/code.py",
        "p.safetensors",
    ]
    hub.dataset("me/personas").commit(dict.fromkeys(odd, stolen))
    found = PersonaVectorStore.from_hub("me/personas", tmp_path / "a" / "b" / "there")
    assert found.list_personas() == ["p1", "p2"]
    written = {path.name for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert written >= {"p1.safetensors", "p2.safetensors", "manifest.json"}
    assert not [name for name in written if name.startswith("p.") or name.endswith((".pt", ".py"))]
    assert sorted(os.listdir(tmp_path / "a")) == ["b"] and os.listdir(tmp_path / "a" / "b") == ["there"]


def test_a_damaged_file_is_refused_and_the_store_stays_as_it_was(hub: Hub, tmp_path: Path) -> None:
    store = a_store(tmp_path / "here")
    store.push_to_hub("me/personas", token=TOKEN)
    whole = store.path_of("templated", "p1").read_bytes()
    place = "org__tiny/answer_mean/templated/p1.safetensors"
    for damaged in (whole[:-1] + b"\x7f", whole[: len(whole) // 2], b"\x80\x04not safetensors"):
        hub.dataset("me/personas").commit({place: damaged})
        with pytest.raises(CorruptFileError, match=r"p1\.safetensors"):
            PersonaVectorStore.from_hub("me/personas", tmp_path / "there")
        assert not (tmp_path / "there" / place).exists()


def test_a_persona_computed_from_something_else_is_a_conflict(hub: Hub, tmp_path: Path) -> None:
    import msgspec

    a_store(tmp_path / "here").push_to_hub("me/personas", token=TOKEN)
    other = a_store(tmp_path / "there", provenance=msgspec.structs.replace(PROVENANCE, prompts_digest="other"))
    before = other.path_of("templated", "p1").read_bytes()
    with pytest.raises(StoreMismatchError, match="p1"):
        PersonaVectorStore.from_hub("me/personas", tmp_path / "there")
    assert other.path_of("templated", "p1").read_bytes() == before
    same = a_store(tmp_path / "same")
    assert PersonaVectorStore.from_hub("me/personas", tmp_path / "same").list_personas() == same.list_personas()


def test_an_empty_store_and_a_repository_without_vectors_are_told(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(NotStoredError, match=r"nothing is stored in .*org__tiny; extract it first"):
        PersonaVectorStore("org/tiny", tmp_path).push_to_hub("me/personas", token=TOKEN)
    hub.dataset("me/empty")
    with pytest.raises(NotStoredError, match="dataset 'me/empty' holds no vectors"):
        PersonaVectorStore.from_hub("me/empty", tmp_path)
    with pytest.raises(NotStoredError, match="cannot fetch dataset 'me/none'"):
        PersonaVectorStore.from_hub("me/none", tmp_path)
