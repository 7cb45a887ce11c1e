"""What a run has sent and received, kept beside the store until the vectors are saved.

A client that was killed finds its jobs by what they computed: finished results are taken from disk, and jobs that the
server still has are asked for, not sent again. A journal is a convenience: losing it costs time, never a number.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from tl_persona.files import make_folder, write_atomically

_SUFFIXES = (".json", ".result")
_CHECKSUM_BYTES = hashlib.sha256().digest_size


class Journal:
    """Jobs and results by the digest of their request.

    Args:
        folder: Where to keep them; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._touched: set[Path] = set()

    def job(self, digest: str) -> str | None:
        """The id of the job that was sent for a request, if it was."""
        path = self._path(digest, ".json")
        if path is None:
            return None
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError):  # absent or damaged: the request is sent again
            return None
        job_id = found.get("job_id") if isinstance(found, dict) else None
        return job_id if isinstance(job_id, str) else None

    def sent(self, digest: str, job_id: str) -> None:
        """Notes that a request was sent.

        Raises:
            StoreError: The folder cannot be written.
        """
        self._write(digest, ".json", json.dumps({"job_id": job_id}).encode())

    def result(self, digest: str) -> dict[str, torch.Tensor] | None:
        """The result of a request, if it was received."""
        path = self._path(digest, ".result")
        if path is None:
            return None
        try:
            data = path.read_bytes()
            checksum, tensors = data[:_CHECKSUM_BYTES], data[_CHECKSUM_BYTES:]
            return load(tensors) if hashlib.sha256(tensors).digest() == checksum else None
        except (OSError, SafetensorError, ValueError):  # absent or damaged: it is asked for again
            return None

    def received(self, digest: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keeps a result.

        Raises:
            StoreError: The folder cannot be written.
        """
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        self._write(digest, ".result", hashlib.sha256(data).digest() + data)

    def clear(self) -> None:
        """Forgets what this process asked for: it is saved elsewhere now."""
        for path in self._touched:
            path.unlink(missing_ok=True)
        self._touched.clear()

    def _path(self, digest: str, suffix: str) -> Path | None:
        if self._folder is None:
            return None
        self._touched |= {self._folder / f"{digest}{either}" for either in _SUFFIXES}
        return self._folder / f"{digest}{suffix}"

    def _write(self, digest: str, suffix: str, data: bytes) -> None:
        path = self._path(digest, suffix)
        if path is None:
            return
        make_folder(path.parent)
        write_atomically(path, data)


def request_digest(*parts: Any) -> str:
    """A name for a request, from all that decides its result: texts, numbers and tensors, nested in any way."""
    hasher = hashlib.sha256()
    _feed(hasher, parts)
    return hasher.hexdigest()[:32]


def _feed(hasher: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        hasher.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        hasher.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        hasher.update(f"mapping {len(value)};".encode())
        for name in sorted(value):
            _feed(hasher, name)
            _feed(hasher, value[name])
    elif isinstance(value, tuple | list):
        hasher.update(f"sequence {len(value)};".encode())
        for item in value:
            _feed(hasher, item)
    else:
        text = repr(value)
        hasher.update(f"{type(value).__name__} {len(text)} {text};".encode())
