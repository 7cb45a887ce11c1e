"""The stand-in of an NDIF server, held to nnsight's own client: what it runs is right, and every failure looks real."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pydantic
import pytest
import torch
import transformers
import websocket
import zstandard
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from nnsight.modeling.transformers import TransformersModel
from nnsight.schema.config import CONFIG
from remote.faults import (
    Altered,
    ByAddress,
    DownloadFails,
    Dropped,
    Fault,
    Garbage,
    OutOfMemory,
    PollFails,
    Rejected,
    ServerSays,
    ShutDown,
    Silent,
    Slow,
    Trickle,
    backend_down,
    model_unavailable,
    preempted,
    purged,
    too_long,
    with_another_dtype,
    with_another_shape,
    with_nan,
    with_nothing,
    worker_killed,
)
from remote.standin import Standin, running_standin

IDS = torch.tensor([[5, 40, 41, 17, 300, 22, 9, 120]])
DEADLINE = 120.0
"""For what takes some milliseconds, on a machine that others use as well: only what hangs reaches it."""

LOADING = 300.0
KNOWN_KEY = "6d1f7a52-3c39-4c61-9a0e-9b0f6f3c1a11"
OTHER_KEY = "0c3c1a5e-8a39-4d0b-b3d2-5f6d8c1f2b22"


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` gives or raises; fails where that takes longer than `seconds`."""
    ended: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            ended.append((True, call()))
        except BaseException as error:
            ended.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not ended:
        raise TimeoutError(f"nothing within {seconds} s")
    went_well, value = ended[0]
    if not went_well:
        raise value
    return value


class Client:
    """A bare nnsight client, which has the architecture and no weights.

    Attributes:
        backend: The one of the last trace, for its `meta`.
    """

    def __init__(self, standin: Standin, folder: Path) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.standin = standin
        self.model = TransformersModel(str(folder), task="text-generation", tokenizer=tokenizer)
        self.backend: Any = None

    def connect(self, **options: Any) -> RemoteBackend:
        env = self.model._remoteable_get_env()
        key = options.pop("model_key", self.standin.model_key)
        self.backend = RemoteBackend(key, host=self.standin.url, env=env, **options)
        return self.backend

    def stream(self, **options: Any) -> torch.Tensor:
        """The output of block 1, over the websocket."""
        model, backend = self.model, self.connect(**options)
        with model.trace(IDS, backend=backend):
            stream = model.model.layers[1].output.save()
        return stream

    def submit(self) -> str:
        """Ask for the output of block 1, and do not wait; gives the job's id."""
        model, backend = self.model, self.connect(blocking=False)
        with model.trace(IDS, backend=backend):
            stream = model.model.layers[1].output.save()  # noqa: F841 - saved by its name
        return backend.job_id

    def collect(self, job_id: str) -> torch.Tensor:
        """Poll until the job has ended."""
        backend = self.connect(blocking=False, job_id=job_id)
        while (saved := backend()) is None:
            time.sleep(0.01)
        return saved["stream"]

    def polled(self) -> torch.Tensor:
        return self.collect(self.submit())


Way = Callable[[], torch.Tensor]


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> Iterator[tuple[Standin, Client]]:
    with running_standin(tiny_llama) as standin:
        client = Client(standin, tiny_llama)
        within(LOADING, client.stream)
        yield standin, client


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONFIG.APP, "REMOTE_LOGGING", False)
    monkeypatch.setattr(CONFIG.API, "APIKEY", None)


@pytest.fixture
def standin(loaded: tuple[Standin, Client]) -> Iterator[Standin]:
    loaded[0].reset()
    yield loaded[0]
    loaded[0].reset()


@pytest.fixture
def client(loaded: tuple[Standin, Client], standin: Standin) -> Client:
    return loaded[1]


