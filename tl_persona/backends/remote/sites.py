"""Hook names as places in a Hugging Face model: which module, and whether its input or its output.

The residual stream before and after a block is found in any decoder. What lies inside a block differs from family to
family, so those hooks exist only for the families in the table, each of which a test compares with TransformerLens.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from tl_persona.errors import ModelError
from tl_persona.models.hooks import layer_of

Side = Literal["input", "output"]


class Site(NamedTuple):
    """A place whose value a hook stands for.

    Attributes:
        module: Path of the module below the model, such as `model.layers.3.mlp`.
        side: Whether the module's input or its output.
    """

    module: str
    side: Side


class _Parts(NamedTuple):
    """Where the hooks inside a block are: a module of the block, and a side of it."""

    attn_out: tuple[str, Side]
    mlp_out: tuple[str, Side]
    resid_mid: tuple[str, Side] | None


_LLAMA = _Parts(("self_attn", "output"), ("mlp", "output"), ("post_attention_layernorm", "input"))
# Norms stand behind attention and MLP too; what they put out is what is added to the residual stream.
_GEMMA2 = _Parts(
    ("post_attention_layernorm", "output"),
    ("post_feedforward_layernorm", "output"),
    ("pre_feedforward_layernorm", "input"),
)

_INSIDE: dict[str, _Parts] = {
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "gpt2": _Parts(("attn", "output"), ("mlp", "output"), ("ln_2", "input")),
    "gpt_neox": _Parts(("attention", "output"), ("mlp", "output"), None),  # attention and MLP read the same residual
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}

_BLOCK_LISTS = (
    "model.layers",
    "transformer.h",
    "gpt_neox.layers",
    "model.decoder.layers",
    "model.language_model.layers",
)

# In the order in which they fire within a block.
_HOOKS = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")


class Sites:
    """The hooks of one model and where they are.

    Args:
        model: A Hugging Face causal language model; its weights are not looked at.

    Raises:
        ModelError: Its blocks cannot be found.
    """

    def __init__(self, model: Any) -> None:
        self.blocks, self.n_layers = _find_blocks(model)
        parts = _INSIDE.get(model.config.model_type)
        self._places: dict[str, tuple[str, Side]] = {"hook_resid_pre": ("", "input"), "hook_resid_post": ("", "output")}
        if parts is not None:
            self._places |= {"hook_attn_out": parts.attn_out, "hook_mlp_out": parts.mlp_out}
            if parts.resid_mid is not None:
                self._places["hook_resid_mid"] = parts.resid_mid
        self.hook_names = tuple(
            f"blocks.{layer}.{hook}" for layer in range(self.n_layers) for hook in _HOOKS if hook in self._places
        )

    def site(self, hook_name: str) -> Site:
        """Where a hook is.

        Raises:
            KeyError: It is none of `hook_names`.
        """
        block, _, hook = hook_name.rpartition(".")
        module, side = self._places[hook]
        path = f"{self.blocks}.{block.removeprefix('blocks.')}"
        return Site(f"{path}.{module}" if module else path, side)

    def in_order(self, hook_names: Sequence[str]) -> list[int]:
        """The indices of hook names in the order in which the model reaches them."""

        def reached(index: int) -> tuple[int, int]:
            name = hook_names[index]
            layer = layer_of(name)
            assert layer is not None, name
            return layer, _HOOKS.index(name.rpartition(".")[2])

        return sorted(range(len(hook_names)), key=reached)


def _find_blocks(model: Any) -> tuple[str, int]:
    n_layers = int(model.config.get_text_config().num_hidden_layers)
    for path in _BLOCK_LISTS:
        try:
            blocks = model.get_submodule(path)
        except AttributeError:
            continue
        if len(blocks) == n_layers:
            return path, n_layers
    raise ModelError(
        f"the blocks of {type(model).__name__} ({model.config.model_type}) are at none of {', '.join(_BLOCK_LISTS)}: "
        "run this model locally"
    )
