"""A transformers model as it is, with forward hooks on its decoder layers under TransformerLens's hook names.

For whatever TransformerLens has no form of, or another function: nothing is rewritten, and the decoder layers are found
by running three tokens (see `reference`). The residual before and after each of them can be read and edited, and what
their parts add to it (see `parts`); hooks lie on the model's own modules and only while somebody has put them there, so
a caller's model is left as it was.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from tl_persona.backends.local.parts import BlockParts, Part, parts_of
from tl_persona.backends.local.reference import NoReferenceError, Reference, is_activation
from tl_persona.errors import HookError, ModelError
from tl_persona.models.configs import longest_text_named
from tl_persona.models.offload import input_device

NamesFilter: TypeAlias = str | Sequence[str] | Callable[[str], bool] | None


class SiteHook(NamedTuple):
    """A hook of somebody's, as TransformerLens keeps one.

    Attributes:
        hook: Takes it off.
        user_hook: What was given.
        is_permanent: Whether `reset_hooks` leaves it.
    """

    hook: Any
    user_hook: Callable[..., Tensor | None]
    is_permanent: bool


class StreamSite:
    """A place in the residual stream, or what is added to it; what a HookPoint is in TransformerLens.

    Args:
        name: The hook's name.
        module: A decoder layer, or a module of one.
        part: Which side of it, and with which factor.
        is_written_into: Whether the model overwrites the value later in a pass.
    """

    def __init__(self, name: str, module: torch.nn.Module, part: Part, *, is_written_into: bool = False) -> None:
        self.name = name
        self.fwd_hooks: list[SiteHook] = []
        self.is_written_into = is_written_into
        self.is_felt = not name.endswith("hook_resid_mid")
        """Whether an edit reaches the stream; what the second part of a block reads is a copy of it."""
        self._module, self._part = module, part

    def add(self, hook: Callable[..., Tensor | None], *, is_permanent: bool = False) -> SiteHook:
        """Has a function see the value, or change it: `hook(activation, hook=site)` gives a tensor, or None."""
        # With the function's own name, module and marks: who looks at a model's hooks sees whose it is.
        if self._part.before:
            pre = functools.wraps(hook)(lambda _module, args, kwargs: self._taken(hook, args, kwargs))
            handle = self._module.register_forward_pre_hook(pre, with_kwargs=True)
        else:
            post = functools.wraps(hook)(lambda _module, _args, output: self._given(hook, output))
            handle = self._module.register_forward_hook(post)
        added = SiteHook(handle, hook, is_permanent)
        self.fwd_hooks.append(added)
        return added

    def _taken(self, hook: Callable[..., Tensor | None], args: Any, kwargs: Any) -> Any:
        place = next((place for place, value in enumerate(args) if is_activation(value)), None)
        if place is not None:
            edited = self._seen(hook, args[place])
            return None if edited is None else ((*args[:place], edited, *args[place + 1 :]), kwargs)
        name = next((name for name, value in kwargs.items() if is_activation(value)), None)
        if name is None:
            raise HookError(f"{type(self._module).__name__} was run without a stream of shape (batch, pos, d_model)")
        edited = self._seen(hook, kwargs[name])
        return None if edited is None else (args, {**kwargs, name: edited})

    def _given(self, hook: Callable[..., Tensor | None], output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple | list) and output else output
        if not is_activation(stream):
            raise HookError(f"{type(self._module).__name__} gave no stream of shape (batch, pos, d_model)")
        edited = self._seen(hook, stream)
        if edited is None:
            return None
        return edited if stream is output else type(output)((edited, *output[1:]))

    def _seen(self, hook: Callable[..., Tensor | None], value: Tensor) -> Tensor | None:
        factor = self._part.factor
        edited = hook(value if factor == 1 else factor * value, hook=self)
        if edited is not None and not self.is_felt:
            raise HookError(
                f"an edit at {self.name} never reaches the stream: choose hook_resid_pre, hook_resid_post or "
                "hook_attn_out"
            )
        return edited if edited is None or factor == 1 else edited / factor


class _StopError(Exception):
    """No block that is needed is left."""


class TransformersModel(torch.nn.Module):
    """A transformers model under TransformerLens's hook names; satisfies `models.facts.HookedModel`.

    Its hooks are `blocks.{i}.hook_resid_pre` and `blocks.{i}.hook_resid_post`, and where two modules give what a block
    adds, `hook_attn_out` and `hook_mlp_out`; `hook_resid_mid` is there to be read where a module takes it.

    Args:
        hf_model: The model, which is not changed.
        layers: Its decoder layers.
        d_model: Width of the stream between them.
        tokenizer: The checkpoint's own.
        parts: What each layer's own modules add.
    """

    def __init__(
        self,
        hf_model: Any,
        layers: Sequence[torch.nn.Module],
        d_model: int,
        tokenizer: Any,
        parts: Sequence[BlockParts],
    ) -> None:
        super().__init__()
        self.original_model = hf_model
        self.tokenizer = tokenizer
        self.training = False
        parameter = next(hf_model.parameters())
        self.cfg = SimpleNamespace(
            n_layers=len(layers),
            d_model=d_model,
            d_vocab=int(hf_model.get_input_embeddings().weight.shape[0]),
            n_ctx=longest_text_named(hf_model.config.to_dict()),
            device=input_device(hf_model),
            dtype=parameter.dtype,
            model_name=str(getattr(hf_model.config, "_name_or_path", "") or type(hf_model).__name__),
        )
        self._sites, self._layers = _sites(layers, parts), tuple(layers)

    @property
    def blocks(self) -> Sequence[torch.nn.Module]:
        """The decoder layers."""
        return self._layers

    @property
    def hook_dict(self) -> Mapping[str, StreamSite]:
        """The sites by hook name."""
        return self._sites

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the transformers model has it."""
        return self.original_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the transformers model has it; with whatever hooks are on."""
        return self.original_model.generate(*args, **kwargs)

    def add_hook(
        self, name: str | Callable[[str], bool], hook: Callable[..., Tensor | None], *, is_permanent: bool = False
    ) -> None:
        """Puts a function on a hook, or on all whose name a function chooses.

        Raises:
            HookError: There is no such hook.
        """
        for site in self._chosen(name):
            site.add(hook, is_permanent=is_permanent)

    def reset_hooks(self, including_permanent: bool = False) -> None:
        """Takes off what `add_hook` put on."""
        for site in self._sites.values():
            for each in [each for each in site.fwd_hooks if including_permanent or not each.is_permanent]:
                each.hook.remove()
                site.fwd_hooks.remove(each)

    @contextmanager
    def hooks(
        self, fwd_hooks: Iterable[tuple[str | Callable[[str], bool], Callable[..., Tensor | None]]] = ()
    ) -> Iterator["TransformersModel"]:
        """Has functions on hooks while the block runs.

        Raises:
            HookError: There is no such hook.
        """
        with ExitStack() as stack:
            for name, hook in fwd_hooks:
                for site in self._chosen(name):
                    added = site.add(hook)
                    stack.callback(site.fwd_hooks.remove, added)
                    stack.callback(added.hook.remove)
            yield self

    def run_with_cache(
        self,
        ids: Tensor,
        *,
        names_filter: NamesFilter = None,
        stop_at_layer: int | None = None,
        return_type: str | None = "logits",
        return_cache_object: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Runs the model and keeps what passes its hooks.

        Args:
            ids: Token ids, shape (batch, pos).
            names_filter: The hooks whose activations are kept: names, or a function of a name; None keeps all.
            stop_at_layer: The first block that does not run; None runs the whole model.
            return_type: `"logits"`, or None.
            return_cache_object: Not known here; what is kept is a dict.
            **kwargs: For the transformers model.

        Returns:
            Logits of shape (batch, pos, vocabulary), None where they were not asked for or a block stopped the run; and
            activations of shape (batch, pos, d_model) by hook name.

        Raises:
            HookError: There is no such hook.
        """
        del return_cache_object
        kept: dict[str, Tensor] = {}

        def keep(activation: Tensor, hook: StreamSite) -> None:
            kept[hook.name] = activation.clone() if hook.is_written_into else activation

        def stop(*_: Any) -> None:
            raise _StopError

        stops = stop_at_layer is not None and stop_at_layer < len(self._layers)
        chosen = [(name, keep) for name in self._names(names_filter)]
        with self.hooks(chosen), ExitStack() as stack:
            if stops:
                stack.callback(self._layers[stop_at_layer or 0].register_forward_pre_hook(stop, prepend=True).remove)
            try:
                output = self.original_model(ids.to(self.cfg.device), **kwargs)
            except _StopError:
                return None, kept
        return (None if return_type is None else output.logits), kept

    def _names(self, names_filter: NamesFilter) -> list[str]:
        if names_filter is None:
            return list(self._sites)
        if isinstance(names_filter, str):
            return [names_filter]
        return [name for name in self._sites if names_filter(name)] if callable(names_filter) else list(names_filter)

    def _chosen(self, name: str | Callable[[str], bool]) -> list[StreamSite]:
        if callable(name):
            return [site for each, site in self._sites.items() if name(each)]
        if name not in self._sites:
            has = dict.fromkeys(each.rpartition("hook_")[2] for each in self._sites)
            raise HookError(f"there is no hook {name!r} on this transformers model: it has {', '.join(has)}")
        return [self._sites[name]]


