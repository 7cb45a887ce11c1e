"""Decoders whose tokens go different ways: to experts, through latent or sparse attention, or through a recurrence.

Beside them are the text models of classes that take pictures and sound as well.
"""

from decoder_record import (
    BASE,
    CONTEXT,
    EXPERTS,
    FEW,
    LATER_WINDOWS,
    LOCAL_EXPERTS,
    NO_BRIDGE,
    NO_HOOKED,
    WINDOW,
    WINDOWS_AROUND,
    YARN,
    Decoder,
    bridged,
    decoder,
)
from tiny import VOCAB_SIZE

LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16}
_ROUTED_LATER = ROUTED | {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_DEEPSEEK3 = LATENT | ROUTED | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
LINEAR_AROUND = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
GEMMA4 = {
    "head_dim": 4,
    "global_head_dim": 4,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
}
GEMMA4 |= WINDOWS_AROUND
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
_NEWER = ("hooked 3.9", "bridge 3.9")
"""Missing in TransformerLens 3.9, where transformers is this new."""

MIXED: dict[str, Decoder] = {
    # experts
    "mixtral": decoder("MixtralConfig", sliding_window=None, **LOCAL_EXPERTS),
    "mixtral window": decoder("MixtralConfig", sliding_window=WINDOW, **LOCAL_EXPERTS),
    "flex-olmo": bridged("FlexOlmoConfig", num_experts=4, num_experts_per_tok=2),
    "olmoe": decoder("OlmoeConfig", num_experts=4, num_experts_per_tok=2),
    "qwen2 experts": bridged("Qwen2MoeConfig", shared_expert_intermediate_size=16, **EXPERTS),
    "qwen3 experts": bridged("Qwen3MoeConfig", head_dim=8, **EXPERTS),
    "qwen3 experts windows": bridged("Qwen3MoeConfig", head_dim=8, **LATER_WINDOWS, **EXPERTS),
    "glm4 experts": bridged("Glm4MoeConfig", head_dim=8, use_qk_norm=True, first_k_dense_replace=1, **ROUTED),
    "granite experts": bridged(
        "GraniteMoeConfig",
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
        **LOCAL_EXPERTS,
    ),
    "ernie experts": bridged(
        "Ernie4_5_MoeConfig",
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=16,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_end_index=2,
    ),
    "jetmoe": bridged("JetMoeConfig", kv_channels=8, **LOCAL_EXPERTS),
    "minimax": bridged("MiniMaxM2Config", head_dim=8, **LOCAL_EXPERTS),
    "afmoe": bridged("AfmoeConfig", head_dim=8, num_dense_layers=1, num_shared_experts=1, **WINDOWS_AROUND, **EXPERTS),
    "laguna": bridged("LagunaConfig", head_dim=8, shared_expert_intermediate_size=16, **WINDOWS_AROUND, **EXPERTS),
    # latent attention
    "deepseek": bridged("DeepseekV3Config", {"bridge 3.9": 2.2}, **_DEEPSEEK3),
    "deepseek yarn": bridged(
        "DeepseekV3Config",
        {"bridge 3.9": 1.9},
        rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        **_DEEPSEEK3,
    ),
    "deepseek2": bridged("DeepseekV2Config", {"bridge 3.9": 1.8}, first_k_dense_replace=1, **LATENT, **ROUTED),
    "youtu": bridged("YoutuConfig", {"bridge 3.9": 1.5}, **LATENT),
    "youtu yarn": bridged("YoutuConfig", {"bridge 3.9": 1.5}, rope_parameters=YARN, **LATENT),
    "glm4 lite": bridged("Glm4MoeLiteConfig", {"bridge 3.9": 1.6}, **LATENT, **_ROUTED_LATER),
    # sparse attention: some of the keys, by what they are
    "glm sparse": bridged(
        "GlmMoeDsaConfig", index_topk=WINDOW, index_head_dim=8, index_n_heads=2, **LATENT, **_ROUTED_LATER
    ),
    "deepseek4": Decoder(
        "DeepseekV4Config", BASE | {"head_dim": 8}, missing=NO_BRIDGE, unreadable="several streams, side by side"
    ),
    # convolutions, recurrences, and both beside attention
    "mamba": Decoder("MambaConfig", FEW | {"state_size": 8}, "backbone.layers", missing=NO_HOOKED),
    "mamba2": Decoder(
        "Mamba2Config",
        FEW | {"state_size": 8, "num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1, "chunk_size": 16},
        "backbone.layers",
        missing=NO_HOOKED,
    ),
    "falcon mamba": Decoder("FalconMambaConfig", FEW | {"state_size": 8}, "backbone.layers", missing=NO_HOOKED),
    "falcon h1": bridged("FalconH1Config", head_dim=8, mamba_d_ssm=64, **_MAMBA2),
    "rwkv": Decoder(
        "RwkvConfig",
        FEW | {"num_hidden_layers": 4, "context_length": CONTEXT, "rescale_every": 2},
        "rwkv.blocks",
        missing=NO_HOOKED,
    ),
    "lfm2": bridged(
        "Lfm2Config",
        layer_types=["conv", "full_attention", "conv"],
        block_auto_adjust_ff_dim=False,
    ),
    "lfm2 experts": bridged(
        "Lfm2MoeConfig", layer_types=["conv", "full_attention", "conv"], num_dense_layers=1, **EXPERTS
    ),
    "recurrentgemma": bridged(
        "RecurrentGemmaConfig",
        head_dim=8,
        lru_width=32,
        attention_window_size=WINDOW,
        block_types=["recurrent", "recurrent", "attention"],
    ),
    "qwen3-next": bridged(
        "Qwen3NextConfig",
        missing=_NEWER,
        head_dim=8,
        shared_expert_intermediate_size=16,
        **LINEAR_AROUND,
        **EXPERTS,
    ),
    "qwen3.5": bridged("Qwen3_5TextConfig", missing=_NEWER, head_dim=8, **LINEAR_AROUND),
    "qwen3.5 experts": bridged(
        "Qwen3_5MoeTextConfig",
        missing=_NEWER,
        head_dim=8,
        shared_expert_intermediate_size=16,
        **LINEAR_AROUND,
        **EXPERTS,
    ),
    "olmo hybrid": bridged("OlmoHybridConfig", **LINEAR_AROUND | {"linear_num_key_heads": 4}),
    "bamba": bridged("BambaConfig", attn_layer_indices=[1], **_MAMBA2),
    "granite hybrid": bridged(
        "GraniteMoeHybridConfig",
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        shared_intermediate_size=16,
        position_embedding_type="rope",
        **_MAMBA2,
        **LOCAL_EXPERTS,
    ),
    "jamba": bridged(
        "JambaConfig",
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "nemotron h": bridged(
        "NemotronHConfig",
        head_dim=8,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        num_hidden_layers=4,
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=1,
        chunk_size=16,
        moe_shared_expert_intermediate_size=16,
        use_mamba_kernels=False,
        **{name: value for name, value in ROUTED.items() if name != "n_shared_experts"},
    ),
    "zamba2": bridged(
        "Zamba2Config",
        num_key_value_heads=4,
        mamba_d_state=8,
        n_mamba_heads=4,
        mamba_ngroups=1,
        chunk_size=16,
        layers_block_type=["mamba", "hybrid", "mamba"],
        use_mamba_kernels=False,
    ),
    # inputs of every layer's own; small heads, because nothing scales their scores down, and roundings grow with them
    "gemma4": bridged("Gemma4TextConfig", **GEMMA4),
    # the last layer has no keys of its own, and reads those of the one above
    "gemma4 shared keys": bridged(
        "Gemma4TextConfig", num_kv_shared_layers=1, **GEMMA4 | {"layer_types": ["full_attention"] * 3}
    ),
    # text models of classes that take more than texts
    "gemma3 multimodal": Decoder(
        "Gemma3Config",
        {
            "text_config": BASE | {"head_dim": 8, "query_pre_attn_scalar": 8} | WINDOWS_AROUND,
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "pad_token_id": 0,
        },
        "model.language_model.layers",
        missing=NO_HOOKED,
    ),
    "gemma4 multimodal": Decoder(
        "Gemma4Config",
        {"text_config": BASE | GEMMA4, "vision_config": VISION, "pad_token_id": 0},
        "model.language_model.layers",
        missing=NO_HOOKED,
    ),
}
