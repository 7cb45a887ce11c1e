"""The remote backend against a server's stand-in: the numbers of a local run, whatever the server does meanwhile."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracle import block_outputs, relative_error
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
    Silent,
    Slow,
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
from remote.standin import Record, Standin, running_standin
from tiny import build_tiny
from torch import Tensor

from tl_persona import (
    MaskStrategy,
    PersonaDataset,
    PersonaVectorStore,
    SteeringVectorSet,
    extract_activations,
    extract_caa_vectors,
    load_model,
    load_pairs,
    run_extraction,
)
from tl_persona.backends import Backend, open_backend
from tl_persona.backends.remote.model import RemoteModel, RemoteSettings, open_remote_model
from tl_persona.cli.main import main
from tl_persona.errors import (
    HookError,
    InputError,
    MissingDependencyError,
    ModelError,
    NonFiniteError,
    RemoteMemoryError,
    RemoteRefusedError,
    RemoteUnavailableError,
)
from tl_persona.plan import Sample

N_LAYERS = 12
ALL_LAYERS = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]
KEY = "3f2b8c1e-0d4a-4b6f-9a7e-5c1d2e3f4a5b"
QUICK = {"first_wait": 0.01, "longest_wait": 0.05, "poll": 0.05, "timeout": 120.0}

pytestmark = pytest.mark.timeout(600)  # whatever the server does, nothing waits for ever


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of twelve tiny layers."""
    target = build_tiny("llama", tmp_path_factory.mktemp("deployed") / "deep-llama")
    config = transformers.AutoConfig.from_pretrained(target)
    config.num_hidden_layers = N_LAYERS
    config.layer_types = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Standin]:
    with running_standin(folder) as standin:
        yield standin


@pytest.fixture
def standin(server: Standin) -> Iterator[Standin]:
    server.reset()
    yield server
    assert server.unused == (), "a scripted fault never struck"


@pytest.fixture
def remote(standin: Standin, folder: Path) -> Callable[..., RemoteModel]:
    """Lays the client's model out anew, as after a restart; settings may be given."""

    def model_of(**settings: Any) -> RemoteModel:
        return open_remote_model(folder, RemoteSettings(host=standin.url, **QUICK | settings))

    return model_of


@pytest.fixture(scope="module")
def weights(folder: Path) -> Any:
    """The deployed model, for the oracle."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def samples_of(*lengths: int, shared: int = 0) -> list[Sample]:
    """Random texts that begin alike, with two random masks each."""
    generator = torch.Generator().manual_seed(sum(lengths))
    prefix = torch.randint(5, 200, (shared,), generator=generator)
    samples = []
    for index, length in enumerate(lengths):
        ids = torch.cat([prefix, torch.randint(5, 200, (length,), generator=generator)])
        masks = torch.rand((2, len(ids)), generator=generator) > 0.5
        masks[:, -1] = True
        samples.append(Sample(f"s{index}", ids, masks))
    return samples


SHARED = samples_of(10, 25, 3, 40, 18, shared=300)
APART = samples_of(20, 35, 8, 50)


def pooled(backend: Backend, samples: list[Sample], hooks: list[str]) -> dict[int, Tensor]:
    return {each.sample: each.means for each in backend.pool(backend.plan(samples), hooks)}


def assert_oracle(backend: Backend, samples: list[Sample], weights: Any) -> None:
    """Every sample's means at every layer are those of the model run plainly, one text at a time."""
    got = pooled(backend, samples, ALL_LAYERS)
    assert sorted(got) == list(range(len(samples)))
    for index, sample in enumerate(samples):
        outputs = block_outputs(weights, sample.input_ids)
        for means, mask in zip(got[index], sample.masks, strict=True):
            assert relative_error(means, outputs[:, mask].mean(dim=1)) < 1e-5


def work(standin: Standin) -> list[Record]:
    """The requests that ran the model."""
    return [record for record in standin.requests if record.forwards]


# --- the numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.tl
def test_every_hook_means_what_it_means_in_transformer_lens(remote: Any, folder: Path, standin: Standin) -> None:
    backend, local = open_backend(remote()), open_backend(load_model(folder, kind="bridge"))
    hooks = list(backend.facts.hook_names)
    assert len(hooks) == 5 * N_LAYERS
    expected = pooled(local, SHARED, hooks)
    for index, means in pooled(backend, SHARED, hooks).items():
        for mine, theirs in zip(means, expected[index], strict=True):
            assert relative_error(mine, theirs) < 1e-5


