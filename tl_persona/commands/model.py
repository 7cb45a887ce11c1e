"""Loads the model that the command line names."""

import os
from argparse import Namespace

from rich.console import Console

from tl_persona.loading import load_model
from tl_persona.models import HookedModel
from tl_persona.sharding import own_device


def load_named_model(arguments: Namespace, console: Console) -> HookedModel:
    """The model of `--model` and the options beside it, with a spinner on a terminal.

    Without `--device`, processes that torchrun or `srun` started on one machine take a CUDA device each.

    Raises:
        ModelError: It cannot be loaded.
        InputError: An option's value is unknown.
    """
    if not console.is_terminal:
        os.environ.setdefault("TQDM_DISABLE", "1")  # for bars that are not transformers' own; read on tqdm's import
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # type: ignore[no-untyped-call]
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
