"""Everything that is read from files, as targets to be fed with any bytes; what hypothesis and atheris share.

A target writes the bytes where its files belong and reads them as users do. Only `TLPersonaError` may come out of it,
and it says nothing of time and memory: whoever feeds it sets limits.
"""

import contextlib
import hashlib
import json
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import torch

from tl_persona.checking import check_saved
from tl_persona.cli.show import is_steering
from tl_persona.data.contrast import ContrastPairDataset
from tl_persona.data.dataset import PersonaDataset, related_frq_qids
from tl_persona.data.personas import answer_text, question_text
from tl_persona.errors import TLPersonaError
from tl_persona.provenance import Provenance
from tl_persona.store import PersonaVectorStore
from tl_persona.store.file import describe, encode
from tl_persona.store.merge import merge_stores
from tl_persona.vectors import SteeringVector, SteeringVectorSet

MODEL = "org/tiny"
VECTORS = torch.tensor([[1.0, 2.0, 2.0], [-3.0, 0.0, 4.0]])
PROVENANCE = Provenance(
    model_name=MODEL,
    revision=None,
    dtype="float32",
    weights="unprocessed",
    hook_names=("blocks.0.hook_resid_post", "blocks.1.hook_resid_post"),
    strategy="answer_mean",
    prompts_digest="d",
    sample_ids=("q1",),
)

PERSONA_LINE = {"id": "p1", "persona": {"first_name": "Ada"}, "templated_view": "Name: Ada", "biography_view": "Ada."}
QA_LINE = {
    "id": "p1",
    "qid": "q1",
    "type": "explicit",
    "item_type": "mcq",
    "scope": "shared",
    "question": "Tea?",
    "answer": "Yes",
    "choices": ["Yes", "No"],
    "correct_choice_index": 0,
    "bank_id": "b1",
    "related_frq_qids": ["q2"],
}
PAIRS = {
    "behavior": "calm",
    "description": "",
    "pairs": [
        {"positive": "Yes.", "negative": "No.", "metadata": {"n": 1}},
        {
            "positive": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}],
            "negative": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "What."}],
        },
    ],
}


def _encoded(value: object) -> bytes:
    return json.dumps(value).encode()


def _personas(folder: Path, data: bytes) -> None:
    (folder / "personas").write_bytes(data)
    (folder / "qa").write_bytes(b"")
    for persona in PersonaDataset(folder / "personas", folder / "qa"):
        assert persona.name and persona.id


def _questions(folder: Path, data: bytes) -> None:
    (folder / "personas").write_bytes(_encoded(PERSONA_LINE))
    (folder / "qa").write_bytes(data)
    dataset = PersonaDataset(folder / "personas", folder / "qa")
    for pair in dataset.get_qa("p1"):
        question_text(pair), answer_text(pair)
    dataset.train_test_split("p1")


def _bank(folder: Path, data: bytes) -> None:
    (folder / "bank").write_bytes(data)
    related_frq_qids(folder / "bank")


def _pairs(folder: Path, data: bytes) -> None:
    (folder / "pairs").write_bytes(data)
    loaded = ContrastPairDataset.load(folder / "pairs")
    loaded.digest()
    loaded.save(folder / "again")
    assert ContrastPairDataset.load(folder / "again") == loaded


def _store(folder: Path) -> tuple[PersonaVectorStore, Path]:
    store = PersonaVectorStore(MODEL, folder / "root")
    place = store.path_of("templated", "p1").parent
    place.mkdir(parents=True)
    return store, place


def _each(*calls: Callable[[], object]) -> None:
    """All of them, each whatever the others do."""
    for call in calls:
        with contextlib.suppress(TLPersonaError):
            call()


def _use(store: PersonaVectorStore, persona_id: str) -> None:
    """Every way of reading and writing."""
    place = store.path_of("templated", persona_id)
    _each(
        lambda: store.load("templated", persona_id),
        lambda: store.status("templated", persona_id, PROVENANCE),
        lambda: store.provenance("templated", persona_id),
        lambda: store.stored_digest("templated", persona_id),
        lambda: store.persona_sample_ids("templated", persona_id),
        lambda: describe(place),
        lambda: store.list_personas(["templated"]),
        lambda: store.persona_names([persona_id], ["templated"]),
        lambda: store.list_layers(["templated"]),
        lambda: check_saved(store.root_dir),
        lambda: merge_stores([store.root_dir], store.root_dir.with_name("merged")),
        lambda: store.save("templated", "p2", "Bo", VECTORS, ["q1"], provenance=PROVENANCE),
        lambda: store.rebuild_manifest("templated"),
        lambda: store.flush(),
        lambda: check_saved(store.root_dir, repair=True),
    )


