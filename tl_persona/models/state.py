"""What a model is at one moment: a sampled digest of its values, and all else that shows whether it has changed.

Nothing is told by the address of memory, and no weight is copied: a quantized tensor can have neither, or lose what it
is. Where a tensor is a class of its own, it is read by its parts and the name of its class.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

from tl_persona.models.offload import kept_elsewhere

_OF_TORCH = frozenset(vars(torch.nn.Module()))
"""What every module has; its tensors, parts and hooks are looked at by themselves."""

_OF_LIBRARIES = ("torch.", "transformers.", "transformer_lens.")
"""Whose modules keep in private attributes how they were loaded and what they did last, and not what they compute."""

_OF_HOOK_POINTS = frozenset({"fwd_hooks", "bwd_hooks", "ctx", "context_level", "is_caching"})
"""What TransformerLens keeps of hooks and of the last pass."""

_HOOK_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DEPTH = 4

_NOT_THE_FUNCTION = frozenset({"name_or_path", "gradient_checkpointing", "hf_device_map"})
"""Public settings of a transformers model that say where it came from or lies, and not what it computes."""


class ModelState(NamedTuple):
    """What a model is made of, and its values; two are equal where nothing shows a difference.

    Attributes:
        parts: Modules and parameters, by name and identity.
        hooks: Hooks on modules, by name and identity.
        settings: Plain attributes of modules (adapters, scales, epsilons), by module and name.
        versions: How often each tensor was written in place, as torch counts it.
        values: `values_digest`.
        buffers: The same of buffers that are not saved with a model, such as frequencies of rotary positions; a model
            may make them anew as it runs.
    """

    parts: frozenset[tuple[str, int]]
    hooks: frozenset[tuple[str, int]]
    settings: frozenset[tuple[str, str, Any]]
    versions: tuple[int, ...]
    values: str
    buffers: str

    def changes(self, now: "ModelState") -> list[str]:
        """What is different, hooks aside, for people; at most a few examples of each kind."""
        lines = []
        if self.parts != now.parts:
            lines.append(f"parts ({_some({name for name, _ in self.parts ^ now.parts})})")
        if self.settings != now.settings:
            lines.append(f"settings ({_some({f'{name}.{key}' for name, key, _ in self.settings ^ now.settings})})")
        if self.values != now.values or (self.parts == now.parts and self.versions != now.versions):
            lines.append("values")
        if self.buffers != now.buffers:
            lines.append("buffers")
        return lines


def state_of(model: torch.nn.Module) -> ModelState:
    """The state of a model now. It takes some 30 ms for 135 million parameters, and no memory worth the name."""
    modules = list(model.named_modules())
    parameters = list(model.named_parameters(remove_duplicate=False))
    saved = _named_tensors(model)
    kept = {id(tensor) for _, tensor in saved}
    unsaved = [(name, buffer) for name, buffer in model.named_buffers() if id(buffer) not in kept]
    hooks = [(name, id(hook)) for name, module in modules for _, hook in hooks_of(module)]
    return ModelState(
        parts=frozenset([(name, id(part)) for name, part in (*modules, *parameters)]),
        hooks=frozenset(hooks),
        settings=frozenset(_settings(modules)),
        versions=tuple(_version(tensor) for _, tensor in parameters),
        values=_digest(saved),
        buffers=_digest(unsaved),
    )


def hooks_of(module: torch.nn.Module) -> Iterator[tuple[int, Any]]:
    """All hooks of one module, each with the key that torch gave it."""
    for kind in _HOOK_KINDS:
        yield from getattr(module, kind).items()


def values_digest(model: torch.nn.Module) -> str:
    """A digest, 16 hex digits, of a model's parameters and buffers by name, dtype, shape and sampled values.

    Of a vector every element is read. Of a matrix n x m, or of a stack of them taken as one, max(n, m) places along a
    diagonal that wraps are, so that every row and every column has one: a neuron, a head or an embedding that is
    zeroed shows. A change of single numbers may be missed.
    """
    return _digest(_named_tensors(model), kept_elsewhere(model))


def _digest(tensors: Iterable[tuple[str, Tensor]], kept: Mapping[str, Tensor] = MappingProxyType({})) -> str:
    """Of tensors by their names, each once; of some it is the values of others that are kept for them."""
    hasher = hashlib.sha256()
    seen: dict[int, int] = {}
    pieces: list[Tensor] = []
    for name, tensor in tensors:
        if id(tensor) in seen:
            hasher.update(f"{name}\0{seen[id(tensor)]}\0".encode())
            continue
        seen[id(tensor)] = len(seen)
        for label, part in parts_of_tensor(name, kept.get(name, tensor)):
            hasher.update(f"{label}\0{part.dtype}\0{tuple(part.shape)}\0".encode())
            pieces.append(_bytes_of(_sampled(part)))
    for piece in _gathered(pieces):
        hasher.update(piece.numpy().tobytes())
    return hasher.hexdigest()[:16]


def digest_beside(model: torch.nn.Module, other: torch.nn.Module) -> str:
    """The digest of those parameters of a model that another does not share with it."""
    shared = {id(parameter) for parameter in other.parameters()}
    return _digest((name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in shared)


def identity_digest(model: torch.nn.Module, kind: str = "values") -> str | None:
    """As `values_digest`, with the settings that decide what is computed: numbers, flags and names of adapters.

    It is the same in another process, and for another model object made alike.

    Args:
        model: The model.
        kind: What the digest is comparable within.

    Returns:
        `<kind>:<hex>`; None where some weights are elsewhere, and nobody says where.
    """
    elsewhere = {name for name, tensor in _named_tensors(model) if tensor.device.type == "meta"}
    if not elsewhere <= kept_elsewhere(model).keys():
        return None
    hasher = hashlib.sha256(values_digest(model).encode())
    for name, module in model.named_modules():
        for key, value in sorted(_plain_attributes(module), key=lambda item: item[0]):
            plain = _frozen(value, by_identity=False)
            if plain is not None and key not in _NOT_THE_FUNCTION:
                hasher.update(f"{name}\0{key}\0{plain!r}\0".encode("utf-8", "surrogatepass"))
    return f"{kind}:{hasher.hexdigest()[:16]}"


def _named_tensors(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    # Past a model's own method, which may rename or rearrange; a quantized module writes its parts.
    state = torch.nn.Module.state_dict(model, keep_vars=True)
    return [(name, value) for name, value in state.items() if isinstance(value, Tensor)]


def parts_of_tensor(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a tensor is made of."""
    inner = getattr(tensor, "__tensor_flatten__", None)
    if type(tensor) in (Tensor, torch.nn.Parameter) or inner is None:
        yield name, tensor.detach()
        return
    names, context = inner()
    for part in names:
        yield from parts_of_tensor(f"{name}.{type(tensor).__qualname__}({context}).{part}", getattr(tensor, part))