def plain_model(hf_model: Any, tokenizer: Any, *, found_on: Reference | None = None) -> TransformersModel:
    """A transformers model itself, under TransformerLens's hook names.

    Args:
        hf_model: The model. One that was compiled is taken as it was before: it would not see the hooks.
        tokenizer: The checkpoint's.
        found_on: A reference made of this model, where there is one.

    Raises:
        ModelError: Its decoder layers cannot be told, or it does not run on token ids alone.
    """
    hf_model = uncompiled(hf_model)
    reference = found_on or reference_on(hf_model)
    try:
        (path, width), parts = reference.decoder_layers(), parts_of(reference)
    except NoReferenceError as error:
        raise _unreadable(hf_model, error) from error
    return TransformersModel(hf_model, list(hf_model.get_submodule(path)), width, tokenizer, parts)


def uncompiled(hf_model: Any) -> Any:
    """The model that `torch.compile` was given: what it gives back ignores hooks that come later."""
    return getattr(hf_model, "_orig_mod", hf_model)


def reference_on(hf_model: Any) -> Reference:
    """A reference that runs the model itself, or a copy where that writes into its weights.

    Raises:
        ModelError: Its decoder layers cannot be told, or it does not run on token ids alone.
    """
    try:
        reference = Reference(hf_model, twin=False)
        return Reference(hf_model, own_weights=True) if reference.writes_weights() else reference
    except NoReferenceError as error:
        raise _unreadable(hf_model, error) from error


def _unreadable(hf_model: Any, error: NoReferenceError) -> ModelError:
    return ModelError(f"{type(hf_model).__name__} cannot be read as plain transformers: {error}")


def _sites(layers: Sequence[torch.nn.Module], parts: Sequence[BlockParts]) -> dict[str, StreamSite]:
    sites = {}
    for number, (layer, block) in enumerate(zip(layers, parts, strict=True)):
        places = {"hook_resid_pre": Part("", True), **block.parts, "hook_resid_post": Part("", False)}
        for hook, part in places.items():
            name, module = f"blocks.{number}.{hook}", layer.get_submodule(part.module)
            sites[name] = StreamSite(name, module, part, is_written_into=hook in block.written_into)
    return sites
