"""A small NDIF server on the loopback interface, for tests: real requests, really run, and failures on cue.

It speaks the protocol of nnsight 0.8's remote client (websocket, polling, results in a frame or by address), executes
with nnsight in a process of its own, counts what ran, and does what a test scripts. It knows no queueing over several
models, no accounts, and stores results in memory. How a client is pointed at it:

    with running_standin(folder) as standin:
        backend = RemoteBackend(standin.model_key, host=standin.url, api_key="...", env=model._remoteable_get_env())
        with model.trace(ids, backend=backend):
            ...

`host=` wins over nnsight's `CONFIG.API.HOST`, which `NDIF_HOST` sets when nnsight is imported (later changes of the
environment do nothing; assign to `CONFIG.API.HOST` instead). A key is sent in the header `ndif-api-key`.
"""

import contextlib
import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn

from remote.channel import strikes
from remote.executor import Executor
from remote.faults import Fault
from remote.records import Record
from remote.wire import application

_START_SECONDS = 120.0
_STOP_SECONDS = 60.0
_SETTLE_SECONDS = 120.0
_INLINE_BYTES = 8 * 1024 * 1024


class Standin:
    """The server. Made by `running_standin`; safe to use from the test's thread while it serves.

    Attributes:
        model_key: The key of the one model that it has.
        port: Kept over a restart.
        requests: One record a request, in the order of arrival.
        keys: The keys that it knows; None where it takes any request, and that is how it starts.
        inline_bytes: Results up to this size come in the websocket's last frame; larger ones as an address.
        environment: What it says of its packages; None for the truth.
        subscriptions: How many websockets were opened.
        executor: Runs the model.
        statuses: The last status of each job that is polled for, as JSON.
        results: The results that are fetched by address.
    """

    def __init__(self, folder: Path, *, job_seconds: float = 60.0) -> None:
        identity = {"repo_id": str(folder), "revision": None, "task": "text-generation"}
        self.model_key = f"nnsight.modeling.transformers.TransformersModel:{json.dumps(identity)}"
        self.port = 0
        self.requests: list[Record] = []
        self.keys: Collection[str] | None = None
        self.inline_bytes = _INLINE_BYTES
        self.environment: dict[str, Any] | None = None
        self.subscriptions = 0
        self.executor = Executor(folder, job_seconds)
        self.statuses: dict[str, str] = {}
        self.results: dict[str, bytes] = {}
        self._script: deque[Fault] = deque()
        self._predicate: Callable[[Record], Fault | None] | None = None
        self._lock = threading.RLock()
        self._at_work = 0
        self._thread: threading.Thread | None = None
        self._server: uvicorn.Server | None = None

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self.port}"

    def script(self, *faults: Fault) -> None:
        """Befall the next requests with these, one each; a fault with `times=n` takes n."""
        with self._lock:
            self._script.extend(replace(fault, times=1) for fault in faults for _ in range(fault.times))

    def fault_if(self, predicate: Callable[[Record], Fault | None] | None) -> None:
        """Ask `predicate` what befalls a request for which nothing is scripted; None for nothing."""
        self._predicate = predicate

    @property
    def unused(self) -> tuple[Fault, ...]:
        """What is scripted and has befallen no request yet."""
        return tuple(self._script)

    def forget(self) -> None:
        """Drop all stored statuses and results, as a server does after its retention."""
        self.statuses.clear()
        self.results.clear()

    def settle(self) -> None:
        """Wait until no job runs or waits: a job goes on where its client has left."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while self._at_work:
            if time.monotonic() > deadline:
                raise TimeoutError(f"jobs still run after {_SETTLE_SECONDS} s")
            time.sleep(0.005)

    def reset(self) -> None:
        """Be as after the start: no records, script, predicate, keys or stored results. The model stays loaded."""
        self.settle()
        with self._lock:
            self.forget()
            self._script.clear()
            self.requests.clear()
        self.fault_if(None)
        self.keys = self.environment = None
        self.inline_bytes = _INLINE_BYTES
        self.subscriptions = 0

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Around a job. For the server."""
        self._at_work += 1
        try:
            yield
        finally:
            self._at_work -= 1

    def take(self, record: Record) -> Fault:
        """What befalls this request, which comes into `requests`. For the server."""
        with self._lock:
            record.number = len(self.requests)
            if self._script:
                record.fault = self._script.popleft()
            elif self._predicate is not None:
                record.fault = self._predicate(record) or Fault()
            self.requests.append(record)
            return record.fault

    def take_subscription(self) -> Fault:
        """What befalls a client that subscribes: the next fault of the script, where it is one of that stage."""
        with self._lock:
            self.subscriptions += 1
            if self._script and strikes(self._script[0], "subscribe"):
                return self._script.popleft()
            return Fault()

    def record_of(self, job_id: str) -> Record | None:
        """The request of a job."""
        with self._lock:
            return next((record for record in self.requests if record.job_id == job_id), None)

    def start(self) -> None:
        """Serve on the port it had, or on a free one the first time. Returns when it answers."""
        if self._thread is not None:
            raise RuntimeError("the stand-in runs already")
        self.executor.start()
        listening = socket.create_server(("127.0.0.1", self.port), backlog=64)
        self.port = listening.getsockname()[1]
        app = application(self, lambda: server.server_state.connections)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="error",
                lifespan="off",
                ws="websockets-sansio",
                timeout_graceful_shutdown=1,
            )
        )
        thread = threading.Thread(target=server.run, args=[[listening]], name="ndif-stand-in", daemon=True)
        thread.start()
        self._server, self._thread = server, thread
        deadline = time.monotonic() + _START_SECONDS
        while not server.started:
            if time.monotonic() > deadline or not thread.is_alive():
                raise RuntimeError("the stand-in did not start")
            time.sleep(0.005)

    def stop(self) -> None:
        """Shut down in order: websockets are closed, jobs are lost, stored results stay. Refuses connections then."""
        if self._thread is None or self._server is None:
            return
        if self.executor.busy:
            self.executor.kill()
        self._server.should_exit = True
        self._thread.join(_STOP_SECONDS)
        if self._thread.is_alive():
            raise RuntimeError(f"the stand-in did not stop within {_STOP_SECONDS} s")
        self._thread = None


@contextlib.contextmanager
def running_standin(model_folder: Path, *, job_seconds: float = 60.0) -> Iterator[Standin]:
    """A stand-in that serves a folder's model, stopped at the end. The first request waits some 5 s for the model."""
    standin = Standin(model_folder, job_seconds=job_seconds)
    try:
        standin.start()
        yield standin
    finally:
        standin.stop()
        standin.executor.kill()
