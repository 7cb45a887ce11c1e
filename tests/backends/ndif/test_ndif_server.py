"""The server that the tests start says what failed, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import server
from keeper import Keeper, ServerError, descendants

GONE_SECONDS = 30.0


def wait_until_gone(processes: list[psutil.Process]) -> list[psutil.Process]:
    return psutil.wait_procs(processes, timeout=GONE_SECONDS)[1]


def starting_keeper(packages: Path, model: Path) -> subprocess.Popen[bytes]:
    """A keeper that has started redis, the store, Ray and the first of Ray's own processes, and is not up yet."""
    command = [sys.executable, server.__file__, "--packages", str(packages), "--model", str(model)]
    keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + GONE_SECONDS
    while len(descendants(keeper.pid)) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(descendants(keeper.pid)) >= 4
    return keeper


def test_a_part_that_does_not_start_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerError, match=r"(?s)part '\w+' of the NDIF server ended with status 1.*No module named"),
        server.running_server(tmp_path, tmp_path),
    ):
        pass


@pytest.fixture
def keeper(tmp_path: Path) -> Keeper:
    return Keeper(tmp_path, os.environ, more_logs={"model": "its own/*.err"}, is_wanted=lambda: True)


def test_a_part_that_fails_at_its_work_is_named_with_its_other_logs(keeper: Keeper) -> None:
    (keeper.folder / "its own").mkdir()
    (keeper.folder / "its own" / "worker.err").write_text("no weights in this file")
    keeper.start("model", sys.executable, "-c", "raise SystemExit('the model did not load')")
    with pytest.raises(ServerError) as caught:
        keeper.wait_for_end("model")
    assert str(caught.value).splitlines() == [
        "the part 'model' of the NDIF server ended with status 1; the end of its log:",
        "--- model.log",
        "the model did not load",
        "--- worker.err",
        "no weights in this file",
    ]


def test_a_part_that_does_its_work_and_ends_is_no_failure(keeper: Keeper) -> None:
    keeper.start("model", sys.executable, "-c", "pass")
    keeper.wait_for_end("model")
    keeper.check()


def test_a_part_that_never_answers_is_given_up(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keeper.PART_SECONDS", 0.5)
    keeper.start("api", sys.executable, "-c", "import time; time.sleep(5)")
    with pytest.raises(ServerError, match=r"^the part 'api' of the NDIF server did not answer within"):
        keeper.wait_until("api", lambda: False)


def test_a_missing_redis_is_told_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(ServerError, match=r"redis-server, which is not installed: apt-get install redis-server"),
        server.running_server(tmp_path, tmp_path),
    ):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_start_and_all_that_was_started(
    ndif_packages: Path, tmp_path: Path, number: signal.Signals
) -> None:
    keeper = starting_keeper(ndif_packages, tmp_path)
    started = descendants(keeper.pid)
    keeper.send_signal(number)
    assert keeper.wait(GONE_SECONDS) == 1
    assert wait_until_gone(started) == []


def test_a_start_that_nobody_waits_for_any_more_ends(ndif_packages: Path, tmp_path: Path) -> None:
    keeper = starting_keeper(ndif_packages, tmp_path)
    started = descendants(keeper.pid)
    assert keeper.stdin is not None
    keeper.stdin.close()  # as the system does when the tests are killed
    assert keeper.wait(GONE_SECONDS) == 0
    assert wait_until_gone(started) == []


def test_everything_listens_on_the_loopback_interface_only(ndif: Any) -> None:
    processes = descendants(ndif.keeper)
    listening = {
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}  # the last is how Ray's sockets write the first
    assert "127.0.0.1" in listening
