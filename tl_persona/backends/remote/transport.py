"""Requests to an NDIF server over HTTP: submitting a job, asking for it, fetching its result; every wait has an end.

nnsight's own client waits without one, and unpickles whatever is sent. This one speaks the same protocol in its
polling form, which a dropped connection does not hurt, bounds what it reads, and loads tensors and plain values only.

A failure calls for trying again, asking for less, or giving up. Servers put their failures into words, with no
structure beyond what is read here. What is not recognised is taken for a fault of the request, which another try would
meet again.
"""

import io
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import httpx
import torch
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status
from pydantic import ValidationError

from tl_persona.backends.remote.model import RemoteSettings, check_url
from tl_persona.errors import InputError, RemoteError, RemoteRefusedError


class TransientFailure(RemoteError):
    """May go well the next time.

    Args:
        message: What was seen.
        job_lost: Whether the job will not come to an end any more, so that it must be sent again.
    """

    def __init__(self, message: str, *, job_lost: bool = False) -> None:
        super().__init__(message)
        self.job_lost = job_lost


class OutOfTime(TransientFailure):
    """The deadline of this client has passed; what went before it says more."""


class CapacityFailure(RemoteError):
    """Too much for the server at once.

    Args:
        message: What was seen.
        of_memory: False where it was time that ran out.
    """

    def __init__(self, message: str, *, of_memory: bool = True) -> None:
        super().__init__(message)
        self.of_memory = of_memory


_OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "can't allocate memory")
_OUT_OF_TIME = "exceeded the execution timeout"
_PASSING = ("try again", "cancelled or preempted", "reconnecting")
_NO_MODEL = "Could not deploy this model"
_MISSING_MODULE = ("ModuleNotFoundError", "ImportError")


def of_job(description: str, meta: Mapping[str, Any] | None) -> RemoteError:
    """The failure that a job ended in, from the server's description and report."""
    last = _last_line(description)
    if (meta is not None and "alloc_shortfall_by_gpu" in meta) or any(word in last for word in _OUT_OF_MEMORY):
        return CapacityFailure(f"out of memory on the server: {last}")
    if _OUT_OF_TIME in description:
        return CapacityFailure(f"out of time on the server: {last}", of_memory=False)
    if _NO_MODEL in description:
        return RemoteRefusedError(
            f"the server cannot run this model now: {last}: see which models are up with nnsight.ndif_status(), or "
            "ask its operators"
        )
    if any(word.lower() in description.lower() for word in _PASSING):
        return TransientFailure(f"the server lost the job: {last}", job_lost=True)
    if any(word in last for word in _MISSING_MODULE):
        return RemoteRefusedError(
            f"the server cannot load the request ({last}): its versions of nnsight, transformers or torch differ too "
            "much from those here; compare them with nnsight.ndif.compare()"
        )
    return RemoteRefusedError(f"the request failed on the server: {last}: the model or the versions there may differ")


def of_answer(status: int, detail: str) -> RemoteError:
    """The failure that an HTTP status stands for; `detail` is what the answer said, without secrets."""
    said = f" ({_last_line(detail)})" if detail.strip() else ""
    if status == 401:
        return RemoteRefusedError(f"the server wants an API key{said}: set NDIF_API_KEY")
    if status == 403:
        return RemoteRefusedError(f"the server does not accept this API key for this model{said}: check NDIF_API_KEY")
    if status in (408, 425, 429) or status >= 500:
        return TransientFailure(f"the server answered {status}{said}")
    if "key" in detail.lower():
        return RemoteRefusedError(f"the server does not take the API key{said}: check NDIF_API_KEY")
    return RemoteRefusedError(
        f"the server refused the request with {status}{said}: check its address, and that its nnsight fits the one here"
    )


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no reason given"


CONNECT_SECONDS = 10.0
"""For a connection; a server that is up answers at once."""

READ_SECONDS = 60.0
"""Between two pieces of an answer."""

MESSAGE_BYTES = 1 << 20
"""The most that any answer but a result may have."""

_HIDDEN = "<key>"


class Look(NamedTuple):
    """What a look at a job showed.

    Attributes:
        status: The job's status, or None where the server has none of it (yet, or any more).
        description: The server's words.
        address: Where the result is, once the job is completed.
    """

    status: str | None
    description: str = ""
    address: str = ""


