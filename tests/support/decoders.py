"""Tiny random decoders of many kinds, and what is known of the TransformerLens classes that are made of them.

Each is a configuration and the place of its decoder layers in the transformers model. They have three or four blocks,
a width of 32 (48 where six heads need it) and `tiny`'s vocabulary. Weights are drawn wide, so that whatever a hooked
class leaves out moves residuals far past any tolerance. Nothing here knows the package under test.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny import FAMILIES, SIZES, VOCAB_SIZE, ask_for_plain_attention, build_tokenizer
from torch import Tensor

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
    """

    config: str
    settings: Mapping[str, Any]
    layers: str = "model.layers"
    wrong: Mapping[str, float] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    def make(self) -> Any:
        """A transformers model, in evaluation mode, with random weights that are the same every time."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            config = getattr(transformers, self.config)(**self.settings)
            model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(_STD * torch.randn_like(parameter))
                else:  # norms and biases lie at 1 and 0, where a missing one would go unnoticed
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model


_NO_HOOKED = ("hooked 3.9",)

_BASE = {name: size for name, size in SIZES.items() if name not in ("head_dim", "initializer_range")}
_BASE |= {"max_position_embeddings": CONTEXT, "pad_token_id": 0}
_FEW = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 3, "pad_token_id": 0}


def _decoder(
    config: str, wrong: Mapping[str, float] | None = None, missing: tuple[str, ...] = (), **settings: Any
) -> Decoder:
    """Of the sizes that most have."""
    return Decoder(config, _BASE | settings, wrong=wrong or {}, missing=missing)


def _gpt2(wrong: Mapping[str, float] | None = None, **settings: Any) -> Decoder:
    sizes = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT}
    # HookedTransformer reads n_ctx, which files of real models have and the class does not set.
    return Decoder("GPT2Config", sizes | {"n_ctx": CONTEXT} | settings, "transformer.h", wrong or {})


def _falcon(wrong: Mapping[str, float] | None = None, **settings: Any) -> Decoder:
    sizes = _FEW | {"num_attention_heads": 4, "bias": True}
    return Decoder("FalconConfig", sizes | settings, "transformer.h", wrong or {}, _NO_HOOKED)


def _bloom(wrong: Mapping[str, float] | None = None, heads: int = 4, **settings: Any) -> Decoder:
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 8 * heads, "n_layer": 3, "n_head": heads, "pad_token_id": 0}
    return Decoder("BloomConfig", sizes | settings, "transformer.h", wrong or {})


def _neox(wrong: Mapping[str, float] | None = None, **settings: Any) -> Decoder:
    sizes = _FEW | {"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": CONTEXT}
    return Decoder("GPTNeoXConfig", sizes | settings, "gpt_neox.layers", wrong or {})


def _rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0, **options}


_LINEAR = _rope("linear")
_YARN = _rope("yarn", original_max_position_embeddings=ORIGINAL_CONTEXT)
_LONG = _rope(
    "longrope",
    short_factor=[1.0] * 4,
    long_factor=[4.0] * 4,
    original_max_position_embeddings=ORIGINAL_CONTEXT,
)
_LATER_WINDOWS = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
_WINDOWS_AROUND = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_GEMMA3 = {"head_dim": 8, "query_pre_attn_scalar": 8, **_WINDOWS_AROUND}
_ALIBI = {"alibi": True, "multi_query": False}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

DECODERS: dict[str, Decoder] = {
    # rotary positions
    "llama": _decoder("LlamaConfig"),
    "llama linear": _decoder("LlamaConfig", {"hooked 3.9": 2.0}, rope_parameters=_LINEAR),
    "llama yarn": _decoder("LlamaConfig", {"hooked 3.9": 1.9}, rope_parameters=_YARN),
    "llama biases": _decoder("LlamaConfig", {"hooked 3.9": 1.7}, attention_bias=True),
    "qwen2": _decoder("Qwen2Config"),
    "qwen2 yarn": _decoder("Qwen2Config", {"hooked 3.9": 1.8}, rope_parameters=_YARN),
    "qwen2 windows": _decoder("Qwen2Config", {"hooked 3.9": 1.6}, **_LATER_WINDOWS),
    "qwen3": _decoder("Qwen3Config", head_dim=8),
    "qwen3 yarn": _decoder("Qwen3Config", {"hooked 3.9": 1.5}, head_dim=8, rope_parameters=_YARN),
    "qwen3 windows": _decoder("Qwen3Config", {"hooked 3.9": 0.89}, head_dim=8, **_LATER_WINDOWS),
    "qwen3 biases": _decoder("Qwen3Config", {"hooked 3.9": 1.6}, head_dim=8, attention_bias=True),
    "phi3": _decoder("Phi3Config"),
    "phi3 longrope": _decoder(
        "Phi3Config",
        {"hooked 3.9": 2.7},
        original_max_position_embeddings=ORIGINAL_CONTEXT,
        rope_parameters=_LONG,
    ),
    "phi3 partial": _decoder("Phi3Config", {"hooked 3.9": 2.9}, partial_rotary_factor=0.5),
    "hunyuan": _decoder("HunYuanDenseV1Config", {"bridge 3.9": 0.35}, _NO_HOOKED, head_dim=8),
    # learned positions
    "gpt2": _gpt2(),
    "gpt2 unscaled": _gpt2({"bridge 3.9": 1.3, "bridge 4.3": 1.3}, scale_attn_weights=False),
    # ALiBi
    "bloom": _bloom(),
    "bloom 6 heads": _bloom({"hooked 3.9": 1.1}, heads=6),
    "bloom post": _bloom({"hooked 3.9": 2.0}, apply_residual_connection_post_layernorm=True),
    "falcon alibi": _falcon({"bridge 3.9": 0.67, "bridge 4.3": 0.67}, parallel_attn=False, **_ALIBI),
    # parallel blocks
    "falcon": _falcon(),
    "falcon alibi parallel": _falcon({"bridge 3.9": 0.21, "bridge 4.3": 0.21}, **_ALIBI),
    "neox": _neox(),
    "neox linear": _neox({"hooked 3.9": 0.61}, rope_parameters=_LINEAR | {"partial_rotary_factor": 0.25}),
    "phi": _decoder("PhiConfig", missing=_NO_HOOKED, num_key_value_heads=4),
    "cohere": _decoder("CohereConfig", {"bridge 3.9": 1.1}, _NO_HOOKED),
    "cohere2": _decoder("Cohere2Config", {"bridge 3.9": 1.4}, _NO_HOOKED, **_WINDOWS_AROUND),
    # windows, chunks, sinks
    "mistral": _decoder("MistralConfig", sliding_window=WINDOW),
    "llama4": _decoder(
        "Llama4TextConfig",
        missing=_NO_HOOKED,
        head_dim=8,
        intermediate_size_mlp=64,
        num_hidden_layers=4,
        attention_chunk_size=WINDOW,
        num_local_experts=2,
        interleave_moe_layer_step=2,
    ),
    "gpt-oss": _decoder(
        "GptOssConfig",
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        **_WINDOWS_AROUND,
        **_LOCAL_EXPERTS,
    ),
    # experts, latent attention
    "mixtral": _decoder("MixtralConfig", sliding_window=None, **_LOCAL_EXPERTS),
    "deepseek": _decoder(
        "DeepseekV3Config",
        {"bridge 3.9": 2.2},
        _NO_HOOKED,
        num_key_value_heads=4,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    # scaled embeddings, multipliers
    "gemma": _decoder("GemmaConfig", missing=_NO_HOOKED, head_dim=8),
    "gemma2": _decoder(
        "Gemma2Config",
        missing=_NO_HOOKED,
        head_dim=8,
        sliding_window=WINDOW,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=5.0,
    ),
    "gemma3": _decoder("Gemma3TextConfig", missing=_NO_HOOKED, **_GEMMA3),
    "gemma3 capped": _decoder(
        "Gemma3TextConfig", {"bridge 3.9": 0.13, "bridge 4.3": 0.13}, _NO_HOOKED, attn_logit_softcapping=5.0, **_GEMMA3
    ),
    "granite": _decoder(
        "GraniteConfig",
        missing=_NO_HOOKED,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
        logits_scaling=2.0,
    ),
    # convolutions, recurrences, and both beside attention
    "mamba": Decoder("MambaConfig", _FEW | {"state_size": 8}, "backbone.layers", missing=_NO_HOOKED),
    "rwkv": Decoder(
        "RwkvConfig",
        _FEW | {"num_hidden_layers": 4, "context_length": CONTEXT, "rescale_every": 2},
        "rwkv.blocks",
        missing=_NO_HOOKED,
    ),
    "lfm2": _decoder(
        "Lfm2Config",
        missing=_NO_HOOKED,
        layer_types=["conv", "full_attention", "conv"],
        block_auto_adjust_ff_dim=False,
    ),
    "recurrentgemma": _decoder(
        "RecurrentGemmaConfig",
        missing=_NO_HOOKED,
        head_dim=8,
        lru_width=32,
        attention_window_size=WINDOW,
        block_types=["recurrent", "recurrent", "attention"],
    ),
    "qwen3-next": _decoder(
        "Qwen3NextConfig",
        missing=("hooked 3.9", "bridge 3.9"),
        head_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        **_EXPERTS,
    ),
    "bamba": _decoder(
        "BambaConfig",
        missing=_NO_HOOKED,
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_n_groups=1,
        mamba_expand=2,
        mamba_chunk_size=16,
    ),
}


def build_decoder(name: str, folder: Path) -> Path:
    """Write a decoder and a ChatML tokenizer to `folder`, as any checkpoint would be, and return the folder.

    TransformerLens 3.x guesses the architecture from words in a path ("llama", "gemma"), so name it something else.
    """
    DECODERS[name].make().save_pretrained(folder)
    build_tokenizer(FAMILIES["llama"]).save_pretrained(folder)
    if DECODERS[name].config == "Gemma2Config":
        ask_for_plain_attention(folder / "config.json")
    return folder


def load_decoder(folder: Path) -> Any:
    """The transformers model of a folder, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def texts() -> Sequence[Tensor]:
    """Token ids of texts below the windows and the original context, past them, and with a beginning in common."""
    beginning = _text(40, 1)
    ends = [_text(9, 2), _text(20, 3)]
    return [_text(1, 4), _text(6, 5), _text(40, 6), *(torch.cat([beginning, end]) for end in ends), _text(90, 7)]


def _text(length: int, seed: int) -> Tensor:
    return torch.randint(10, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed))
