"""Whatever class a model becomes, its residuals are those of the transformers model, or it is refused with a reason."""

from collections.abc import Callable
from typing import Any

import pytest
from decoders import DECODERS
from hooked_residuals import allowed, outcome, residuals
from kinds import HOOKED

from tl_persona import load_model

pytestmark = pytest.mark.tl

EVERY_DECODER = pytest.mark.parametrize("name", DECODERS)


@EVERY_DECODER
def test_a_model_in_memory_is_right_or_refused(name: str, decoder: Callable[[str], Any]) -> None:
    saved = decoder(name)
    found = outcome(lambda: residuals(saved.load(), saved.texts, saved.tokenizer), saved.expected)
    assert found in allowed(saved.record, "auto")


@pytest.mark.parametrize("kind", ["auto", "bridge", HOOKED])
@EVERY_DECODER
def test_a_loaded_model_is_right_or_refused(name: str, kind: str, decoder: Callable[[str], Any]) -> None:
    saved = decoder(name)
    found = outcome(lambda: residuals(load_model(saved.folder, kind=kind), saved.texts), saved.expected)
    assert found in allowed(saved.record, kind)
