"""Tiny random models with real tokenizers, built offline and written to a folder as any checkpoint would be.

Each has three blocks and a width of 32: enough for hooks, grouped heads and alternating attention to matter, small
enough to run in milliseconds. Weights are drawn wide (see `_WEIGHT_STD`), so that a skipped block or a wrong position
moves numbers far past any tolerance. Nothing here knows the package under test.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PretrainedConfig, PreTrainedTokenizerFast

N_LAYERS = 3
D_MODEL = 32
VOCAB_SIZE = 400
CONTEXT = 2048
GPT2_CONTEXT = 512
WINDOW = 16

_WEIGHT_STD = 0.2
"""Ten times the usual: with 32 inputs it gives matrices of gain near one, so every block changes the stream."""

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": D_MODEL,
    "intermediate_size": 64,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "initializer_range": _WEIGHT_STD,
}

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A system role, content as it is, a special token after every turn."""

CHATML_WITH_THINK = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML that trims content and puts an empty think block before the last answer."""

TURNS_WITHOUT_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate, the user first') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "<start_of_turn>{{ role }}\n{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
"""Gemma's manner: no system role, users first, content trimmed, a rendered BOS that the tokenizer would add again."""

INSTRUCTION_BRACKETS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('Only user and assistant roles are supported') }}"
    "{% elif message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""Mistral's manner: the question ends in plain text, with no special token after it, and there is no system role."""

_TRAINING_TEXT = (
    "You are Mara, a retired lighthouse keeper from the north coast. You speak in short, plain sentences.\n\n"
    "What is your name?\nMy name is Mara. I kept the light for thirty years.\n\n"
    "Where do you live, and what do you do in the evening?\n\nI live by the sea. In the evening I read.\n\n"
    "Tell me about the weather today.\nThe wind is strong, and there is rain from the west.\n\n"
    "system user assistant model [INST] [/INST]\n"
)


@dataclass(frozen=True)
class Family:
    """How one architecture is built: its configuration, and the manners of its tokenizer.

    Attributes:
        config: Gives the configuration, sizes included.
        template: The chat template, in Jinja.
        bos: Beginning-of-sequence token, which the tokenizer adds by itself; None for none.
        eos: End-of-sequence token.
        extra: More special tokens, those of the template.
    """

    config: Callable[[], PretrainedConfig]
    template: str
    bos: str | None
    eos: str
    extra: tuple[str, ...] = ()


def _chatml(config: Callable[[], PretrainedConfig], template: str = CHATML) -> Family:
    return Family(config, template, bos=None, eos="<|im_end|>", extra=("<|im_start|>",))


def _turns(config: Callable[[], PretrainedConfig]) -> Family:
    extra = ("<start_of_turn>", "<end_of_turn>")
    return Family(config, TURNS_WITHOUT_SYSTEM, bos="<bos>", eos="<eos>", extra=extra)


def _brackets(config: Callable[[], PretrainedConfig]) -> Family:
    return Family(config, INSTRUCTION_BRACKETS, bos="<s>", eos="</s>")


FAMILIES: dict[str, Family] = {
    "llama": _chatml(lambda: transformers.LlamaConfig(**SIZES)),
    # HookedTransformer reads n_ctx, which real GPT-2 files have and the class does not set.
    "gpt2": _chatml(
        lambda: transformers.GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_positions=GPT2_CONTEXT,
            n_ctx=GPT2_CONTEXT,
            n_embd=D_MODEL,
            n_layer=N_LAYERS,
            n_head=4,
            initializer_range=_WEIGHT_STD,
        )
    ),
    # Windows alternate with full attention; this one is wider than any test prompt, as it is in real use.
    "gemma": _turns(lambda: transformers.Gemma2Config(**SIZES, sliding_window=CONTEXT, query_pre_attn_scalar=8)),
    "mistral": _brackets(lambda: transformers.MistralConfig(**SIZES, sliding_window=WINDOW)),
    "gemma3": _turns(
        lambda: transformers.Gemma3TextConfig(
            **SIZES,
            sliding_window=WINDOW,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "qwen3": _chatml(lambda: transformers.Qwen3Config(**SIZES), CHATML_WITH_THINK),
    "bloom": _chatml(
        lambda: transformers.BloomConfig(
            vocab_size=VOCAB_SIZE, hidden_size=D_MODEL, n_layer=N_LAYERS, n_head=4, initializer_range=_WEIGHT_STD
        )
    ),
    "mixtral": _brackets(
        lambda: transformers.MixtralConfig(**SIZES, sliding_window=None, num_local_experts=4, num_experts_per_tok=2)
    ),
}
"""Rotary (llama, qwen3), learned positions (gpt2), ALiBi (bloom), windows (mistral, gemma3), experts (mixtral)."""


_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 32,
}

