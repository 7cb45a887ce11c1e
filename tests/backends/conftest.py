"""Models of the backends' tests."""

import json
from pathlib import Path

import pytest
from tiny import build_tiny


@pytest.fixture
def unscaled_gpt2(tmp_path: Path) -> Path:
    """A configuration that a TransformerBridge does not read: scores are not scaled."""
    folder = build_tiny("gpt2", tmp_path / "unscaled")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"scale_attn_weights": False}))
    return folder
