"""How the real server's failures reach a bare nnsight client: what an adapter can tell them apart by.

The texts and types are NDIF's and nnsight's, so a new release of either may fail here first.
"""

import json
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import httpx
import pydantic
import pytest
import torch
import websocket
from nnsight.intervention.backends.remote import RemoteError

IDS = torch.tensor([[1, 504, 2436, 7869]])
BACK_SECONDS = 60.0
COSTS = {"runtime", "max_memory_usage", "max_mem_by_gpu", "max_mem_pct_by_gpu"}


def run(client: Any, backend: Any, seconds: float = 0.0) -> torch.Tensor:
    """Runs a job that takes a while."""
    with client.trace({"input_ids": IDS}, backend=backend):
        time.sleep(seconds)
        state = client.model.layers[3].output.save()
    return state


def wait_until_served(client: Any, backend: Callable[..., Any]) -> None:
    """Waits until jobs run again after a test broke a part of the server."""
    deadline = time.monotonic() + BACK_SECONDS
    while True:
        try:
            run(client, backend())
            return
        except (RemoteError, OSError, websocket.WebSocketException):
            assert time.monotonic() < deadline, f"the server does not serve {BACK_SECONDS} s after the failure"
            time.sleep(0.5)


def after(seconds: float, action: Callable[[], Any]) -> None:
    threading.Timer(seconds, action).start()


def redis(ndif: Any, *command: str) -> str:
    words = ["redis-cli", "-p", str(ndif.redis_port), *command]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def test_an_exception_in_the_block_arrives_as_its_traceback(client: Any, backend: Any) -> None:
    asked = backend()
    with (
        pytest.raises(RemoteError, match=r"(?s)^Traceback .*line \d+.*\nValueError: our own bug\s*$"),
        client.trace({"input_ids": IDS}, backend=asked),
    ):
        client.model.layers[0].output.save()
        raise ValueError("our own bug")
    assert set(asked.meta) == COSTS


