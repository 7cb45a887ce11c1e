"""The objects of steering-vectors and repeng.

Both add a vector, times a coefficient, to the output of a block. So vectors go over as they are, with the same
sign, length and layer number, and what acts elsewhere is refused. The packages are loaded when an object of theirs is
made; reading one needs none.
"""

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

import numpy
import torch
from torch import Tensor

from tl_persona.errors import InputError, MissingDependencyError
from tl_persona.files import Fields
from tl_persona.vectors.files import block_outputs


def as_steering_vectors(vectors: Iterable[Fields]) -> Any:
    """A `steering_vectors.SteeringVector` of the layer type `decoder_block`, with copies of the vectors.

    Raises:
        InputError: There is no vector, or one is no output of a block.
        MissingDependencyError: steering-vectors is not installed.
    """
    chosen = block_outputs(vectors, "steering-vectors")
    module = _installed("steering_vectors", "steering-vectors")
    activations = {vector["layer_index"]: vector["vector"].clone() for vector in chosen}
    return module.SteeringVector(layer_activations=activations, layer_type="decoder_block")


def from_steering_vectors(vector: Any) -> dict[int, Tensor]:
    """The vectors of a `steering_vectors.SteeringVector`, by block.

    Raises:
        InputError: It is something else, acts on another part of a block, or counts blocks from the end.
    """
    layer_type = getattr(vector, "layer_type", None)
    if layer_type != "decoder_block":
        raise InputError(
            f"got a {type(vector).__name__} of layer type {layer_type!r}: only 'decoder_block' is an output of blocks"
        )
    return _by_block(vector.layer_activations, "layer_activations")


def as_repeng(vectors: Iterable[Fields], model_type: str | None = None) -> Any:
    """A `repeng.ControlVector`, in float32, as its own are.

    Args:
        vectors: At most one a block.
        model_type: What repeng compares when vectors are added, such as `llama`; None is the model's name.

    Raises:
        InputError: There is no vector, or one is no output of a block.
        MissingDependencyError: repeng is not installed.
    """
    chosen = block_outputs(vectors, "repeng")
    module = _installed("repeng", "repeng")
    directions = {
        vector["layer_index"]: vector["vector"].to("cpu", torch.float32, copy=True).numpy() for vector in chosen
    }
    return module.ControlVector(
        model_type=chosen[0]["model_name"] if model_type is None else model_type, directions=directions
    )


def from_repeng(control: Any) -> tuple[str, dict[int, Tensor]]:
    """The model type and the vectors, by block, of a `repeng.ControlVector`.

    Raises:
        InputError: It is something else, or counts blocks from the end.
    """
    directions = getattr(control, "directions", None)
    if not isinstance(directions, Mapping):
        raise InputError(f"got a {type(control).__name__} without directions: pass a repeng.ControlVector")
    return str(control.model_type), _by_block(directions, "directions")


def _by_block(found: Mapping[Any, Any], where: str) -> dict[int, Tensor]:
    vectors = {}
    for layer, values in found.items():
        if not isinstance(layer, int) or layer < 0:
            raise InputError(f"{where} has the layer {layer!r}: number the blocks from 0, not from the end")
        vectors[layer] = (
            torch.from_numpy(values.copy()) if isinstance(values, numpy.ndarray) else values.detach().clone()
        )
    return vectors


def _installed(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingDependencyError(f"this needs {package} ({error}): pip install {package}") from error
    except Exception as error:  # a package may break on a release of what it imports: repeng 0.4 does on NumPy 2
        raise MissingDependencyError(f"{package} is installed and cannot be imported here: {error}") from error
