"""Which tokens of a running pass a choice of positions means; positions are places in a text."""

import operator
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_persona.errors import InputError
from tl_persona.steering.pass_watch import PassTokens, require_clear

Positions: TypeAlias = (
    Literal["last", "generated"] | int | slice | Sequence[int] | Bool[Tensor, "batch prompt_pos"] | None
)
"""Which tokens of a text. Ints count from its first real token, 0, so padding on the left moves nothing.

- None: every token. `"last"`: the last real token of each row, in every pass, so each generated token too.
- `"generated"`: the tokens that run after the prompt's pass, and not the prompt.
- An int or several: these tokens, those yet to be generated too. Negative ones count from the end of the prompt.
- A slice: like ints, but what it holds beyond the text is left out; `slice(12, None)` goes on while tokens come.
- A mask: True where the prompt's token is meant, one column a token, padding included.

The prompt is what runs in a text's first pass. Where it runs in pieces, as with `prefill_chunk_size`, another turn goes
on with its cache, or tokens are drafts of an assistant model, only places that count from 0 can be told.
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
        require_clear(tokens, f"positions={positions!r}")
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
    require_clear(tokens, f"positions={positions!r}")
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