def test_a_shared_beginning_runs_once_a_group(remote: Any, weights: Any, standin: Standin) -> None:
    backend = open_backend(remote())
    assert_oracle(backend, SHARED, weights)
    assert backend.notes["sharing"] == "packed"
    assert backend.notes["proof"] == "within 1e-05"
    distinct = 300 + 10 + 25 + 3 + 40 + 18
    assert work(standin)[-1].tokens == distinct


def test_texts_that_share_nothing_are_proven_to_lie_below_one_another(
    remote: Any, weights: Any, standin: Standin
) -> None:
    backend = open_backend(remote())
    assert_oracle(backend, APART, weights)
    assert len(work(standin)) == 2
    assert_oracle(backend, APART, weights)
    assert len(work(standin)) == 3
    assert backend.notes["sharing"] == "none" and "fallbacks" not in backend.notes


def test_one_text_alone_needs_no_proof(remote: Any, weights: Any, standin: Standin) -> None:
    assert_oracle(open_backend(remote()), APART[:1], weights)
    assert len(work(standin)) == 1


def test_samples_go_in_groups_of_a_bounded_size(remote: Any, weights: Any, standin: Standin) -> None:
    assert_oracle(open_backend(remote(group_tokens=60)), APART, weights)
    groups = [2 * 35, 2 * 50]  # rows of 20 and 35 tokens, of 8 and 50
    # The longest text of each beside a row that is as much longer as the shortest's was, and by itself.
    proofs = [2 * (35 + 15) + 35, 2 * (50 + 42) + 50]
    assert [record.tokens for record in work(standin)] == [proofs[0], groups[0], proofs[1], groups[1]]


def test_hooks_come_back_in_the_order_they_were_asked_for(remote: Any, weights: Any) -> None:
    backend = open_backend(remote())
    forward = pooled(backend, APART, ALL_LAYERS)
    backward = pooled(backend, APART, ALL_LAYERS[::-1])
    for index in forward:
        torch.testing.assert_close(backward[index].flip(1), forward[index])


def test_nothing_runs_after_the_last_layer_that_is_asked_for(remote: Any, standin: Standin) -> None:
    pooled(open_backend(remote()), APART, ["blocks.3.hook_resid_mid"])
    assert work(standin)[-1].layers == (0, 1, 2, 3)


def test_the_server_says_its_dtype(remote: Any) -> None:
    assert open_backend(remote()).facts.dtype == "float32"


def test_a_model_is_known_by_what_the_server_calls_it(remote: Any, folder: Path) -> None:
    facts = open_backend(remote()).facts
    assert facts.weights_digest is not None and facts.weights_digest.startswith("served:")
    assert facts.architecture == "LlamaForCausalLM" and open_backend(remote()).interventions == ""

    def called(repo_id: object, revision: str | None) -> str | None:
        asked = json.dumps({"repo_id": str(repo_id), "revision": revision})
        key = f"nnsight.modeling.transformers.TransformersModel:{asked}"
        return replace(remote(), model_key=key).served_digest

    assert called(folder, None) == called(folder, "main") == facts.weights_digest
    assert len({called(folder, None), called(folder, "v2"), called("lab/other", None)}) == 3
    assert replace(remote(), settings=None).served_digest is None


def test_the_client_has_no_weights(remote: Any) -> None:
    assert all(parameter.is_meta for parameter in remote().nnsight_model._module.parameters())


def test_an_nnsight_model_with_weights_runs_here(folder: Path, weights: Any, standin: Standin) -> None:
    from nnsight.modeling.transformers import TransformersModel

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = TransformersModel(weights, tokenizer=tokenizer, task="text-generation")
    backend = open_backend(model)
    assert_oracle(backend, SHARED, weights)
    assert backend.notes["backend"] == "nnsight"
    assert not standin.requests


# --- the recipes ---------------------------------------------------------------------------------------------------


