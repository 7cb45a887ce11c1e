"""Which backend runs a model. Each is imported when a model asks for it."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tl_persona.backends.base import Backend, OnStatus
from tl_persona.errors import MissingDependencyError


def open_backend(
    model: Any,
    *,
    tokenizer: Any = None,
    remote: bool = False,
    on_status: OnStatus | None = None,
    journal: Path | None = None,
) -> Backend:
    """The backend that runs this model.

    Args:
        model: A `HookedTransformer`, a `TransformerBridge`, or a Hugging Face causal language model, which is wrapped
            without being changed; what `load_model(name, kind="remote")` returns, or, with `remote=True`, a name; or
            an nnsight model with weights, which runs in this process.
        tokenizer: Used in place of the model's own.
        remote: True to run on NDIF.
        on_status: Told how remote jobs are.
        journal: Folder in which a remote run keeps what it needs to continue after it was killed.

    Raises:
        InputError: The model is none of these.
        MissingDependencyError: A remote model without the packages for it.
        RemoteError: The server does not answer, or will not run the model.
    """
    # By module, so that nnsight is not imported where nobody has: its objects come with it.
    modules = {kind.__module__ for kind in type(model).__mro__}
    if remote or any(module.startswith(("nnsight.", "tl_persona.backends.remote.")) for module in modules):
        require_remote()
        from tl_persona.backends.remote.backend import RemoteBackend

        return RemoteBackend(model, tokenizer=tokenizer, remote=remote, on_status=on_status, journal=journal)
    from tl_persona.backends.local.backend import LocalBackend

    return LocalBackend(model, tokenizer=tokenizer)


def require_remote() -> None:
    """Checks that the packages for remote runs are there.

    Raises:
        MissingDependencyError: One is missing; the message has the install command.
    """
    missing = [name for name in ("nnsight", "httpx", "tenacity", "zstandard") if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f'remote runs need {", ".join(missing)}: pip install "tl-persona[remote]"')
