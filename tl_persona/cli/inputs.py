"""What several commands read from their arguments: the data set, keywords for the chat template, and the model.

The model that the command line names is loaded here, and what becomes of remote jobs is told.
"""

import json
import os
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from tl_persona.backends.base import OnStatus
from tl_persona.data.dataset import PersonaDataset
from tl_persona.data.shards import own_device
from tl_persona.errors import InputError
from tl_persona.loading import load_model
from tl_persona.models.facts import HookedModel

if TYPE_CHECKING:
    from tl_persona.backends.remote.model import RemoteModel


def read_dataset(arguments: Namespace) -> PersonaDataset:
    """The data set of `--dataset`, or of `--personas` and `--qa`; the bundled one without them.

    Raises:
        InputError: Options that exclude each other, or files that cannot be read.
    """
    files = (arguments.personas, arguments.qa)
    if any(files) and not all(files):
        raise InputError("--personas and --qa go together: give both files")
    if any(files) and arguments.dataset:
        raise InputError("--dataset goes without --personas and --qa: give one or the other")
    if all(files):
        return PersonaDataset.from_jsonl(*files)
    return PersonaDataset.from_hub(arguments.dataset) if arguments.dataset else PersonaDataset.bundled()


def read_template_kwargs(settings: Sequence[str] | None) -> dict[str, Any]:
    """Keywords from `NAME=VALUE` texts; a value that is JSON is read as such, any other is text.

    Raises:
        InputError: No name, or one given twice.

    Example:
        >>> read_template_kwargs(["enable_thinking=false", "date_string=26 Jul 2024", "depth=2"])
        {'enable_thinking': False, 'date_string': '26 Jul 2024', 'depth': 2}
    """
    kwargs: dict[str, Any] = {}
    for setting in settings or ():
        name, equals, value = setting.partition("=")
        if not name or not equals:
            raise InputError(f"--template-kwarg {setting!r} is not NAME=VALUE, such as enable_thinking=false")
        if name in kwargs:
            raise InputError(f"--template-kwarg {name} is given twice")
        try:
            kwargs[name] = json.loads(value)
        except (ValueError, RecursionError):
            kwargs[name] = value
    return kwargs


def load_named_model(arguments: Namespace, console: Console) -> HookedModel:
    """The model of `--model` and the options beside it, with a spinner on a terminal.

    Without `--device`, processes that torchrun or `srun` started on one machine take a CUDA device each.

    Raises:
        ModelError: It cannot be loaded.
        InputError: An option's value is unknown.
    """
    _silence_progress_bars(console)
    import torch

    with console.status(f"loading {arguments.model}"):
        return load_model(
            arguments.model,
            arguments.kind,
            arguments.dtype,
            arguments.device or own_device(os.environ, torch.cuda.device_count()),
            revision=arguments.revision,
            trust_remote_code=arguments.trust_remote_code,
        )


def load_for_backend(arguments: Namespace, console: Console) -> "HookedModel | RemoteModel":
    """The model of `--model` for `--backend`: as `load_named_model`, or one on a server.

    Raises:
        ModelError: It cannot be loaded, or laid out.
        InputError: An option's value is unknown, or does not go with the backend.
    """
    if arguments.backend == "local":
        if arguments.timeout is not None or arguments.allow_http:
            raise InputError("--timeout and --allow-http go with --backend remote only")
        return load_named_model(arguments, console)
    chosen = {"--kind": arguments.kind != "auto", "--dtype": arguments.dtype, "--device": arguments.device}
    for option, given in chosen.items():
        if given:
            raise InputError(f"{option} is the server's choice with --backend remote: leave it out")
    _silence_progress_bars(console)
    with console.status(f"laying out {arguments.model}"):
        return load_model(
            arguments.model,
            kind="remote",
            revision=arguments.revision,
            trust_remote_code=arguments.trust_remote_code,
            timeout=arguments.timeout,
            allow_http=arguments.allow_http,
        )


def _silence_progress_bars(console: Console) -> None:
    """Bars of transformers' own are for terminals; others have `TQDM_DISABLE`, which `cli` sets."""
    if not console.is_terminal:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # type: ignore[no-untyped-call]


def status_printer(console: Console, *, verbose: bool) -> OnStatus:
    """Prints a line for every retry of a remote job, and with `verbose` for every change of its status."""

    def print_status(job_id: str, status: str, description: str) -> None:
        if job_id != "local" and (verbose or status == "RETRYING"):
            console.print(Text(f"{job_id or 'server'} {status} {description}".rstrip()))

    return print_status