def arguments(root: Path, **more: Any) -> dict[str, Any]:
    dataset = PersonaDataset.bundled()
    persona = next(iter(dataset))
    questions = list(dataset.get_qa(persona.id))[:6]
    return {
        "model_name": "org/deep",
        "qa_pairs": questions,
        "variants": ["templated", "biography"],
        "persona": persona,
        "mask_strategy": list(MaskStrategy),
        "activations_dir": root,
        "show_progress": False,
    } | more


def vectors_in(root: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {str(path.relative_to(root)): load_file(path)["activations"] for path in root.rglob("*.safetensors")}


@pytest.mark.tl
def test_extraction_leaves_the_artifacts_of_a_local_run(
    remote: Any, folder: Path, tmp_path: Path, standin: Standin
) -> None:
    model = load_model(folder, kind="bridge")
    run_extraction(model, **arguments(tmp_path / "local"))
    seen: list[tuple[str, str, str]] = []
    run_extraction(remote(), **arguments(tmp_path / "remote", remote=True, on_status=lambda *told: seen.append(told)))
    here, there = vectors_in(tmp_path / "local"), vectors_in(tmp_path / "remote")
    assert sorted(here) == sorted(there)
    assert len(here) == 2 * len(MaskStrategy)
    for name, vectors in here.items():
        assert relative_error(there[name], vectors) < 1e-5
    jobs = {record.job_id for record in standin.requests}
    assert {job_id for job_id, _, _ in seen} == jobs | {"local"}
    ran = len(standin.requests)
    again = run_extraction(remote(), **arguments(tmp_path / "local", remote=True))
    assert not any(result.extracted for result in again), "the same provenance, wherever it ran"
    assert len(standin.requests) == ran + 1  # asked for its dtype alone


@pytest.mark.tl
def test_steering_vectors_are_those_of_a_local_run(remote: Any, folder: Path) -> None:
    pairs = list(load_pairs("formality"))[:6]
    here = extract_caa_vectors(load_model(folder, kind="bridge"), None, pairs, show_progress=False)
    there = extract_caa_vectors(remote(), None, pairs, remote=True, show_progress=False)
    assert there.layers == here.layers == list(range(N_LAYERS))
    for vector in here:
        other = there[vector.layer_index]
        assert relative_error(other.vector, vector.vector) < 1e-4
        assert other.metadata["num_pairs"] == 6
        assert other.metadata["outliers"] == "not checked"


def test_activations_of_a_named_model(standin: Standin, folder: Path, weights: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("NDIF_HOST", standin.url)
    ids, masks = [each.input_ids for each in APART], [each.masks[0] for each in APART]
    vectors = extract_activations(str(folder), ids, masks, layers=[2, -1], remote=True)
    means = [block_outputs(weights, each.input_ids)[:, each.masks[0]].mean(dim=1) for each in APART]
    assert relative_error(vectors, torch.stack(means).mean(dim=0)[[2, 11]]) < 1e-5


# --- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def host(standin: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NDIF_HOST", standin.url)
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.mark.usefixtures("host")
def test_extract_runs_on_the_server(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    persona = next(iter(PersonaDataset.bundled())).id
    options = ["--persona-id", persona, "--n-train", "2", "--variants", "biography", "--activations-dir", str(tmp_path)]
    command = ["extract", "--backend", "remote", "--model", str(folder), "--timeout", "60", *options]
    assert main(command) == 0
    assert PersonaVectorStore("deep-llama", tmp_path).load("biography", persona).shape == (N_LAYERS, 32)
    assert main([*command, "--verbose"]) == 0
    assert "kept" in capsys.readouterr().out


@pytest.mark.usefixtures("host")
def test_caa_runs_on_the_server_and_tells_of_retries(
    folder: Path, standin: Standin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    standin.script(backend_down())
    target = tmp_path / "set"
    command = ["caa", "--backend", "remote", "--model", str(folder), "--behavior", "formality", "--output", str(target)]
    assert main([*command, "--layers", "2", "5"]) == 0
    assert SteeringVectorSet.load(target).layers == [2, 5]
    assert "RETRYING the server answered 503" in capsys.readouterr().err
    assert not any((tmp_path / ".set.remote").iterdir())


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--backend", "remote", "--kind", "bridge"], "--kind is the server's choice"),
        (["--backend", "remote", "--dtype", "bfloat16"], "--dtype is the server's choice"),
        (["--backend", "remote", "--device", "cpu"], "--device is the server's choice"),
        (["--timeout", "5"], "go with --backend remote only"),
        (["--allow-http"], "go with --backend remote only"),
    ],
)
def test_options_that_do_not_go_with_the_backend(
    options: list[str], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["extract", "--model", str(folder), "--activations-dir", str(tmp_path), *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"device": "cpu"}, {"process_weights": True}])
def test_what_the_server_decides_is_not_the_clients_to_choose(options: dict[str, Any], folder: Path) -> None:
    with pytest.raises(InputError, match="server's choice"):
        load_model(folder, kind="remote", **options)


@pytest.mark.parametrize("options", [{"host": "http://127.0.0.1:1"}, {"timeout": 5.0}, {"allow_http": True}])
def test_a_local_model_has_no_server(options: dict[str, Any], folder: Path) -> None:
    with pytest.raises(InputError, match="kind='remote' only"):
        load_model(folder, kind="bridge", **options)


def test_missing_packages_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tl_persona.backends.choice.find_spec", lambda name: None if name == "tenacity" else object())
    with pytest.raises(MissingDependencyError, match=r"remote runs need tenacity: pip install .tl-persona\[remote\]"):
        load_model(folder, kind="remote")


# --- too little memory ---------------------------------------------------------------------------------------------


def test_chunks_of_layers_give_the_numbers_of_the_whole(remote: Any, weights: Any, standin: Standin) -> None:
    standin.fault_if(lambda _record: OutOfMemory(above_layers=5))
    backend = open_backend(remote(group_tokens=60))
    assert_oracle(backend, APART, weights)
    assert backend.notes["layers_per_request"] == 3  # a quarter of twelve
    fine = [record for record in work(standin) if record.status == "COMPLETED"]
    assert [record.layers for record in fine[:4]] == [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11)]
    assert len(fine) == 2 * 4
    assert len(standin.requests) == 1 + 1 + 2 * 4  # the dtype; all layers, once; two groups: the size is remembered


