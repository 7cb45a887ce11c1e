"""persona-vectors' own `extract_activations`, a trace a sample, on SmolLM2."""

import time
from typing import Any

import torch
from nnterp import StandardizedTransformer
from persona_vectors.activations import extract_activations
from serve import serve

from tl_persona.models.checkpoints import find_checkpoint, load_hf_model, load_tokenizer

checkpoint = find_checkpoint("smollm2")
hf_model = load_hf_model(checkpoint, dtype=torch.float32)
model = StandardizedTransformer(hf_model, tokenizer=load_tokenizer(checkpoint), check_renaming=False)


def answer(inputs: str, output: str) -> dict[str, Any]:
    """Reads ids and masks from one file and writes the vectors to another."""
    saved = torch.load(inputs, weights_only=True)
    start = time.perf_counter()
    vectors = extract_activations(model, saved["ids"], saved["masks"])
    seconds = time.perf_counter() - start
    torch.save(vectors.detach().clone(), output)
    return {"seconds": seconds}


serve(answer)
