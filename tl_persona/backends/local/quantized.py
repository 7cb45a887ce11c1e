"""Weights that are held in fewer bits, found by what they are made of, and whether activations are rounded as well.

Rounded weights are a function like any other, and every shortcut is as exact on them. Where activations are rounded as
they come, a difference in the last bit may move a number by a whole step: two ways to compute one text differ by per
cents.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from tl_persona.models.state import parts_of_tensor

_N_MODULES = 3
_N_ROWS = 256
_NOISE = 1e-5
_STEPS = 10
"""How many times its noise an input's effect may be where nothing is rounded; where something is, it is a hundred."""


def quantization_of(modules: Iterable[torch.nn.Module]) -> str:
    """In what a model's weights are held, such as `int8 (Int8Tensor)`; empty where they are floating-point numbers."""
    found = {
        f"{str(part.dtype).removeprefix('torch.')} ({type(tensor).__name__})"
        for module in modules
        for tensor in _weights(module)
        for part in _low(tensor)
    }
    return ", ".join(sorted(found))


def _weights(module: torch.nn.Module) -> Iterator[Tensor]:
    yield from (tensor for tensor in module._parameters.values() if tensor is not None)
    saved = ((name, tensor) for name, tensor in module._buffers.items() if tensor is not None)
    yield from (tensor for name, tensor in saved if tensor.ndim == 2 and name not in module._non_persistent_buffers_set)


def _low(tensor: Tensor) -> list[Tensor]:
    """The parts of a matrix that are whole numbers, or floating-point ones of a byte."""
    parts = [part for _, part in parts_of_tensor("", tensor)]
    return [part for part in parts if part.ndim >= 2 and part.itemsize < 8 and _is_low(part.dtype)]


def _is_low(dtype: torch.dtype) -> bool:
    return dtype != torch.bool and (not dtype.is_floating_point or dtype.itemsize == 1)


@torch.no_grad()
def rounds_activations(modules: Iterable[torch.nn.Module]) -> bool:
    """Whether what goes into quantized layers is rounded, tried on some of them with inputs that differ by a hair.

    In float32 alone: in half precision every input is rounded as coarsely.
    """
    layers = [module for module in modules if hasattr(module, "in_features") and any(map(_low, _weights(module)))]
    for layer in layers[:: max(1, len(layers) // _N_MODULES)]:
        device = next(_weights(layer)).device
        generator = torch.Generator().manual_seed(0)
        shape = (_N_ROWS, int(layer.in_features))  # type: ignore[arg-type]
        inputs, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
        try:
            one, other = layer(inputs), layer(inputs + _NOISE * noise)
        except (RuntimeError, TypeError):  # it takes another dtype
            continue
        if float((one - other).norm() / one.norm()) > _STEPS * _NOISE:
            return True
    return False
