"""Decoders of the further classes of transformers 5.24 that make a causal model. They run in `make nightly`.

Beside them are those that are made as the decoder of something else: of a masked language model with `is_decoder`, of a
translator, of a class that takes pictures as well. What TransformerLens makes of them is not recorded.
"""

from dataclasses import replace
from typing import Any

from decoder_record import BASE, CONTEXT, EXPERTS, LOCAL_EXPERTS, WINDOW, WINDOWS_AROUND, Decoder
from decoders_mixed import GEMMA4, LATENT, LINEAR_AROUND, ROUTED, VISION
from tiny import VOCAB_SIZE

_HEADS = {"num_key_value_heads": 4}
_LATER = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_INDEXED = {"index_topk": WINDOW, "index_head_dim": 8, "index_n_heads": 2}
_WINDOWED_HEADS = {"head_dim": 8, "swa_head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2}
_WINDOWED_HEADS |= {"sliding_window_size": WINDOW, "d_rel": 4}
_PER_LAYER = {str(layer): {"num_attention_heads": 4, "num_key_value_heads": 4, **LATENT} for layer in range(3)}
_SOUNDS = {"pronunciation_embed_dim": 8, "pronunciation_vocab_size": 8, "shape_embed_dim": 8, "shape_vocab_size": 8}
_COUNTED = {"max_position_embeddings": CONTEXT + 1}  # positions are counted from the one past padding
_AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}}
_MARKS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
_SEEING = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
_TEXT = BASE | {"head_dim": 8}


def _sized(config: str, layers: str = "model.layers", **settings: Any) -> Decoder:
    """Of the usual sizes."""
    return Decoder(config, BASE | settings, layers)


def _filling(config: str, layers: str, **settings: Any) -> Decoder:
    """A masked language model, which is a decoder where its configuration says so."""
    return _sized(config, layers, is_decoder=True, **settings)


