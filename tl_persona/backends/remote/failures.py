"""What a failure calls for: trying again, asking for less, or giving up.

Servers put their failures into words, with no structure beyond what is read here. What is not recognised is taken for
a fault of the request, which another try would meet again.
"""

from collections.abc import Mapping
from typing import Any

from tl_persona.errors import RemoteError, RemoteRefusedError


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