def _persona_vector(folder: Path, data: bytes) -> None:
    store, place = _store(folder)
    (place / "p1.safetensors").write_bytes(data)
    _use(store, "p1")


def _index(name: str) -> Callable[[Path, bytes], None]:
    def target(folder: Path, data: bytes) -> None:
        store, place = _store(folder)
        store.save("templated", "p1", "Ada", VECTORS, ["q1"], provenance=PROVENANCE)
        (place / name).write_bytes(data)
        _use(store, "p1")
        if name != "manifest.json":  # A manifest of a later version is left alone, and so is everything beside it.
            assert store.persona_names(["p1"], ["templated"]) == {"p1": "Ada"}
        assert store.load("templated", "p1").equal(VECTORS)

    return target


def _use_vector(path: Path) -> None:
    _each(
        lambda: is_steering(path),
        lambda: SteeringVector.load(path).save(path.with_name("again")),
        lambda: check_saved(path.parent),
    )


def _use_set(folder: Path) -> None:
    _each(lambda: len(SteeringVectorSet.load(folder)), lambda: check_saved(folder))


def _steering_vector(folder: Path, data: bytes) -> None:
    (folder / "v.safetensors").write_bytes(data)
    _use_vector(folder / "v.safetensors")


def _set(folder: Path, data: bytes) -> None:
    _saved_set(folder)
    (folder / "metadata.json").write_bytes(data)
    _use_set(folder)


def _layer_of_a_set(folder: Path, data: bytes) -> None:
    """A file that its set vouches for, in its place and where a killed save leaves it."""
    digest = hashlib.sha256(data).hexdigest()
    metadata = {"format": "tl_persona.steering_vector_set", "format_version": "1", "behavior": "calm", "layers": [1]}
    (folder / "metadata.json").write_bytes(_encoded({**metadata, "sha256": {"1": digest}}))
    (folder / "layer_1.safetensors").write_bytes(data)
    _use_set(folder)
    (folder / ".set.next").mkdir()
    (folder / "layer_1.safetensors").rename(folder / ".set.next" / f"{digest}.safetensors")
    _use_set(folder)


def _rotalabs_text(folder: Path, data: bytes) -> None:
    torch.save(torch.ones(3), folder / "v.pt")
    (folder / "v.json").write_bytes(data)
    _use_vector(folder / "v.pt")


def _rotalabs_tensor(folder: Path, data: bytes) -> None:
    (folder / "metadata.json").write_bytes(_encoded({"behavior": "calm", "layers": [1]}))
    (folder / "layer_1.json").write_bytes(_encoded({"behavior": "calm", "layer_index": 1, "model_name": MODEL}))
    (folder / "layer_1.pt").write_bytes(data)
    _use_vector(folder / "layer_1.pt")
    _use_set(folder)


def _rotalabs_pickle(folder: Path, data: bytes) -> None:
    _rotalabs_tensor(folder, archived(data))


def _control_vector(folder: Path, data: bytes) -> None:
    (folder / "v.gguf").write_bytes(data)
    SteeringVectorSet.import_gguf(folder / "v.gguf").save(folder / "set")


def _saved_set(folder: Path) -> bytes:
    _a_set().save(folder)
    return (folder / "metadata.json").read_bytes()


def _a_set() -> SteeringVectorSet:
    vectors = [SteeringVector("calm", layer, torch.ones(3) * layer, MODEL) for layer in (1, 2)]
    return SteeringVectorSet("calm", vectors)


TARGETS: dict[str, Callable[[Path, bytes], None]] = {
    "personas": _personas,
    "questions": _questions,
    "item bank": _bank,
    "pairs": _pairs,
    "persona vector": _persona_vector,
    "manifest": _index("manifest.json"),
    "pending entries": _index("manifest.pending"),
    "times": _index(".manifest.times"),
    "steering vector": _steering_vector,
    "set": _set,
    "layer of a set": _layer_of_a_set,
    "control vector": _control_vector,
    "rotalabs text": _rotalabs_text,
    "rotalabs tensor": _rotalabs_tensor,
    "rotalabs pickle": _rotalabs_pickle,
}


