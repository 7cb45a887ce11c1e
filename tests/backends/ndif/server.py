"""Runs NDIF's real server on the loopback interface, CPU only, for as long as a test session needs it.

`running_server` is the way in. It starts this file as a process of its own, which starts the parts in order, waits
for each with a deadline, deploys one model, and takes everything down when its standard input closes: at the end of the
block, and also when the tests are killed. By hand: `python server.py --packages FOLDER --model FOLDER`, until ctrl-D.

It installs nothing: that is `make`'s work. Nobody needs an API key: NDIF checks keys only with a database of them.
"""

import argparse
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from keeper import (
    LOOPBACK,
    PART_SECONDS,
    STOP_SECONDS,
    Keeper,
    ServerError,
    accepts,
    adopt_orphans,
    answers,
    descendants,
    free_ports,
    kill_all,
)

HERE = Path(__file__).resolve().parent
START_SECONDS = 240.0  # for all parts and the model; 35 on a quiet machine with two cores
SOCKET_FOLDER_MAX = 40  # characters: Ray adds some 65, and a Unix socket's path must stay below 108
REDIS_MISSING = "NDIF needs redis-server, which is not installed: apt-get install redis-server"


@dataclass(frozen=True)
class Server:
    """A server that is up.

    Attributes:
        url: Where the API listens.
        model_key: What nnsight calls the deployed model.
        model_folder: The model's files; the same for server and client.
        dtype: What the server holds the weights in.
        redis_port: Where the queue and the flags of the server lie.
        store_url: Where the results lie of jobs that nobody waited for, and results too large for the websocket.
        keeper: Process id of the ancestor of every part.
        folder: Holds `logs`, one a part, and `ray`, with Ray's own.
    """

    url: str
    model_key: str
    model_folder: str
    dtype: str
    redis_port: int
    store_url: str
    keeper: int
    folder: str

    def workers(self) -> list[psutil.Process]:
        """The processes that hold the model."""
        return [process for process in descendants(self.keeper) if "ModelActor" in _command(process)]

    def api_workers(self) -> list[psutil.Process]:
        """The processes that answer clients; their parent starts another where one ends."""
        serving = [process for process in descendants(self.keeper) if "gunicorn" in _command(process)]
        return [process for process in serving if "gunicorn" in _command(process.parent())]


def _command(process: psutil.Process | None) -> str:
    if process is None:
        return ""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def model_key_of(model_folder: str | Path) -> str:
    """The key that nnsight makes for a transformers model, without asking the hub about a local folder."""
    named = {"repo_id": str(model_folder), "revision": None, "task": "text-generation"}
    return f"nnsight.modeling.transformers.TransformersModel:{json.dumps(named)}"


@contextlib.contextmanager
def running_server(packages: str | Path, model_folder: str | Path, dtype: str = "float32") -> Iterator[Server]:
    """Keeps a server up for the block.

    Args:
        packages: The folder NDIF was installed to.
        model_folder: A Hugging Face model folder, with its tokenizer.
        dtype: What to hold the weights in.

    Raises:
        ServerError: It did not come up; everything it had started is gone by then.
    """
    command = [sys.executable, __file__, "--packages", str(packages), "--model", str(model_folder), "--dtype", dtype]
    # A session of its own: ctrl-C in a terminal goes to the tests, which then end this block.
    keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield Server(**_answer(keeper))
    finally:
        _end(keeper)


def _answer(keeper: subprocess.Popen[str]) -> dict[str, Any]:
    assert keeper.stdout is not None
    if not select.select([keeper.stdout], [], [], START_SECONDS)[0]:
        raise ServerError(f"no NDIF server after {START_SECONDS:.0f} s")
    line = keeper.stdout.readline()
    if not line:
        raise ServerError(f"the NDIF server's keeper ended without a word, status {keeper.wait(STOP_SECONDS)}")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise ServerError(answer["error"])
    return answer


def _end(keeper: subprocess.Popen[str]) -> None:
    assert keeper.stdin is not None and keeper.stdout is not None
    keeper.stdin.close()
    try:
        keeper.wait(2 * STOP_SECONDS)
    except subprocess.TimeoutExpired:
        kill_all([*descendants(keeper.pid), psutil.Process(keeper.pid)])
        keeper.wait()
    keeper.stdout.close()


def _environment(packages: Path, ports: Mapping[str, int], dtype: str) -> dict[str, str]:
    inherited = {name: os.environ[name] for name in ("HOME", "LANG", "PATH", "TMPDIR") if name in os.environ}
    return inherited | {
        "PYTHONPATH": os.pathsep.join([str(packages), str(HERE)]),  # HERE for the actor's class
        "OMP_NUM_THREADS": str(os.cpu_count() or 1),  # Ray would give the model one
        "HF_HUB_OFFLINE": "1",
        "NDIF_REDIS_URL": f"redis://{LOOPBACK}:{ports['redis']}",
        "NDIF_OBJECT_STORE_URL": f"http://{LOOPBACK}:{ports['store']}",
        "NDIF_RAY_ADDRESS": f"ray://{LOOPBACK}:{ports['ray_client']}",
        "NDIF_DEFAULT_MODEL_ACTOR_CLASS": "cpu_actor.CpuModelActor",
        "NDIF_DEFAULT_DTYPE": dtype,
        "RAY_ADDRESS": f"{LOOPBACK}:{ports['ray']}",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # otherwise Ray puts another address for the loopback one
        "RAY_USAGE_STATS_ENABLED": "0",
        "GRPC_ENABLE_FORK_SUPPORT": "0",  # as in NDIF's own start script: with it, one start in six hangs for 40 s
    }


