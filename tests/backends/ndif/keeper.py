"""Starts processes, waits for them with a deadline, says which one failed, and ends them with all they left behind.

What the processes are is `server`'s business.
"""

import contextlib
import ctypes
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

LOOPBACK = "127.0.0.1"
PART_SECONDS = 120.0  # for one part
STOP_SECONDS = 20.0
LOG_TAIL_LINES = 40


class ServerError(RuntimeError):
    """A part of the server did not start, or ended by itself; the message has the end of its log."""


@dataclass
class Keeper:
    """Starts the parts, one process each, and ends them and everything they left behind.

    Attributes:
        folder: Where the parts run, and where their logs are.
        environment: The environment variables of the parts.
        more_logs: By part: a pattern for files in the folder that its failure is explained by, besides its log.
        is_wanted: Whether anybody still needs the parts; asked while waiting.
    """

    folder: Path
    environment: Mapping[str, str]
    more_logs: Mapping[str, str]
    is_wanted: Callable[[], bool]
    parts: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *command: str) -> None:
        """Starts a part; its output goes to a log of its own."""
        self._log(name).parent.mkdir(exist_ok=True)
        with self._log(name).open("ab") as log:
            self.parts[name] = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def wait_until(self, name: str, is_up: Callable[[], bool]) -> None:
        """Waits for a part to answer.

        Raises:
            ServerError: A part ended, or this one did not answer in time.
        """
        deadline = time.monotonic() + PART_SECONDS
        while not is_up():
            self.check()
            if time.monotonic() > deadline:
                raise ServerError(self._failure(name, f"did not answer within {PART_SECONDS:.0f} s"))
            time.sleep(0.1)

    def wait_for_end(self, name: str) -> None:
        """Waits for a part that does its work and ends.

        Raises:
            ServerError: It failed, or did not end in time, or another part ended.
        """
        process = self.parts.pop(name)
        self.wait_until(name, lambda: process.poll() is not None)
        if process.returncode != 0:
            raise ServerError(self._failure(name, f"ended with status {process.returncode}"))

    def check(self) -> None:
        """Sees that every part still runs, and that somebody still wants them.

        Raises:
            ServerError: A part has ended.
            SystemExit: Nobody does.
        """
        if not self.is_wanted():
            raise SystemExit(0)
        for name, process in self.parts.items():
            status = process.poll()
            if status is not None:
                raise ServerError(self._failure(name, f"ended with status {status}"))

    def stop(self) -> None:
        """Ends everything at once: nothing of it is kept, so nothing is worth an orderly end."""
        deadline = time.monotonic() + STOP_SECONDS
        while (running := descendants(os.getpid())) and time.monotonic() < deadline:
            kill_all(running)  # again, for what was started meanwhile

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def _failure(self, name: str, what: str) -> str:
        more = sorted(self.folder.glob(self.more_logs[name])) if name in self.more_logs else []
        tails = [f"--- {log.name}\n{_tail(log)}" for log in [self._log(name), *more] if log.stat().st_size]
        return "\n".join([f"the part {name!r} of the NDIF server {what}; the end of its log:", *tails])


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])


def adopt_orphans() -> None:
    """Makes this process the parent of what its descendants leave behind, so that nothing escapes `stop` (Linux)."""
    set_child_subreaper = 36  # from linux/prctl.h
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)


def descendants(pid: int) -> list[psutil.Process]:
    """The children of a process and their children; none when it has ended."""
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def kill_all(processes: list[psutil.Process]) -> None:
    """Kills processes and waits until they are gone."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=STOP_SECONDS / 4)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on; somebody may by the time they are used."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [one.getsockname()[1] for one in sockets]


def accepts(port: int) -> bool:
    """Whether somebody listens on a port of the loopback interface."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((LOOPBACK, port)) == 0


def answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5.0) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
