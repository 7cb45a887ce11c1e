"""Decoders of attention and one MLP a block, by how they tell positions apart and how far they attend."""

from collections.abc import Mapping
from typing import Any

from decoder_record import (
    CONTEXT,
    FEW,
    LATER_WINDOWS,
    LINEAR,
    LOCAL_EXPERTS,
    LONG,
    NO_BRIDGE,
    NO_HOOKED,
    ORIGINAL_CONTEXT,
    WINDOW,
    WINDOWS_AROUND,
    YARN,
    Decoder,
    bridged,
    decoder,
    rope,
)
from tiny import VOCAB_SIZE


def _gpt2(wrong: Mapping[str, float] | None = None, **settings: Any) -> Decoder:
    # HookedTransformer reads n_ctx, which files of real models have and the class does not set.
    return Decoder("GPT2Config", _N_SIZES | {"n_ctx": CONTEXT} | settings, "transformer.h", wrong or {})


def _falcon(wrong: Mapping[str, float] | None = None, **settings: Any) -> Decoder:
    sizes = FEW | {"num_attention_heads": 4, "bias": True}
    return Decoder("FalconConfig", sizes | settings, "transformer.h", wrong or {}, NO_HOOKED)


def _bloom(wrong: Mapping[str, float] | None = None, heads: int = 4, **settings: Any) -> Decoder:
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 8 * heads, "n_layer": 3, "n_head": heads, "pad_token_id": 0}
    return Decoder("BloomConfig", sizes | settings, "transformer.h", wrong or {})


def _neox(wrong: Mapping[str, float] | None = None, **settings: Any) -> Decoder:
    sizes = FEW | {"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": CONTEXT}
    return Decoder("GPTNeoXConfig", sizes | settings, "gpt_neox.layers", wrong or {})


def _opt(missing: tuple[str, ...] = (), **settings: Any) -> Decoder:
    sizes = FEW | {"ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": 32}
    sizes |= {"max_position_embeddings": CONTEXT}
    return Decoder("OPTConfig", sizes | settings, "model.decoder.layers", missing=missing)


_N_SIZES = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT}
_PARTLY = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
_LLAMA3 = rope("llama3", original_max_position_embeddings=ORIGINAL_CONTEXT, low_freq_factor=1.0, high_freq_factor=4.0)
_GEMMA3 = {"head_dim": 8, "query_pre_attn_scalar": 8, **WINDOWS_AROUND}
_ALIBI = {"alibi": True, "multi_query": False}
_CHUNKS = {
    "head_dim": 8,
    "intermediate_size_mlp": 64,
    "num_hidden_layers": 4,
    "attention_chunk_size": WINDOW,
    "num_local_experts": 2,
    "interleave_moe_layer_step": 2,
}