def _start(keeper: Keeper, ports: Mapping[str, int], model_folder: Path, dtype: str) -> None:
    redis_server = shutil.which("redis-server")
    if redis_server is None:
        raise ServerError(REDIS_MISSING)
    unsaved = ["--save", "", "--appendonly", "no", "--dir", str(keeper.folder)]
    keeper.start("redis", redis_server, "--bind", LOOPBACK, "--port", str(ports["redis"]), *unsaved)
    keeper.start("store", sys.executable, "-m", "moto.server", "-H", LOOPBACK, "-p", str(ports["store"]))
    keeper.start("ray", sys.executable, "-m", "ray.scripts.scripts", "start", *_ray_options(keeper.folder, ports))
    keeper.wait_until("redis", lambda: accepts(ports["redis"]))
    keeper.wait_until("store", lambda: accepts(ports["store"]))
    keeper.wait_until("ray", lambda: accepts(ports["ray_client"]) and accepts(ports["ray_dashboard"]))
    size = sum(file.stat().st_size for file in model_folder.glob("*.safetensors"))
    wanted = ["--model-key", model_key_of(model_folder), "--size-bytes", str(size), "--dtype", dtype]
    launch = [sys.executable, str(HERE / "launch.py"), "--ray", f"{LOOPBACK}:{ports['ray']}", *wanted]
    keeper.start("model", *launch, "--timeout", str(PART_SECONDS))
    bound = ["--bind", f"{LOOPBACK}:{ports['api']}", "--no-control-socket"]
    gunicorn = [sys.executable, "-m", "gunicorn", "--config", "python:ndif.services.api.gunicorn_conf", *bound]
    keeper.start("api", *gunicorn, "ndif.services.api.app:app")
    keeper.wait_for_end("model")
    keeper.wait_until("api", lambda: answers(f"http://{LOOPBACK}:{ports['api']}/connected"))


def _ray_options(folder: Path, ports: Mapping[str, int]) -> list[str]:
    # A GPU is made up, because NDIF places models on GPUs; the actor ignores which one it is given.
    resources = {"head": 10, "cuda_memory_bytes": 4 * 10**9, "cpu_memory_bytes": 4 * 10**9}
    named = {
        "node-ip-address": LOOPBACK,
        "port": ports["ray"],
        "ray-client-server-port": ports["ray_client"],
        "dashboard-host": LOOPBACK,
        "dashboard-port": ports["ray_dashboard"],
        "num-cpus": 3,
        "num-gpus": 1,
        "resources": json.dumps(resources),
        "object-store-memory": 10**8,
        "temp-dir": folder / "ray",
    }
    return ["--head", "--block", "--disable-usage-stats", *(f"--{name}={value}" for name, value in named.items())]


def _stdin_closes(seconds: float) -> bool:
    return bool(select.select([sys.stdin], [], [], seconds)[0])


def _stop_on_signal(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(1)


def keep(packages: Path, model_folder: Path, dtype: str) -> None:
    """Starts the server, prints one line of JSON about it, and keeps it until standard input closes."""
    adopt_orphans()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop_on_signal)
    with tempfile.TemporaryDirectory(prefix="ndif-", ignore_cleanup_errors=True) as name:
        ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
        folder, environment = Path(name), _environment(packages, ports, dtype)
        logs = {"model": "ray/session_latest/logs/worker-*.err"}
        keeper = Keeper(folder, environment, logs, is_wanted=lambda: not _stdin_closes(0.0))
        try:
            if len(name) > SOCKET_FOLDER_MAX:
                raise ServerError(f"Ray's sockets need a folder with a shorter name than {name}: set TMPDIR")
            _start(keeper, ports, model_folder, dtype)
            up = Server(
                url=f"http://{LOOPBACK}:{ports['api']}",
                model_key=model_key_of(model_folder),
                model_folder=str(model_folder),
                dtype=dtype,
                redis_port=ports["redis"],
                store_url=f"http://{LOOPBACK}:{ports['store']}",
                keeper=os.getpid(),
                folder=name,
            )
            print(json.dumps(asdict(up)), flush=True)
            while not _stdin_closes(1.0):
                keeper.check()
        except ServerError as error:
            print(json.dumps({"error": str(error)}), flush=True)
            print(error, file=sys.stderr)
        finally:
            keeper.stop()


_PORTS = ("redis", "store", "ray", "ray_client", "ray_dashboard", "api")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="the folder NDIF was installed to")
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face model folder")
    parser.add_argument("--dtype", default="float32")
    asked = parser.parse_args()
    keep(asked.packages.absolute(), asked.model.absolute(), asked.dtype)
