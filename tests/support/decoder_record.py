"""How a tiny decoder is made, and the settings that many of them share. The tables are beside it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from tiny import SIZES, VOCAB_SIZE

WINDOW = 16
"""Of sliding windows and of chunks."""

ORIGINAL_CONTEXT = 32
"""Rotary positions are scaled past it where a configuration says so."""

CONTEXT = 128

_STD = 0.2  # tiny's: matrices of gain near one


@dataclass(frozen=True)
class Decoder:
    """How one decoder is made, and what was seen of its hooked classes with transformers 5.24.

    Attributes:
        config: Name of the configuration class in transformers.
        settings: What it is made with.
        layers: Where the decoder layers are in the transformers model, as `get_submodule` takes it.
        wrong: For a class and the release of TransformerLens (`hooked 3.9`, `bridge 4.3`) the largest error of a
            residual, relative to its norm, on `texts()`. What is not named here was right.
        missing: Classes that TransformerLens cannot make, or that do not run, named in the same way.
        unreadable: Why its blocks have no one residual stream, so that it is refused as what it is, too.
    """

    config: str
    settings: Mapping[str, Any]
    layers: str = "model.layers"
    wrong: Mapping[str, float] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unreadable: str = ""

    def make(self) -> Any:
        """A transformers model, in evaluation mode, with random weights that are the same every time."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            config = getattr(transformers, self.config)(**self.settings)
            model = auto_class(config).from_config(config).float().eval()
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(_STD * torch.randn_like(parameter))
                else:  # norms and biases lie at 1 and 0, where a missing one would go unnoticed
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model


def auto_class(config: Any) -> Any:
    """Of transformers, that which makes a model of a configuration: one that takes pictures has a class of its own."""
    causal = transformers.AutoModelForCausalLM
    return causal if type(config) in causal._model_mapping else transformers.AutoModelForImageTextToText


NO_HOOKED = ("hooked 3.9",)
NO_BRIDGE = ("hooked 3.9", "bridge 3.9", "bridge 4.3")

BASE = {name: size for name, size in SIZES.items() if name not in ("head_dim", "initializer_range")}
BASE |= {"max_position_embeddings": CONTEXT, "pad_token_id": 0}
FEW = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 3, "pad_token_id": 0}


def decoder(
    config: str, wrong: Mapping[str, float] | None = None, missing: tuple[str, ...] = (), **settings: Any
) -> Decoder:
    """Of the sizes that most have."""
    return Decoder(config, BASE | settings, wrong=wrong or {}, missing=missing)


def bridged(
    config: str, wrong: Mapping[str, float] | None = None, missing: tuple[str, ...] = NO_HOOKED, **settings: Any
) -> Decoder:
    """The same, of a kind that is no HookedTransformer."""
    return decoder(config, wrong, missing, **settings)


def rope(kind: str, **options: Any) -> dict[str, Any]:
    """Scaled rotary positions."""
    return {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0, **options}


LINEAR = rope("linear")
YARN = rope("yarn", original_max_position_embeddings=ORIGINAL_CONTEXT)
LONG = rope(
    "longrope",
    short_factor=[1.0] * 4,
    long_factor=[4.0] * 4,
    original_max_position_embeddings=ORIGINAL_CONTEXT,
)
WINDOWS_AROUND = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
LATER_WINDOWS = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
