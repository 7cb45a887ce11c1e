"""The modules that take part in a pass, and whether somebody looks into, or changes, what they compute.

TransformerLens and transformers leave hooks of their own behind, which only look on; all others are somebody's.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tl_persona.models.facts import intervention_of
from tl_persona.models.state import hooks_of
from tl_persona.provenance import UNKNOWN

LOOKING_ON = (
    "transformers.utils.output_capturing",
    "transformer_lens.model_bridge.generalized_components.block",
    "transformer_lens.model_bridge.component_setup",  # hands a layer's input and output on to the hooks of its MLP
    "tl_persona.backends.local.trial",  # hands an argument on under the name that is looked for
    "tl_persona.backends.local.reference",
    "tl_persona.backends.local.parts",
)


def modules_of(model: Any) -> list[torch.nn.Module]:
    """Every module that takes part: a bridge's original model can be in training mode when the bridge is not."""
    roots = (model, getattr(model, "original_model", None))
    return list({module: None for root in roots if root is not None for module in root.modules()})


@contextmanager
def evaluating(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Dropout off while the model runs, and every module as it was after."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def is_observed(modules: Iterable[torch.nn.Module]) -> bool:
    """Whether any of these has a hook of somebody's."""
    return any(_is_somebodys(module, key, hook) for module in modules for key, hook in hooks_of(module))


def _is_somebodys(module: torch.nn.Module, key: int, hook: Any) -> bool:
    return not _only_looks_on(_users_hooks(module).get(key) or hook)


def _users_hooks(module: torch.nn.Module) -> dict[int, Any]:
    """What TransformerLens was given to wrap, by the keys of the hooks that it put on."""
    return {handle.hook.id: handle.user_hook for handle in getattr(module, "fwd_hooks", ())}


def interventions_on(modules: Iterable[torch.nn.Module]) -> str:
    """Which edits a model's hooks make: a digest of ours, empty without any, `unknown` where others' hooks are on.

    Hooks of ours that only look, as monitors do, count for nothing; nor do backward hooks.
    """
    found: list[tuple[str, str]] = []
    for module in dict.fromkeys(modules):
        users = _users_hooks(module)
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            for key, hook in getattr(module, kind).items():
                given = users.get(key) or hook
                edit = intervention_of(given)
                if edit is not None:
                    found.append(edit)
                elif not _only_looks_on(given) and not _is_ours(given):
                    return UNKNOWN
    if not found:
        return ""
    # In the order in which they act at one hook; hooks by name, as modules come in another order in another class.
    text = "\n".join(f"{name} {digest}" for name, digest in sorted(found, key=lambda edit: edit[0]))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_ours(hook: Any) -> bool:
    return str(getattr(hook, "__module__", None)).startswith("tl_persona.")


@contextmanager
def without_hooks(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Somebody's forward hooks are away while the block runs, and as they were after."""
    taken: list[tuple[Any, OrderedDict[int, Any]]] = []
    try:
        for module in dict.fromkeys(modules):
            users = _users_hooks(module)
            for kind in ("_forward_hooks", "_forward_pre_hooks"):
                hooks: Any = getattr(module, kind)
                away = OrderedDict(
                    (key, hook) for key, hook in hooks.items() if not _only_looks_on(users.get(key) or hook)
                )
                if away:
                    taken.append((hooks, OrderedDict(hooks)))
                    for key in away:
                        del hooks[key]
        yield
    finally:
        for hooks, before in taken:
            new = {key: hook for key, hook in hooks.items() if key not in before}
            hooks.clear()
            hooks.update(before)
            hooks.update(new)


def _only_looks_on(hook: Any) -> bool:
    return getattr(hook, "__module__", None) in LOOKING_ON