ATTENDING: dict[str, Decoder] = {
    # rotary positions
    "llama": decoder("LlamaConfig"),
    "llama linear": decoder("LlamaConfig", {"hooked 3.9": 2.0}, rope_parameters=LINEAR),
    "llama yarn": decoder("LlamaConfig", {"hooked 3.9": 1.9}, rope_parameters=YARN),
    "llama 3": decoder("LlamaConfig", rope_parameters=_LLAMA3),
    "llama biases": decoder("LlamaConfig", {"hooked 3.9": 1.7}, attention_bias=True),
    "qwen2": decoder("Qwen2Config"),
    "qwen2 yarn": decoder("Qwen2Config", {"hooked 3.9": 1.8}, rope_parameters=YARN),
    "qwen2 windows": decoder("Qwen2Config", {"hooked 3.9": 1.6}, **LATER_WINDOWS),
    "qwen3": decoder("Qwen3Config", head_dim=8),
    "qwen3 yarn": decoder("Qwen3Config", {"hooked 3.9": 1.5}, head_dim=8, rope_parameters=YARN),
    "qwen3 windows": decoder("Qwen3Config", {"hooked 3.9": 0.89}, head_dim=8, **LATER_WINDOWS),
    "qwen3 biases": decoder("Qwen3Config", {"hooked 3.9": 1.6}, head_dim=8, attention_bias=True),
    "phi3": decoder("Phi3Config"),
    "phi3 longrope": decoder(
        "Phi3Config",
        {"hooked 3.9": 2.7},
        original_max_position_embeddings=ORIGINAL_CONTEXT,
        rope_parameters=LONG,
    ),
    "phi3 partial": decoder("Phi3Config", {"hooked 3.9": 2.9}, partial_rotary_factor=0.5),
    "hunyuan": bridged("HunYuanDenseV1Config", {"bridge 3.9": 0.35}, head_dim=8),
    "ministral yarn": bridged(
        "Ministral3Config", head_dim=8, sliding_window=None, rope_parameters=YARN | {"llama_4_scaling_beta": 0.1}
    ),
    "olmo": bridged("OlmoConfig", clip_qkv=2.0),
    "olmo2": bridged("Olmo2Config"),
    "stablelm": bridged("StableLmConfig", rope_parameters=_PARTLY),
    "glm": bridged("GlmConfig", head_dim=8),
    "glm4": bridged("Glm4Config", head_dim=8),
    "nemotron": bridged("NemotronConfig", head_dim=8),
    "apertus": decoder("ApertusConfig"),
    "arcee": bridged("ArceeConfig", head_dim=8),
    "bitnet": bridged("BitNetConfig"),
    "seed-oss": bridged("SeedOssConfig", head_dim=8),
    "ernie": bridged("Ernie4_5Config", head_dim=8),
    "jais2": bridged("Jais2Config", head_dim=8),
    "nanochat": bridged("NanoChatConfig"),
    # rotary positions in some layers, none in the others
    "smollm3": bridged("SmolLM3Config", no_rope_layers=[1, 0, 1]),
    "smollm3 windows": bridged("SmolLM3Config", no_rope_layers=[1, 0, 1], use_sliding_window=True, **WINDOWS_AROUND),
    # learned and fixed positions
    "gpt2": _gpt2(),
    "gpt2 unscaled": _gpt2({"bridge 3.9": 1.3, "bridge 4.3": 1.3}, scale_attn_weights=False),
    "bigcode": Decoder("GPTBigCodeConfig", _N_SIZES, "transformer.h", missing=NO_HOOKED),
    "openai-gpt": Decoder("OpenAIGPTConfig", _N_SIZES, "transformer.h", missing=NO_BRIDGE),
    "opt": _opt(),
    "opt post": _opt(NO_BRIDGE, do_layer_norm_before=False),
    "xglm": Decoder(
        "XGLMConfig",
        {
            "vocab_size": VOCAB_SIZE,
            "d_model": 32,
            "ffn_dim": 64,
            "num_layers": 3,
            "attention_heads": 4,
            "max_position_embeddings": CONTEXT,
            "pad_token_id": 0,
        },
        missing=NO_HOOKED,
    ),
    # ALiBi
    "bloom": _bloom(),
    "bloom 6 heads": _bloom({"hooked 3.9": 1.1}, heads=6),
    "bloom post": _bloom({"hooked 3.9": 2.0}, apply_residual_connection_post_layernorm=True),
    "falcon alibi": _falcon({"bridge 3.9": 0.67, "bridge 4.3": 0.67}, parallel_attn=False, **_ALIBI),
    "mpt": Decoder(
        "MptConfig",
        {"vocab_size": VOCAB_SIZE, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": CONTEXT},
        "transformer.blocks",
        missing=NO_HOOKED,
    ),
    # parallel blocks
    "falcon": _falcon(),
    "falcon alibi parallel": _falcon({"bridge 3.9": 0.21, "bridge 4.3": 0.21}, **_ALIBI),
    "neox": _neox(),
    "neox linear": _neox({"hooked 3.9": 0.61}, rope_parameters=LINEAR | {"partial_rotary_factor": 0.25}),
    "gpt-j": Decoder("GPTJConfig", _N_SIZES | {"rotary_dim": 4}, "transformer.h"),
    "codegen": Decoder("CodeGenConfig", _N_SIZES | {"rotary_dim": 4}, "transformer.h", missing=NO_BRIDGE),
    "phi": bridged("PhiConfig", num_key_value_heads=4),
    "cohere": bridged("CohereConfig", {"bridge 3.9": 1.1}),
    "cohere2": bridged("Cohere2Config", {"bridge 3.9": 1.4}, **WINDOWS_AROUND),
    "stablelm parallel": bridged(
        "StableLmConfig", rope_parameters=_PARTLY, use_parallel_residual=True, use_qkv_bias=True, qk_layernorm=True
    ),
    # windows, chunks, sinks
    "mistral": decoder("MistralConfig", sliding_window=WINDOW),
    "starcoder2": bridged("Starcoder2Config", sliding_window=WINDOW),
    "phi3 window": decoder("Phi3Config", sliding_window=WINDOW),
    "gpt-neo": Decoder(
        "GPTNeoConfig",
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "num_layers": 3,
            "num_heads": 4,
            "attention_types": [[["global", "local", "local"], 1]],
            "window_size": WINDOW,
            "max_position_embeddings": CONTEXT,
        },
        "transformer.h",
    ),
    "olmo3": decoder("Olmo3Config", **WINDOWS_AROUND),
    "exaone4": bridged("Exaone4Config", **WINDOWS_AROUND),
    "modernbert": bridged(
        "ModernBertDecoderConfig",
        local_attention=2 * WINDOW,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
    "llama4": bridged("Llama4TextConfig", **_CHUNKS),
    "llama4 scaled": bridged(
        "Llama4TextConfig", no_rope_layers=[1, 0, 1, 0], floor_scale=WINDOW, attn_scale=0.5, **_CHUNKS
    ),
    "gpt-oss": decoder(
        "GptOssConfig",
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        **WINDOWS_AROUND,
        **LOCAL_EXPERTS,
    ),
    # scaled embeddings, multipliers
    "gemma": bridged("GemmaConfig", head_dim=8),
    "gemma2": bridged(
        "Gemma2Config",
        head_dim=8,
        sliding_window=WINDOW,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=5.0,
    ),
    "gemma3": bridged("Gemma3TextConfig", **_GEMMA3),
    "gemma3 capped": bridged(
        "Gemma3TextConfig", {"bridge 3.9": 0.13, "bridge 4.3": 0.13}, attn_logit_softcapping=5.0, **_GEMMA3
    ),
    "gemma3 both ways": bridged("Gemma3TextConfig", use_bidirectional_attention=True, **_GEMMA3),
    "vaultgemma": bridged("VaultGemmaConfig", **_GEMMA3),
    "granite": bridged(
        "GraniteConfig",
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
        logits_scaling=2.0,
    ),
}
