"""Whether somebody looks into, or changes, what a model computes.

TransformerLens and transformers leave hooks of their own behind, which only look on; all others are somebody's.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
LOOKING_ON = ("transformers.utils.output_capturing", "transformer_lens.model_bridge.generalized_components.block")


def hooks_of(module: torch.nn.Module) -> Iterator[Any]:
    """All hooks of one module."""
    for kind in _KINDS:
        yield from getattr(module, kind).values()


def is_observed(modules: Iterable[torch.nn.Module]) -> bool:
    """Whether any of these has a hook of somebody's."""
    return any(getattr(hook, "__module__", None) not in LOOKING_ON for module in modules for hook in hooks_of(module))
