"""A model on a server, as the client has it: its configuration and its tokenizer, never its weights."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnsight.modeling.transformers import TransformersModel

from tl_persona.backends.remote.settings import RemoteSettings
from tl_persona.errors import InputError, ModelError
from tl_persona.models.checkpoints import Checkpoint, find_checkpoint, load_tokenizer

TASK = "text-generation"


@dataclass(frozen=True)
class RemoteModel:
    """What `load_model(name, kind="remote")` returns.

    Attributes:
        name: What artifacts are filed under.
        revision: The commit or content fingerprint of the checkpoint; None where it is not known.
        tokenizer: The model's tokenizer.
        nnsight_model: nnsight's model, on the meta device.
        model_key: What the server calls the model.
        settings: The server, and how long it may take; None runs `nnsight_model` here, which then has weights.
    """

    name: str
    revision: str | None
    tokenizer: Any
    nnsight_model: Any
    model_key: str = ""
    settings: RemoteSettings | None = None


def open_remote_model(
    name: str | Path, settings: RemoteSettings, *, revision: str | None = None, trust_remote_code: bool = False
) -> RemoteModel:
    """A model on a server by its hub id, or by the folder it is deployed from.

    Raises:
        InputError: A GGUF file, which no server can be asked for.
        ModelError: Configuration or tokenizer cannot be loaded, or nnsight cannot lay the model out.
    """
    found = find_checkpoint(name, revision)
    if found.gguf_file is not None:
        raise InputError(f"{found.name} is a GGUF file, which a server cannot run: name the hub id or folder it has")
    tokenizer = load_tokenizer(found, trust_remote_code=trust_remote_code)
    location = str(Path(found.location).resolve()) if found.is_local else found.location
    options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    if revision is not None and not found.is_local:
        options["revision"] = revision
    try:
        # A copy, because nnsight changes a tokenizer's padding.
        model = TransformersModel(location, task=TASK, tokenizer=copy.deepcopy(tokenizer), **options)
    # Building from a configuration runs any architecture's code; whatever it raises, the model is not to be had.
    except Exception as error:
        raise ModelError(f"nnsight cannot lay out {found.name!r} ({type(error).__name__}: {error})") from error
    commit = None if found.is_local else getattr(model._module.config, "_commit_hash", None)
    return RemoteModel(
        name=found.name,
        revision=commit or found.revision,
        tokenizer=tokenizer,
        nnsight_model=model,
        model_key=_model_key(model, found, location),
        settings=settings,
    )


def running_here(model: Any, tokenizer: Any) -> RemoteModel:
    """A caller's nnsight model with weights, to be run in this process.

    Raises:
        InputError: It has no weights, or no tokenizer.
    """
    if next(model._module.parameters()).is_meta:
        raise InputError("the nnsight model has no weights here: load it with dispatch=True, or pass remote=True")
    config = model._module.config
    return RemoteModel(
        name=Path(str(getattr(config, "_name_or_path", "") or "unknown")).name,
        revision=getattr(config, "_commit_hash", None),
        tokenizer=tokenizer if tokenizer is not None else model.tokenizer,
        nnsight_model=model,
    )


def _model_key(model: Any, found: Checkpoint, location: str) -> str:
    """Nnsight's key; made by hand where the hub, which nnsight asks for the spelling of an id, is of no use."""
    if not found.is_local:
        try:
            return str(model.to_model_key())
        except (OSError, ValueError):  # offline: taken as it was written
            pass
    parts: dict[str, Any] = {"repo_id": location, "revision": model.revision}
    if model.kwargs.get("trust_remote_code"):
        parts["trust_remote_code"] = True
    kind = type(model)
    return f"{kind.__module__}.{kind.__qualname__}:{json.dumps(parts | {'task': TASK})}"
