"""The transformers model that a hooked model was made from, kept to compare with: its residuals, block by block.

Its decoder layers are found by running it: the list of modules of which each takes what the one before it gave. It is a
twin of the module tree that shares every parameter, so that making a hooked model, which rewires modules, leaves it as
it was. It raises `NoReferenceError` where there is nothing to compare with.
"""

import copy
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tl_persona.backends.local.observers import evaluating, without_hooks
from tl_persona.models.configs import lengths_named
from tl_persona.models.offload import input_device, is_offloaded

_DISCOVERY = 3
"""Tokens that are enough to see which modules follow one another."""


class NoReferenceError(Exception):
    """The transformers model cannot be compared with; the text says why."""


class _NoLogitsError(Exception):
    """A pass has come as far as it is needed."""


class _WroteWeightsError(Exception):
    """A pass was about to write into a parameter."""


class _Seen(dict[Any, tuple[Tensor, Tensor]]):
    """What modules took and gave the last time that they ran, how often they did, and at how many positions."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[Any] = Counter()
        self.n_positions: dict[Any, int] = {}


class Reference:
    """A transformers model to compare with.

    Args:
        hf_model: The model; it is neither changed nor run.
        own_weights: Whether it gets a copy of the weights, for a model that writes into them.
        twin: Whether it gets a module tree of its own; without, it is the model itself, which then runs.

    Raises:
        NoReferenceError: Its module tree cannot be copied.
    """

    def __init__(self, hf_model: Any, *, own_weights: bool = False, twin: bool = True) -> None:
        self.name = type(hf_model).__name__
        self.owns_weights = own_weights
        # Modes are of modules, which are its own.
        self.model = twin_of(hf_model, own_weights=own_weights).eval() if twin else hf_model
        self.lengths = tuple(sorted(set(lengths_named(hf_model.config.to_dict()))))
        self._layers: Sequence[torch.nn.Module] = ()
        self._path, self._width = "", 0

    @property
    def vocabulary(self) -> int:
        """Rows of its embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that its configuration gives a meaning: of an image, of padding."""
        return frozenset(_special_ids(self.model.config.to_dict()))

    def writes_weights(self) -> bool:
        """Whether it writes into its parameters as it runs; found out without letting it.

        Raises:
            NoReferenceError: It cannot be run on token ids alone, or its decoder layers cannot be told.
        """
        try:
            self._find_layers()
        except _WroteWeightsError:
            return True
        return False

    def decoder_layers(self) -> tuple[str, int]:
        """Where in the module tree the list of decoder layers is, and the width of the stream between them.

        Raises:
            NoReferenceError: It cannot be run on token ids alone, its decoder layers cannot be told, or it writes into
                its weights.
        """
        if not self._layers:
            try:
                self._find_layers()
            except _WroteWeightsError as error:
                raise NoReferenceError(f"{self.name} writes into its weights as it runs") from error
        return self._path, self._width

    def residuals(self, ids: Int[Tensor, "row pos"], positions: Sequence[int]) -> Float[Tensor, "layer chosen d_model"]:
        """What the layers gave for the first row, at these positions, in float64 on the CPU.

        Raises:
            NoReferenceError: It cannot be run on token ids alone, its decoder layers cannot be told, or it writes into
                its weights.
        """
        self.decoder_layers()
        try:
            marked = [(layer, number) for number, layer in enumerate(self._layers)]
            with self._watching(marked, torch.tensor(list(positions))) as seen:
                self.run(ids)
        except _WroteWeightsError as error:
            raise NoReferenceError(f"{self.name} writes into its weights as it runs") from error
        return torch.stack([seen[number][1] for number in range(len(self._layers))])

    def values_inside(
        self, ids: Int[Tensor, "row pos"], positions: Sequence[int]
    ) -> dict[int | None, list[Float[Tensor, "pos d_model"]]]:
        """Whatever passes between modules and is as wide as the stream: by decoder layer, None for those outside.

        Raises:
            NoReferenceError: As `residuals`.
        """
        width = self.residuals(ids[:, :1], [0]).shape[-1]
        inside = {id(part): number for number, layer in enumerate(self._layers) for part in layer.modules()}
        index = torch.tensor(list(positions))
        found: dict[int | None, list[Tensor]] = {}

        def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            given = output if isinstance(output, tuple | list) else (output,)
            for value in (*args, *kwargs.values(), *given):
                if isinstance(value, Tensor) and value.is_floating_point() and value.numel() == ids.shape[1] * width:
                    tokens = value.detach().reshape(ids.shape[1], width)
                    picked = tokens[index.to(tokens.device)].cpu().double()
                    found.setdefault(inside.get(id(module)), []).append(picked)

        handles = [module.register_forward_hook(look, with_kwargs=True) for module in self.model.modules()]
        try:
            self.run(ids)
        except _WroteWeightsError as error:
            raise NoReferenceError(f"{self.name} writes into its weights as it runs") from error
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _find_layers(self) -> None:
        lists = [
            (path, module)
            for path, module in self.model.named_modules()
            if isinstance(module, torch.nn.ModuleList) and len(module)
        ]
        marked = [(layer, (path, number)) for path, module in lists for number, layer in enumerate(module)]
        with self._watching(marked, torch.arange(_DISCOVERY)) as seen:
            self.run(torch.arange(1, 1 + _DISCOVERY)[None] % self.vocabulary)
        found = [
            (path, module)
            for path, module in lists
            if _is_stream([seen.get((path, number)) for number in range(len(module))])
        ]
        if not found:
            raise NoReferenceError(f"the decoder layers of {self.name} cannot be told by running it")
        self._path, layers = max(found, key=lambda each: len(each[1]))
        n_positions = seen.n_positions[self._path, 0]
        if n_positions != _DISCOVERY:
            raise NoReferenceError(
                f"layers of {self.name} see {n_positions} positions of a text of {_DISCOVERY} tokens ({self._path}): "
                "which of them is a token's cannot be told"
            )
        again = [number for number in range(len(layers)) if seen.times[self._path, number] > 1]
        if again:
            raise NoReferenceError(
                f"layers of {self.name} run more than once in a pass ({self._path}: {', '.join(map(str, again))}), so "
                "that none has one residual"
            )
        self._layers, self._width = list(layers), int(seen[self._path, 0][1].shape[-1])

    def run(self, ids: Int[Tensor, "row pos"]) -> None:
        """Runs it up to its logits, nobody's hooks in the way but those that this package puts on.

        Raises:
            NoReferenceError: It cannot be run on token ids alone.
        """
        device = input_device(self.model)
        try:
            # What is written into weights that are brought for a layer is gone after it.
            guard = nullcontext() if self.owns_weights or is_offloaded(self.model) else _Guard(self.model)
            modules = list(self.model.modules())
            with torch.no_grad(), evaluating(modules), without_hooks(modules), self._without_logits(), guard:
                self.model(ids.to(device), use_cache=False)
        except _NoLogitsError:
            return
        except (MemoryError, torch.OutOfMemoryError, _WroteWeightsError):
            raise
        except Exception as error:  # an architecture may refuse in any way
            raise NoReferenceError(
                f"{self.name} does not run on token ids alone ({type(error).__name__}: {error})"
            ) from error

    @contextmanager
    def _without_logits(self) -> Iterator[None]:
        """Ends a pass where logits would be computed: nobody looks at them, and they cost as much as some layers."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        if not isinstance(head, torch.nn.Module) or head is self.model.get_input_embeddings():
            yield
            return

        def stop(*_: Any) -> None:
            raise _NoLogitsError

        handle = head.register_forward_pre_hook(stop)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _watching(
        self, marked: Sequence[tuple[torch.nn.Module, Any]], positions: Int[Tensor, "pos"]
    ) -> Iterator["_Seen"]:
        """What marked modules take and give for the first row, by mark; as it is then, as it may be written into."""
        seen = _Seen()
        handles = []
        for module, mark in marked:

            def look(_module: Any, args: Any, kwargs: Any, output: Any, mark: Any = mark) -> None:
                taken = first_activation((*args, *kwargs.values()))
                given = output[0] if isinstance(output, tuple | list) and output else output
                if taken is not None and is_activation(given) and taken.shape == given.shape:
                    seen.times[mark] += 1
                    seen.n_positions[mark] = given.shape[1]
                    seen[mark] = _picked(taken, positions), _picked(given, positions)

            handles.append(module.register_forward_hook(look, with_kwargs=True))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def reference_to(hf_model: Any) -> tuple[Reference | None, str]:
    """What a model can be compared with, and else why there is nothing; a copy where it writes into its weights."""
    try:
        reference = Reference(hf_model)
        if reference.writes_weights():
            logging.getLogger("tl_persona").warning(
                "%s writes into its weights as it runs: it is run on a copy of them, which takes as much memory again",
                reference.name,
            )
            reference = Reference(hf_model, own_weights=True)
    except NoReferenceError as error:
        return None, str(error)
    return reference, ""


