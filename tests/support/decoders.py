"""Tiny random decoders of many kinds, and what is known of the TransformerLens classes that are made of them.

Each is a configuration and the place of its decoder layers in the transformers model. They have three or four blocks,
a width of 32 (48 where six heads need it) and `tiny`'s vocabulary. Weights are drawn wide, so that whatever a hooked
class leaves out moves residuals far past any tolerance. Nothing here knows the package under test.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from decoder_record import Decoder as Decoder
from decoder_record import auto_class
from decoders_attending import ATTENDING
from decoders_further import FURTHER
from decoders_mixed import MIXED
from tiny import FAMILIES, VOCAB_SIZE, ask_for_plain_attention, build_tokenizer
from torch import Tensor

DECODERS: dict[str, Decoder] = {**ATTENDING, **MIXED}
"""Those that attend to every token that they may, each in the same way; and experts, latent attention, recurrences."""

EVERY: dict[str, Decoder] = {**DECODERS, **FURTHER}
"""Those, and what else transformers makes a causal model of."""


def build_decoder(name: str, folder: Path) -> Path:
    """Write a decoder and a ChatML tokenizer to `folder`, as any checkpoint would be, and return the folder.

    TransformerLens 3.x guesses the architecture from words in a path ("llama", "gemma"), so name it something else.
    """
    EVERY[name].make().save_pretrained(folder)
    build_tokenizer(FAMILIES["llama"]).save_pretrained(folder)
    if EVERY[name].config == "Gemma2Config":
        ask_for_plain_attention(folder / "config.json")
    return folder


def load_decoder(folder: Path) -> Any:
    """The transformers model of a folder, in float32."""
    found = auto_class(transformers.AutoConfig.from_pretrained(folder))
    return found.from_pretrained(folder, dtype=torch.float32).eval()


def texts() -> Sequence[Tensor]:
    """Token ids of texts below the windows and the original context, past them, and with a beginning in common."""
    beginning = _text(40, 1)
    ends = [_text(9, 2), _text(20, 3)]
    return [_text(1, 4), _text(6, 5), _text(40, 6), *(torch.cat([beginning, end]) for end in ends), _text(90, 7)]


def _text(length: int, seed: int) -> Tensor:
    return torch.randint(10, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed))