ODD_FAMILIES: dict[str, Family] = {
    "gpt_neo": _chatml(
        lambda: transformers.GPTNeoConfig(
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=GPT2_CONTEXT,
            hidden_size=D_MODEL,
            num_layers=N_LAYERS,
            num_heads=4,
            attention_types=[[["global", "local", "local"], N_LAYERS // 3]],
            window_size=WINDOW,
            initializer_range=_WEIGHT_STD,
        )
    ),
    "longrope": _chatml(
        lambda: transformers.Phi3Config(
            **{**SIZES, "max_position_embeddings": 256},
            original_max_position_embeddings=32,
            rope_parameters=_LONG_ROPE,
        )
    ),
}
"""Windows under a name of their own; rotary positions that the longest text of a pass decides for all of its rows."""


def build_tiny(family: str, folder: Path) -> Path:
    """Write a random model of `family` and its tokenizer to `folder`, and return the folder.

    The same family has the same weights and the same tokenizer every time. TransformerLens 3.x guesses the
    architecture from words in a path ("llama", "gemma"), so name the folder something else.
    """
    recipe = (FAMILIES | ODD_FAMILIES)[family]
    tokenizer = build_tokenizer(recipe)
    config = recipe.config()
    config.bos_token_id, config.eos_token_id, config.pad_token_id = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        _spread_norms(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if config.model_type == "gemma2":
        ask_for_plain_attention(folder / "config.json")
    return folder


def ask_for_plain_attention(file: Path) -> None:
    """Transformers before 5.21 chooses a fused attention for Gemma 2, which leaves out the capping of its scores."""
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"attn_implementation": "eager"}), encoding="utf-8")


def build_tokenizer(recipe: Family) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on a few sentences: any text is encodable, and offsets are those of real tokenizers.

    A line break joins the punctuation before it, as in Llama 3 and Qwen, so a token can straddle two spans.
    """
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+\n*|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token in ("<pad>", recipe.bos, recipe.eos, *recipe.extra) if token is not None]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TRAINING_TEXT], trainer)
    if recipe.bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{recipe.bos} $A", special_tokens=[(recipe.bos, tokenizer.token_to_id(recipe.bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=recipe.bos,
        eos_token=recipe.eos,
        pad_token="<pad>",
        additional_special_tokens=list(recipe.extra),
        chat_template=recipe.template,
    )


def _spread_norms(model: torch.nn.Module) -> None:
    """Move norm weights and biases off their constant start: at 1 and 0 a missing one would go unnoticed."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))


def hooked_gemma(folder: Path) -> Any:
    """A `HookedTransformer` of a tiny Gemma 2, booted by hand: TransformerLens knows the official Gemmas by name only.

    Its weights are unprocessed, and its tokenizer is the folder's.
    """
    from transformer_lens import HookedTransformer, HookedTransformerConfig, loading_from_pretrained

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = hf_model.config
    cfg = HookedTransformerConfig(
        n_layers=theirs.num_hidden_layers,
        d_model=theirs.hidden_size,
        n_ctx=theirs.max_position_embeddings,
        d_head=theirs.head_dim,
        n_heads=theirs.num_attention_heads,
        n_key_value_heads=theirs.num_key_value_heads,
        d_mlp=theirs.intermediate_size,
        d_vocab=theirs.vocab_size,
        eps=theirs.rms_norm_eps,
        act_fn="gelu_pytorch_tanh",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        use_normalization_before_and_after=True,
        positional_embedding_type="rotary",
        rotary_dim=theirs.head_dim,
        rotary_base=int(theirs.rope_parameters["rope_theta"]),
        use_attn_scale=True,
        attn_scale=theirs.query_pre_attn_scalar**0.5,
        attn_scores_soft_cap=theirs.attn_logit_softcapping,
        output_logits_soft_cap=theirs.final_logit_softcapping,
        use_local_attn=True,
        window_size=theirs.sliding_window,
        attn_types=["local" if kind == "sliding_attention" else "global" for kind in theirs.layer_types],
        original_architecture="Gemma2ForCausalLM",
        model_name="hooked-gemma",
        dtype=torch.float32,
        device="cpu",
    )
    model = HookedTransformer(cfg, tokenizer=tokenizer)
    weights = loading_from_pretrained.get_pretrained_state_dict(
        str(folder), cfg, hf_model=hf_model, dtype=torch.float32
    )
    model.load_and_process_state_dict(
        weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    model.tokenizer = tokenizer
    return model.eval()