def twin_of(hf_model: Any, *, own_weights: bool = False) -> Any:
    """A copy of a model's module tree that shares every parameter and buffer, unless it is to have its own.

    Raises:
        NoReferenceError: It cannot be copied.
    """
    shared = {} if own_weights else {id(tensor): tensor for tensor in (*hf_model.parameters(), *hf_model.buffers())}
    try:
        return copy.deepcopy(hf_model, shared)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever somebody's modules hold
        raise NoReferenceError(
            f"the modules of {type(hf_model).__name__} cannot be copied ({type(error).__name__}: {error})"
        ) from error


class _Guard(TorchDispatchMode):
    """Stops a pass before it writes into a parameter."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages = {storage for parameter in model.parameters() for storage in _storages(parameter)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written and isinstance(value, Tensor) and not self._storages.isdisjoint(_storages(value)):
                    raise _WroteWeightsError
        return func(*args, **(kwargs or {}))


def _storages(tensor: Tensor) -> Iterator[int]:
    """The storage of a tensor, as torch knows it; none for a tensor that has none of its own."""
    try:
        yield tensor.untyped_storage()._cdata
    except RuntimeError:
        return


def is_activation(value: Any) -> bool:
    """Whether a value may be a stream of shape (batch, pos, d_model)."""
    return isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point()


def first_activation(values: Iterable[Any]) -> Tensor | None:
    """The first value that may be a stream, of what a module takes."""
    return next((value for value in values if is_activation(value)), None)


def _picked(activation: Tensor, positions: Int[Tensor, "pos"]) -> Tensor:
    return activation.detach()[0, positions.to(activation.device)].cpu().double()


def _is_stream(seen: Sequence[tuple[Tensor, Tensor] | None]) -> bool:
    """Whether every one was run, and nearly every one took what the one before it gave."""
    ran = [pair for pair in seen if pair is not None]
    follows = [_goes_on(above[1], below[0]) for above, below in pairwise(ran)]
    return len(ran) == len(seen) and sum(follows) >= 0.8 * len(follows)


def _goes_on(given: Tensor, taken: Tensor) -> bool:
    """Whether one stream is the other, or a multiple of it: RWKV halves it every few layers."""
    if torch.equal(given, taken):
        return True
    ratio = taken.norm() / given.norm().clamp_min(torch.finfo(given.dtype).tiny)
    return torch.allclose(given * ratio, taken, rtol=1e-6, atol=0)


def _special_ids(settings: Any) -> Iterator[int]:
    if not isinstance(settings, dict):
        return
    for name, value in settings.items():
        if str(name).endswith(("_token_id", "_token_index")):
            yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int))
        yield from _special_ids(value)
