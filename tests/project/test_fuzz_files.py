"""Any bytes in any file that is read: only this package's own errors come out, soon, and without much memory."""

import json
import math
import os
import pickle
import resource
import signal
import struct
import traceback
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest
import torch
from fuzzing import MODEL, TARGETS, archived, feed, recompressed, saved_by_torch, seeds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tl_persona.checking import check_saved
from tl_persona.cli.show import run as show
from tl_persona.data.contrast import ContrastPairDataset
from tl_persona.data.dataset import PersonaDataset
from tl_persona.errors import CorruptFileError, InputError, NotStoredError, StoreError, TLPersonaError
from tl_persona.store import PersonaVectorStore
from tl_persona.store.file import describe
from tl_persona.vectors import SteeringVector, SteeringVectorSet
from tl_persona.vectors.rotalabs import read_rotalabs

SECONDS = 60
MEMORY = 1_000 * 2**20

HOSTILE = [
    b"NaN", b"-Infinity", b"1e999", b"-0", b"9" * 5000, b"1" + b"0" * 400 + b".5", b"\\ud800", b'"\\u0000"', b"\0",
    b"\xff\xfe", b"\xef\xbb\xbf", b"null", b"true", b"{}", b"[]", b'""', b"[" * 2000, b'{"a":' * 2000, b"-1",
    b"18446744073709551616", b"0.5", b'"x"', b",", b":", b'"', b"}", b"\n", b"\r", b"\x85", b"..", b"/",
]  # fmt: skip


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def too_long(*_: object) -> None:
        raise TimeoutError(f"still at it after {seconds} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@st.composite
def spoilt(draw: st.DrawFn, good: list[bytes]) -> bytes:
    """Good bytes with pieces overwritten, cut, repeated or put in; lengths of a safetensors header follow, or not."""
    data = bytearray(draw(st.sampled_from(good)))
    length = int.from_bytes(data[:8], "little")
    has_header = 8 + length <= len(data)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(8 if has_header else 0, len(data)))
        stop = min(len(data), start + draw(st.integers(0, 30)))
        piece = draw(st.sampled_from(HOSTILE) | st.binary(max_size=6) | st.just(bytes(data[start:stop]) * 2))
        data[start:stop] = piece
        if has_header and start < 8 + length:
            length += len(piece) - (stop - start)
    if has_header and draw(st.booleans()):
        data[:8] = max(0, length).to_bytes(8, "little")
    return bytes(data)


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_spoilt_files_raise_only_our_own_errors(target: str, tmp_path: Path) -> None:
    good = seeds(target, tmp_path / "seeds")

    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(data=spoilt(good))
    def run(data: bytes) -> None:
        with time_limit(SECONDS):
            feed(target, tmp_path / "fed", data)

    run()


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_arbitrary_json_raises_only_our_own_errors(target: str, tmp_path: Path) -> None:
    names = sorted({name for data in seeds(target, tmp_path / "seeds") for name in _names_in(data)})
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from(names)
    documents = st.recursive(
        scalars,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.sampled_from(names) | st.text(max_size=4), inner, max_size=6)
        ),
        max_leaves=25,
    )

    @settings(max_examples=40, suppress_health_check=list(HealthCheck))
    @given(document=documents, lines=st.integers(1, 2), body=st.binary(max_size=24), framed=st.booleans())
    def run(document: object, lines: int, body: bytes, framed: bool) -> None:
        text = json.dumps(document).encode()
        data = len(text).to_bytes(8, "little") + text + body if framed else b"\n".join([text] * lines)
        with time_limit(SECONDS):
            feed(target, tmp_path / "fed", data)

    run()