def _sampled(tensor: Tensor) -> Shaped[Tensor, "places"]:
    if tensor.ndim < 2 or tensor.numel() == 0:
        return tensor.reshape(-1)
    if tensor.ndim > 2:
        if not tensor.is_contiguous():
            return torch.cat([_sampled(part) for part in tensor])
        tensor = tensor.view(-1, tensor.shape[-1])
    return tensor[_diagonal(*tensor.shape, tensor.device)]


@lru_cache(maxsize=64)
def _diagonal(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    places = torch.arange(max(n, m), device=device)
    return places % n, places % m


def _bytes_of(values: Shaped[Tensor, "places"]) -> UInt8[Tensor, "bytes"]:
    if values.device.type == "meta":  # held elsewhere, as by accelerate: its name and shape are all there is
        return torch.empty(0, dtype=torch.uint8)
    return values.contiguous().view(torch.uint8)


def _gathered(pieces: Iterable[UInt8[Tensor, "_"]]) -> Iterator[UInt8[Tensor, "_"]]:
    """The pieces on the CPU, in order, with one transfer for those that lie on one device in turn."""
    run: list[Tensor] = []
    for piece in pieces:
        if run and run[0].device != piece.device:
            yield torch.cat(run).cpu()
            run = []
        run.append(piece)
    if run:
        yield torch.cat(run).cpu()


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except (RuntimeError, AttributeError):  # made in inference mode, which does not count
        return -1


def _settings(modules: Iterable[tuple[str, torch.nn.Module]]) -> Iterator[tuple[str, str, Any]]:
    configs: dict[int, Any] = {}
    for name, module in modules:
        for key, value in _plain_attributes(module):
            if not name and key != "forward" and callable(value) and not isinstance(value, torch.nn.Module):
                continue  # somebody watches a method of the whole model, which its passes do not go through
            if hasattr(value, "to_diff_dict"):  # a transformers configuration, which many modules have
                configs[id(value)] = value
            yield name, key, _frozen(value)
    for number, config in enumerate(configs.values()):
        yield from ((f"config {number}", key, _frozen(value)) for key, value in vars(config).items())


def _plain_attributes(module: torch.nn.Module) -> list[tuple[str, Any]]:
    library = type(module).__module__.startswith(_OF_LIBRARIES)
    return [
        (key, value)
        for key, value in vars(module).items()
        if key not in _OF_TORCH and key not in _OF_HOOK_POINTS and not (library and key.startswith("_"))
    ]


def _frozen(value: Any, depth: int = _DEPTH, *, by_identity: bool = True) -> Any:
    """A value that can be compared: what is plain as it is, all else by identity, or None."""
    if value is None or isinstance(value, bool | int | float | str):
        return type(value).__name__, value if value == value else "nan"
    if isinstance(value, Tensor):  # one number is a setting; more are what was seen last
        return value.item() if value.numel() == 1 and value.device.type != "meta" else None
    if depth and isinstance(value, list | tuple):
        return tuple(_frozen(item, depth - 1, by_identity=by_identity) for item in value)
    if depth and isinstance(value, set | frozenset):
        return tuple(sorted(map(repr, (_frozen(item, depth - 1, by_identity=by_identity) for item in value))))
    if depth and isinstance(value, dict):
        return tuple((repr(key), _frozen(item, depth - 1, by_identity=by_identity)) for key, item in value.items())
    return id(value) if by_identity else None


def _some(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