def test_chunks_are_halved_down_to_one_layer(remote: Any, weights: Any, standin: Standin) -> None:
    standin.fault_if(lambda _record: OutOfMemory(above_layers=1, device="cpu"))
    backend = open_backend(remote())
    assert_oracle(backend, APART, weights)
    assert backend.notes["layers_per_request"] == 1


def test_then_samples_go_alone(remote: Any, weights: Any, standin: Standin) -> None:
    standin.fault_if(lambda _record: OutOfMemory(above_tokens=60))
    backend = open_backend(remote())
    assert_oracle(backend, APART, weights)
    assert backend.notes["layers_per_request"] == 1
    assert backend.notes["samples_per_request"] == 2  # of which each is a pass by itself: nothing was proven


def test_a_sample_that_never_fits_says_what_was_tried(remote: Any, standin: Standin) -> None:
    standin.fault_if(lambda _record: OutOfMemory())
    backend = open_backend(remote())
    with pytest.raises(RemoteMemoryError, match=r"'s0'.*12 layers of 4 samples.*3 layers.*1 layers of 1 samples"):
        pooled(backend, APART, ALL_LAYERS)


def test_a_group_that_takes_too_long_is_cut(remote: Any, weights: Any, standin: Standin) -> None:
    backend = open_backend(remote())
    standin.script(too_long())
    assert_oracle(backend, APART, weights)
    assert backend.notes["samples_per_request"] == 2
    assert "layers_per_request" not in backend.notes


def test_what_fitted_holds_for_the_next_persona(remote: Any, weights: Any, standin: Standin) -> None:
    standin.fault_if(lambda _record: OutOfMemory(above_layers=5))
    model = remote()
    pooled(open_backend(model), APART, ALL_LAYERS)
    before = len(standin.requests)
    pooled(open_backend(model), APART, ALL_LAYERS)
    assert len(standin.requests) - before == 4


def test_chunks_share_nothing_but_agree_where_beginnings_are_shared(
    remote: Any, weights: Any, standin: Standin
) -> None:
    standin.fault_if(lambda _record: OutOfMemory(above_layers=5))
    assert_oracle(open_backend(remote()), SHARED, weights)


# --- what passes ---------------------------------------------------------------------------------------------------

