"""The names by which transformers hands a key-value cache on, and what can be read of one.

Releases rename the argument: `past_key_values` until 5.23, `cache` from 5.24 on, `cache_params` in recurrent models. So
a cache is known by what it offers; the names are only what is tried when one is handed in.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

NAMES = ("cache", "past_key_values", "cache_params")
"""In the order in which they are tried."""

_PLAIN = (Tensor, bool, int, float, str, tuple, list, dict, type(None))


class UnknownCacheError(Exception):
    """A pass is handed an object that may be a cache, and does not say how many tokens it holds."""


def cache_among(arguments: Mapping[str, Any], positional: Sequence[Any] = ()) -> Any:
    """The cache among the arguments of a forward call; None where there is none.

    Args:
        arguments: By name.
        positional: Those without a name.

    Raises:
        UnknownCacheError: An argument is an object of a kind that is not known here.

    Example:
        >>> cache_among({"input_ids": None, "use_cache": True}) is None
        True
    """
    values = (*positional, *arguments.values())
    objects = [value for value in values if not isinstance(value, _PLAIN) and not callable(value)]
    caches = [value for value in objects if hasattr(value, "get_seq_length")]
    if caches:
        return caches[0]
    named = [arguments[name] for name in NAMES if arguments.get(name) is not None]
    if named:
        return named[0]
    if objects:
        raise UnknownCacheError(f"the pass is handed a {type(objects[0]).__name__}, which may be a cache")
    return None


def tokens_held(cache: Any) -> int | None:
    """How many tokens a cache holds; None where it does not say so.

    Example:
        >>> from transformers import DynamicCache
        >>> tokens_held(DynamicCache())
        0
        >>> tokens_held(object()) is None
        True
    """
    try:
        return int(cache.get_seq_length())
    except (AttributeError, TypeError, ValueError):  # a recurrent state, which keeps no count
        return None


def first_cache(values: Iterable[Any]) -> Any:
    """The first of some values that says how many tokens it holds; None where none does."""
    return next((value for value in values if hasattr(value, "get_seq_length")), None)


def values_of(output: Any) -> list[Any]:
    """The parts of what a forward call returned, by name or in a tuple; none of a bare tensor.

    Example:
        >>> values_of((1, 2)), values_of({"logits": 3})
        ([1, 2], [3])
    """
    return list(output.values()) if isinstance(output, Mapping) else list(output) if isinstance(output, tuple) else []
