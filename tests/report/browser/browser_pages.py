"""What the pages of the browser tests are about, all of it known in advance, and what the browser asked for."""

import json
from typing import Any

import torch

from tl_persona.vectors import SteeringVector

LAYERS, WIDTH = 5, 6
NAMES = {
    "ada": "Ada",
    "bo": "<script>window.hacked = 1</script>",
    "cy": '<img src=x onerror="window.hacked = 2"> & %{x}',
    "dee": "Ada",
    "baseline_assistant": "Assistant",
}
ATTRIBUTES = {
    "ada": {"home": "sea", "age": 30},
    "bo": {"home": "<b>hill</b>", "age": 41},
    "cy": {"home": "sea", "age": 52},
    "dee": {"home": "town"},
}


def vectors_of(persona_id: str, variant: str) -> torch.Tensor:
    """Random numbers around a mean that all share, the same every time."""
    seed = list(NAMES).index(persona_id) + 100 * (variant == "biography")
    return torch.randn(LAYERS, WIDTH, generator=torch.Generator().manual_seed(seed)) + 2.0


def steering_vector(layer: int) -> SteeringVector:
    """Layer 1 separates best."""
    auc = (0.7, 0.95, 0.9)[layer]
    statistics = {"auc": auc, "auc_low": auc - 0.1, "auc_high": auc + 0.04, "split_half": 0.5, "agreement": 0.8}
    statistics |= {"d_prime": auc * 2, "d_prime_low": auc, "d_prime_high": auc * 3}
    metadata = {"num_pairs": 12, "token_position": "last", "statistics": statistics}
    return SteeringVector("calm </script>", layer, torch.ones(4) * (layer + 1), "org/model", "caa", metadata)


def requests_of(chromium: Any) -> list[str]:
    """The addresses asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    return [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