def _names_in(data: bytes) -> set[str]:
    start = data.find(b"{")
    try:
        found, _ = json.JSONDecoder().raw_decode(data[start:].decode("utf-8", "ignore"))
    except ValueError:
        return {"activations"}

    def walk(value: object) -> Iterator[str]:
        if isinstance(value, dict):
            for name, inner in value.items():
                yield name
                yield from walk(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from walk(inner)

    return set(walk(found)) or {"activations"}


# Inputs that are small to write and would be large, or endless, to read


def framed(header: bytes, body: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def shaped(name: str, shape: list[int], size: int) -> bytes:
    entry = {"data_offsets": [0, size], "dtype": "F32", "shape": shape}
    return framed(json.dumps({name: entry}).encode(), bytes(size))


def bomb() -> bytes:
    """A megabyte of archive that would unfold to a gigabyte of zeros."""
    buffer = BytesIO()
    torch.save(torch.zeros(4), buffer)
    swollen = BytesIO()
    with zipfile.ZipFile(BytesIO(buffer.getvalue())) as old, zipfile.ZipFile(swollen, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            if name.endswith("/data/0"):
                with new.open(name, "w", force_zip64=True) as entry:
                    for _ in range(1024):
                        entry.write(bytes(2**20))
            else:
                new.writestr(name, old.read(name))
    return swollen.getvalue()


def beside(name: str, shape: list[int], extra: list[int]) -> bytes:
    """A tensor, and another of no numbers at all."""
    size = 4 * math.prod(shape)
    entries = {
        name: {"data_offsets": [0, size], "dtype": "F32", "shape": shape},
        "extra": {"data_offsets": [size, size], "dtype": "F32", "shape": extra},
    }
    return framed(json.dumps(entries).encode(), bytes(size))


def plain(stored: int, size: int, stride: int = 1) -> bytes:
    """A plain tensor's pickle, with claims of one's own."""
    numbers = pickle.BINUNICODE + struct.pack("<I", 7) + b"storage" + b"ctorch\nFloatStorage\n"
    numbers += b"X\x01\0\0\x000" + b"X\x03\0\0\0cpu" + b"J" + struct.pack("<i", stored)
    size_and_stride = b"J" + struct.pack("<i", size) + b"\x85" + b"J" + struct.pack("<i", stride) + b"\x85"
    start = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(("
    return start + numbers + b"tQK\0" + size_and_stride + b"\x89ccollections\nOrderedDict\n)RtR."


def calling(name: str, argument: int) -> bytes:
    module, _, what = name.rpartition(".")
    return b"\x80\x02c" + f"{module}\n{what}\n".encode() + b"J" + struct.pack("<i", argument) + b"\x85R."


def legacy() -> bytes:
    """A torch file of the time before archives, with an archive behind it."""
    buffer = BytesIO()
    torch.save(torch.ones(3), buffer, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("a", "b")
    return buffer.getvalue()


def claims_a_view() -> bytes:
    buffer = BytesIO()
    torch.save(torch.zeros(1).expand(2**40), buffer)
    return buffer.getvalue()


LARGE: dict[str, Callable[[], bytes]] = {
    "deep lists": lambda: b"[" * 3_000_000,
    "deep lists, closed": lambda: b"[" * 500_000 + b"]" * 500_000,
    "deep mappings": lambda: b'{"personas":' * 500_000,
    "deep in a field": lambda: b'{"id": "p1", "persona": ' + b'{"a": [' * 400_000,
    "a long number": lambda: b'{"id": ' + b"9" * 3_000_000 + b"}",
    "a long number in a header": lambda: framed(b'{"activations": {"shape": [' + b"9" * 1_000_000 + b"]}}"),
    "one endless line": lambda: b"x" * 20_000_000,
    "a line of nothing": lambda: b'{"id": "p1", "persona": {"a": [' + b"[]," * 300_000 + b"[]]}}",
    "a header of nothing": lambda: framed(b'{"a": [' + b"[]," * 6_000_000 + b"[]]}"),
    "many blank lines": lambda: b"\n" * 300_000,
    "a header as long as nothing": lambda: struct.pack("<Q", 2**63) + b"{}",
    "a header longer than the file": lambda: struct.pack("<Q", 99_999_999) + b"{}",
    "many layers of nothing": lambda: shaped("activations", [4_000_000_000, 0], 0),
    "wide layers of nothing": lambda: shaped("activations", [0, 4_000_000_000], 0),
    "a shape beyond counting": lambda: shaped("activations", [2**62, 4], 4),
    "a steering vector of nothing": lambda: shaped("vector", [0], 0),
    "an archive that unfolds": bomb,
    "a view that claims a trillion numbers": claims_a_view,
    "a huge tensor of nothing beside the vectors": lambda: beside("activations", [2, 3], [0, 2**64 - 1]),
    "a tensor beyond counting beside the vectors": lambda: beside("activations", [2, 3], [0, 2**63 - 1, 2**63 - 1]),
    "a huge tensor of nothing beside the vector": lambda: beside("vector", [3], [0, 2**64 - 1]),
    "a pickle that asks for memory": lambda: archived(calling("builtins.bytearray", 2**31 - 1)),
    "a pickle that stores more than there is": lambda: archived(plain(2**30, 2**30)),
    "a pickle that claims more than is stored": lambda: archived(plain(3, 2**30)),
    "a legacy file with an archive behind it": legacy,
}  # fmt: skip


@pytest.mark.parametrize("content", sorted(LARGE))
def test_small_files_cannot_cost_much_memory_or_time(content: str, tmp_path: Path) -> None:
    data = LARGE[content]()

    def run() -> None:
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, in_use + MEMORY))
        for target in sorted(TARGETS):
            with time_limit(SECONDS):
                feed(target, tmp_path / target, data)

    child = os.fork()
    if child == 0:
        code = 1
        try:
            run()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_compressed_archive_is_refused_though_it_is_harmless(tmp_path: Path) -> None:
    (tmp_path / "v.json").write_text(json.dumps({"behavior": "calm", "layer_index": 1, "model_name": MODEL}))
    (tmp_path / "v.pt").write_bytes(saved_by_torch())
    assert SteeringVector.load(tmp_path / "v").vector.tolist() == [1.0, 1.0, 1.0]
    (tmp_path / "v.pt").write_bytes(recompressed(saved_by_torch()))
    with pytest.raises(CorruptFileError, match="compressed"):
        SteeringVector.load(tmp_path / "v")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (archived(calling("builtins.bytearray", 500_000_000)), "asks for 'builtins bytearray'"),
        (archived(calling("torch.Tensor", 500_000_000)), "asks for 'torch Tensor'"),
        (archived(calling("torch.FloatTensor", 500_000_000)), "asks for 'torch FloatTensor'"),
        (archived(calling("torch.nn.parameter.Parameter", 500_000_000)), "asks for 'torch.nn.parameter Parameter'"),
        (archived(plain(4, 4)), "claims numbers 0 to 4 of 4, and has 12 bytes"),
        (archived(plain(3, 4)), "claims numbers 0 to 4 of 3"),
        (archived(plain(3, -1)), "claims numbers 0 to -1 of 3"),
        (archived(plain(3, 3, 0)), "do not lie side by side"),
        (archived(plain(3, 3)[:-1] + b"0."), "describes something else"),
        (archived(bytes(5000)), "longer than it can be"),
        (legacy(), "does not begin as an archive does"),
        (pickle.dumps([1.0]), "does not begin as an archive does"),
    ],
)
def test_a_pt_file_is_a_plain_tensor_that_is_all_there_or_says_what_it_is(
    tmp_path: Path, data: bytes, message: str
) -> None:
    (tmp_path / "v.json").write_text(json.dumps({"behavior": "calm", "layer_index": 1, "model_name": MODEL}))
    (tmp_path / "v.pt").write_bytes(archived(plain(3, 3)))
    assert SteeringVector.load(tmp_path / "v").vector.tolist() == [1.0, 1.0, 1.0]
    (tmp_path / "v.pt").write_bytes(data)
    with pytest.raises(CorruptFileError, match=message):
        SteeringVector.load(tmp_path / "v")


@pytest.mark.parametrize("extra", [[0, 2**64 - 1], [0, 2**63 - 1, 2**63 - 1], [0, 2**20]])
def test_what_lies_beside_the_vectors_of_a_persona_is_not_looked_at(tmp_path: Path, extra: list[int]) -> None:
    store = PersonaVectorStore(MODEL, tmp_path)
    path = store.path_of("templated", "p1")
    path.parent.mkdir(parents=True)
    path.write_bytes(beside("activations", [2, 3], extra))
    assert store.load("templated", "p1").equal(torch.zeros(2, 3))
    assert describe(path).shape == (2, 3)
    assert check_saved(path).problems == ()


# Pickles, pipes, devices and paths


class Dangerous:
    """Unpickling it would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.write_text, (self.target, "this ran")


@pytest.mark.parametrize("wrap", ["plain pickle", "torch archive", "legacy torch file"])
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pkl", ".safetensors"])
def test_no_pickle_is_run_whatever_it_is_called(tmp_path: Path, wrap: str, suffix: str) -> None:
    trap = tmp_path / "ran"
    if wrap == "plain pickle":
        data = pickle.dumps(Dangerous(trap))
    else:
        buffer = BytesIO()
        torch.save(Dangerous(trap), buffer, _use_new_zipfile_serialization=wrap == "torch archive")
        data = buffer.getvalue()
    (tmp_path / "v.json").write_text(json.dumps({"behavior": "calm", "layer_index": 1, "model_name": MODEL}))
    path = tmp_path / f"v{suffix}"
    path.write_bytes(data)
    store = PersonaVectorStore(MODEL, tmp_path / "root")
    stored = store.path_of("templated", "p1")
    stored.parent.mkdir(parents=True)
    stored.write_bytes(data)
    for call in (
        lambda: SteeringVector.load(path),
        lambda: describe(path),
        lambda: store.load("templated", "p1"),
    ):
        with pytest.raises(StoreError):
            call()
    assert not trap.exists()


def test_a_pickle_has_no_place_in_a_store(tmp_path: Path) -> None:
    store = PersonaVectorStore(MODEL, tmp_path)
    folder = store.path_of("templated", "p1").parent
    folder.mkdir(parents=True)
    for suffix in (".pt", ".bin", ".pkl"):
        torch.save({"activations": torch.ones(2, 3)}, folder / f"p1{suffix}")
    assert store.list_personas(["templated"]) == []
    with pytest.raises(NotStoredError):
        store.load("templated", "p1")


def test_pipes_and_devices_in_the_place_of_files_do_not_hang(tmp_path: Path) -> None:
    store = PersonaVectorStore(MODEL, tmp_path / "root")
    store.save("templated", "p1", "Ada", torch.ones(2, 3), ["q1"])
    folder = store.path_of("templated", "p1").parent
    os.mkfifo(folder / "p2.safetensors")
    for name in ("v.safetensors", "v.pt", "v.gguf"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "v.json").write_text(json.dumps({"behavior": "calm", "layer_index": 1, "model_name": MODEL}))
    with time_limit(SECONDS):
        assert store.list_personas(["templated"]) == ["p1"]
        (folder / "p3.safetensors").symlink_to("/dev/zero")
        for call in (
            lambda: store.load("templated", "p2"),
            lambda: store.load("templated", "p3"),
            lambda: describe(folder / "p2.safetensors"),
            lambda: describe(folder / "p3.safetensors"),
            lambda: SteeringVector.load(tmp_path / "v.safetensors"),
            lambda: show(Namespace(path=str(tmp_path / "v.safetensors"))),
            lambda: read_rotalabs(tmp_path / "v.json", tmp_path / "v.pt"),
            lambda: SteeringVectorSet.import_gguf(tmp_path / "v.gguf"),
        ):
            with pytest.raises(StoreError, match=r"pipe or a device|outside"):
                call()
        (folder / "p3.safetensors").unlink()
        for name in ("manifest.pending", ".manifest.times"):
            (folder / name).unlink(missing_ok=True)
            os.mkfifo(folder / name)
        assert store.list_personas(["templated"]) == ["p1"]
        (folder / "manifest.json").unlink()
        os.mkfifo(folder / "manifest.json")
        with pytest.raises(StoreError, match="pipe or a device"):
            store.list_personas(["templated"])


@pytest.mark.parametrize("name", ["../p1", "..", "/etc/passwd", "a/../../p1", "p1\0", ".manifest", "~/p1", "C:\\p1"])
def test_ids_and_names_that_lead_elsewhere_are_refused_for_reading_too(tmp_path: Path, name: str) -> None:
    (tmp_path / "p1.safetensors").write_bytes(b"secret")
    store = PersonaVectorStore(MODEL, tmp_path / "root")
    for call in (
        lambda: store.load("templated", name),
        lambda: store.load(name, "p1"),
        lambda: store.load("templated", "p1", name),
        lambda: store.list_personas([name]),
        lambda: store.persona_sample_ids("templated", name),
        lambda: store.provenance(name, "p1"),
        lambda: store.rebuild_manifest(name),
    ):
        with pytest.raises(InputError):
            call()
    if name.strip("~/") != "p1":
        with pytest.raises(InputError):
            PersonaVectorStore(name, tmp_path / "root")


@pytest.mark.parametrize("what", ["model", "strategy", "variant", "file"])
def test_nothing_is_read_through_a_link_that_leads_out(tmp_path: Path, what: str) -> None:
    elsewhere = PersonaVectorStore(MODEL, tmp_path / "elsewhere")
    folder = elsewhere.save("templated", "p1", "Ada", torch.ones(2, 3), ["q1"])
    store = PersonaVectorStore(MODEL, tmp_path / "root")
    place = store.path_of("templated", "p1")
    levels = {"file": 0, "variant": 1, "strategy": 2, "model": 3}[what]
    link, target = [place, *place.parents][levels], [folder / "p1.safetensors", folder, *folder.parents][levels]
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    calls = [
        lambda: store.load("templated", "p1"),
        lambda: store.provenance("templated", "p1"),
        lambda: store.persona_sample_ids("templated", "p1"),
    ]
    if what != "file":
        calls += [lambda: store.list_personas(["templated"]), lambda: store.rebuild_manifest("templated")]
    for call in calls:
        with pytest.raises(StoreError, match="outside"):
            call()
    assert store.stored_digest("templated", "p1") is None


def test_a_link_within_the_store_is_followed(tmp_path: Path) -> None:
    store = PersonaVectorStore(MODEL, tmp_path / "root")
    folder = store.save("templated", "p1", "Ada", torch.ones(2, 3), ["q1"])
    (folder.parent / "biography").symlink_to(folder)
    assert store.load("biography", "p1").equal(torch.ones(2, 3))


def test_files_that_are_folders_are_our_errors(tmp_path: Path) -> None:
    for call in (
        lambda: ContrastPairDataset.load(tmp_path),
        lambda: PersonaDataset(tmp_path, tmp_path),
        lambda: SteeringVector.load(tmp_path),
        lambda: describe(tmp_path),
    ):
        with pytest.raises(TLPersonaError):
            call()
