"""Whether `hook_attn_out` and `hook_mlp_out` of a hooked model are what is added to the residual stream.

The names promise `resid_pre + attn_out + mlp_out = resid_post` (see `parts`). It is tried before the first use, with
both edited, and what does not hold is refused.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tl_persona.backends.local.check import known_check
from tl_persona.backends.local.differences import captured
from tl_persona.backends.local.parts import N_TOKENS, deviation, edit_at, tolerated
from tl_persona.backends.local.reference import NoReferenceError
from tl_persona.errors import HookError
from tl_persona.models.facts import HookedModel

_ADDED = re.compile(r"blocks\.(\d+)\.hook_(attn_out|mlp_out)")


def require_added(model: HookedModel, names: Sequence[str]) -> None:
    """Refuse a `hook_attn_out` or `hook_mlp_out` that is not what is added to the stream; tried once for each block.

    Raises:
        HookError: The residual before the block and what its hooks show do not add up to the one after it.
    """
    check = known_check(model)
    asked = [name for name in names if name in model.hook_dict and name not in check.sites]
    blocks = {found.group(1): name for name in asked if (found := _ADDED.fullmatch(name))}
    if not blocks or check.itself:
        return
    dtype = model.cfg.dtype if isinstance(model.cfg.dtype, torch.dtype) else torch.float32
    for block, missed in _deviations(model, list(blocks)).items():
        if not missed <= tolerated(dtype):
            raise HookError(
                f"{blocks[block]} of this {type(model).__name__} is not what is added to the residual stream: "
                f"resid_pre and what the block's parts give miss resid_post by {missed:.2g} of its length. Choose "
                "hook_resid_pre or hook_resid_post, or load the model with kind='transformers'"
            )
    check.sites.update(name for name in asked if _ADDED.fullmatch(name))


@torch.no_grad()
def _deviations(model: HookedModel, blocks: Sequence[str]) -> dict[str, float]:
    def edit(value: Tensor, hook: Any) -> Tensor:
        return value + edit_at(value, str(hook.name))

    hooks = [
        [name for part in ("attn_out", "mlp_out") if (name := f"blocks.{block}.hook_{part}") in model.hook_dict]
        for block in blocks
    ]
    edges = [(f"blocks.{block}.hook_resid_pre", f"blocks.{block}.hook_resid_post") for block in blocks]
    ids = torch.arange(1, 1 + N_TOKENS) % int(model.cfg.d_vocab)
    names = [name for group in (*hooks, *edges) for name in group]
    try:
        seen = captured(model, ids, names, range(N_TOKENS), [(name, edit) for group in hooks for name in group])
    except NoReferenceError as error:
        raise HookError(f"whether {', '.join(names)} add up cannot be told: {error}") from error
    return {
        block: deviation([seen[before], *(seen[name] for name in group)], seen[after])
        for block, group, (before, after) in zip(blocks, hooks, edges, strict=True)
    }
