"""One small tokenizer for each kind there is, trained on a few sentences, and the special tokens of all templates.

A kind is a way to cut text and to count its characters. Nothing here knows the package.
"""

import json
from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|User|>", "<|Assistant|>", "<|end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<|start|>", "<|channel|>", "<|message|>", "<|return|>"),
)
"""Control tokens of the templates."""

SWALLOWS = ("<|system|>", "<|user|>", "<|assistant|>", "<|stop|>")
"""Control tokens that take the white space after them into themselves, as Phi-3's do."""

UNMARKED = ("<｜User｜>", "<｜Assistant｜>")
"""Added to the vocabulary and not marked special, though templates write them as control tokens, as DeepSeek's do."""

ADDED = ("<think>", "</think>", "<tool_response>", "</tool_response>")
"""Added to the vocabulary, but not marked special, as Qwen3's are."""

_TRAINING_TEXT = (
    "You are Mara, a retired lighthouse keeper.\n\nWhat is your name?\nMy name is Mara. I kept the light.\n"
    "system user assistant model [INST] [/INST] <think>\n\n</think>\n\n <<SYS>> A B C D The answer is A.\n"
)
_BYTE_PIECES = Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+\n*|\s+")


def byte_level(*, trim_offsets: bool = False) -> Tokenizer:
    """A byte-level BPE, as of GPT-2, Llama 3 and Qwen; punctuation takes a following line break into its token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_BYTE_PIECES, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if trim_offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.train_from_iterator(
        [_TRAINING_TEXT],
        trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=[]
        ),
    )
    return tokenizer


def sentencepiece_bpe() -> Tokenizer:
    """A BPE with byte fallback and a prefix space, as of Llama 2 and Mistral."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(
        [_TRAINING_TEXT], trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>"], show_progress=False)
    )
    vocab = trained.get_vocab()
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def word_piece() -> Tokenizer:
    """A WordPiece that lower-cases, strips accents and drops white space, as of BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator([_TRAINING_TEXT], trainer)
    return tokenizer


def unigram() -> Tokenizer:
    """A Unigram with compatibility normalization, as of T5."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([_TRAINING_TEXT], trainer)
    return tokenizer


def sentencepiece_first() -> Tokenizer:
    """A BPE with byte fallback whose prefix space stands at the start of the whole text only, as of newer Mistrals."""
    tokenizer = sentencepiece_bpe()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def gemma_bpe() -> Tokenizer:
    """A BPE with byte fallback and no prefix space, as of Gemma."""
    tokenizer = sentencepiece_bpe()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def byte_level_composed() -> Tokenizer:
    """A byte-level BPE that composes letters with their accents first, as of Qwen."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def byte_level_prefixed() -> Tokenizer:
    """A byte-level BPE that puts a space before the text, as of RoBERTa's kin."""
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    return tokenizer


def unigram_with_bytes() -> Tokenizer:
    """A Unigram with byte fallback and no normalization, as of newer SentencePiece models."""
    trained = json.loads(unigram().to_str())["model"]
    pieces = [(piece, score) for piece, score in trained["vocab"]]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(pieces, trained["unk_id"], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "byte_level_trimmed_offsets": lambda: byte_level(trim_offsets=True),
    "byte_level_composed": byte_level_composed,
    "byte_level_prefixed": byte_level_prefixed,
    "sentencepiece_bpe": sentencepiece_bpe,
    "sentencepiece_first": sentencepiece_first,
    "gemma_bpe": gemma_bpe,
    "word_piece": word_piece,
    "unigram": unigram,
    "unigram_with_bytes": unigram_with_bytes,
}

_UNKNOWN = {"word_piece": "[UNK]", **dict.fromkeys(["sentencepiece_bpe", "sentencepiece_first", "gemma_bpe"], "<unk>")}


def fast_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One of `TOKENIZERS` with the control tokens of all templates, and no template yet."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZERS[kind](),
        unk_token=_UNKNOWN.get(kind, "<unk>" if kind.startswith("unigram") else None),
        bos_token="<s>",
        eos_token="</s>",
    )
    add_control_tokens(tokenizer)
    return tokenizer


def add_control_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """Gives a tokenizer the tokens of all templates that it has not."""
    known = tokenizer.get_vocab()
    special = [AddedToken(token, normalized=False) for token in SPECIAL if token not in known]
    special += [AddedToken(token, normalized=False, rstrip=True) for token in SWALLOWS]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in (*UNMARKED, *ADDED)])
