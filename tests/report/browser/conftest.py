"""A headless browser without a network, and a small store and set whose every cosine is known."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_pages import LAYERS, NAMES, steering_vector, vectors_of

from tl_persona.provenance import Provenance
from tl_persona.store import PersonaVectorStore
from tl_persona.vectors import SteeringVectorSet


@pytest.fixture(scope="session")
def filled_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a store with two variants, and a set of steering vectors in it."""
    root = tmp_path_factory.mktemp("store")
    hooks = tuple(f"blocks.{i}.hook_resid_post" for i in range(LAYERS))
    provenance = Provenance(
        model_name="org/model",
        revision="abc123",
        dtype="float32",
        weights="unprocessed",
        hook_names=hooks,
        strategy="answer_mean",
        prompts_digest="d",
        sample_ids=("q1", "q2"),
        notes={"backend": "local"},
    )
    with PersonaVectorStore("org/model", root) as store:
        for variant in ("templated", "biography"):
            for persona_id, name in NAMES.items():
                vectors = vectors_of(persona_id, variant)
                store.save(variant, persona_id, name, vectors, ["q1", "q2"], provenance=provenance)
    SteeringVectorSet("calm </script>", [steering_vector(layer) for layer in range(3)]).save(root / "steering" / "calm")
    return root


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless browser of a laptop's size that resolves no host name."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.fail("these tests need a browser: apt-get install chromium chromium-driver", pytrace=False)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in (
        "--headless=new",
        "--no-sandbox",  # which root, as in a container, may not have
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=1366,768",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


@pytest.fixture
def few() -> Callable[[Path, int], Path]:
    """Fill a store with a number of personas."""

    def fill(root: Path, personas: int) -> Path:
        with PersonaVectorStore("org/model", root) as store:
            for persona_id in list(NAMES)[:personas]:
                store.save("templated", persona_id, NAMES[persona_id], vectors_of(persona_id, "templated"), ["q1"])
        return root

    return fill
