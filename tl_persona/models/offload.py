"""Weights that accelerate keeps elsewhere, in memory or on disk, and brings where they are needed, layer by layer.

Such a parameter is a tensor on the meta device: a name and a shape. A copy of the module tree has hooks that bring
weights to the modules of the first, so these models run as they are, and nobody knows what is written into them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def is_offloaded(model: torch.nn.Module) -> bool:
    """Whether some weights of a model are elsewhere."""
    return any(parameter.device.type == "meta" for parameter in model.parameters())


def input_device(hf_model: Any) -> torch.device:
    """Where a transformers model takes its token ids."""
    device: torch.device = hf_model.get_input_embeddings().weight.device
    if device.type != "meta":
        return device
    found = (getattr(hook, "execution_device", None) for module in hf_model.modules() for hook in _hooks(module))
    named = next((device for device in found if device is not None), "cpu")
    return torch.device("cuda", named) if isinstance(named, int) else torch.device(named)


def kept_elsewhere(model: torch.nn.Module) -> dict[str, Tensor]:
    """The weights themselves, by the names of the parameters and buffers that stand for them, as far as known."""
    found = {}
    for path, module in model.named_modules():
        for hook in _hooks(module):
            kept: Mapping[str, Tensor] | None = getattr(hook, "weights_map", None)
            if kept is None:
                continue
            below = bool(getattr(hook, "place_submodules", False))
            for name, tensor in (*module.named_parameters(recurse=below), *module.named_buffers(recurse=below)):
                if tensor.device.type == "meta" and name in kept:
                    found[f"{path}.{name}" if path else name] = kept[name]
    return found


def _hooks(module: torch.nn.Module) -> Iterator[Any]:
    """Those that accelerate has put on a module."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))
