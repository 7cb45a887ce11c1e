"""How many tokens a forward pass may hold on a device, from its free memory."""

import psutil
import torch

from tl_persona.models.facts import ModelFacts

SHARE = 0.25
"""Of the free memory: what a model needs beside the captured activations is an estimate."""

CEILINGS = {"cpu": 512, "cuda": 16384, "mps": 4096}
"""Past these a pass gains no speed: on a CPU larger ones leave the caches."""

WORKSPACE = 32
"""Activations of d_model numbers that a block holds at once for each token, its MLP and scores included."""


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, in bytes; that of the host for devices that share it."""
    if device.type == "cuda":
        # What torch holds and nobody uses is free to the next pass, though not to other processes.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    return int(psutil.virtual_memory().available)


def default_batch_tokens(facts: ModelFacts, device: torch.device, free: int | None = None) -> int:
    """Padded tokens a pass may hold where the caller sets no budget.

    Args:
        facts: Of the model.
        device: Where it runs.
        free: Free bytes; None asks the device.

    Example:
        >>> facts = ModelFacts(name="m", revision=None, kind="k", dtype="bfloat16", weights="unprocessed",
        ...                    n_layers=80, d_model=8192, n_ctx=None, hook_names=())
        >>> default_batch_tokens(facts, torch.device("cuda"), free=8 * 2**30)
        1170
    """
    itemsize = getattr(torch, facts.dtype).itemsize
    per_token = (facts.n_layers + WORKSPACE) * facts.d_model * itemsize
    available = free_bytes(device) if free is None else free
    ceiling = CEILINGS.get(device.type, CEILINGS["cpu"])
    return max(1, min(ceiling, int(SHARE * available / per_token)))
