"""What a bridge's model takes, found by trying it with a few tokens.

Releases of transformers rename arguments, and TransformerLens, which stands between, may look for the older name. A
signature that has a name, or a version, does not tell whether a cache is continued or a mask obeyed: the residuals do.
What is found limits what is tried on real texts; whether that is exact is `proof`'s work.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_persona.backends.local.native import NativeParts, attentions, native_parts
from tl_persona.backends.local.observers import modules_of, without_hooks
from tl_persona.backends.shortcuts import tolerance_of
from tl_persona.errors import ModelError
from tl_persona.models import caches
from tl_persona.models.facts import HookedModel
from tl_persona.plan.plan import Sharing

_RESIDUAL = re.compile(r"blocks\.\d+\.hook_resid_post")

_NO_POSITIONS = torch.zeros(0, dtype=torch.long)
"""Which logits to compute: none."""


@dataclass(frozen=True)
class Trial:
    """What one model takes.

    Attributes:
        arguments: For every pass: leave out what nobody reads.
        without_logits: For a pass that takes a shortcut: the same, and no logits where that is possible.
        cache_name: The argument that continues a cache; None where no way was found.
        read_as: The name under which the bridge's attentions look for the cache, where it reaches them under another.
        limits: For each kind of sharing that is not possible, what was seen.
        costs: What is computed although nobody reads it, and what was seen.
        stops: Whether a pass can be told the last block that need run.
        lasting: False where NaN or infinity got in the way.
    """

    arguments: Mapping[str, Any]
    without_logits: Mapping[str, Any]
    cache_name: str | None = None
    read_as: str | None = None
    limits: Mapping[Sharing, str] = field(default_factory=dict)
    costs: Mapping[str, str] = field(default_factory=dict)
    stops: bool = True
    lasting: bool = True

    def renamed(self, model: Any) -> AbstractContextManager[None]:
        """A block in which the bridge's own attentions find the cache."""
        if self.cache_name is None or self.read_as is None:
            return nullcontext()
        return _renaming(model, self.cache_name, self.read_as)


_TRIALS: "WeakKeyDictionary[Any, Trial]" = WeakKeyDictionary()


def known_trial(model: HookedModel) -> Trial | None:
    """What was found before; None where the model was not tried yet."""
    return _TRIALS.get(model)


def forget_trial(model: HookedModel) -> None:
    """Have a model that has changed tried anew."""
    _TRIALS.pop(model, None)


def trial_of(model: HookedModel) -> Trial:
    """What the model takes, tried at the first call; hooks of the caller's do not see the tokens that are tried."""
    found = _TRIALS.get(model)
    if found is None:
        with torch.no_grad(), without_hooks(modules_of(model)):
            found = _Trier(model).trial()
        if found.lasting:
            _TRIALS[model] = found
    return found


