"""Follows the passes of a model, so that a hook knows which tokens of a text it sees.

A pass may run a whole text, or, as in generation with a key-value cache, only what follows the tokens run before. How
many those are is read from the cache itself, and padding from the attention mask; neither is guessed from shapes.
Choosing among the tokens is the work of `steering_positions`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_persona.errors import InputError
from tl_persona.hooks import layer_of

_NEEDED_BY = "monitors need, and positions other than None"


@dataclass(frozen=True, eq=False)
class PassTokens:
    """The tokens of one pass, as their places in their texts.

    Attributes:
        places: Index of each token in its row's text; -1 for padding.
        prompt_lengths: Tokens of each row's prompt; None where the prompt was run before anyone watched.
        is_first: Nothing of these texts was run before.
        is_cached: Keys and values are kept, so that the text may go on in later passes.
        goes_on: The tokens follow right on those of the pass seen before this one.
    """

    places: Int[Tensor, "batch pos"]
    prompt_lengths: Int[Tensor, "batch"] | None
    is_first: bool
    is_cached: bool
    goes_on: bool = False


@dataclass(frozen=True)
class _Beginning:
    """What a pass says of itself before it runs."""

    tokens_before: int | None
    is_cached: bool
    attention_mask: Any


class PassWatch:
    """Tells a hook of a model which tokens it sees, while entered.

    Raises:
        InputError: The model gives no sign of its passes.
    """

    def __init__(self, model: Any, hook_name: str) -> None:
        self._hook_name = hook_name
        self._module, self._read = _announcer(model, hook_name)
        self._handle: Any = None
        self._beginning: _Beginning | None = None
        self._seen: tuple[_Beginning, PassTokens] | None = None
        self._prompt_lengths: Int[Tensor, batch] | None = None
        self._prompt_width = self._end = 0

    def __enter__(self) -> "PassWatch":
        self._handle = self._module.register_forward_pre_hook(self._note, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _note(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        self._beginning = self._read(kwargs)

    def tokens(self, batch: int, pos: int) -> PassTokens:
        """The tokens of the pass that is running.

        Raises:
            InputError: The pass does not say how much of the text went before, or its attention mask does not fit.
        """
        beginning = self._beginning
        if beginning is None:
            raise InputError(f"{self._hook_name} ran outside a pass of its model: call the model, not a part of it")
        if self._seen is None or self._seen[0] is not beginning:
            self._seen = beginning, self._follow(beginning, batch, pos)
        return self._seen[1]

    def _follow(self, beginning: _Beginning, batch: int, pos: int) -> PassTokens:
        before = beginning.tokens_before
        if before is None:
            raise InputError(f"the model's cache does not tell how many tokens went before, which {_NEEDED_BY}")
        places = _places(beginning.attention_mask, batch, before, pos)
        if before == 0:
            self._prompt_lengths, self._prompt_width = places.amax(dim=1) + 1, pos
        elif not self._knows_the_prompt(batch, before):
            self._prompt_lengths = None
        lengths = self._prompt_lengths
        goes_on = lengths is not None and 0 < before == self._end
        self._end = before + pos
        return PassTokens(
            places,
            None if lengths is None else lengths.to(places.device),
            is_first=before == 0,
            is_cached=beginning.is_cached,
            goes_on=goes_on,
        )

    def _knows_the_prompt(self, batch: int, before: int) -> bool:
        lengths = self._prompt_lengths
        return lengths is not None and len(lengths) == batch and self._prompt_width <= before <= self._end


def _places(mask: Any, batch: int, before: int, pos: int) -> Int[Tensor, "batch pos"]:
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else ()
    # Other masks say what may be attended to, not what is padding; with one row there is none.
    if mask is None or (len(shape) != 2 and batch == 1):
        return torch.arange(before, before + pos).expand(batch, pos)
    if shape != (batch, before + pos):
        raise InputError(
            f"the attention mask has shape {shape or type(mask).__name__}; telling positions apart takes one of shape "
            f"(batch, all tokens so far), here {(batch, before + pos)}"
        )
    real = mask != 0
    return torch.where(real, real.long().cumsum(dim=1) - 1, -1)[:, before:]


def _announcer(model: Any, hook_name: str) -> tuple[Any, Callable[[dict[str, Any]], _Beginning]]:
    """The module whose arguments tell of a pass before the hook fires, and what reads them."""
    original = getattr(model, "original_model", None)
    if original is not None and not getattr(original.config, "is_encoder_decoder", False):
        return original, _read_transformers
    if original is not None or not hasattr(model, "blocks"):
        raise InputError(f"the passes of a {type(original or model).__name__} cannot be followed, which {_NEEDED_BY}")
    layer = layer_of(hook_name)
    return model.blocks[-1 if layer is None else layer], _read_block


def _read_transformers(kwargs: dict[str, Any]) -> _Beginning:
    cache = kwargs.get("past_key_values")
    if cache is None:
        cache = kwargs.get("cache_params")
    return _Beginning(
        tokens_before=_cached_tokens(cache, kwargs.get("cache_position")),
        is_cached=cache is not None or bool(kwargs.get("use_cache")),
        attention_mask=kwargs.get("attention_mask"),
    )


def _cached_tokens(cache: Any, cache_position: Tensor | None) -> int | None:
    if cache is None:
        return 0
    if cache_position is not None:
        return int(cache_position[0])
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):  # a recurrent state, which keeps no count
        return None


def _read_block(kwargs: dict[str, Any]) -> _Beginning:
    entry = kwargs.get("past_kv_cache_entry")
    return _Beginning(
        tokens_before=0 if entry is None else entry.past_keys.shape[1],
        is_cached=entry is not None,
        attention_mask=kwargs.get("attention_mask"),
    )
