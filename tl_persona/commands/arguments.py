"""Reads what several subcommands have among their arguments: the data set, and keywords for the chat template."""

import json
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from tl_persona.data.dataset import PersonaDataset
from tl_persona.errors import InputError


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