class _Trier:
    """Runs the tokens."""

    def __init__(self, model: HookedModel) -> None:
        self._model = model
        self._original: Any = model.original_model  # type: ignore[attr-defined]
        # Of its own blocks, and not of a vision tower's: texts do not run there.
        self._names = [name for name in model.hook_dict if _RESIDUAL.fullmatch(name)]
        self._tolerance = tolerance_of(str(self._original.dtype).removeprefix("torch."))
        self._ids = torch.empty(0)
        self._output: Any = None

    def trial(self) -> Trial:
        if not self._names:
            raise ModelError(f"{type(self._original).__name__} has no hook blocks.0.hook_resid_post: it cannot be read")
        whole = self._first_finite()
        if whole is None:
            reason = "tokens that were tried gave NaN or infinity"
            return Trial({}, {}, limits=dict.fromkeys((Sharing.PACKED, Sharing.CACHED), reason), lasting=False)
        arguments, costs = self._quiet(whole)
        stops, not_narrow = self._narrow()
        costs |= not_narrow
        without_logits = dict(arguments)
        if "logits_to_keep" in arguments:
            # By index, and none of them: the unembedding reads all its weights even for one position.
            none = arguments | {"logits_to_keep": _NO_POSITIONS.to(self._ids.device)}
            if self._same(whole, lambda: self._residuals(self._ids, **none)) is None:
                without_logits = none
        cache_name, read_as, seen = self._cache(whole, without_logits)
        limits: dict[Sharing, str] = {}
        if cache_name is None:
            limits = dict.fromkeys((Sharing.PACKED, Sharing.CACHED), f"it does not continue a cache ({seen})")
        else:
            flaw = self._same(self._second_ending(without_logits), lambda: self._side_by_side(without_logits))
            if flaw is not None:
                limits = {Sharing.PACKED: f"it does not take positions and a mask of its own ({flaw})"}
        return Trial(arguments, without_logits, cache_name, read_as, limits, costs, stops)

    def _first_finite(self) -> Tensor | None:
        """Residuals of the first three tokens without NaN, which `_ids` then are."""
        vocabulary = int(self._model.cfg.d_vocab)
        for first in range(1, vocabulary, max(1, vocabulary // 7)):
            ids = torch.arange(first, first + 3) % vocabulary
            self._ids = ids[None].to(self._model.cfg.device)
            whole = self._whole()
            if bool(whole.isfinite().all()):
                return whole
        return None

    def _whole(self) -> Tensor:
        """Residuals of the tokens, without any argument that could be left out."""
        failures = []
        for arguments in ({}, {"output_attentions": False}):  # a bridge asks for patterns where nobody says not to
            try:
                return self._residuals(self._ids, **arguments)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # an architecture may refuse in any way
                failures.append(error)
        dtype = str(self._original.dtype).removeprefix("torch.")
        other = "" if dtype in ("float32", "float64") else f"load it with dtype='float32' instead of {dtype}, or "
        raise ModelError(
            f"TransformerLens cannot run {type(self._original).__name__} with the installed transformers "
            f"({type(failures[0]).__name__}: {failures[0]}): {other}try another release of either"
        ) from failures[0]

    def _quiet(self, whole: Tensor) -> tuple[dict[str, Any], dict[str, str]]:
        """Arguments that leave out what nobody reads, and those of them that do not."""
        wanted: dict[str, tuple[Any, str, Callable[[], bool]]] = {
            "output_attentions": (False, "attention patterns are kept", lambda: not _has_patterns(self._output)),
            "logits_to_keep": (1, "all logits are computed", lambda: _n_positions(self._output) <= 1),
            "use_cache": (False, "keys and values are kept", lambda: not _keeps(self._output)),
        }
        together = {name: value for name, (value, _, _) in wanted.items()}
        arguments, costs = {}, {}
        if self._same(whole, lambda: self._residuals(self._ids, **together)) is None:
            arguments = together
        else:  # each with those before it: Gemma 4 cuts its stream to one token where two of them meet
            for name, (value, cost, _) in wanted.items():
                chosen = {**arguments, name: value}
                seen = self._same(whole, lambda chosen=chosen: self._residuals(self._ids, **chosen))  # type: ignore[misc]
                if seen is None:
                    arguments = chosen
                else:
                    costs[name] = f"{cost}: {name}={value} does not do ({seen})"
            self._residuals(self._ids, **arguments)
        for name in arguments:
            value, cost, left_out = wanted[name]
            if not left_out():
                costs[name] = f"{cost}: {name}={value} has no effect"
        return arguments, costs

    def _narrow(self) -> tuple[bool, dict[str, str]]:
        """Whether a last layer can be named, and what of the bridge's own arguments has no effect."""
        ran: list[Any] = []
        handle = self._model.blocks[-1].register_forward_hook(lambda *_: ran.append(_))  # type: ignore[attr-defined]
        try:
            _, captured = self._model.run_with_cache(
                self._ids, return_type=None, return_cache_object=False, names_filter=self._names[:1], stop_at_layer=1
            )
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # an architecture may refuse in any way
            return False, {"stop_at_layer": f"all blocks run: stop_at_layer=1 does not do ({error})"}
        finally:
            handle.remove()
        costs = {}
        if ran and len(self._names) > 1:
            costs["stop_at_layer"] = "blocks behind the last needed one run: stop_at_layer=1 has no effect"
        if len(captured) > 2:  # a hook may have an alias
            costs["names_filter"] = f"{len(captured)} activations are kept where names_filter has one"
        return True, costs

    def _cache(self, whole: Tensor, arguments: dict[str, Any]) -> tuple[str | None, str | None, str]:
        """The name under which a cache goes in, the name under which attentions read it, and else what was seen."""
        native = native_parts(self._model)
        seen = []
        for name in caches.NAMES:
            ways: list[tuple[str | None, AbstractContextManager[None]]] = [(None, nullcontext())]
            ways += [(other, _renaming(self._model, name, other)) for other in caches.NAMES if other != name]
            if isinstance(native, NativeParts):
                ways.append((None, native.in_place()))
            for read_as, way in ways:
                with way:
                    flaw = self._same(whole[:, :, -1:], lambda name=name: self._continued(name, arguments))  # type: ignore[misc]
                if flaw is None:
                    return name, read_as, ""
                seen.append(f"{name}: {flaw}" if read_as is None else f"{name} read as {read_as}: {flaw}")
        return None, None, f"{seen[0]}, and {len(seen) - 1} other ways did not do either"

    def _continued(self, name: str, arguments: dict[str, Any]) -> Tensor:
        """Residuals of the last token, the others being in a cache."""
        cache = new_cache(self._original)
        chosen = {**arguments, "use_cache": True, name: cache}
        self._residuals(self._ids[:, :-1], **chosen)
        return self._residuals(self._ids[:, -1:], **chosen)

    def _second_ending(self, arguments: dict[str, Any]) -> Tensor:
        return self._residuals(self._ids[:, [0, 2]], **arguments)[:, :, -1:]

    def _side_by_side(self, arguments: dict[str, Any]) -> Tensor:
        """Residuals of the last token as the second of a text, beside another second token."""
        visible = torch.tensor([[True, False, False], [True, True, False], [True, False, True]])[None]
        positions = torch.tensor([[0, 1, 1]], device=self._ids.device)
        mask = additive(visible.to(self._ids.device), self._original.dtype)
        return self._residuals(self._ids, **arguments, position_ids=positions, attention_mask=mask)[:, :, -1:]

    def _residuals(self, ids: Tensor, **arguments: Any) -> Float[Tensor, "hook row pos d_model"]:
        handle = self._original.register_forward_hook(self._look_at)
        try:
            _, captured = self._model.run_with_cache(
                ids, return_type=None, return_cache_object=False, names_filter=self._names, **arguments
            )
        finally:
            handle.remove()
        return torch.stack([captured[name].cpu().double() for name in self._names])

    def _look_at(self, _module: Any, _args: Any, output: Any) -> None:
        self._output = output

    def _same(self, expected: Tensor, run: Callable[[], Tensor]) -> str | None:
        """What was seen instead of the expected residuals; None where it is they."""
        try:
            got = run()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # an architecture may refuse in any way
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if got.shape != expected.shape:
            return f"residuals of shape {tuple(got.shape)}, not {tuple(expected.shape)}"
        errors = (got - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
        worst = float(errors.max())
        return None if worst <= self._tolerance else f"residuals differ by {worst:.1e}"


def _n_positions(output: Any) -> int:
    """Positions that the logits, the first of a model's outputs with three axes, were computed for."""
    return next(
        (value.shape[1] for value in caches.values_of(output) if isinstance(value, Tensor) and value.ndim == 3), 0
    )


def _has_patterns(output: Any) -> bool:
    return any(
        isinstance(one, Tensor) and one.ndim == 4 and one.shape[-1] == one.shape[-2]
        for value in caches.values_of(output)
        if isinstance(value, tuple | list)
        for one in value
    )


def _keeps(output: Any) -> bool:
    return bool(caches.tokens_held(caches.first_cache(caches.values_of(output))))


def new_cache(original: Any) -> Any:
    """An empty cache that fits a transformers model."""
    from transformers import DynamicCache

    return DynamicCache(config=original.config)


def additive(visible: Bool[Tensor, "row pos key"], dtype: torch.dtype) -> Float[Tensor, "row 1 pos key"]:
    """A mask as transformers adds it to attention scores."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def mend(model: HookedModel) -> None:
    """Lets the attentions of a bridge find the cache for good, where they look for it under another name.

    For a bridge that this package makes: its own `generate` and `hf_generate` are then right, too.
    """
    trial = trial_of(model)
    if trial.cache_name is not None and trial.read_as is not None:
        _rename(model, trial.cache_name, trial.read_as)


class _Renamed:
    """A hook that hands an argument on under another name; a class, so that a model with it can be pickled."""

    def __init__(self, name: str, read_as: str) -> None:
        self._name, self._read_as = name, read_as

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if self._name not in kwargs or "forward" in vars(module):  # the wrapped model's own forward has its own name
            return None
        kwargs = dict(kwargs)
        kwargs[self._read_as] = kwargs.pop(self._name)
        return args, kwargs


def _rename(model: Any, name: str, read_as: str) -> list[Any]:
    hook = _Renamed(name, read_as)
    return [attention.register_forward_pre_hook(hook, with_kwargs=True) for attention in attentions(model)]


@contextmanager
def _renaming(model: Any, name: str, read_as: str) -> Iterator[None]:
    """The attentions of a bridge are handed an argument under the name that they look for."""
    handles = _rename(model, name, read_as)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
