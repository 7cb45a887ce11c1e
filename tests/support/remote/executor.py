"""Runs jobs in a `worker` process: starts it, waits for it with a deadline, and replaces it when it dies."""

import multiprocessing.connection
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from remote.work import Job, Outcome

_LOADING_SECONDS = 120.0
"""For a process that imports torch and nnsight while others use the processors."""

_BOOT = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from remote.worker import main
del sys.path[0]
main(int(sys.argv[1]), sys.argv[2])
"""


class WorkerDied(Exception):
    """The process ended while it had a job."""


class Executor:
    """One worker process, which serves one job at a time.

    Attributes:
        folder: Where the model is.
        job_seconds: A job that takes longer is killed, and its process with it.
        starts: How many processes were started so far.
    """

    def __init__(self, folder: Path, job_seconds: float) -> None:
        self.folder = folder
        self.job_seconds = job_seconds
        self.starts = 0
        self._one_job = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._loaded = False

    def start(self) -> None:
        """Start the process where none lives. It loads while the caller goes on."""
        if self._process is not None and self._process.poll() is None:
            return
        self.kill()
        ours, theirs = socket.socketpair()
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        environment.setdefault("OMP_NUM_THREADS", "1")
        with theirs:
            command = [sys.executable, "-P", "-c", _BOOT, str(theirs.fileno()), str(self.folder)]
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL
            )
        self.starts += 1
        self._pipe = Connection(ours.detach())
        self._loaded = False

    def run(self, job: Job, log: Callable[[str], None]) -> Outcome:
        """Run `job`, and call `log` with each line that it prints.

        Raises:
            WorkerDied: The process ended before the job did.
            TimeoutError: The job took longer than `job_seconds`; the process is gone.
        """
        with self._one_job:
            self.start()
            pipe = self._pipe
            assert pipe is not None
            try:
                if not self._loaded:
                    self._next(pipe, time.monotonic() + _LOADING_SECONDS)
                    self._loaded = True
                pipe.send(job)
                deadline = time.monotonic() + self.job_seconds
                while isinstance(message := self._next(pipe, deadline), str):
                    log(message)
                return message
            except TimeoutError:
                raise
            except (EOFError, OSError) as error:
                raise WorkerDied("the worker's pipe is closed") from error
            except BaseException:  # what the worker still sends belongs to no later job
                self.kill()
                raise

    def _next(self, pipe: Connection, deadline: float) -> "Outcome | str":
        if not multiprocessing.connection.wait([pipe], max(0.0, deadline - time.monotonic())):
            self.kill()
            raise TimeoutError(f"no answer from the worker within {self.job_seconds} s")
        message: Outcome | str = pipe.recv()
        return message

    @property
    def busy(self) -> bool:
        """Whether a job runs."""
        return self._one_job.locked()

    def kill(self) -> None:
        """End the process, and with it a job that runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None
