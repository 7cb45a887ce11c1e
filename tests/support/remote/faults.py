"""What may go wrong with a request, as values that a test scripts: `standin.script(Dropped(), OutOfMemory(times=2))`.

Each class is one way to fail; the texts are those a client recognises a failure by. Nothing is done here: `jobs` and
`wire` ask a request's fault at every stage. `at` names a stage:

    "subscribe"   the client opens its websocket (blocking clients only), before it sends anything
    "request"     the client has sent its request and waits for the answer
    "QUEUED", "DISPATCHED", "RUNNING", "COMPLETED"   before this status is sent
    "poll"        the client asks for the status of a job (non-blocking clients only)
    "download"    the client fetches a result by its address
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

STAGES = ("subscribe", "request", "QUEUED", "DISPATCHED", "RUNNING", "COMPLETED", "poll", "download")


@dataclass(frozen=True)
class Fault:
    """A request that goes well; the base of those that do not.

    Attributes:
        times: How many requests in a row it befalls, where it is scripted.
    """

    times: int = field(default=1, kw_only=True)


@dataclass(frozen=True)
class Staged(Fault):
    """A fault that strikes at one stage.

    Attributes:
        at: The stage.
    """

    at: str = "RUNNING"

    def __post_init__(self) -> None:
        if self.at not in STAGES:
            raise ValueError(f"no stage {self.at!r}: take one of {', '.join(STAGES)}")


@dataclass(frozen=True)
class Dropped(Staged):
    """The connection ends without a word at `at`. The job goes on, but at "subscribe" and "request" there is none.

    Attributes:
        reset: Whether it ends by a reset instead of an end of stream.
    """

    reset: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class ShutDown(Staged):
    """The server closes the websocket in order, as it does where it restarts. The job is lost with it."""


@dataclass(frozen=True)
class Silent(Staged):
    """Nothing comes any more from `at` on; the connection stays open and the job does not run (if it has not yet)."""


@dataclass(frozen=True)
class Slow(Staged):
    """What is sent at `at` comes late.

    Attributes:
        seconds: How late.
    """

    seconds: float = field(default=1.0, kw_only=True)


@dataclass(frozen=True)
class Trickle(Staged):
    """The answer at "poll" or "download" comes in pieces, each of them soon enough and all of them late.

    Attributes:
        pieces: In how many.
        seconds: How long after each other.
    """

    at: str = "download"
    pieces: int = field(default=20, kw_only=True)
    seconds: float = field(default=0.1, kw_only=True)

    def __post_init__(self) -> None:
        if self.at not in ("poll", "download"):
            raise ValueError(f"no answer with a body at {self.at!r}: take poll or download")


@dataclass(frozen=True)
class Rejected(Fault):
    """The request is answered with an HTTP error, and there is no job.

    Attributes:
        status: The HTTP status.
        detail: What the answer's body says.
    """

    status: int = 503
    detail: str = "Service temporarily unavailable: compute backend is reconnecting. Please try again in a few minutes."


@dataclass(frozen=True)
class ServerSays(Fault):
    """The job ends in an error of the server's own, and does not run.

    Attributes:
        text: The description that the client gets.
        meta: What the server reports of the run; None where it did not come to that.
    """

    text: str
    meta: dict[str, Any] | None = None


@dataclass(frozen=True)
class OutOfMemory(Fault):
    """An allocator refuses while the request runs, so its error has the path of a genuine one.

    Attributes:
        above_layers: Only where the request runs more different layers than this (skipped ones do not count).
        above_tokens: Only where the request runs more tokens than this through a layer, over all its forwards.
            With neither bound, the first layer that runs is too much.
        device: "cuda" or "cpu".
    """

    above_layers: int | None = None
    above_tokens: int | None = None
    device: str = "cuda"


@dataclass(frozen=True)
class ByAddress(Fault):
    """No fault: a small result, too, comes as an address to fetch it from.

    Attributes:
        address: Another address than that of the result; None for the right one.
    """

    address: str | None = None


@dataclass(frozen=True)
class DownloadFails(Fault):
    """The result comes as an address, and fetching it fails.

    Attributes:
        status: The HTTP status; None where the connection ends in the middle of the body.
        downloads: How many attempts fail before one goes well; None for all.
    """

    status: int | None = 500
    downloads: int | None = None


@dataclass(frozen=True)
class PollFails(Fault):
    """Asking for the status of the job fails.

    Attributes:
        status: The HTTP status; None where the connection ends without an answer.
        polls: How many attempts fail before one goes well; None for all.
    """

    status: int | None = 500
    polls: int | None = 1


@dataclass(frozen=True)
class Garbage(Fault):
    """The job runs, and its result arrives as nonsense.

    Attributes:
        of: "result" (the saved values are no archive), "half" (they are cut off) or "frame" (the message that carries
            them is nonsense itself).
    """

    of: str = "result"


@dataclass(frozen=True)
class Altered(Fault):
    """The job runs, and its result is changed before it is sent.

    Attributes:
        change: Given the saved values by name, returns those to send.
    """

    change: Callable[[dict[str, Any]], dict[str, Any]]


def worker_killed(*, times: int = 1) -> ServerSays:
    """The process that ran the model was killed."""
    text = "Error submitting request to model deployment. Please try again later. Sorry for the inconvenience."
    return ServerSays(text, times=times)


def model_unavailable(reason: str = "CANT_ACCOMMODATE: placed 0 of 1 new replicas", *, times: int = 1) -> ServerSays:
    """The server cannot load the model."""
    return ServerSays(f"Could not deploy this model. {reason}", times=times)


def too_long(seconds: float = 3600.0, *, times: int = 1) -> ServerSays:
    """The job took longer than the server allows."""
    text = f"Your job exceeded the execution timeout of {seconds}s."
    return ServerSays(text, {"runtime": seconds, "max_memory_usage": 0}, times=times)


def preempted(*, times: int = 1) -> ServerSays:
    """The server ended the job for its own reasons."""
    text = "Your job was cancelled or preempted by the server."
    return ServerSays(text, {"runtime": 1.0, "max_memory_usage": 0}, times=times)


def purged(*, times: int = 1) -> ServerSays:
    """The server lost its backend, and with it all jobs that waited."""
    return ServerSays(
        "Critical server error occurred. Please try again later. Sorry for the inconvenience.", times=times
    )


def backend_down(*, times: int = 1) -> Rejected:
    """The server is up and what it computes with is not."""
    return Rejected(times=times)


def with_nan(saved: dict[str, Any]) -> dict[str, Any]:
    """Put a NaN into every floating tensor."""
    return _changed(saved, lambda tensor: tensor.flatten().index_fill(0, _first(tensor), float("nan")).view_as(tensor))


def with_another_shape(saved: dict[str, Any]) -> dict[str, Any]:
    """Leave off the last column of every floating tensor."""
    return _changed(saved, lambda tensor: tensor[..., :-1].clone())


def with_another_dtype(saved: dict[str, Any]) -> dict[str, Any]:
    """Make every floating tensor one of integers."""
    return _changed(saved, lambda tensor: tensor.long())


def with_nothing(saved: dict[str, Any]) -> dict[str, Any]:
    """Send no saved value at all."""
    return {}


def _first(tensor: Any) -> Any:
    return tensor.new_zeros(1).long()


def _changed(saved: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """Change the floating tensors wherever they are in dicts, lists and tuples."""

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: walk(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(walk(item) for item in value)
        return change(value) if hasattr(value, "is_floating_point") and value.is_floating_point() else value

    return {name: walk(value) for name, value in saved.items()}
