"""Loads the model that the command line names."""

from argparse import Namespace

from rich.console import Console

from tl_persona.loading import load_model
from tl_persona.models import HookedModel


def load_named_model(arguments: Namespace, console: Console) -> HookedModel:
    """The model of `--model` and the options beside it, with a spinner on a terminal.

    Raises:
        ModelError: It cannot be loaded.
        InputError: An option's value is unknown.
    """
    if not console.is_terminal:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # type: ignore[no-untyped-call]
    with console.status(f"loading {arguments.model}"):
        return load_model(
            arguments.model,
            arguments.kind,
            arguments.dtype,
            arguments.device,
            revision=arguments.revision,
            trust_remote_code=arguments.trust_remote_code,
        )
