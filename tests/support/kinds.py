"""Both TransformerLens classes as parameters, where the installed release has both, and the layers of a tiny model."""

import importlib.metadata
from collections.abc import Callable
from typing import Any

import pytest
from tiny import N_LAYERS

HAS_HOOKED_TRANSFORMER = importlib.metadata.version("transformer-lens").startswith("3.")
Boot = Callable[[str, str], Any]


HOOKED = pytest.param("hooked", marks=pytest.mark.hooked)


BOTH_KINDS = pytest.mark.parametrize("kind", ["bridge", HOOKED])


ALL_LAYERS = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]