def test_a_mistake_in_the_shapes_arrives_as_its_traceback(client: Any, backend: Any) -> None:
    with (
        pytest.raises(RemoteError, match=r"RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        client.trace({"input_ids": IDS}, backend=backend()),
    ):
        product = client.model.layers[0].output @ torch.ones(3, 3)
        product.save()


def test_the_cpu_allocator_out_of_memory_is_told_by_its_last_line(client: Any, backend: Any) -> None:
    asked = backend()
    with (
        pytest.raises(RemoteError) as caught,
        client.trace({"input_ids": IDS}, backend=asked),
    ):
        client.model.layers[0].output.save()
        torch.empty(10**14).save()
    assert "DefaultCPUAllocator: can't allocate memory" in str(caught.value).strip().splitlines()[-1]
    assert set(asked.meta) == COSTS


def test_cuda_out_of_memory_is_told_by_the_shortfall(client: Any, backend: Any) -> None:
    """There is no GPU here, but the exception and the whole of its way to the client are the real ones."""
    asked = backend()
    with (
        pytest.raises(RemoteError) as caught,
        client.trace({"input_ids": IDS}, backend=asked),
    ):
        client.model.layers[0].output.save()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has no more of it.")
    assert str(caught.value).strip().splitlines()[-1].startswith("torch.OutOfMemoryError: CUDA out of memory.")
    assert set(asked.meta) == {*COSTS, "alloc_shortfall_by_gpu"}
    assert asked.meta["alloc_shortfall_by_gpu"]["0"] > 0


def test_a_model_that_is_not_there_is_refused_with_the_reason(client: Any, backend: Any) -> None:
    named = {"repo_id": "nobody/nothing", "revision": None, "task": "text-generation"}
    key = f"nnsight.modeling.transformers.TransformersModel:{json.dumps(named)}"
    asked = backend(model_key=key)
    with pytest.raises(RemoteError, match=r"^Could not deploy this model\. .*nobody/nothing"):
        run(client, asked)
    assert asked.meta is None


def test_a_model_that_the_server_lacks_memory_for_is_refused(client: Any, backend: Any, ndif: Any) -> None:
    other_spelling = ndif.model_key.replace('"revision": null', '"revision": "main"')
    with pytest.raises(RemoteError, match=r"^Could not deploy this model\."):
        run(client, backend(model_key=other_spelling))


def test_a_worker_that_dies_fails_its_job_and_the_next_waits_for_its_successor(
    client: Any, backend: Any, ndif: Any
) -> None:
    (worker,) = ndif.workers()
    after(1.0, worker.kill)
    asked = backend()
    with pytest.raises(RemoteError, match=r"^Error submitting request to model deployment\. Please try again later\."):
        run(client, asked, seconds=10)
    assert asked.meta is None
    assert run(client, backend()).shape == (1, 4, 576)  # no retry: the queue waits until the worker is back


def test_a_backend_that_reconnects_is_a_503(client: Any, backend: Any, ndif: Any) -> None:
    assert redis(ndif, "del", "ray:connected") == "1"  # what NDIF itself does while it reconnects
    try:
        for blocking in (True, False):
            with pytest.raises(RemoteError, match=r"^Failed to send request: .*reconnecting") as caught:
                run(client, backend(blocking=blocking))
            assert isinstance(caught.value.__cause__, httpx.HTTPStatusError)
            assert caught.value.__cause__.response.status_code == 503
    finally:
        redis(ndif, "set", "ray:connected", "1")


def test_a_server_that_crashes_closes_the_socket(client: Any, backend: Any, ndif: Any) -> None:
    (api,) = ndif.api_workers()
    after(1.0, api.kill)
    with pytest.raises(websocket.WebSocketConnectionClosedException):
        run(client, backend(), seconds=3)
    wait_until_served(client, backend)


def test_a_server_that_shuts_down_sends_an_empty_message(client: Any, backend: Any, ndif: Any) -> None:
    (api,) = ndif.api_workers()
    after(1.0, lambda: api.send_signal(signal.SIGTERM))
    with pytest.raises(pydantic.ValidationError, match="Invalid JSON"):
        run(client, backend(), seconds=3)
    wait_until_served(client, backend)


def test_a_job_that_nobody_waits_for_survives_a_crash_of_the_api(client: Any, backend: Any, ndif: Any) -> None:
    submitted = backend(blocking=False)
    run_without_waiting = pytest.raises(UnboundLocalError)  # nothing was saved into this frame
    with run_without_waiting:
        run(client, submitted, seconds=2)
    (api,) = ndif.api_workers()
    api.kill()
    deadline, saved = time.monotonic() + BACK_SECONDS, None
    while saved is None and time.monotonic() < deadline:
        try:
            saved = submitted.poll()
        except httpx.TransportError:
            time.sleep(0.2)
    assert saved is not None
    assert saved["state"].shape == (1, 4, 576)
    wait_until_served(client, backend)


def test_nobody_listening_is_refused(client: Any, backend: Any) -> None:
    nobody = "http://127.0.0.1:9"
    with pytest.raises(ConnectionRefusedError):
        run(client, backend(host=nobody))
    with pytest.raises(RemoteError, match=r"^Failed to send request: .*refused") as caught:
        run(client, backend(host=nobody, blocking=False))
    assert isinstance(caught.value.__cause__, httpx.ConnectError)
    with pytest.raises(httpx.ConnectError):
        backend(host=nobody, blocking=False, job_id="0" * 32).poll()


def test_a_host_that_does_not_exist_has_no_address(client: Any, backend: Any) -> None:
    with pytest.raises(websocket.WebSocketAddressException):
        run(client, backend(host="http://no-such-host.invalid"))


def test_a_result_that_is_gone_fails_in_the_download(client: Any, backend: Any, ndif: Any) -> None:
    submitted = backend(blocking=False)
    with pytest.raises(UnboundLocalError):
        run(client, submitted)
    deadline = time.monotonic() + BACK_SECONDS
    while submitted.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    scope = "rustfsadmin/20260101/us-east-1/s3/aws4_request"  # the stand-in asks who, and checks no signature
    signed = {"Authorization": f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=0"}
    result = f"{ndif.store_url}/ndif-results/{submitted.job_id}.pt"
    urllib.request.urlopen(urllib.request.Request(result, method="DELETE", headers=signed), timeout=10).close()
    late = backend(blocking=False, job_id=submitted.job_id)
    with pytest.raises(httpx.HTTPStatusError) as caught:
        late.poll()
    assert caught.value.response.status_code == 404
    assert late.status.value == "COMPLETED"
    assert set(late.meta) == COSTS
