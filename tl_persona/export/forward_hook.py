"""A steering vector as a forward hook for a decoder layer of plain transformers, or of what is built like it.

Putting the hook on a module, and taking it off, is the caller's. Steering through TransformerLens hook names, at chosen
positions, is `steering`'s work.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tl_persona.errors import HookError
from tl_persona.steering import Intervention, edit_of


def forward_hook(wanted: Intervention) -> Callable[[Any, Any, Any], Any]:
    """A function for `module.register_forward_hook` that edits the hidden states a module returns.

    They may come as a tensor (..., d_model), or first in a tuple, whose rest stays as it is.

    Args:
        wanted: The edit; it acts on every position.

    Raises:
        HookError: While the model runs: the module returns something else or another width, or a part of the stream
            of which only the sum could be set.
    """

    def steer_output(module: Any, inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(hidden, Tensor) or hidden.shape[-1] != len(wanted.direction):
            seen = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(output).__name__
            raise HookError(
                f"{type(module).__name__} returned {seen}, not hidden states of width {len(wanted.direction)}: put the "
                f"hook for {wanted.hook_name} on the decoder layer of that number"
            )
        if hidden is output:
            return edit(hidden)
        if wanted.mode != "add" and any(isinstance(part, Tensor) and part.shape == hidden.shape for part in output[1:]):
            raise HookError(
                f"{type(module).__name__} returned its stream in two parts, and mode {wanted.mode!r} would set "
                "only one: use mode 'add'"
            )
        return (edit(hidden), *output[1:])

    edit = edit_of(wanted)
    return steer_output
