"""What a vector must be to mean the same in another program. Writing it there is the work of its siblings."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from tl_persona.errors import InputError
from tl_persona.models.hooks import resid_post


@runtime_checkable
class Outgoing(Protocol):
    """What the exports need of a steering vector, whose class is defined further down the flow."""

    @property
    def behavior(self) -> str: ...
    @property
    def layer_index(self) -> int: ...
    @property
    def hook_name(self) -> str: ...
    @property
    def vector(self) -> Float[Tensor, "d_model"]: ...
    @property
    def model_name(self) -> str: ...
    @property
    def extraction_method(self) -> str: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def label(self) -> str: ...


def block_outputs(vectors: Iterable[Outgoing], consumer: str) -> list[Outgoing]:
    """The vectors, all at the output of a block, the one place that every program means by a layer's number.

    Raises:
        InputError: There is none, or one acts at another hook.
    """
    chosen = list(vectors)
    if not chosen:
        raise InputError(f"there is no vector to hand to {consumer}: the set is empty")
    for vector in chosen:
        if vector.hook_name != resid_post(vector.layer_index):
            raise InputError(
                f"{vector.label} has no counterpart in {consumer}, which knows the outputs of blocks only: "
                f"extract at {resid_post(vector.layer_index)}"
            )
    return chosen
