"""One request brought to its result: sent, looked after, fetched; again where that may help, until its time is over.

What a run has sent and received is kept in a journal beside the store until the vectors are saved. A client that was
killed finds its jobs by what they computed: finished results are taken from disk, and jobs that the server still has
are asked for, not sent again. A journal is a convenience: losing it costs time, never a number.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from tl_persona.backends.base import OnStatus
from tl_persona.backends.remote.model import RemoteSettings
from tl_persona.backends.remote.transport import Look, OutOfTime, TransientFailure, Transport
from tl_persona.errors import RemoteUnavailableError
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


TRIES = 12
"""Failures in a row after which waiting longer is no use: with the default waits, some ten minutes."""

UNKNOWN_SECONDS = 60.0
"""For how long a server may not know a job that it has just taken, before the job counts as lost."""

FIRST_POLL_SECONDS = 0.05


class Jobs:
    """Brings requests to their results, one at a time.

    Args:
        transport: Speaks to the server.
        settings: Limits and waits.
        journal: Remembers jobs and results.
        on_status: Told of every change of a job's status, and of every retry.
    """

    def __init__(
        self, transport: Transport, settings: RemoteSettings, journal: Journal, on_status: OnStatus | None
    ) -> None:
        self._transport, self._settings, self._journal = transport, settings, journal
        self._tell: OnStatus = on_status or (lambda _job_id, _status, _description: None)

    def run(self, digest: str | None, make_blob: Callable[[], bytes], max_bytes: int) -> dict[str, Any]:
        """The result of a request.

        Args:
            digest: Names the request in the journal; None where it is not worth remembering.
            make_blob: Makes the request; called only where it has to be sent.
            max_bytes: The most that the result may have.

        Raises:
            RemoteUnavailableError: The server could not be reached, or did not finish, within the time.
            CapacityFailure: The request was too much for the server.
            RemoteRefusedError: It failed for good.
        """
        deadline = time.monotonic() + self._settings.timeout
        job_id = known = None if digest is None else self._journal.job(digest)
        seen: TransientFailure | None = None

        def note(state: RetryCallState) -> None:
            nonlocal seen
            error = state.outcome.exception() if state.outcome else None
            if isinstance(error, TransientFailure):
                seen = error
            self._tell(job_id or "", "RETRYING", f"{error}; again in {state.upcoming_sleep:.1f} s")

        retrying = Retrying(
            retry=retry_if_exception_type(TransientFailure),
            wait=wait_random_exponential(multiplier=self._settings.first_wait, max=self._settings.longest_wait),
            stop=lambda state: _no_time_left(state, deadline) or stop_after_attempt(TRIES)(state),
            before_sleep=note,
            reraise=True,
        )
        try:
            for attempt in retrying:
                with attempt:
                    if job_id is None:
                        job_id = self._transport.submit(make_blob(), deadline)
                        if digest is not None:
                            self._journal.sent(digest, job_id)
                    try:
                        return self._result(job_id, max_bytes, deadline, from_before=job_id == known)
                    except TransientFailure as failure:
                        if failure.job_lost:
                            job_id = None
                        raise
        except TransientFailure as failure:
            cause = seen if seen is not None and isinstance(failure, OutOfTime) else failure
            raise RemoteUnavailableError(
                f"the server at {self._settings.host} did not bring the job to its end ({cause}): run again to "
                f"continue where this stopped; a longer timeout than {self._settings.timeout:g} s gives it more time"
            ) from cause
        raise AssertionError("a retry ends in a result or an error")

    def _result(self, job_id: str, max_bytes: int, deadline: float, *, from_before: bool) -> dict[str, Any]:
        """Waits for a job and fetches its result; one from an earlier run may have been forgotten by the server."""
        begun = time.monotonic()
        pause = min(FIRST_POLL_SECONDS, self._settings.poll)
        status: str | None = None
        while True:
            look = self._transport.look(job_id, deadline)
            if look.status is not None and look.status != status:
                self._tell(job_id, look.status, look.description)
                status = look.status
            if look.status == "COMPLETED":
                return self._fetched(job_id, look, max_bytes, deadline)
            now = time.monotonic()
            if look.status is None and (from_before or status is not None or now - begun > UNKNOWN_SECONDS):
                raise TransientFailure(f"the server does not know job {job_id}", job_lost=True)
            if now >= deadline:
                raise OutOfTime(f"job {job_id} is {status or 'not begun'} and the time is over")
            time.sleep(min(pause, deadline - now))
            pause = min(pause * 1.5, self._settings.poll)

    def _fetched(self, job_id: str, look: Look, max_bytes: int, deadline: float) -> dict[str, Any]:
        for left in (2, 1, 0):
            try:
                return self._transport.fetch(look.address, max_bytes, deadline)
            except TransientFailure as failure:
                # An address grows stale, so it is asked for anew; a result that stays out of reach is computed anew.
                if failure.job_lost or left == 0:
                    raise TransientFailure(str(failure), job_lost=True) from failure
                self._tell(job_id, "RETRYING", str(failure))
                time.sleep(min(self._settings.first_wait, max(0.0, deadline - time.monotonic())))
                look = self._transport.look(job_id, deadline)
                if look.status != "COMPLETED":
                    raise TransientFailure(f"the result of job {job_id} is gone", job_lost=True) from failure
        raise AssertionError("the last attempt returns or raises")


def _no_time_left(state: RetryCallState, deadline: float) -> bool:
    return time.monotonic() + state.upcoming_sleep >= deadline