PASSING: dict[str, Fault] = {
    "dropped before it was sent": Dropped(at="request"),
    "reset before it was sent": Dropped(at="request", reset=True),
    "polls without answers": PollFails(None, polls=3),
    "backend down": backend_down(),
    "bad gateway": Rejected(502, "Bad Gateway"),
    "too many requests": Rejected(429, "slow down"),
    "worker killed": worker_killed(),
    "jobs purged": purged(),
    "preempted": preempted(),
    "one poll fails": PollFails(500),
    "a poll without an answer": PollFails(None),
    "a download fails once": DownloadFails(500, downloads=1),
    "a download ends early": DownloadFails(None, downloads=1),
    "a result stays out of reach": DownloadFails(404, downloads=None),
    "a result that is no archive": Garbage("result"),
    "a result cut off": Garbage("half"),
    "slow": Slow(at="RUNNING", seconds=0.5),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_a_passing_failure_changes_no_number(fault: Fault, remote: Any, weights: Any, standin: Standin) -> None:
    standin.script(Fault(), fault)  # the first request asks for the dtype
    assert_oracle(open_backend(remote()), APART, weights)


def test_every_third_job_may_drop(remote: Any, weights: Any, standin: Standin) -> None:
    standin.fault_if(lambda record: PollFails(None) if record.number % 3 == 0 else None)
    samples = samples_of(*range(20, 60, 5))
    assert_oracle(open_backend(remote(group_tokens=50)), samples, weights)


def test_a_server_that_restarts_is_waited_for(remote: Any, weights: Any, standin: Standin) -> None:
    backend = open_backend(remote(first_wait=0.2, longest_wait=0.5))
    url = standin.url
    standin.stop()
    told: list[str] = []

    def start_again(_job: str, status: str, _description: str) -> None:
        told.append(status)
        if status == "RETRYING" and told.count("RETRYING") == 2:
            standin.start()

    try:
        again = open_backend(backend.model, on_status=start_again)  # type: ignore[attr-defined]
        assert_oracle(again, APART, weights)
    finally:
        if told.count("RETRYING") < 2:
            standin.start()
    assert standin.url == url


def opened_in_peace(model: RemoteModel, then: float) -> Backend:
    """A backend that had all the time it needed to open, and has `then` seconds for each group from now on."""
    backend = open_backend(model)
    object.__setattr__(model.settings, "timeout", then)
    return backend


def test_silence_ends_at_the_deadline(remote: Any, standin: Standin) -> None:
    backend = opened_in_peace(remote(), then=1.0)
    standin.script(Silent(at="RUNNING"))
    with pytest.raises(RemoteUnavailableError, match="1 s gives it more time"):
        pooled(backend, APART, ALL_LAYERS)


def test_a_server_that_takes_the_request_and_says_nothing_is_given_up(remote: Any, standin: Standin) -> None:
    backend = opened_in_peace(remote(), then=1.0)
    standin.script(Silent(at="request"))
    with pytest.raises(RemoteUnavailableError, match="run again to continue") as caught:
        pooled(backend, APART, ALL_LAYERS)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("host", ["http://127.0.0.1:9", "http://localhost:9"])
def test_nobody_there(host: str, folder: Path) -> None:
    model = open_remote_model(folder, RemoteSettings(host=host, **QUICK | {"timeout": 0.5}))
    with pytest.raises(RemoteUnavailableError, match="ConnectError"):
        open_backend(model)


def test_a_host_without_an_address(folder: Path) -> None:
    model = open_remote_model(folder, RemoteSettings(host="https://no-such-host.invalid", **QUICK | {"timeout": 0.5}))
    with pytest.raises(RemoteUnavailableError, match="no-such-host"):
        open_backend(model)


# --- what does not pass --------------------------------------------------------------------------------------------

LASTING: dict[str, tuple[Fault, str]] = {
    "model unavailable": (model_unavailable(), "cannot run this model now.*CANT_ACCOMMODATE"),
    "not found": (Rejected(404, "Not Found"), "404"),
    "a version that does not fit": (Rejected(400, "nnsight 0.1 is too old"), "nnsight 0.1 is too old"),
    "our own fault": (
        ServerSays("Traceback (most recent call last):\n  ...\nIndexError: list index out of range", {"runtime": 0.1}),
        "IndexError: list index out of range",
    ),
    "a module the server lacks": (
        ServerSays("Traceback:\nModuleNotFoundError: No module named 'x'", {"runtime": 0.1}),
        "versions of nnsight, transformers or torch differ",
    ),
    "another shape": (Altered(with_another_shape), r"shape \(\d, 12, 31\) where .* \(\d, 12, 32\)"),
    "another dtype": (Altered(with_another_dtype), "torch.int64"),
    "nothing": (Altered(with_nothing), "nothing in place of the result"),
    "an address elsewhere": (ByAddress("http://192.0.2.1/result"), "plain http to another machine"),
    "an address that is none": (ByAddress("file:///etc/passwd"), "no http or https address"),
}


@pytest.mark.parametrize(("fault", "said"), LASTING.values(), ids=LASTING)
def test_a_lasting_failure_ends_the_run_at_once(fault: Fault, said: str, remote: Any, standin: Standin) -> None:
    backend = open_backend(remote())
    standin.script(fault)
    with pytest.raises(RemoteRefusedError, match=said):
        pooled(backend, APART, ALL_LAYERS)
    assert len(standin.requests) == 2, "it was not tried again"


def test_numbers_that_are_none_are_refused(remote: Any, standin: Standin) -> None:
    backend = open_backend(remote())
    standin.fault_if(lambda _record: Altered(with_nan))
    with pytest.raises(NonFiniteError, match=r"blocks\.0\.hook_resid_post.*'s0'"):
        pooled(backend, APART, ALL_LAYERS)


@pytest.mark.parametrize(
    ("key", "said"),
    [("", "set NDIF_API_KEY"), ("no-uuid", "check NDIF_API_KEY"), (KEY.replace("3", "4"), "check NDIF_API_KEY")],
)
def test_a_key_that_is_not_taken(key: str, said: str, remote: Any, standin: Standin) -> None:
    standin.keys = {KEY}
    with pytest.raises(RemoteRefusedError, match=said) as caught:
        open_backend(remote(api_key=key))
    if key:
        assert key not in str(caught.value)


def test_the_key_is_sent_and_never_told(
    remote: Any, standin: Standin, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    standin.keys = {KEY}
    caplog.set_level(logging.DEBUG)
    told: list[str] = []
    model = remote(api_key=KEY)
    run_extraction(
        model, **arguments(tmp_path, remote=True, verbose=True, on_status=lambda *what: told.append(" ".join(what)))
    )
    assert all(record.had_key for record in standin.requests)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    output = capsys.readouterr()
    for text in (caplog.text, output.out, output.err, repr(model), *told):
        assert KEY not in text
    assert KEY.encode() not in written


# --- killed, and started again -------------------------------------------------------------------------------------

CLIENT = """
import sys
from pathlib import Path
from test_remote import QUICK, arguments
from tl_persona import run_extraction
from tl_persona.backends.remote.model import open_remote_model
from tl_persona.backends.remote.model import RemoteSettings
folder, host, root, group = sys.argv[1:]
model = open_remote_model(folder, RemoteSettings(host=host, group_tokens=int(group), **QUICK))
run_extraction(model, **arguments(Path(root), remote=True, variants=["biography"]))
"""


def client(folder: Path, standin: Standin, root: Path, group_tokens: int) -> "subprocess.Popen[bytes]":
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[1] / "support"), *sys.path])
    }
    command = [sys.executable, "-c", CLIENT, str(folder), standin.url, str(root), str(group_tokens)]
    return subprocess.Popen(command, env=environment)