def feed(target: str, folder: Path, data: bytes) -> None:
    """Feed a target in an empty folder; errors of the package's own are what should come of bad input."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with warnings.catch_warnings(), contextlib.suppress(TLPersonaError):
        warnings.simplefilter("ignore")
        TARGETS[target](folder, data)


def seeds(target: str, folder: Path) -> list[bytes]:
    """Good input of a target, to be spoilt."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    whole = encode(VECTORS, persona_id="p1", persona_name="Ada", sample_ids=["q1"], provenance=PROVENANCE)
    if target in ("manifest", "pending entries", "times"):
        return list(_index_seeds(target, folder))
    if target == "persona vector":
        foreign = b'{"activations":{"data_offsets":[0,24],"dtype":"F32","shape":[2,3]}}'
        return [whole, len(foreign).to_bytes(8, "little") + foreign + bytes(24)]
    if target == "steering vector":
        path = SteeringVector("calm", 1, torch.ones(3), MODEL, provenance=PROVENANCE).save(folder / "v")
        return [path.read_bytes()]
    if target == "set":
        return [_saved_set(folder), _encoded({"behavior": "calm", "layers": [1, 2]})]
    if target == "layer of a set":
        _saved_set(folder)
        return [(folder / "layer_1.safetensors").read_bytes()]
    if target == "control vector":
        return [_a_set().export_gguf(folder / "v.gguf").read_bytes(), _foreign_gguf()]
    if target == "rotalabs tensor":
        return [saved_by_torch(), recompressed(saved_by_torch())]
    if target == "rotalabs pickle":
        with zipfile.ZipFile(BytesIO(saved_by_torch())) as archive:
            return [archive.read("archive/data.pkl")]
    texts = {
        "personas": [PERSONA_LINE],
        "questions": [QA_LINE, QA_LINE | {"qid": "q2", "item_type": "frq", "scope": "individual"}],
        "item bank": [{"items": [{"bank_id": "b1", "related_frq_qids": ["f1"]}]}],
        "pairs": [PAIRS],
        "rotalabs text": [{"behavior": "calm", "layer_index": 1, "model_name": MODEL, "metadata": {}}],
    }
    return [b"\n".join(map(_encoded, texts[target]))]


def saved_by_torch() -> bytes:
    buffer = BytesIO()
    torch.save(torch.ones(3), buffer)
    return buffer.getvalue()


def archived(program: bytes) -> bytes:
    """What torch saves, with another pickle in it."""
    buffer = BytesIO()
    with zipfile.ZipFile(BytesIO(saved_by_torch())) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            new.writestr(name, program if name.endswith("data.pkl") else old.read(name))
    return buffer.getvalue()


def _foreign_gguf() -> bytes:
    """A control vector as other programs write it, which vouches for nothing."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    header += text("general.architecture") + struct.pack("<I", 8) + text("controlvector")
    header += text("direction.5") + struct.pack("<IQIQ", 1, 3, 0, 0)
    return header.ljust(-(-len(header) // 32) * 32, b"\0") + struct.pack("<3f", 1, 2, 3)


def recompressed(archive: bytes) -> bytes:
    """The same archive with its entries compressed, as torch never writes them."""
    buffer = BytesIO()
    with (
        zipfile.ZipFile(BytesIO(archive)) as old,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return buffer.getvalue()


def _index_seeds(target: str, folder: Path) -> Iterator[bytes]:
    from tl_persona.store import manifest

    name = {"manifest": "manifest.json", "pending entries": "manifest.pending", "times": ".manifest.times"}[target]
    before = manifest.SMALL, manifest.PENDING_SHARE
    try:
        store, place = _store(folder)
        store.save("templated", "p1", "Ada", VECTORS, ["q1"], provenance=PROVENANCE)
        manifest.SMALL, manifest.PENDING_SHARE = 0, 0
        store.save("templated", "p1", "Ada", VECTORS, ["q1"], provenance=PROVENANCE)
        yield (place / name).read_bytes()
    finally:
        manifest.SMALL, manifest.PENDING_SHARE = before
