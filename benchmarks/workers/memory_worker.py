"""Peak memory of our own extraction above the loaded model: a fresh process a figure, which remembers no other run.

Reads Linux's own counters. Loading a model leaves memory free that is not given back and would hide some of what
follows, so it is given back first, and the peak starts anew.
"""

import ctypes
import gc
from pathlib import Path
from typing import Any

import torch
from persona_samples import long_persona_inputs
from serve import serve

from tl_persona import extract_activations, load_model

model = load_model("smollm2")


def kilobytes(counter: str) -> int:
    """A counter of this process: `VmRSS` is what it holds, `VmHWM` the most it has held."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(counter))
    return int(line.split()[1])


def answer(questions: int, layers: str | None, output: str) -> dict[str, Any]:
    """Extracts once, tells how far the resident set rose, and then writes the vectors."""
    inputs = long_persona_inputs(model.tokenizer, questions)
    extract_activations(model, inputs.ids[:2], inputs.masks[:2], layers=layers)  # buffers that every run needs
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    vectors = extract_activations(model, inputs.ids, inputs.masks, layers=layers)
    peak = kilobytes("VmHWM")
    torch.save(vectors, output)
    return {"bytes": 1024 * (peak - before)}


serve(answer)