def test_a_client_that_is_killed_does_not_redo_finished_groups(
    remote: Any, folder: Path, standin: Standin, tmp_path: Path
) -> None:
    """The client dies while its third group runs: two are done and saved, the third is done when it comes back."""
    run_extraction(remote(group_tokens=400), **arguments(tmp_path / "whole", remote=True, variants=["biography"]))
    undisturbed = len(work(standin))
    assert undisturbed > 4
    standin.reset()
    third = 1 + 1 + 2  # after the dtype, the proof and two groups
    standin.fault_if(lambda record: Slow(at="COMPLETED", seconds=5.0) if record.number == third else None)
    first = client(folder, standin, tmp_path / "killed", 400)
    deadline = time.monotonic() + 300
    while len(work(standin)) < third and time.monotonic() < deadline:
        assert first.poll() is None, "the client ended by itself"
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait(60)
    assert not list((tmp_path / "killed").rglob("*.safetensors"))
    standin.settle()
    second = client(folder, standin, tmp_path / "killed", 400)
    assert second.wait(300) == 0
    assert len(work(standin)) == undisturbed, "nothing ran twice"
    whole, after = vectors_in(tmp_path / "whole"), vectors_in(tmp_path / "killed")
    assert sorted(whole) == sorted(after)
    for name, vectors in whole.items():
        assert torch.equal(after[name], vectors)
    assert not list((tmp_path / "killed" / ".remote").iterdir())


