"""Chooses layers by hook name: one function, one error.

A selection is an int, a range `"10:20"`, a hook name, a glob, a predicate on names, or a list of these. Names are
TransformerLens's; an int i means `blocks.i.hook_resid_post`, the output of block i. Whether a hook carries a
`d_model` axis is seen when it runs, so the backends check that.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TypeAlias

from tl_persona.errors import HookError

LayerChoice: TypeAlias = int | str | slice | range | Callable[[str], bool]
LayerSelection: TypeAlias = LayerChoice | Sequence[LayerChoice] | None

_RANGE = re.compile(r"\s*(-?\d+)?\s*:\s*(-?\d+)?\s*(?::\s*(-?\d+)\s*)?")
_BLOCK = re.compile(r"blocks\.(\d+)\.")


def resid_post(layer: int) -> str:
    """The hook at the output of block `layer`.

    Example:
        >>> resid_post(7)
        'blocks.7.hook_resid_post'
    """
    return f"blocks.{layer}.hook_resid_post"


def layer_of(hook_name: str) -> int | None:
    """The block a hook sits in, or None for a hook outside the blocks.

    Example:
        >>> layer_of("blocks.12.hook_resid_mid"), layer_of("hook_embed")
        (12, None)
    """
    match = _BLOCK.match(hook_name)
    return int(match.group(1)) if match else None


def resolve_hooks(selection: LayerSelection, available: Iterable[str], n_layers: int) -> tuple[str, ...]:
    """The hook names a selection stands for.

    Args:
        selection: What to choose; None means `resid_post` of every block. Ints and the ends of ranges count from
            the end where negative. Lists keep their order; ranges, globs and predicates go in the model's order.
        available: The model's own hook names (the keys of its `hook_dict`).
        n_layers: Number of blocks.

    Raises:
        HookError: A name, layer or pattern fits nothing (the nearest names are given), or a hook is chosen twice.

    Example:
        >>> names = [f"blocks.{i}.{site}" for i in range(4) for site in ("hook_resid_pre", "hook_resid_post")]
        >>> resolve_hooks("1:3", names, 4)
        ('blocks.1.hook_resid_post', 'blocks.2.hook_resid_post')
        >>> resolve_hooks([-1, "blocks.0.hook_resid_pre"], names, 4)
        ('blocks.3.hook_resid_post', 'blocks.0.hook_resid_pre')
        >>> resolve_hooks("blocks.*.hook_resid_pre", names, 4)[-1]
        'blocks.3.hook_resid_pre'
    """
    names = tuple(available)
    many = isinstance(selection, Sequence) and not isinstance(selection, str | range)
    choices: Sequence[LayerChoice] = ["blocks.*.hook_resid_post"] if selection is None else (
        selection if many else [selection]  # type: ignore[assignment,list-item]
    )  # fmt: skip
    chosen = [name for choice in choices for name in _resolve_one(choice, names, n_layers)]
    if not chosen:
        raise HookError("no layer was chosen: pass at least one, or None for all")
    repeated = {name for name in chosen if chosen.count(name) > 1}
    if repeated:
        raise HookError(f"hook {min(repeated)!r} is chosen twice")
    return tuple(chosen)


def _resolve_one(choice: LayerChoice, names: tuple[str, ...], n_layers: int) -> list[str]:
    if isinstance(choice, bool):
        raise HookError(f"{choice!r} is not a layer: pass an int, a range, a hook name, a glob or a predicate")
    if isinstance(choice, int):
        return [_known(resid_post(_absolute(choice, n_layers)), names)]
    if isinstance(choice, range):
        return [_known(resid_post(_absolute(layer, n_layers)), names) for layer in choice]
    if isinstance(choice, slice):
        return [_known(resid_post(layer), names) for layer in _sliced(choice, n_layers)]
    if isinstance(choice, str):
        return _resolve_text(choice, names, n_layers)
    if callable(choice):
        return _model_order([name for name in names if choice(name)], "the predicate", names)
    raise HookError(f"{choice!r} is not a layer: pass an int, a range, a hook name, a glob or a predicate")


def _resolve_text(text: str, names: tuple[str, ...], n_layers: int) -> list[str]:
    if text in names:
        return [text]
    if re.fullmatch(r"\s*-?\d+\s*", text):
        return _resolve_one(int(text), names, n_layers)
    ends = _RANGE.fullmatch(text)
    if ends:
        start, stop, step = (None if end is None else int(end) for end in ends.groups())
        if step == 0:
            raise HookError(f"the range {text!r} has step 0")
        return [_known(resid_post(layer), names) for layer in _sliced(slice(start, stop, step), n_layers, text)]
    if any(character in text for character in "*?["):
        return _model_order([name for name in names if fnmatchcase(name, text)], repr(text), names)
    return [_known(text, names)]


def _sliced(ends: slice, n_layers: int, text: str | None = None) -> range:
    for end in (ends.start, ends.stop):
        if end is not None and not -n_layers <= end <= n_layers:
            raise HookError(f"the range {text or ends!r} leaves the model, which has layers 0 to {n_layers - 1}")
    layers = range(*ends.indices(n_layers))
    if not layers:
        raise HookError(f"the range {text or ends!r} is empty: the model has layers 0 to {n_layers - 1}")
    return layers


def _absolute(layer: int, n_layers: int) -> int:
    if not -n_layers <= layer < n_layers:
        raise HookError(f"there is no layer {layer}: the model has layers 0 to {n_layers - 1}")
    return layer % n_layers


def _known(name: str, names: tuple[str, ...]) -> str:
    if name not in names:
        near = get_close_matches(name, names, n=3, cutoff=0.4)
        raise HookError(f"the model has no hook {name!r}{_nearest(near)}")
    return name


def _model_order(found: list[str], what: str, names: tuple[str, ...]) -> list[str]:
    if not found:
        near = get_close_matches(what, names, n=3, cutoff=0.3)
        raise HookError(f"{what} fits none of the model's {len(names)} hooks{_nearest(near)}")
    order = {name: index for index, name in enumerate(names)}

    def depth(name: str) -> tuple[int, int]:
        layer = layer_of(name)
        # Hooks before the blocks come first, those after them last, as they fire.
        outside = -1 if "embed" in name and "unembed" not in name else len(names)
        return (outside if layer is None else layer, order[name])

    return sorted(found, key=depth)


def _nearest(near: list[str]) -> str:
    return f"; nearest: {', '.join(near)}" if near else ""
