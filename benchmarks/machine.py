"""What the machine could reach: the speed of the model's own largest matrix product, and how much of it a run used."""

import time
from collections.abc import Callable
from typing import Any

import torch


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def matmul_share(model: Any, tokens_distinct: int, seconds: float) -> float:
    """The share of the machine's matmul speed that a run reached, distinct tokens and the blocks' weights counted."""
    return tokens_distinct * 2 * _block_weights(model) / matmul_flops() / seconds


def matmul_flops() -> float:
    """The machine's speed at the largest product of the model, in operations a second."""
    left, right = torch.randn(512, 576), torch.randn(1536, 576)
    for _ in range(20):
        left @ right.T
    seconds = min(timed(lambda: [left @ right.T for _ in range(20)]) for _ in range(5)) / 20
    return 2 * 512 * 576 * 1536 / seconds


def _block_weights(model: Any) -> int:
    """Weights of the blocks' matrices, each of which multiplies every token once."""
    cfg = model.cfg
    n_kv = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    attention = cfg.d_model * cfg.d_head * (2 * cfg.n_heads + 2 * n_kv)
    return int(cfg.n_layers * (attention + 3 * cfg.d_model * cfg.d_mlp))