def test_a_job_that_the_server_forgot_is_sent_again(
    remote: Any, weights: Any, standin: Standin, tmp_path: Path
) -> None:
    model = remote()
    backend = open_backend(model, journal=tmp_path)
    pooled(backend, APART, ALL_LAYERS)
    for path in tmp_path.glob("*.result"):
        path.unlink()
    standin.forget()
    before = len(work(standin))
    assert_oracle(open_backend(model, journal=tmp_path), APART, weights)
    assert len(work(standin)) == before + 1


def test_a_finished_job_is_fetched_and_not_sent_again(
    remote: Any, weights: Any, standin: Standin, tmp_path: Path
) -> None:
    model = remote()
    pooled(open_backend(model, journal=tmp_path), APART, ALL_LAYERS)
    for path in tmp_path.glob("*.result"):
        path.unlink()
    before = len(standin.requests)
    assert_oracle(open_backend(model, journal=tmp_path), APART, weights)
    assert len(standin.requests) == before


def test_a_damaged_journal_costs_time_and_no_number(
    remote: Any, weights: Any, standin: Standin, tmp_path: Path
) -> None:
    model = remote()
    pooled(open_backend(model, journal=tmp_path), APART, ALL_LAYERS)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-20] + b"?" * 20)
    assert_oracle(open_backend(model, journal=tmp_path), APART, weights)


# --- refused before anything is sent -------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["blocks.0.attn.hook_z", "hook_embed", "ln_final.hook_normalized"])
def test_a_hook_without_a_counterpart_is_refused_before_anything_is_sent(
    hook: str, remote: Any, standin: Standin
) -> None:
    model = remote()
    open_backend(model)
    before = len(standin.requests)
    with pytest.raises(HookError, match="hook"):
        extract_activations(model, [APART[0].input_ids], [APART[0].masks[0]], layers=hook, remote=True)
    assert len(standin.requests) == before


def test_ids_outside_the_vocabulary_are_refused(remote: Any) -> None:
    ids = torch.tensor([1, 10**6])
    with pytest.raises(InputError, match=r"1000000.*use its own tokenizer"):
        extract_activations(remote(), [ids], [torch.ones(2, dtype=torch.bool)], remote=True)


@pytest.mark.parametrize("host", ["http://example.org", "ftp://example.org", "api.ndif.us", "http://[::1", ""])
def test_an_address_that_is_not_safe_is_refused(host: str) -> None:
    with pytest.raises(InputError):
        RemoteSettings(host=host)


def test_plain_http_may_be_allowed() -> None:
    assert RemoteSettings(host="http://example.org/", allow_http=True).host == "http://example.org"
    assert RemoteSettings(host="http://127.0.0.1:5000").host == "http://127.0.0.1:5000"


def test_a_local_model_does_not_run_remotely(folder: Path, weights: Any) -> None:
    with pytest.raises(InputError, match="LlamaForCausalLM"):
        open_backend(weights, remote=True)


def test_a_gguf_file_has_no_name_on_a_server() -> None:
    with pytest.raises(InputError, match="GGUF"):
        load_model("smollm2", kind="remote")


def test_a_folder_without_a_model_cannot_be_laid_out(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(tmp_path, kind="remote")


def test_the_store_is_the_same_as_that_of_a_local_run(remote: Any, tmp_path: Path) -> None:
    run_extraction(remote(), **arguments(tmp_path, remote=True, variants=["biography"]))
    persona = next(iter(PersonaDataset.bundled()))
    store = PersonaVectorStore("org/deep", tmp_path)
    assert store.list_personas(["biography"], include_baseline=True) == [persona.id]
    assert store.load("biography", persona.id).shape == (N_LAYERS, 32)
