"""Each decoder of `decoders`, saved once, with what plain transformers computes for its texts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from decoders import EVERY, Decoder, build_decoder, load_decoder, texts
from oracle import block_outputs
from torch import Tensor


@dataclass(frozen=True)
class SavedDecoder:
    """A decoder as a checkpoint.

    Attributes:
        record: What it is.
        folder: Where it lies, with a tokenizer.
        texts: Token ids, some shorter and some longer than its windows and its original context.
        expected: The residuals of each text, (layer, pos, d_model).
    """

    record: Decoder
    folder: Path
    texts: list[Tensor]
    expected: list[Tensor]

    def load(self) -> Any:
        """A transformers model of its own."""
        return load_decoder(self.folder)

    @property
    def tokenizer(self) -> Any:
        return transformers.AutoTokenizer.from_pretrained(self.folder)

    def oracle(self, model: Any) -> list[Tensor]:
        """What a transformers model, changed or not, computes for the texts, one after the other."""
        return [block_outputs(model, ids, self.record.layers) for ids in self.texts]


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SavedDecoder]:
    """Give a decoder by its name; the test is skipped where the installed transformers is too old to build it."""

    @cache
    def saved(name: str) -> SavedDecoder | Exception:
        try:
            folder = build_decoder(name, tmp_path_factory.mktemp("decoder"))
            plain = load_decoder(folder)
            expected = [block_outputs(plain, ids, EVERY[name].layers) for ids in texts()]
        except Exception as error:  # an old release may lack a class, a setting, or what they need
            return error
        return SavedDecoder(EVERY[name], folder, list(texts()), expected)

    def decoder_of(name: str) -> SavedDecoder:
        found = saved(name)
        if isinstance(found, Exception):
            if not _is_old():
                raise found
            pytest.skip(
                f"transformers {transformers.__version__} cannot build {name}, 5.24 and `make test-newest` can: {found}"
            )
        return found

    return decoder_of


def _is_old() -> bool:
    """Whether the installed transformers is older than the one that builds all of them."""
    major, minor = transformers.__version__.split(".")[:2]
    return (int(major), int(minor)) < (5, 24)
