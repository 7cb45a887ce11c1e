"""Which tokens a running pass has, told to the hooks that it fires.

A pass may run a whole text, or, as in generation with a key-value cache, only what follows the tokens run before. How
many those are is read from the cache itself, and padding from the attention mask; neither is guessed from shapes.
"""

import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from tl_persona.errors import InputError
from tl_persona.models.caches import UnknownCacheError, cache_among, first_cache, tokens_held, values_of
from tl_persona.models.hooks import layer_of

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
        unclear: Why it cannot be told which of the tokens were generated: several go on at once, or some are drafts.
    """

    places: Int[Tensor, "batch pos"]
    prompt_lengths: Int[Tensor, "batch"] | None
    is_first: bool
    is_cached: bool
    goes_on: bool = False
    unclear: Literal["several", "drafts"] | None = None


@dataclass(frozen=True)
class _Beginning:
    """What a pass says of itself before it runs.

    Attributes:
        tokens_before: None where its cache does not say so.
        is_cached: Keys and values are kept.
        attention_mask: As it was given.
        cache: Refers to the cache, without keeping it; None where it has none.
        n_read: Tokens whose logits are asked for; None where that is not said.
    """

    tokens_before: int | None
    is_cached: bool
    attention_mask: Any
    cache: Callable[[], Any] | None = None
    n_read: int | None = None


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
        self._cache: Callable[[], Any] | None = None

    def __enter__(self) -> "PassWatch":
        self._handle = self._module.register_forward_pre_hook(self._note, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _note(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._beginning = self._read(args, kwargs)

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
        drafts = self._has_drafts(beginning, before)
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
            unclear="drafts" if drafts else "several" if before and pos > 1 else None,
        )

    def _has_drafts(self, beginning: _Beginning, before: int) -> bool:
        """Assisted decoding reads several tokens of a pass, and takes back the drafts that it does not accept."""
        cache = None if beginning.cache is None else beginning.cache()
        taken_back = cache is not None and self._cache is not None and self._cache() is cache and 0 < before < self._end
        self._cache = beginning.cache
        return taken_back or (beginning.is_cached and (beginning.n_read or 0) > 1)

    def _knows_the_prompt(self, batch: int, before: int) -> bool:
        lengths = self._prompt_lengths
        return lengths is not None and len(lengths) == batch and self._prompt_width <= before <= self._end


def _places(mask: Any, batch: int, before: int, pos: int) -> Int[Tensor, "batch pos"]:
    if isinstance(mask, str):
        raise InputError(f"the argument {mask!r} looks like an attention mask, which is called attention_mask here")
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


class CacheGuard:
    """Refuses to go on with a text whose cache did not take up what ran before, while entered.

    Where TransformerLens and transformers do not agree on the cache's name, the attentions of a bridge never see it,
    and every token that is generated is taken for the first of its text. Nothing else in the run looks wrong.
    """

    def __init__(self, model: Any) -> None:
        self._original = getattr(model, "original_model", None)
        self._held_before: int | None = None
        self._empty: weakref.WeakSet[Any] = weakref.WeakSet()
        self._stack = ExitStack()

    def __enter__(self) -> "CacheGuard":
        if self._original is not None:
            for handle in (
                self._original.register_forward_pre_hook(self._before, with_kwargs=True),
                self._original.register_forward_hook(self._after, with_kwargs=True),
            ):
                self._stack.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _before(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = _cache_or_none(args, kwargs)
        held = tokens_held(cache)
        if cache is not None and (cache in self._empty or (held == 0 and _speaks_of_more(kwargs))):
            raise InputError(
                "the model has lost the beginning of the text that it goes on with: its key-value cache is empty, as "
                "the installed TransformerLens and transformers hand it on under different names. Generate with "
                "tl_persona.generate, or with use_past_kv_cache=False"
            )
        self._held_before = 0 if cache is None else held

    def _after(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = _cache_or_none(args, kwargs)
        cache = first_cache(values_of(output)) if given is None else given
        held = tokens_held(cache)
        if held is not None and self._held_before is not None and held <= self._held_before:
            self._empty.add(cache)


def _speaks_of_more(kwargs: Mapping[str, Any]) -> bool:
    """Whether the attention mask covers tokens that ran before, too."""
    mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
    if not isinstance(mask, Tensor) or not isinstance(ids, Tensor) or not mask.ndim == ids.ndim == 2:
        return False
    return mask.shape[1] > ids.shape[1]


def _cache_or_none(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return cache_among(kwargs, args)
    except UnknownCacheError:
        return None


def _announcer(model: Any, hook_name: str) -> tuple[Any, Callable[[tuple[Any, ...], dict[str, Any]], _Beginning]]:
    """The module whose arguments tell of a pass before the hook fires, and what reads them."""
    original = getattr(model, "original_model", None)
    if original is not None and not getattr(original.config, "is_encoder_decoder", False):
        return original, _read_transformers
    if original is not None or not hasattr(model, "blocks"):
        raise InputError(f"the passes of a {type(original or model).__name__} cannot be followed, which {_NEEDED_BY}")
    layer = layer_of(hook_name)
    return model.blocks[-1 if layer is None else layer], _read_block


def _read_transformers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Beginning:
    try:
        cache = cache_among(kwargs, args)
    except UnknownCacheError:
        return _Beginning(tokens_before=None, is_cached=True, attention_mask=None)
    n_read = kwargs.get("logits_to_keep")
    return _Beginning(
        tokens_before=_cached_tokens(cache, kwargs.get("cache_position")),
        is_cached=cache is not None or bool(kwargs.get("use_cache")),
        attention_mask=kwargs.get("attention_mask", _unknown_mask(kwargs)),
        cache=_referring(cache),
        n_read=n_read if isinstance(n_read, int) else None,
    )


def _referring(cache: Any) -> Callable[[], Any] | None:
    try:
        return weakref.ref(cache)
    except TypeError:  # None, or of a class without room for it
        return None


def _unknown_mask(kwargs: Mapping[str, Any]) -> str | None:
    """The name of an argument that looks like a mask of padding under a name that is not known here."""
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.ndim == 2 and name not in ("input_ids", "position_ids", "labels"):
            numbers = value if value.dtype == torch.bool else value.long()
            if (
                not value.is_floating_point()
                and bool((numbers == 0).any())
                and bool(((value == 0) | (value == 1)).all())
            ):
                return name
    return None


def _cached_tokens(cache: Any, cache_position: Tensor | None) -> int | None:
    if cache is None:
        return 0
    return tokens_held(cache) if cache_position is None else int(cache_position[0])


def _read_block(_args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Beginning:
    """What a block of a HookedTransformer is told; it is always handed a cache entry, or None in its place."""
    entry = kwargs.get("past_kv_cache_entry")
    if "past_kv_cache_entry" not in kwargs:
        return _Beginning(tokens_before=None, is_cached=True, attention_mask=None)
    return _Beginning(
        tokens_before=0 if entry is None else entry.past_keys.shape[1],
        is_cached=entry is not None,
        attention_mask=kwargs.get("attention_mask"),
    )


def require_clear(tokens: PassTokens, what: str, *, only_drafts: bool = False) -> None:
    """Refuses a pass of which it cannot be told which tokens were generated.

    Args:
        tokens: Of the pass.
        what: What needs to know it.
        only_drafts: Whether several tokens that go on do no harm.

    Raises:
        InputError: It cannot be told.
    """
    if tokens.unclear == "drafts":
        raise InputError(
            f"{what}: tokens of this pass are drafts, or some that ran before it were taken back, so which of them "
            "count is unknown: generate without assistant_model and prompt_lookup_num_tokens"
        )
    if tokens.unclear == "several" and not only_drafts:
        raise InputError(
            f"{what}: this pass goes on with several tokens at once, a piece of a prompt (prefill_chunk_size) or "
            "another turn, so where the prompt ends is unknown: run the prompt in one pass, or pass positions from 0 up"
        )
