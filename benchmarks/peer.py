"""Runs what we compare with in a process and environment of its own, on request.

The peers pin other releases of shared packages than we do, and two libraries that rewire one model do not live in one
process. A worker loads its model once, then answers one request a line with one line of JSON; between requests it
sleeps, so that it takes nothing from what is timed beside it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(os.environ.get("TL_PERSONA_PEERS", ROOT / ".venv" / "peers"))
THREADS = str(os.cpu_count() or 1)


class Worker:
    """A worker script of `benchmarks/workers`, as a context manager.

    Args:
        script: Its file name.
        needs: The peer's folder in the peers' environment; the benchmark is skipped where it is missing.
        environment: Variables that the process gets beside ours.
    """

    def __init__(self, script: str, needs: str | None = None, environment: Mapping[str, str] | None = None) -> None:
        self._environment = dict(environment or {})
        if needs is not None and not (PEERS / needs).is_dir():
            pytest.skip(f"{needs} is not installed in {PEERS}: run `make bench`")
        self._script = Path(__file__).parent / "workers" / script
        self._path = [str(folder) for folder in (ROOT, ROOT / "tests" / "support", ROOT / "benchmarks")]
        if needs is not None:
            self._path.append(str(PEERS))

    def __enter__(self) -> "Worker":
        path = os.pathsep.join([*self._path, os.environ.get("PYTHONPATH", "")])
        own = {"PYTHONPATH": path, "OMP_NUM_THREADS": THREADS, "HF_HUB_OFFLINE": "1"}
        environment = {**os.environ, **own, **self._environment}
        self._process = subprocess.Popen(
            [sys.executable, str(self._script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.ask(ready=True)
        return self

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print what they like in between
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"{self._script.name} ended with exit code {self._process.wait()}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