@pytest.fixture(params=["blocking", "polled"])
def ask(request: pytest.FixtureRequest, client: Client) -> Way:
    """Ask for the output of block 1 in either way."""
    ways = {"blocking": client.stream, "polled": client.polled}
    return lambda: within(DEADLINE, ways[request.param])


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> torch.Tensor:
    """The output of block 1, by transformers alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    model.model.layers[1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        model(IDS)
    return seen[0]


def last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]


# What runs


def test_a_saved_value_equals_local_execution_bit_for_bit(ask: Way, expected: torch.Tensor) -> None:
    assert torch.equal(ask(), expected)


def test_a_session_carries_values_between_traces_and_a_skipped_block_does_not_run(
    standin: Standin, client: Client, expected: torch.Tensor
) -> None:
    model = client.model

    def in_two_chunks() -> torch.Tensor:
        with model.session(backend=client.connect()):
            with model.trace(IDS) as first:
                boundary = model.model.layers[0].output
                first.stop()
            with model.trace(IDS) as second:
                model.model.layers[0].skip(boundary)
                stream = model.model.layers[1].output.save()
                second.stop()
        return stream

    assert torch.equal(within(DEADLINE, in_two_chunks), expected)
    record = standin.requests[-1]
    assert (record.layers, record.layer_calls, record.forwards, record.tokens) == ((0, 1), 2, 2, IDS.numel())


def test_the_statuses_come_in_the_order_of_the_real_server_with_what_is_printed(client: Client) -> None:
    model, heard = client.model, []

    def printing() -> None:
        backend = client.connect()
        backend.display.update = lambda response: heard.append((response.status.value, response.description))
        with model.trace(IDS, backend=backend):
            print("from the server")
            model.model.layers[0].output.save()

    within(DEADLINE, printing)
    assert [status for status, _ in heard] == ["RECEIVED", "QUEUED", "DISPATCHED", "RUNNING", "LOG", "COMPLETED"]
    assert ("LOG", "from the server") in heard


def test_a_result_above_the_bound_comes_by_address(standin: Standin, client: Client, expected: torch.Tensor) -> None:
    standin.inline_bytes = 100
    assert torch.equal(within(DEADLINE, client.stream), expected)
    assert standin.requests[-1].downloads == 1
    assert standin.requests[-1].bytes_out > 100


def test_requests_are_counted_in_the_order_of_arrival(standin: Standin, client: Client) -> None:
    within(DEADLINE, client.stream)
    within(DEADLINE, client.polled)
    assert [(record.number, record.blocking, record.status) for record in standin.requests] == [
        (0, True, "COMPLETED"),
        (1, False, "COMPLETED"),
    ]
    assert [record.polls > 0 for record in standin.requests] == [False, True]
    assert all(record.bytes_in > 0 and record.layers == (0, 1, 2) for record in standin.requests)


def test_a_job_is_collected_by_its_id_after_its_client_is_gone(client: Client, expected: torch.Tensor) -> None:
    job_id = within(DEADLINE, client.submit)
    assert torch.equal(within(DEADLINE, lambda: client.collect(job_id)), expected)


def test_jobs_that_wait_together_are_each_collected(standin: Standin, client: Client, expected: torch.Tensor) -> None:
    standin.script(Slow(at="RUNNING", seconds=0.2))
    job_ids = [within(DEADLINE, client.submit) for _ in range(3)]
    assert len(set(job_ids)) == 3
    for job_id in reversed(job_ids):
        assert torch.equal(within(DEADLINE, lambda job_id=job_id: client.collect(job_id)), expected)


def test_a_request_may_be_large(standin: Standin, client: Client) -> None:
    model = client.model
    noise = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))

    def send_it() -> torch.Tensor:
        with model.trace(IDS, backend=client.connect()):
            back = (noise + 0 * model.model.layers[0].output[0, 0, 0]).save()
        return back

    assert torch.equal(within(DEADLINE, send_it), noise)
    assert standin.requests[-1].bytes_in > 2**20


def test_a_forgotten_job_polls_as_one_that_never_was(standin: Standin, client: Client) -> None:
    job_id = within(DEADLINE, client.submit)
    within(DEADLINE, lambda: client.collect(job_id))
    standin.forget()
    assert within(DEADLINE, client.connect(blocking=False, job_id=job_id)) is None
    assert within(DEADLINE, client.connect(blocking=False, job_id="no such job")) is None


def test_a_blocking_job_cannot_be_polled(standin: Standin, client: Client) -> None:
    within(DEADLINE, client.stream)
    job_id = standin.requests[-1].job_id
    assert within(DEADLINE, client.connect(blocking=False, job_id=job_id)) is None


def test_a_restart_keeps_the_port_and_the_results(standin: Standin, client: Client, expected: torch.Tensor) -> None:
    job_id, before = within(DEADLINE, client.submit), standin.url
    standin.settle()
    standin.stop()
    with pytest.raises(ConnectionRefusedError):
        within(DEADLINE, client.stream)
    standin.start()
    assert standin.url == before
    assert torch.equal(within(DEADLINE, lambda: client.collect(job_id)), expected)
    assert torch.equal(within(DEADLINE, client.stream), expected)
    assert standin.executor.starts == 1


def test_what_the_server_tells_of_itself(standin: Standin) -> None:
    assert httpx.get(f"{standin.url}/ping").json() == "pong"
    assert httpx.get(f"{standin.url}/connected").json() == {"status": "connected"}
    deployed = httpx.get(f"{standin.url}/status").json()["deployments"]
    assert [about["application_state"] for about in deployed.values()] == ["RUNNING"]
    assert httpx.get(f"{standin.url}/env", timeout=DEADLINE).json()["packages"]["torch"] == torch.__version__
    standin.environment = {"python_version": "3.12.0", "packages": {"torch": "1.0"}}
    assert httpx.get(f"{standin.url}/env").json() == standin.environment


# What is scripted


def test_a_script_befalls_one_request_after_the_other(standin: Standin, client: Client) -> None:
    standin.script(worker_killed(times=2), Fault(), purged())
    ends = []
    for _ in range(5):
        try:
            within(DEADLINE, client.stream)
            ends.append("well")
        except RemoteError as error:
            ends.append(str(error).split()[0])
    assert ends == ["Error", "Error", "well", "Critical", "well"]
    assert standin.unused == ()


def test_a_predicate_befalls_what_is_not_scripted(standin: Standin, client: Client) -> None:
    standin.fault_if(lambda record: worker_killed() if record.number % 3 == 2 else None)
    standin.script(Fault())
    for _ in range(6):
        with contextlib.suppress(RemoteError):
            within(DEADLINE, client.stream)
    assert [record.status == "ERROR" for record in standin.requests] == [False, False, True, False, False, True]


def test_a_stage_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="no stage 'COMPLETE': take one of"):
        Dropped(at="COMPLETE")
    with pytest.raises(ValueError, match="no answer with a body at 'RUNNING'"):
        Trickle(at="RUNNING")


# Out of memory


def test_out_of_cuda_memory_is_told_by_the_last_line_and_the_shortfall(
    standin: Standin, client: Client, ask: Way
) -> None:
    standin.script(OutOfMemory())
    with pytest.raises(RemoteError) as caught:
        ask()
    assert last_line(caught.value).startswith("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate")
    assert "alloc_shortfall_by_gpu" in client.backend.meta
    assert standin.requests[-1].layers == (0,)


def test_out_of_cpu_memory_is_told_by_the_last_line_alone(standin: Standin, client: Client, ask: Way) -> None:
    standin.script(OutOfMemory(device="cpu"))
    with pytest.raises(RemoteError) as caught:
        ask()
    assert "DefaultCPUAllocator: can't allocate memory" in last_line(caught.value)
    assert "alloc_shortfall_by_gpu" not in client.backend.meta


def test_memory_runs_out_above_some_layers_that_really_run(
    standin: Standin, client: Client, expected: torch.Tensor
) -> None:
    standin.fault_if(lambda _: OutOfMemory(above_layers=2))
    with pytest.raises(RemoteError, match="CUDA out of memory"):
        within(DEADLINE, client.stream)
    model = client.model

    def two_layers() -> torch.Tensor:
        with model.trace(IDS, backend=client.connect()) as tracer:
            stream = model.model.layers[1].output.save()
            tracer.stop()
        return stream

    assert torch.equal(within(DEADLINE, two_layers), expected)
    assert [(record.status, record.layers) for record in standin.requests] == [
        ("ERROR", (0, 1, 2)),
        ("COMPLETED", (0, 1)),
    ]


def test_memory_runs_out_above_some_tokens_of_a_request(standin: Standin, client: Client) -> None:
    model = client.model

    def run_twice() -> None:
        with model.session(backend=client.connect()):
            with model.trace(IDS):
                model.model.layers[0].output.save()
            with model.trace(IDS):
                model.model.layers[0].output.save()

    standin.fault_if(lambda _: OutOfMemory(above_tokens=2 * IDS.numel()))
    within(DEADLINE, run_twice)
    assert standin.requests[-1].tokens == 2 * IDS.numel()
    standin.fault_if(lambda _: OutOfMemory(above_tokens=2 * IDS.numel() - 1))
    with pytest.raises(RemoteError, match="CUDA out of memory"):
        within(DEADLINE, run_twice)


# What the server refuses, and what it says of itself


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (worker_killed(), "Error submitting request to model deployment. Please try again later"),
        (model_unavailable("no such repository"), "Could not deploy this model. no such repository"),
        (purged(), "Critical server error occurred."),
    ],
)
def test_an_error_of_the_servers_own_comes_as_a_sentence_without_a_cost(
    standin: Standin, client: Client, ask: Way, fault: ServerSays, text: str
) -> None:
    standin.script(fault)
    with pytest.raises(RemoteError) as caught:
        ask()
    assert str(caught.value).startswith(text)
    assert client.backend.meta is None
    assert standin.requests[-1].layers == ()


@pytest.mark.parametrize(
    ("fault", "text"), [(too_long(60.0), "exceeded the execution timeout of 60.0s"), (preempted(), "preempted")]
)
def test_a_job_that_was_ended_comes_as_a_sentence_with_its_cost(
    standin: Standin, client: Client, ask: Way, fault: ServerSays, text: str
) -> None:
    standin.script(fault)
    with pytest.raises(RemoteError, match=text):
        ask()
    assert client.backend.meta["runtime"] > 0


def test_a_backend_that_reconnects_is_told_by_its_http_status(standin: Standin, ask: Way) -> None:
    standin.script(backend_down())
    with pytest.raises(RemoteError, match=r"Failed to send request: .*reconnecting") as caught:
        ask()
    assert isinstance(caught.value.__cause__, httpx.HTTPStatusError)
    assert caught.value.__cause__.response.status_code == 503
    assert standin.requests[-1].status == "REJECTED"


def test_an_old_client_is_rejected(standin: Standin, ask: Way) -> None:
    standin.script(Rejected(400, "Client nnsight version 0.1 is below the minimum supported 0.8."))
    with pytest.raises(RemoteError, match=r"Failed to send request: Client nnsight version") as caught:
        ask()
    assert caught.value.__cause__.response.status_code == 400  # type: ignore[union-attr]


@pytest.mark.parametrize(("key", "status"), [(None, 401), ("not-a-key", 400), (OTHER_KEY, 403)])
def test_a_key_that_is_missing_malformed_or_unknown_is_refused(
    standin: Standin, client: Client, key: str | None, status: int
) -> None:
    standin.keys = {KNOWN_KEY}
    with pytest.raises(RemoteError, match=r"Failed to send request: .*API key") as caught:
        within(DEADLINE, lambda: client.stream(api_key=key))
    assert caught.value.__cause__.response.status_code == status  # type: ignore[union-attr]
    assert standin.requests[-1].had_key is (key is not None)


def test_a_known_key_is_let_in_and_kept_nowhere(
    standin: Standin, client: Client, expected: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    standin.keys = {KNOWN_KEY}
    assert torch.equal(within(DEADLINE, lambda: client.stream(api_key=KNOWN_KEY)), expected)
    assert standin.requests[-1].had_key
    assert KNOWN_KEY not in repr(standin.requests) + caplog.text


def test_an_unknown_model_is_not_deployed(client: Client) -> None:
    key = 'nnsight.modeling.transformers.TransformersModel:{"repo_id": "another"}'
    with pytest.raises(RemoteError, match=r"Could not deploy this model\. Repository Not Found"):
        within(DEADLINE, lambda: client.stream(model_key=key))


def test_another_architecture_is_refused_with_the_module_that_is_missing(standin: Standin, tiny_gpt2: Path) -> None:
    stranger = Client(standin, tiny_gpt2)
    model = stranger.model

    def ask() -> None:
        with model.trace(IDS, backend=stranger.connect()):
            model.transformer.h[0].output.save()

    with pytest.raises(RemoteError, match=r"doesn't match the one .* no module at '.*transformer"):
        within(DEADLINE, ask)


# What the client's own code does wrong


def test_an_exception_of_the_block_comes_as_its_traceback_with_the_cost(client: Client) -> None:
    model = client.model

    def divide() -> None:
        with model.trace(IDS, backend=client.connect()):
            model.model.layers[0].output.save()
            1 / (IDS.numel() - 8)

    with pytest.raises(RemoteError) as caught:
        within(DEADLINE, divide)
    assert str(caught.value).startswith("Traceback")
    assert "1 / (IDS.numel() - 8)" in str(caught.value)
    assert last_line(caught.value) == "ZeroDivisionError: division by zero"
    assert client.backend.meta["runtime"] > 0
    assert "alloc_shortfall_by_gpu" not in client.backend.meta


def test_the_clients_own_packages_are_out_of_reach_on_the_server(client: Client) -> None:
    model = client.model

    def import_it() -> None:
        with model.trace(IDS, backend=client.connect()):
            import tl_persona

            model.model.layers[0].output.save()
            print(tl_persona)

    with pytest.raises(RemoteError) as caught:
        within(DEADLINE, import_it)
    assert last_line(caught.value) == "ModuleNotFoundError: No module named 'tl_persona'"


# Connections


@pytest.mark.parametrize("at", ["subscribe", "QUEUED", "RUNNING", "COMPLETED"])
@pytest.mark.parametrize(
    ("reset", "error"),
    [(False, websocket.WebSocketConnectionClosedException), (True, ConnectionResetError)],
)
def test_a_lost_websocket_is_told_by_the_exception(
    standin: Standin, client: Client, at: str, reset: bool, error: type[Exception]
) -> None:
    standin.script(Dropped(at=at, reset=reset))
    with pytest.raises(error):
        within(DEADLINE, client.stream)
    standin.settle()
    jobs = [(record.status, record.layers) for record in standin.requests]
    assert jobs == ([] if at == "subscribe" else [("COMPLETED", (0, 1, 2))])
    assert standin.subscriptions == 1


@pytest.mark.parametrize("at", ["QUEUED", "RUNNING", "COMPLETED"])
def test_a_polled_job_survives_a_lost_websocket(
    standin: Standin, client: Client, expected: torch.Tensor, at: str
) -> None:
    standin.script(Dropped(at=at))
    assert torch.equal(within(DEADLINE, client.polled), expected)


@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_lost_while_the_request_is_sent_makes_no_job(standin: Standin, ask: Way, reset: bool) -> None:
    standin.script(Dropped(at="request", reset=reset))
    with pytest.raises(RemoteError, match="Failed to send request: ") as caught:
        ask()
    assert isinstance(caught.value.__cause__, httpx.TransportError)
    assert [(record.status, record.layers) for record in standin.requests] == [("REJECTED", ())]


def test_a_websocket_closed_in_order_is_told_as_invalid_json(standin: Standin, client: Client) -> None:
    standin.script(ShutDown(at="RUNNING"))
    with pytest.raises(pydantic.ValidationError, match="Invalid JSON"):
        within(DEADLINE, client.stream)
    assert standin.requests[-1].layers == ()


def test_a_stop_ends_what_waits(standin: Standin, client: Client, expected: torch.Tensor) -> None:
    standin.script(Slow(at="RUNNING", seconds=10 * DEADLINE))
    waiting: list[BaseException] = []

    def wait() -> None:
        try:
            client.stream()
        except pydantic.ValidationError as error:
            waiting.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    within(DEADLINE, lambda: _until(lambda: bool(standin.requests) and standin.requests[-1].status == "RUNNING"))
    within(DEADLINE, standin.stop)
    thread.join(DEADLINE)
    assert len(waiting) == 1
    standin.start()
    assert torch.equal(within(DEADLINE, client.stream), expected)


def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.005)


@pytest.mark.parametrize("at", ["subscribe", "request", "QUEUED", "RUNNING", "COMPLETED"])
def test_a_silent_server_leaves_a_blocking_client_waiting(standin: Standin, client: Client, at: str) -> None:
    standin.script(Silent(at=at))
    with pytest.raises(TimeoutError, match="nothing within"):
        within(0.5, client.stream)
    standin.stop()
    standin.start()


@pytest.mark.parametrize("at", ["QUEUED", "RUNNING", "COMPLETED"])
def test_a_silent_server_answers_polls_with_no_end(standin: Standin, client: Client, at: str) -> None:
    standin.script(Silent(at=at))
    job_id = within(DEADLINE, client.submit)
    standin.settle()
    assert within(DEADLINE, client.connect(blocking=False, job_id=job_id)) is None


@pytest.mark.parametrize("at", ["request", "RUNNING", "poll", "download"])
def test_a_slow_server_answers_in_the_end(standin: Standin, client: Client, expected: torch.Tensor, at: str) -> None:
    standin.script(Slow(at=at, seconds=0.4))
    started = time.monotonic()
    assert torch.equal(within(DEADLINE, client.polled), expected)
    assert time.monotonic() - started >= 0.4


@pytest.mark.parametrize("at", ["poll", "download"])
def test_an_answer_may_come_in_pieces(standin: Standin, client: Client, expected: torch.Tensor, at: str) -> None:
    standin.script(Trickle(at=at, pieces=8, seconds=0.05))
    started = time.monotonic()
    assert torch.equal(within(DEADLINE, client.polled), expected)
    assert time.monotonic() - started >= 8 * 0.05


# Results


def test_a_download_that_fails_leaves_the_cost_known(standin: Standin, client: Client, ask: Way) -> None:
    standin.script(DownloadFails(404))
    with pytest.raises(httpx.HTTPStatusError) as caught:
        ask()
    assert caught.value.response.status_code == 404
    assert client.backend.meta["runtime"] > 0


def test_a_download_that_fails_once_goes_well_at_the_next_poll(
    standin: Standin, client: Client, expected: torch.Tensor
) -> None:
    standin.script(DownloadFails(500, downloads=1))
    job_id = within(DEADLINE, client.submit)
    with pytest.raises(httpx.HTTPStatusError):
        within(DEADLINE, lambda: client.collect(job_id))
    assert torch.equal(within(DEADLINE, lambda: client.collect(job_id)), expected)
    assert standin.requests[-1].downloads == 2


def test_a_download_that_is_cut_off_is_told_by_the_exception(standin: Standin, ask: Way) -> None:
    standin.script(DownloadFails(None))
    with pytest.raises(httpx.RemoteProtocolError, match="without sending complete message body"):
        ask()


def test_a_result_may_lie_anywhere(standin: Standin, ask: Way) -> None:
    standin.script(ByAddress("http://127.0.0.1:1/nothing"))
    with pytest.raises(httpx.ConnectError):
        ask()


@pytest.mark.parametrize(("status", "error"), [(500, httpx.HTTPStatusError), (None, httpx.RemoteProtocolError)])
def test_a_poll_that_fails_once_goes_well_the_next_time(
    standin: Standin, client: Client, expected: torch.Tensor, status: int | None, error: type[Exception]
) -> None:
    standin.script(PollFails(status))
    job_id = within(DEADLINE, client.submit)
    with pytest.raises(error):
        within(DEADLINE, lambda: client.collect(job_id))
    assert torch.equal(within(DEADLINE, lambda: client.collect(job_id)), expected)


@pytest.mark.parametrize("of", ["result", "half"])
def test_a_result_of_garbage_does_not_decompress(standin: Standin, ask: Way, of: str) -> None:
    standin.script(Garbage(of))
    with pytest.raises(zstandard.ZstdError):
        ask()


def test_a_frame_of_garbage_does_not_load(standin: Standin, client: Client) -> None:
    standin.script(Garbage("frame", times=2))
    with pytest.raises(Exception, match="invalid load key"):
        within(DEADLINE, client.stream)
    with pytest.raises(pydantic.ValidationError, match="Invalid JSON"):
        within(DEADLINE, client.polled)


def test_results_are_changed_before_they_are_sent(
    standin: Standin, client: Client, ask: Way, expected: torch.Tensor
) -> None:
    standin.script(*(Altered(change) for change in (with_nan, with_another_shape, with_another_dtype)))
    damaged = ask()
    assert damaged.shape == expected.shape
    assert torch.equal(damaged.isnan().nonzero(), torch.tensor([[0, 0, 0]]))
    assert torch.equal(ask(), expected[..., :-1])
    assert torch.equal(ask(), expected.long())


def test_a_mistake_in_a_scripted_change_reaches_the_client(standin: Standin, ask: Way) -> None:
    standin.script(Altered(lambda saved: saved["no such name"]))
    with pytest.raises(RemoteError, match="The stand-in itself failed"):
        ask()


def test_a_result_may_lack_what_was_saved(standin: Standin, client: Client) -> None:
    standin.script(Altered(with_nothing))
    with pytest.raises(KeyError):
        within(DEADLINE, client.polled)


# The process


@pytest.mark.slow
def test_a_process_that_dies_or_hangs_is_replaced(tiny_llama: Path, expected: torch.Tensor) -> None:
    with running_standin(tiny_llama, job_seconds=5.0) as standin:
        client = Client(standin, tiny_llama)
        model = client.model

        def die() -> None:
            with model.trace(IDS, backend=client.connect()):
                model.model.layers[0].output.save()
                __import__("os")._exit(1)

        def hang() -> None:
            with model.trace(IDS, backend=client.connect()):
                model.model.layers[0].output.save()
                __import__("time").sleep(60)

        with pytest.raises(RemoteError, match="Error submitting request to model deployment"):
            within(LOADING, die)
        with pytest.raises(RemoteError, match=r"exceeded the execution timeout of 5\.0s"):
            within(LOADING, hang)
        assert torch.equal(within(LOADING, client.stream), expected)
        assert standin.executor.starts == 3
