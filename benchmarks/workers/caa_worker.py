"""The peers' contrastive directions on SmolLM2: rotalabs-steer, steering-vectors and repeng."""

import time
from typing import Any

import numpy
import torch
from serve import serve

from tl_persona.models.checkpoints import find_checkpoint, load_hf_model, load_tokenizer

numpy.float_ = numpy.float64  # type: ignore[attr-defined]  # repeng 0.4 is written for NumPy 1

checkpoint = find_checkpoint("smollm2")
tokenizer = load_tokenizer(checkpoint)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
hf_model = load_hf_model(checkpoint, dtype=torch.float32)
LAYERS = list(range(hf_model.config.num_hidden_layers))


def rotalabs(pairs: list[dict[str, str]], layers: list[int]) -> list[torch.Tensor]:
    from rotalabs_steer.extraction import extract_caa_vectors

    found = extract_caa_vectors(hf_model, tokenizer, pairs, layers, show_progress=False)
    return [found[layer].vector for layer in layers]


def steering_vectors(pairs: list[dict[str, str]], batch_size: int) -> list[torch.Tensor]:
    from steering_vectors import train_steering_vector

    samples = [(pair["positive"], pair["negative"]) for pair in pairs]
    found = train_steering_vector(hf_model, tokenizer, samples, layers=LAYERS, batch_size=batch_size)
    return [found.layer_activations[layer] for layer in LAYERS]


def repeng(pairs: list[dict[str, str]]) -> list[torch.Tensor]:
    from repeng import ControlModel, ControlVector, DatasetEntry

    entries = [DatasetEntry(positive=pair["positive"], negative=pair["negative"]) for pair in pairs]
    model = ControlModel(hf_model, LAYERS[1:])
    try:
        found = ControlVector.train(model, tokenizer, entries, batch_size=16)
    finally:
        model.unwrap()
    return [torch.from_numpy(found.directions[layer]) for layer in LAYERS[1:]]


def answer(peer: str, pairs: list[dict[str, str]], output: str, **options: Any) -> dict[str, Any]:
    """Runs one peer and writes its directions."""
    run = {"rotalabs": rotalabs, "steering_vectors": steering_vectors, "repeng": repeng}[peer]
    start = time.perf_counter()
    with torch.no_grad():
        directions = run(pairs, **options)
    seconds = time.perf_counter() - start
    torch.save(torch.stack([direction.float() for direction in directions]), output)
    return {"seconds": seconds}


serve(answer)