class Transport:
    """One model on one server.

    Args:
        settings: The server and the key.
        model_key: What the server calls the model.
        env: nnsight's per-request environment of the model.
    """

    def __init__(self, settings: RemoteSettings, model_key: str, env: dict[str, Any]) -> None:
        self._settings = settings
        self._envelope = RequestModel(model_key=model_key, compress=True, env=env).metadata()

    def submit(self, blob: bytes, deadline: float) -> str:
        """Sends a request and gives the id of its job.

        Args:
            blob: The request, as `backends.remote.tracing.serialize` makes it.
            deadline: By `time.monotonic`.

        Raises:
            TransientFailure: The server cannot be reached, or not now.
            RemoteRefusedError: It does not take the request.
        """
        headers = {"ndif-timestamp": repr(time.time()), "nnsight-version": version("nnsight")}
        headers["python-version"] = sys.version
        body = self._read(
            "POST",
            f"{self._settings.host}/request",
            MESSAGE_BYTES,
            deadline,
            headers=headers | self._key(),
            data={"data": self._envelope},
            files={"blob": ("request", blob, "application/octet-stream")},
        )
        return str(self._message(body).id)

    def look(self, job_id: str, deadline: float) -> Look:
        """Asks how a job is.

        Raises:
            TransientFailure: The server cannot be reached, or the job is lost.
            CapacityFailure: The job was too much for the server.
            RemoteRefusedError: The job failed for good.
        """
        try:
            body = self._read(
                "GET", f"{self._settings.host}/response/{job_id}", MESSAGE_BYTES, deadline, headers=self._key()
            )
        except _NotThere:
            return Look(None)
        message = self._message(body)
        if message.status == Status.ERROR:
            raise of_job(self._safe(message.description), message.meta)
        address = message.data if message.status == Status.COMPLETED else ""
        if not isinstance(address, str):
            raise TransientFailure(f"the result of job {job_id} has no address", job_lost=True)
        return Look(message.status.value, self._safe(message.description), address)

    def fetch(self, address: str, max_bytes: int, deadline: float) -> dict[str, Any]:
        """Downloads a result.

        Args:
            address: Where it is.
            max_bytes: The most that it may have, unpacked.
            deadline: By `time.monotonic`.

        Raises:
            TransientFailure: It cannot be downloaded or is not what a server sends.
            RemoteRefusedError: It is larger than what was asked for, or lies where it should not be fetched from.
        """
        try:
            check_url(address, allow_http=self._settings.allow_http)
        except InputError as error:
            raise RemoteRefusedError(f"the server keeps the result where it is not safe to fetch: {error}") from error
        try:
            packed = self._read("GET", address, max_bytes + MESSAGE_BYTES, deadline)  # no key: it is another server's
        except _NotThere as error:
            raise TransientFailure("the result is not where the server said") from error
        return _loaded(packed, max_bytes)

    def _read(self, method: str, url: str, max_bytes: int, deadline: float, **request: Any) -> bytes:
        """The body of an answer, read piece by piece so that neither its size nor its pace can hold us up."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise OutOfTime("the time is over")
        timeout = httpx.Timeout(min(READ_SECONDS, left), connect=min(CONNECT_SECONDS, left))
        try:
            with httpx.Client(timeout=timeout) as client, client.stream(method, url, **request) as answer:
                body = b"".join(_pieces(answer, max_bytes, deadline))
                if answer.status_code == 404 and method == "GET":
                    raise _NotThere(url)
                if answer.status_code != 200:
                    raise of_answer(answer.status_code, self._safe(_detail(body)))
                return body
        except httpx.HTTPError as error:
            raise TransientFailure(self._safe(f"{type(error).__name__}: {error}")) from error

    def _message(self, body: bytes) -> ResponseModel:
        try:
            return ResponseModel.model_validate_json(body)
        except ValidationError as error:
            raise TransientFailure(f"the server's answer is no message of the protocol: {_start(body)}") from error

    def _key(self) -> dict[str, str]:
        return {"ndif-api-key": self._settings.api_key} if self._settings.api_key else {}

    def _safe(self, text: str) -> str:
        """A text of the server's without the key, which some of its errors repeat."""
        return text.replace(self._settings.api_key, _HIDDEN) if self._settings.api_key else text


class _NotThere(Exception):
    """The server answered 404."""


def _pieces(answer: httpx.Response, max_bytes: int, deadline: float) -> Iterator[bytes]:
    length = 0
    for piece in answer.iter_bytes():
        length += len(piece)
        if length > max_bytes:
            raise RemoteRefusedError(f"the server sends more than the {max_bytes:,} bytes that were asked for")
        if time.monotonic() > deadline:
            raise OutOfTime("the time is over, with the answer half read")
        yield piece


def _loaded(packed: bytes, max_bytes: int) -> dict[str, Any]:
    import zstandard

    try:
        # A frame may claim any size, so it is unpacked as a stream, and no further than what was asked for.
        unpacked = zstandard.ZstdDecompressor().stream_reader(packed).read(max_bytes + 1)
        if len(unpacked) > max_bytes:
            raise RemoteRefusedError(f"the result is larger than the {max_bytes:,} bytes that were asked for")
        saved = torch.load(io.BytesIO(unpacked), map_location="cpu", weights_only=True)
    except RemoteRefusedError:
        raise
    # torch.load raises whatever its input leads it to; each of these means that the bytes are not a result.
    except Exception as error:
        raise TransientFailure(f"the result cannot be read ({type(error).__name__})", job_lost=True) from error
    if not isinstance(saved, dict):
        raise TransientFailure(f"the result is a {type(saved).__name__}, not a mapping", job_lost=True)
    return saved


def _detail(body: bytes) -> str:
    import json

    try:
        found = json.loads(body)
    except ValueError:
        return _start(body)
    return str(found.get("detail", "")) if isinstance(found, dict) else str(found)


def _start(body: bytes) -> str:
    return body[:200].decode("utf-8", "replace")
