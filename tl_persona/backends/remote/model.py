"""A model on a server, as the client has it, and how it is reached: its configuration and tokenizer, never its weights.

The key stays in the settings: it is sent, never shown.
"""

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nnsight.modeling.transformers import TransformersModel

from tl_persona.errors import InputError, ModelError
from tl_persona.models.checkpoints import Checkpoint, find_checkpoint, load_tokenizer

HOSTED = "https://api.ndif.us"
"""NDIF's own server."""


@dataclass(frozen=True)
class RemoteSettings:
    """The settings of one remote model.

    Attributes:
        host: Base URL of the server.
        api_key: Sent with every request to the host; kept out of representations, messages and files.
        timeout: Seconds that one group of samples may take, waiting and retries included.
        allow_http: True lets texts, key and results travel unencrypted to a host that is not this machine.
        group_tokens: Tokens of one request, each shared one counted once: what a failure costs.
        first_wait: Seconds before the first retry; doubled, with jitter, for each further one.
        longest_wait: Seconds between two retries at most.
        poll: Seconds between two looks at a job at most.

    Raises:
        InputError: A host that is no URL, plain http to another machine, or a limit that is not positive.

    Example:
        >>> RemoteSettings(host="http://127.0.0.1:5001", api_key="secret").host
        'http://127.0.0.1:5001'
        >>> "secret" in repr(RemoteSettings(api_key="secret"))
        False
    """

    host: str = HOSTED
    api_key: str = field(default="", repr=False)
    timeout: int | float = 1800.0
    allow_http: bool = False
    group_tokens: int = 8192
    first_wait: float = 1.0
    longest_wait: float = 60.0
    poll: float = 2.0

    def __post_init__(self) -> None:
        for name in ("timeout", "group_tokens", "first_wait", "longest_wait", "poll"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be greater than 0, got {getattr(self, name)}")
        check_url(self.host, allow_http=self.allow_http)
        object.__setattr__(self, "host", self.host.rstrip("/"))

    @classmethod
    def from_environment(
        cls,
        environment: Mapping[str, str] = os.environ,
        *,
        host: str | None = None,
        timeout: int | float | None = None,
        allow_http: bool = False,
    ) -> "RemoteSettings":
        """The settings of `NDIF_HOST` and `NDIF_API_KEY`; what is given goes before them."""
        chosen = host or environment.get("NDIF_HOST") or HOSTED
        key = environment.get("NDIF_API_KEY", "")
        seconds = cls.timeout if timeout is None else timeout
        return cls(host=chosen, api_key=key, allow_http=allow_http, timeout=seconds)


def check_url(url: str, *, allow_http: bool) -> None:
    """Refuses a URL that texts, keys and results should not travel over.

    Raises:
        InputError: No http(s) URL, or plain http to a machine that is not this one.
    """
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        known = False
    if not known:
        raise InputError(f"{_shown(url)!r} is no http or https address: give one such as {HOSTED}")
    if parts.username or parts.password:
        raise InputError("the server's address holds a user name or password: give the key in NDIF_API_KEY")
    if parts.scheme == "http" and not allow_http and not _is_this_machine(parts.hostname or ""):
        raise InputError(
            f"{_shown(url)!r} is plain http to another machine: anybody on the way could read the key and replace "
            "the results; use https, or allow it explicitly (allow_http=True, --allow-http)"
        )


def _is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _shown(url: str) -> str:
    """An address without what may be secret in it."""
    return url.split("?", 1)[0].rpartition("@")[2]


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

    @property
    def served_digest(self) -> str | None:
        """`served:<hex>` of the repository and revision that a server is asked for; None where the model runs here."""
        if self.settings is None or not self.model_key:
            return None
        asked = json.loads(self.model_key.partition(":")[2])
        served = f"{asked['repo_id']}@{asked.get('revision') or 'main'}"
        return f"served:{hashlib.sha256(served.encode()).hexdigest()[:16]}"


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
