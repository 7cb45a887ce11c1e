"""One request brought to its result: sent, looked after, fetched; again where that may help, until its time is over."""

import time
from collections.abc import Callable
from typing import Any

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from tl_persona.backends import OnStatus
from tl_persona.backends.remote.failures import OutOfTime, TransientFailure
from tl_persona.backends.remote.journal import Journal
from tl_persona.backends.remote.settings import RemoteSettings
from tl_persona.backends.remote.transport import Look, Transport
from tl_persona.errors import RemoteUnavailableError

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
