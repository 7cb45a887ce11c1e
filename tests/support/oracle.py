"""A naive oracle: the Hugging Face model itself, one sample at a time, decoder-layer outputs averaged in float64.

No batch, no padding, no TransformerLens and nothing of the package under test: what everything fast is compared with.
Beside it, `watched` tells what a hooked model really ran.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tl_persona.backends.local.observers import LOOKING_ON
from tl_persona.backends.local.trial import trial_of
from tl_persona.plan import Sample


def block_outputs(model: Any, input_ids: Tensor, layers_at: str | None = None) -> Tensor:
    """Output of every decoder layer for one text, shape (layer, pos, d_model), in float64.

    `layers_at` says where the layers are, as `get_submodule` takes it; None looks where most families have them.
    """
    layers = _layers_of(model) if layers_at is None else model.get_submodule(layers_at)
    captured: list[Tensor] = []
    handles = [
        layer.register_forward_hook(
            lambda _m, _args, out: captured.append(out[0] if isinstance(out, tuple | list) else out)
        )
        for layer in layers
    ]
    try:
        with torch.no_grad():
            model(input_ids[None])
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([output[0].double() for output in captured])


def _layers_of(model: Any) -> Any:
    if hasattr(model, "transformer"):
        return model.transformer.h
    for name in ("language_model", "text_model"):  # of a model that reads images or sound as well
        if hasattr(model.model, name):
            return getattr(model.model, name).layers
    return model.model.layers


def mean_activations(model: Any, samples: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean over the masked tokens of each sample, then over samples: (layer, d_model) from (ids, mask) pairs."""
    return torch.stack([block_outputs(model, ids)[:, mask].mean(dim=1) for ids, mask in samples]).mean(dim=0)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest error of a vector, relative to the norm of the expected one."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    errors = (actual.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
    return float(errors.max())


def looking_on(hook: Any) -> Any:
    """Marks a hook as one that changes nothing: for others every text is run by itself."""
    hook.__module__ = LOOKING_ON[0]
    return hook


@contextmanager
def watched(model: Any) -> Iterator[dict[str, int]]:
    """Counts the positions that go through the layers of a hooked model: `{"blocks.0.mlp": 42, ...}`."""
    positions: dict[str, int] = {}
    layers = {"ln_final": model.ln_final, "unembed": model.unembed}
    for index, block in enumerate(model.blocks):
        layers |= {f"blocks.{index}.attn": block.attn, f"blocks.{index}.mlp": block.mlp}
    handles = []
    for name, layer in layers.items():
        positions[name] = 0

        def count(_layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            hidden = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
            positions[name] += hidden.shape[:-1].numel()

        looking_on(count)
        handles.append(layer.register_forward_pre_hook(count, with_kwargs=True))
    try:
        yield positions
    finally:
        for handle in handles:
            handle.remove()


def oracle_means(hf_model: Any, sample: Sample) -> Tensor:
    outputs = block_outputs(hf_model, sample.input_ids)
    return torch.stack([outputs[:, mask].mean(dim=1) for mask in sample.masks])


def some(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def keeping_its_cache(model: Any) -> AbstractContextManager[None]:
    """A block in which a model's own loops continue their cache, also where its releases do not agree on its name."""
    return trial_of(model).renamed(model) if hasattr(model, "original_model") else nullcontext()


def logits_of(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad(), keeping_its_cache(model):
        found = model(ids, **options)
    return found if isinstance(found, Tensor) else found.logits
