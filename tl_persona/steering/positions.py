"""Which tokens of a running pass a choice of positions means.

Positions are places in a text. A pass may run a whole text, or, as in generation with a key-value cache, only what
follows the tokens run before. How many those are is read from the cache itself, and padding from the attention mask;
neither is guessed from shapes.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from weakref import WeakSet

import torch
from jaxtyping import Bool, Int
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
        self._empty: WeakSet[Any] = WeakSet()
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
    return _Beginning(
        tokens_before=_cached_tokens(cache, kwargs.get("cache_position")),
        is_cached=cache is not None or bool(kwargs.get("use_cache")),
        attention_mask=kwargs.get("attention_mask", _unknown_mask(kwargs)),
    )


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


Positions: TypeAlias = (
    Literal["last", "generated"] | int | slice | Sequence[int] | Bool[Tensor, "batch prompt_pos"] | None
)
"""Which tokens of a text. Ints count from its first real token, 0, so padding on the left moves nothing.

- None: every token. `"last"`: the last real token of each row, in every pass, so each generated token too.
- `"generated"`: the tokens that run after the prompt's pass, and not the prompt.
- An int or several: these tokens, those yet to be generated too. Negative ones count from the end of the prompt.
- A slice: like ints, but what it holds beyond the text is left out; `slice(12, None)` goes on while tokens come.
- A mask: True where the prompt's token is meant, one column a token, padding included.
"""


def check_positions(positions: Positions) -> Positions:
    """The positions, with a sequence of ints made a tuple.

    Raises:
        InputError: They are none of the forms that `Positions` names.

    Example:
        >>> check_positions(range(3))
        (0, 1, 2)
        >>> check_positions([])
        Traceback (most recent call last):
        tl_persona.errors.InputError: positions is empty: name at least one, or pass None for every token
    """
    if positions is None or (isinstance(positions, str) and positions in ("last", "generated")):
        return positions
    if isinstance(positions, Tensor):
        if positions.dtype != torch.bool or positions.ndim != 2:
            seen = f"{positions.dtype} of shape {tuple(positions.shape)}"
            raise InputError(f"a mask of positions must be a bool tensor of shape (batch, pos), got {seen}")
        return positions
    if isinstance(positions, slice):
        ends = [_as_int(end, positions) for end in (positions.start, positions.stop, positions.step) if end is not None]
        if positions.step is not None and ends[-1] < 1:
            raise InputError(f"positions={positions}: the step must be 1 or more")
        return positions
    if isinstance(positions, Sequence) and not isinstance(positions, str):
        if not positions:
            raise InputError("positions is empty: name at least one, or pass None for every token")
        return tuple(_as_int(position, positions) for position in positions)
    return _as_int(positions, positions)


def _as_int(value: object, positions: object) -> int:
    if not isinstance(value, bool | str):
        try:
            return operator.index(value)  # type: ignore[arg-type]  # whatever has no index raises
        except TypeError:
            pass
    raise InputError(f"positions={positions!r} is unknown: use 'last', 'generated', ints, a slice or a mask")


def select(positions: Positions, tokens: PassTokens) -> Bool[Tensor, "batch pos"]:
    """True for the tokens of a pass that the positions, as `check_positions` gave them, mean.

    Raises:
        InputError: A position lies outside a text, a mask does not fit, or the prompt's end cannot be told.

    Example:
        >>> row = PassTokens(torch.tensor([[-1, 0, 1, 2]]), torch.tensor([3]), is_first=True, is_cached=False)
        >>> select("last", row), select(slice(-3, -1), row)
        (tensor([[False, False, False,  True]]), tensor([[False,  True,  True, False]]))
    """
    places = tokens.places
    real = places >= 0
    if positions is None:
        return torch.ones_like(real)
    if isinstance(positions, Tensor):
        return _under_mask(positions, tokens)
    if positions == "last":
        return real & (places == places.amax(dim=1, keepdim=True))
    if positions == "generated":
        if not tokens.is_cached:
            raise InputError(
                "positions='generated' needs a key-value cache, as without one the prompt cannot be told from what was "
                "generated: generate with one, or pass slice(length of the prompt, None)"
            )
        return places >= _prompt_ends(tokens, positions)
    if isinstance(positions, slice):
        return real & _inside(positions, tokens)
    chosen = torch.zeros_like(real)
    for position in [positions] if isinstance(positions, int) else positions:
        chosen |= places == _in_text(position, tokens)
    return chosen


def _under_mask(mask: Bool[Tensor, "batch prompt_pos"], tokens: PassTokens) -> Bool[Tensor, "batch pos"]:
    places = tokens.places
    if not tokens.is_first:
        _prompt_ends(tokens, "a mask")
        return torch.zeros_like(places, dtype=torch.bool)
    if mask.shape != places.shape:
        raise InputError(f"the mask of positions has shape {tuple(mask.shape)}, the prompt {tuple(places.shape)}")
    return mask.to(places.device)


def _prompt_ends(tokens: PassTokens, positions: object) -> Int[Tensor, "batch 1"]:
    if tokens.prompt_lengths is None:
        raise InputError(
            f"positions={positions!r}: this pass goes on with a text that began before the block, so where its prompt "
            "ends is unknown: run the prompt inside the block, or pass positions from 0 up"
        )
    return tokens.prompt_lengths[:, None]


def _in_text(position: int, tokens: PassTokens) -> int | Int[Tensor, "batch 1"]:
    """The place of one position, after the check that every text has it, or may come to have it."""
    if position >= 0:
        if tokens.is_first and not tokens.is_cached and bool((_prompt_ends(tokens, position) <= position).any()):
            shortest = int(_prompt_ends(tokens, position).min())
            raise InputError(f"position {position} is outside a text of {shortest} tokens")
        return position
    ends = _prompt_ends(tokens, position)
    if bool((ends + position < 0).any()):
        raise InputError(f"position {position} is outside a prompt of {int(ends.min())} tokens")
    return ends + position


def _inside(positions: slice, tokens: PassTokens) -> Bool[Tensor, "batch pos"]:
    def place(end: int) -> int | Int[Tensor, "batch 1"]:
        return end if end >= 0 else (_prompt_ends(tokens, positions) + end).clamp(min=0)

    start = place(positions.start or 0)
    inside = tokens.places >= start
    if positions.stop is not None:
        inside &= tokens.places < place(positions.stop)
    if positions.step is not None:
        inside &= (tokens.places - start) % positions.step == 0
    return inside
