"""Peak memory of our own extraction above the loaded model: a fresh process a figure, because peaks only rise."""

import resource
import sys
from typing import Any

import psutil
from persona_samples import long_persona_inputs
from serve import serve

from tl_persona import extract_activations, load_model

model = load_model("smollm2")


def answer(questions: int, layers: str | None) -> dict[str, Any]:
    """Extracts once and tells how far the resident set rose."""
    inputs = long_persona_inputs(model.tokenizer, questions)
    extract_activations(model, inputs.ids[:2], inputs.masks[:2], layers=layers)  # buffers that every run needs
    before = psutil.Process().memory_info().rss
    unit = 1 if sys.platform == "darwin" else 1024
    already = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    extract_activations(model, inputs.ids, inputs.masks, layers=layers)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"bytes": peak - before, "raised": peak > already}


serve(answer)
