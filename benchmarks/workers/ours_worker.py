"""Our own `extract_activations` on SmolLM2, as whatever commit and releases lie first on the path have it."""

import resource
import time
from typing import Any

import torch
from serve import serve

from tl_persona import extract_activations, load_model

loaded: dict[str, Any] = {}


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def answer(inputs: str, output: str, kind: str = "bridge", load: bool = False, first: bool = False) -> dict[str, Any]:
    """Reads ids and masks from one file and writes the vectors to another.

    `load` opens the model anew, in the time; `first` before it, so that this is the model's first call.
    """
    saved = torch.load(inputs, weights_only=True)
    if first or (not load and kind not in loaded):
        loaded[kind] = load_model("smollm2", kind)  # type: ignore[call-overload]
    began, used = time.perf_counter(), cpu_seconds()
    if load:
        loaded[kind] = load_model("smollm2", kind)  # type: ignore[call-overload]
    vectors = extract_activations(loaded[kind], saved["ids"], saved["masks"])
    answered = {"seconds": time.perf_counter() - began, "cpu": cpu_seconds() - used}
    torch.save(vectors, output)
    return answered


serve(answer)
