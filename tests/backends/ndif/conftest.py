"""The real NDIF server as a fixture, and a bare nnsight client of it; `make test-ndif` runs what uses them."""

import beartype  # noqa: F401, I001 - before nnsight, which breaks a beartype imported after it

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
TEST_SECONDS = 90  # one test, once the server is up; the slowest takes 15


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """End a test that waits for an answer that never comes: nnsight's waiting client has no deadline of its own."""
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_SECONDS, func_only=True))


@pytest.fixture(scope="session")
def ndif_packages() -> Path:
    """The folder with NDIF and what only it needs."""
    if "TL_PERSONA_NDIF" not in os.environ:
        pytest.fail("TL_PERSONA_NDIF must name the folder NDIF was installed to: run these tests with `make test-ndif`")
    return Path(os.environ["TL_PERSONA_NDIF"]).absolute()


@pytest.fixture(scope="session")
def smollm2_folder(smollm2: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model as a folder that server and client both read, with the name its artifacts are filed under."""
    weights, tokenizer = smollm2
    folder = tmp_path_factory.mktemp("ndif") / "SmolLM2-135M-Instruct"
    with pytest.MonkeyPatch.context() as patch:
        # Left over from the GGUF file; transformers saves no model that it takes for a quantized one.
        patch.delattr(weights.config, "quantization_config", raising=False)
        patch.setattr(weights, "hf_quantizer", None, raising=False)
        weights.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ndif(ndif_packages: Path, smollm2_folder: Path) -> Iterator[Any]:
    """A server that serves SmolLM2 in float32: a `server.Server`. A test that breaks it waits until it serves again."""
    from server import running_server

    with running_server(ndif_packages, smollm2_folder) as up:
        yield up


@pytest.fixture(scope="session")
def client(ndif: Any, smollm2: tuple[Any, Any]) -> Any:
    """What a client holds of the model: nnsight's model on the meta device, without weights."""
    import nnsight
    from nnsight.modeling.transformers import TransformersModel

    nnsight.CONFIG.APP.REMOTE_LOGGING = False  # no spinner
    return TransformersModel(ndif.model_folder, task="text-generation", tokenizer=smollm2[1])


@pytest.fixture(scope="session")
def backend(ndif: Any, client: Any) -> Callable[..., Any]:
    """Give a new `RemoteBackend` of the server; options replace the model key, the host, and the rest."""
    from nnsight.intervention.backends.remote import RemoteBackend

    def make(**options: Any) -> Any:
        return RemoteBackend(
            **{"model_key": ndif.model_key, "host": ndif.url, "env": client._remoteable_get_env()} | options
        )

    return make


@pytest.fixture(scope="session")
def local_states(smollm2: tuple[Any, Any]) -> Callable[..., Any]:
    """Give the output of every block of the local model: `Float[Tensor, "layer batch pos d_model"]`."""
    import torch

    weights = smollm2[0]

    def states(**inputs: Any) -> Any:
        kept: list[Any] = []
        handles = [block.register_forward_hook(lambda *seen: kept.append(seen[2])) for block in weights.model.layers]
        try:
            with torch.no_grad():
                weights(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(kept)

    return states
