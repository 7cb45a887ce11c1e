"""Hook names: layers chosen by name, with one function and one error, and the last block that a choice needs.

A selection is an int, a range `"10:20"`, a hook name, a glob, a predicate on names, or a list of these. Names are
TransformerLens's; an int i means `blocks.i.hook_resid_post`, the output of block i. Whether a hook carries a
`d_model` axis is seen when it runs, so the backends check that.

In a glob `*` and `?` stay between two dots, so that `blocks.*.hook_out` does not also choose `blocks.0.attn.hook_out`;
`**` crosses dots; `[0-3]` is one of some characters. A model may know one hook by two names (a TransformerBridge does):
each is chosen by its own name only.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import SupportsIndex, TypeAlias

from tl_persona.errors import HookError

_EMBEDDING = re.compile(r"(hook_)?(pos_)?embed(\.|$)")


LayerChoice: TypeAlias = SupportsIndex | str | slice | range | Callable[[str], bool]
LayerSelection: TypeAlias = LayerChoice | Sequence[LayerChoice] | None

_NUMBER = "-?[0-9]{1,9}"  # no model has more blocks, and Python refuses to count digits by the thousand
_INT = re.compile(rf"\s*{_NUMBER}\s*")
_RANGE = re.compile(rf"\s*({_NUMBER})?\s*:\s*({_NUMBER})?\s*(?::\s*({_NUMBER})?\s*)?")
_BLOCK = re.compile(r"blocks\.([0-9]{1,9})\.")
_GLOB_PART = re.compile(r"\*\*|\*|\?|\[!?[^\]]+\]|[^*?\[]+|\[")


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
            the end where negative, and a range leaves its second end out. Lists keep their order, ranges their own;
            globs and predicates go in the model's order.
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
    names = dict.fromkeys(available)
    choices: Sequence[LayerChoice]
    if selection is None:
        choices = [range(n_layers)]
    elif isinstance(selection, Sequence) and not isinstance(selection, str | range):
        choices = selection
    else:
        choices = [selection]
    chosen = [name for choice in choices for name in _resolve_one(choice, names, n_layers)]
    if not chosen:
        raise HookError("no layer was chosen: pass at least one, or None for all")
    name, count = Counter(chosen).most_common(1)[0]
    if count > 1:
        raise HookError(f"hook {name!r} is chosen twice: name every layer once")
    return tuple(chosen)


def _resolve_one(choice: object, names: dict[str, None], n_layers: int) -> list[str]:
    if isinstance(choice, str):
        return _resolve_text(choice, names, n_layers)
    if isinstance(choice, range):
        return [_known(resid_post(_absolute(layer, n_layers)), names) for layer in choice]
    if isinstance(choice, slice):
        return [_known(resid_post(layer), names) for layer in _sliced(choice, n_layers)]
    if isinstance(choice, SupportsIndex) and not isinstance(choice, bool):
        return [_known(resid_post(_absolute(choice.__index__(), n_layers)), names)]
    if callable(choice):
        return _in_model_order([name for name in names if choice(name)], names) or _refuse("the predicate", "", names)
    raise HookError(f"{choice!r} is not a layer: pass an int, a range, a hook name, a glob or a predicate")


def _resolve_text(text: str, names: dict[str, None], n_layers: int) -> list[str]:
    if text in names:
        return [text]
    if _INT.fullmatch(text):
        return _resolve_one(int(text), names, n_layers)
    ends = _RANGE.fullmatch(text)
    if ends:
        start, stop, step = (None if end is None else int(end) for end in ends.groups())
        return [_known(resid_post(layer), names) for layer in _sliced(slice(start, stop, step), n_layers, text)]
    if any(character in text for character in "*?["):
        pattern = _glob(text)
        return _in_model_order([name for name in names if pattern.fullmatch(name)], names) or _refuse(
            repr(text), text, names
        )
    return [_known(text, names)]


def _glob(text: str) -> re.Pattern[str]:
    """A glob as a regular expression; see the module's docstring for its rules."""
    meaning = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    pattern = ""
    for part in _GLOB_PART.findall(text):
        if part in meaning:
            pattern += meaning[part]
        elif part.startswith("[") and len(part) > 1:
            negated = part[1] == "!"
            inside = part[2:-1] if negated else part[1:-1]
            pattern += "[" + ("^." if negated else "") + re.sub(r"([^\w-])", r"\\\1", inside) + "]"
        else:
            pattern += re.escape(part)
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise HookError(f"{text!r} is no glob ({error}): write *, **, ? or [0-3]") from None


def _sliced(ends: slice, n_layers: int, text: str | None = None) -> range:
    if ends.step == 0:
        raise HookError(f"the range {text or ends!r} has step 0: use 1, or leave it out")
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


def _known(name: str, names: dict[str, None]) -> str:
    if name not in names:
        near = get_close_matches(name, names, n=3, cutoff=0.4)
        raise HookError(f"the model has no hook {name!r}{_nearest(near)}")
    return name


def _refuse(what: str, pattern: str, names: dict[str, None]) -> list[str]:
    near = get_close_matches(pattern, names, n=3, cutoff=0.3)
    crossing = " (* does not cross a dot, ** does)" if "*" in pattern else ""
    raise HookError(f"{what} fits none of the model's {len(names)} hooks{crossing}{_nearest(near)}")


def _in_model_order(found: list[str], names: dict[str, None]) -> list[str]:
    """Hooks before the blocks first, those after them last, as they fire; within a block as the model lists them."""
    order = {name: index for index, name in enumerate(names)}

    def depth(name: str) -> tuple[int, int]:
        layer = layer_of(name)
        # No block has a number as high as the number of hooks.
        outside = -1 if "emb" in name and "unembed" not in name else len(names)
        return (outside if layer is None else layer, order[name])

    return sorted(found, key=depth)


def _nearest(near: list[str]) -> str:
    return f"; nearest: {', '.join(near)}" if near else ""


def stop_layer(names: Sequence[str]) -> int | None:
    """The first block that need not run; None where a hook lies behind the blocks or outside them."""
    needed = [_blocks_needed(name) for name in names]
    known = [count for count in needed if count is not None]
    return max(known) if len(known) == len(needed) else None


def _blocks_needed(name: str) -> int | None:
    layer = layer_of(name)
    if layer is not None:
        return layer + 1
    return 0 if _EMBEDDING.match(name) else None
