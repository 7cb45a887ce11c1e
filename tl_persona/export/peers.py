"""The objects of steering-vectors and repeng, and the folders of rotalabs-steer.

All three add a vector, times a coefficient, to the output of a block. So vectors go over as they are, with the same
sign, length and layer number, and what acts elsewhere is refused. The packages are loaded when an object of theirs is
made; reading one needs none. Folders of rotalabs-steer are read by `rotalabs_files`.
"""

import json
from collections.abc import Iterable, Mapping
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from tl_persona.errors import InputError, MissingDependencyError, StoreError
from tl_persona.export.outgoing import Outgoing, block_outputs
from tl_persona.files import SET_FILE, SET_FORMAT, make_folder, parsed_json, read_bytes, write_atomically
from tl_persona.vector_files import contents_of


def as_steering_vectors(vectors: Iterable[Outgoing]) -> Any:
    """A `steering_vectors.SteeringVector` of the layer type `decoder_block`, with copies of the vectors.

    Raises:
        InputError: There is no vector, or one is no output of a block.
        MissingDependencyError: steering-vectors is not installed.
    """
    chosen = block_outputs(vectors, "steering-vectors")
    module = _installed("steering_vectors", "steering-vectors")
    activations = {vector.layer_index: vector.vector.clone() for vector in chosen}
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


def as_repeng(vectors: Iterable[Outgoing], model_type: str | None = None) -> Any:
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
    directions = {vector.layer_index: vector.vector.to("cpu", torch.float32, copy=True).numpy() for vector in chosen}
    return module.ControlVector(
        model_type=chosen[0].model_name if model_type is None else model_type, directions=directions
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


def write_rotalabs(folder: Path, vectors: Iterable[Outgoing]) -> Path:
    """Write a folder that rotalabs-steer loads as a set of its own.

    It has `metadata.json`, and for each layer `layer_<N>.json` and a plain tensor in `layer_<N>.pt`. The tensors are in
    torch's pickle, since its readers know nothing else; they load with `weights_only=True`, as rotalabs-steer loads
    them. Provenance has no place in it.

    Raises:
        InputError: There is no vector, one is no output of a block, metadata has no JSON form, or the folder holds a
            set of this package, whose files would be mixed up with these.
        StoreError: The file system refused.
    """
    chosen = sorted(block_outputs(vectors, "rotalabs-steer"), key=lambda vector: vector.layer_index)
    if _holds_own_set(folder):
        raise InputError(f"{folder} holds a set of this package's own format: choose another folder")
    files = {}
    for vector in chosen:
        contents_of(vector, vector.label)  # raises where JSON cannot hold the metadata, before anything is written
        described = {
            "behavior": vector.behavior,
            "layer_index": vector.layer_index,
            "model_name": vector.model_name,
            "extraction_method": vector.extraction_method,
            "metadata": dict(vector.metadata),
            "vector_shape": list(vector.vector.shape),
        }
        pickled = BytesIO()
        torch.save(vector.vector.cpu().clone(), pickled)  # a view would take its whole storage along
        files[f"layer_{vector.layer_index}.pt"] = pickled.getvalue()
        files[f"layer_{vector.layer_index}.json"] = _json(described)
    metadata = {
        "behavior": chosen[0].behavior,
        "layers": [vector.layer_index for vector in chosen],
        "model_name": chosen[0].model_name,
    }
    make_folder(folder)
    for name, data in (*files.items(), (SET_FILE, _json(metadata))):
        write_atomically(folder / name, data)
    return folder


def _by_block(found: Mapping[Any, Any], where: str) -> dict[int, Tensor]:
    vectors = {}
    for layer, values in found.items():
        if not isinstance(layer, int) or layer < 0:
            raise InputError(f"{where} has the layer {layer!r}: number the blocks from 0, not from the end")
        vectors[layer] = (
            torch.from_numpy(values.copy()) if isinstance(values, numpy.ndarray) else values.detach().clone()
        )
    return vectors


def _holds_own_set(folder: Path) -> bool:
    source = folder / SET_FILE
    try:
        found = parsed_json(read_bytes(source), source)
    except StoreError:
        return False
    return isinstance(found, dict) and found.get("format") == SET_FORMAT


def _json(data: object) -> bytes:
    return f"{json.dumps(data, indent=2)}\n".encode()


def _installed(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingDependencyError(f"this needs {package} ({error}): pip install {package}") from error
    except Exception as error:  # a package may break on a release of what it imports: repeng 0.4 does on NumPy 2
        raise MissingDependencyError(f"{package} is installed and cannot be imported here: {error}") from error