def _translating(config: str, **settings: Any) -> Decoder:
    """The decoder of a translator."""
    sizes = {"d_model": 32, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
    sizes |= {"vocab_size": VOCAB_SIZE, "max_position_embeddings": CONTEXT, "pad_token_id": 0}
    return Decoder(config, sizes | settings, "model.decoder.layers")


def _seeing(config: str, text: dict[str, Any], sight: dict[str, Any], **settings: Any) -> Decoder:
    """The text model of a class that takes pictures as well."""
    parts = {"text_config": text, "vision_config": sight}
    return Decoder(config, parts | settings, "model.language_model.layers")


_LOOP, _STREAMS = "layers run more than once in a pass", "several streams, side by side"
_MORE = "layers see more positions than a text has tokens"


def _unread(reason: str, decoder: Decoder) -> Decoder:
    """One whose blocks have no one residual stream."""
    return replace(decoder, unreadable=reason)


FURTHER: dict[str, Decoder] = {
    # attention and an MLP
    "apertus 1.5": _sized("Apertus1p5TextConfig"),
    "cwm": _sized("CwmConfig", head_dim=8, **WINDOWS_AROUND),
    "diffllama": _sized("DiffLlamaConfig"),
    "exaone": _sized("ExaoneConfig"),
    "flint": _sized("FlintConfig", head_dim=8, shared_expert_intermediate_size=16, mlp_only_layers=[0], **EXPERTS),
    "granite windows": _sized("GraniteSWAConfig", residual_multiplier=0.5, attention_multiplier=0.2),
    "helium": _sized("HeliumConfig", head_dim=8),
    "hyperclovax": _sized("HyperCLOVAXConfig"),
    "internlm3": _sized("InternLM3Config", head_dim=8),
    "iquestcoder": _sized("IQuestCoderConfig"),
    "mellum": _sized("MellumConfig", head_dim=8, moe_intermediate_size=16, **WINDOWS_AROUND, **LOCAL_EXPERTS),
    "ministral windows": _sized("MinistralConfig", head_dim=8, **WINDOWS_AROUND),
    "moshi": _sized("MoshiConfig", ffn_dim=64),
    "neox japanese": Decoder(
        "GPTNeoXJapaneseConfig",
        {name: value for name, value in BASE.items() if name != "intermediate_size"}
        | {"intermediate_multiple_size": 2},
        "gpt_neox_japanese.layers",
    ),
    "persimmon": _sized("PersimmonConfig"),
    "biogpt": _sized("BioGptConfig", "biogpt.layers"),
    "ctrl": Decoder(
        "CTRLConfig",
        {"vocab_size": VOCAB_SIZE, "n_positions": CONTEXT, "n_embd": 32, "dff": 64, "n_layer": 3, "n_head": 4},
        "transformer.h",
    ),
    "cpmant": _unread(
        _MORE,
        Decoder(
            "CpmAntConfig",
            {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 64}
            | {"num_hidden_layers": 3},
            "cpmant.encoder.layers",
        ),
    ),
    "beam": _sized("BeamConfig"),
    "dory": _unread(_LOOP, _sized("DoryConfig")),
    "hrm": _unread(_LOOP, _sized("HrmTextConfig", "model.L_module.layers")),
    "inkling": _sized("InklingTextConfig", n_routed_experts=4, **_WINDOWED_HEADS, **EXPERTS),
    "inkling 2": _sized(
        "Inkling2TextConfig", n_routed_experts=4, unpadded_vocab_size=VOCAB_SIZE, **_WINDOWED_HEADS, **EXPERTS
    ),
    "inkling 2 loop": _unread(
        _LOOP,
        _sized(
            "Inkling2LoopTextConfig",
            unpadded_vocab_size=VOCAB_SIZE,
            n_routed_experts=4,
            n_layers_per_attn_res_block=1,
            loop_layer_index_start=1,
            loop_layer_index_end=2,
            **_WINDOWED_HEADS,
            **EXPERTS,
        ),
    ),
    "minicpm3": _sized("MiniCPM3Config", **LATENT),
    "gemma3n": _unread(
        _STREAMS,
        _sized(
            "Gemma3nTextConfig",
            head_dim=8,
            num_kv_shared_layers=0,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCAB_SIZE,
            laurel_rank=4,
            activation_sparsity_pattern=[0.0, 0.0, 0.0],
            **WINDOWS_AROUND,
        ),
    ),
    "gemma4 unified": _sized("Gemma4UnifiedTextConfig", **GEMMA4),
    # experts
    "aria": _sized("AriaTextConfig", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
    "cohere2 experts": _sized("Cohere2MoeConfig", head_dim=8, **WINDOWS_AROUND, **EXPERTS),
    "dbrx": Decoder(
        "DbrxConfig",
        {
            **{"vocab_size": VOCAB_SIZE, "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": CONTEXT},
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        },
        "transformer.blocks",
    ),
    "doge": _sized("DogeConfig"),
    "doge experts": _sized("DogeConfig", is_moe=True, num_experts=4, num_experts_per_tok=2),
    "dots": _sized("Dots1Config", head_dim=8, first_k_dense_replace=1, **ROUTED),
    "exaone experts": _sized("ExaoneMoeConfig", head_dim=8, **WINDOWS_AROUND, **EXPERTS),
    "granite experts windows": _sized("GraniteMoeSWAConfig", residual_multiplier=0.5, **LOCAL_EXPERTS),
    "granite shared experts": _sized(
        "GraniteMoeSharedConfig", residual_multiplier=0.5, shared_intermediate_size=16, **LOCAL_EXPERTS
    ),
    "hunyuan experts": _sized("HunYuanMoEV1Config", head_dim=8, num_experts=4, moe_topk=2),
    "hunyuan 3": _sized("HYV3Config", head_dim=8, num_shared_experts=1, **_LATER, **EXPERTS),
    "kolibri": _sized(
        "Kolibri1Config",
        head_dim=8,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        **WINDOWS_AROUND,
        **LOCAL_EXPERTS,
    ),
    "mimo 2": _sized("MiMoV2FlashConfig", head_dim=8, v_head_dim=8, **WINDOWS_AROUND, **_LATER, **ROUTED),
    "minimax 1": _sized(
        "MiniMaxConfig",
        head_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        block_size=8,
        **LOCAL_EXPERTS,
    ),
    "minimax 3": _sized("MiniMaxM3VLTextConfig", head_dim=8, moe_intermediate_size=16, **LOCAL_EXPERTS),
    "phi3.5 experts": _sized("PhimoeConfig", **LOCAL_EXPERTS),
    "sarvam": _sized("SarvamMoEConfig", head_dim=8, first_k_dense_replace=1, **ROUTED),
    "solar": _sized("SolarOpenConfig", head_dim=8, **ROUTED),
    "zaya": _sized("ZayaConfig", head_dim=8, router_hidden_size=16, **EXPERTS | {"num_experts_per_tok": 1}),
    # latent and sparse attention
    "axk1": _sized("AXK1Config", n_group=1, topk_group=1, **_LATER, **LATENT, **ROUTED),
    "axk2": _sized("AXK2Config", **_INDEXED, **_LATER, **LATENT, **ROUTED),
    "deepseek 3.2": _sized("DeepseekV32Config", n_group=1, topk_group=1, **_INDEXED, **_LATER, **LATENT, **ROUTED),
    "dots 3": _sized(
        "Dots3NoteTextConfig",
        layer_types=["sliding_attention", "indexed_attention", "sliding_attention"],
        sliding_window=WINDOW,
        shared_experts_intermediate_size=16,
        head_dim=12,
        per_layer_config=_PER_LAYER,
        **_INDEXED,
        **_LATER,
        **LATENT,
        **ROUTED,
    ),
    "hunyuan 4": _unread(_STREAMS, _sized("HYV4Config", **_INDEXED, **_LATER, **LATENT, **ROUTED)),
    "longcat": _sized(
        "LongcatFlashConfig",
        num_layers=3,
        num_hidden_layers=6,
        ffn_hidden_size=64,
        expert_ffn_hidden_size=16,
        moe_topk=2,
        zero_expert_num=2,
        n_routed_experts=4,
        head_dim=4,
        **LATENT,
    ),
    "sarvam latent": _sized("SarvamMLAConfig", first_k_dense_replace=1, **LATENT | {"q_lora_rank": None}, **ROUTED),
    # recurrences beside attention
    "bailing": _sized(
        "BailingHybridConfig",
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        num_experts=4,
        num_experts_per_token=2,
        num_expert_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        **_LATER,
        **LATENT | {"q_lora_rank": None},
    ),
    "kimi linear": _sized(
        "KimiLinearConfig",
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_head_dim=8,
        linear_num_heads=4,
        num_experts=4,
        num_experts_per_token=2,
        moe_intermediate_size=16,
        **_LATER,
        **LATENT | {"q_lora_rank": None},
    ),
    "lara": _sized("LaraMiniConfig", head_dim=8, shared_expert_intermediate_size=16, **LINEAR_AROUND, **EXPERTS),
    "lfm3": _sized("Lfm3Config"),
    "qwen4": _sized(
        "Qwen4ExpTextConfig",
        head_dim=8,
        shared_expert_intermediate_size=16,
        **LINEAR_AROUND | {"layer_types": ["linear_attention", "indexed_attention", "linear_attention"]},
        indexer_head_dim=8,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_budget=WINDOW,
        indexer_compress_ratio=4,
        hc_lowrank=8,
        ngram_vocab_size_base=100,
        **EXPERTS,
    ),
    "xlstm": Decoder(
        "xLSTMConfig",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_heads": 4, "num_hidden_layers": 3, "chunk_size": 16}
        | {"qk_dim_factor": 1.0},
        "backbone.blocks",
    ),
    "zamba": _sized(
        "ZambaConfig",
        attention_head_dim=16,
        attention_hidden_size=64,
        mamba_d_state=8,
        mamba_dt_rank=4,
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
        num_hidden_layers=4,
        use_mamba_kernels=False,
        **_HEADS,
    ),
    # masked language models as decoders
    "bert": _filling("BertConfig", "bert.encoder.layer"),
    "bert generation": _filling("BertGenerationConfig", "bert.encoder.layer"),
    "big bird": _filling("BigBirdConfig", "bert.encoder.layer", attention_type="original_full"),
    "camembert": _filling("CamembertConfig", "roberta.encoder.layer", **_COUNTED),
    "data2vec": _filling("Data2VecTextConfig", "data2vec_text.encoder.layer", **_COUNTED),
    "electra": _filling("ElectraConfig", "electra.encoder.layer", embedding_size=32),
    "ernie 2": _filling("ErnieConfig", "ernie.encoder.layer"),
    "megatron bert": _filling("MegatronBertConfig", "bert.encoder.layer"),
    "rembert": _filling("RemBertConfig", "rembert.encoder.layer", input_embedding_size=32, output_embedding_size=32),
    "roberta": _filling("RobertaConfig", "roberta.encoder.layer", **_COUNTED),
    "roberta prelayernorm": _filling("RobertaPreLayerNormConfig", "roberta_prelayernorm.encoder.layer", **_COUNTED),
    "roc bert": _filling(
        "RoCBertConfig", "roc_bert.encoder.layer", enable_pronunciation=False, enable_shape=False, **_SOUNDS
    ),
    "roformer": _filling("RoFormerConfig", "roformer.encoder.layer", embedding_size=32),
    "xlm roberta": _filling("XLMRobertaConfig", "roberta.encoder.layer", **_COUNTED),
    "xlm roberta xl": _filling("XLMRobertaXLConfig", "roberta.encoder.layer", **_COUNTED),
    "xmod": _filling("XmodConfig", "roberta.encoder.layer", default_language="en_XX", **_COUNTED),
    "xlm": _unread(
        "attention and MLPs lie in lists of their own",
        Decoder(
            "XLMConfig",
            {"vocab_size": VOCAB_SIZE, "emb_dim": 32, "n_layers": 3, "n_heads": 4, "max_position_embeddings": CONTEXT}
            | {"causal": True, "is_encoder": True},
            "transformer.ffns",
        ),
    ),
    # decoders of translators
    "bart": _translating("BartConfig"),
    "bigbird pegasus": _translating("BigBirdPegasusConfig"),
    "blenderbot": _translating("BlenderbotConfig", encoder_layers=3),
    "blenderbot small": _translating("BlenderbotSmallConfig"),
    "marian": _translating("MarianConfig", decoder_start_token_id=0),
    "mbart": _translating("MBartConfig"),
    "mvp": _translating("MvpConfig"),
    "pegasus": _translating("PegasusConfig"),
    "plbart": _translating("PLBartConfig"),
    "trocr": _translating("TrOCRConfig"),
    "whisper": _translating("WhisperConfig", max_target_positions=CONTEXT),
    "prophetnet": _unread(
        _MORE,
        Decoder(
            "ProphetNetConfig",
            {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_decoder_layers": 3, "num_decoder_attention_heads": 4}
            | {"decoder_ffn_dim": 64, "max_position_embeddings": CONTEXT, "num_encoder_attention_heads": 4, "ngram": 2},
            "prophetnet.decoder.layers",
        ),
    ),
    # text models of classes that take more than texts
    "fuyu": _sized("FuyuConfig", "model.language_model.layers"),
    "internvl": _seeing(
        "InternVLConfig",
        BASE | {"model_type": "qwen2"},
        VISION | {"image_size": [28, 28], "patch_size": [14, 14]},
        image_token_id=5,
    ),
    "llava": _seeing("LlavaConfig", BASE | {"model_type": "llama"}, VISION, image_token_index=5),
    "mistral small 3": _seeing(
        "Mistral3Config", _TEXT | {"model_type": "mistral", "sliding_window": None}, VISION, image_token_index=5
    ),
    "qwen2 vl": _seeing(
        "Qwen2VLConfig", BASE | _AXES, {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32}, **_MARKS
    ),
    "qwen2.5 vl": _seeing("Qwen2_5_VLConfig", BASE | _AXES, _SEEING, **_MARKS),
    "qwen3 vl": _seeing("Qwen3VLConfig", _TEXT | _AXES, _SEEING | {"deepstack_visual_indexes": [0]}, **_MARKS),
    "smolvlm": Decoder(
        "SmolVLMConfig",
        {"text_config": BASE | {"model_type": "llama"}, "vision_config": VISION, "image_token_id": 5},
        "model.text_model.layers",
    ),
}
