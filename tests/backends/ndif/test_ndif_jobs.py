"""Jobs that nobody waits for: they are collected by their id, later, by whoever has it."""

import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight.intervention.backends.remote import RemoteError

IDS = torch.tensor([[1, 504, 2436, 7869]])
JOB_SECONDS = 60.0


def collect(backend: Callable[..., Any], job_id: str) -> tuple[dict[str, Any], Any]:
    """Polls from a backend that did not submit the job; gives what was saved, and that backend."""
    poller = backend(blocking=False, job_id=job_id)
    deadline = time.monotonic() + JOB_SECONDS
    while (saved := poller.poll()) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert saved is not None, f"no result after {JOB_SECONDS} s, last status {poller.status}"
    return saved, poller


def submit(client: Any, backend: Callable[..., Any], seconds: float = 0.0) -> str:
    """Submits a job that takes a while; gives its id."""
    submitted = backend(blocking=False)
    with client.trace({"input_ids": IDS}, backend=submitted):
        time.sleep(seconds)
        state = client.model.layers[3].output.save()  # noqa: F841 - saved under this name
    return submitted.job_id


def test_a_job_is_collected_by_its_id_from_a_new_backend(
    client: Any, backend: Any, local_states: Callable[..., torch.Tensor]
) -> None:
    saved, poller = collect(backend, submit(client, backend))
    assert list(saved) == ["state"]
    torch.testing.assert_close(saved["state"], local_states(input_ids=IDS)[3], rtol=1e-5, atol=1e-5)
    assert poller.meta["runtime"] > 0  # seconds on the server


def test_a_result_stays_after_it_was_collected(client: Any, backend: Any) -> None:
    job_id = submit(client, backend)
    first, second = (collect(backend, job_id)[0]["state"] for _ in range(2))
    assert torch.equal(first, second)


def test_a_job_in_work_says_so(client: Any, backend: Any) -> None:
    job_id = submit(client, backend, seconds=1.5)
    poller = backend(blocking=False, job_id=job_id)
    seen = set()
    while poller.poll() is None:
        seen.add(None if poller.status is None else poller.status.value)
        time.sleep(0.05)
    assert "RUNNING" in seen
    assert poller.status.value == "COMPLETED"


def test_polling_an_unknown_job_looks_like_one_that_has_not_begun(backend: Any) -> None:
    poller = backend(blocking=False, job_id="0" * 32)
    assert poller.poll() is None
    assert poller.status is None


def test_an_error_is_collected_like_a_result(client: Any, backend: Any) -> None:
    submitted = backend(blocking=False)
    with client.trace({"input_ids": IDS}, backend=submitted):
        raise KeyError("a name that is not there")
    with pytest.raises(RemoteError, match=r"KeyError: 'a name that is not there'"):
        collect(backend, submitted.job_id)


def test_a_job_outlives_the_client_that_submitted_it(ndif: Any, backend: Any, tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import json, os, signal, sys, time
        import nnsight, torch
        from nnsight.intervention.backends.remote import RemoteBackend
        from nnsight.modeling.transformers import TransformersModel
        from transformers import AutoTokenizer

        nnsight.CONFIG.APP.REMOTE_LOGGING = False
        url, key, folder, ids = json.loads(sys.argv[1])
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = TransformersModel(folder, task="text-generation", tokenizer=tokenizer)
        submitted = RemoteBackend(model_key=key, host=url, blocking=False)
        with model.trace({"input_ids": torch.tensor(ids)}, backend=submitted):
            time.sleep(1.0)
            state = model.model.layers[3].output.save()
        print(submitted.job_id, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    asked = json.dumps([ndif.url, ndif.model_key, ndif.model_folder, IDS.tolist()])
    # A file, because nnsight reads the source of the block it sends.
    path = tmp_path / "submits_and_dies.py"
    path.write_text(script)
    died = subprocess.run([sys.executable, path, asked], capture_output=True, text=True, timeout=JOB_SECONDS)
    assert died.returncode == -signal.SIGKILL, died.stderr
    saved, _ = collect(backend, died.stdout.split()[-1])
    assert saved["state"].shape == (1, 4, 576)


def test_a_result_too_large_for_the_websocket_is_downloaded(
    client: Any, backend: Any, local_states: Callable[..., torch.Tensor]
) -> None:
    ids = IDS.repeat(1, 80)
    with client.trace({"input_ids": ids}, backend=backend()):
        states = torch.stack([block.output for block in client.model.layers]).save()
    assert states.nbytes > 2 * 8 * 2**20  # 8 MiB is Redis's limit for a message, and floats compress badly
    expected = local_states(input_ids=ids)
    assert float(((states - expected).norm(dim=-1) / expected.norm(dim=-1)).max()) < 1e-5


def test_any_key_and_none_is_accepted_where_no_keys_are_kept(client: Any, backend: Any) -> None:
    with client.trace({"input_ids": IDS}, backend=backend(api_key="not-a-key")):
        state = client.model.layers[3].output.save()
    assert state.shape == (1, 4, 576)


def test_a_client_of_the_next_nnsight_is_served_by_the_torch_and_transformers_of_the_tests(
    client: Any, backend: Any
) -> None:
    with client.trace({"input_ids": IDS}, backend=backend()):
        client.model.layers[0].output.save()
        versions = {name: version(name) for name in ("nnsight", "torch", "transformers")}.save()
    assert versions == {"nnsight": "0.8.0", "torch": version("torch"), "transformers": version("transformers")}
    assert version("nnsight") == "0.8.1"
