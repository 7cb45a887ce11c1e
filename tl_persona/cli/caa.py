"""`tl-persona caa`: steering vectors of one behaviour, with what is known of each layer, saved as a set."""

from argparse import Namespace
from pathlib import Path

from rich.console import Console

from tl_persona.backends.base import JOURNAL_FOLDER
from tl_persona.caa import extract_caa_vectors
from tl_persona.cli.inputs import load_for_backend, read_template_kwargs, status_printer
from tl_persona.cli.show import best_line, layer_table
from tl_persona.data.behaviors import load_pairs
from tl_persona.data.contrast import ContrastPairDataset
from tl_persona.errors import InputError
from tl_persona.statistics.directions import logistic_direction, mean_difference, pca_direction

DIRECTIONS = {"mean_difference": mean_difference, "pca": pca_direction, "logistic": logistic_direction}


def run(arguments: Namespace) -> int:
    """Extracts and saves, prints the layers and which is best, and returns the exit code."""
    # All that can be wrong without a model is found before one is loaded.
    pairs = load_pairs(arguments.behavior) if arguments.behavior else ContrastPairDataset.load(arguments.pairs)
    folder = Path(arguments.output)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder} is a file: name a folder")
    errors = Console(stderr=True, highlight=False)
    template_kwargs = read_template_kwargs(arguments.template_kwarg)
    model = load_for_backend(arguments, errors)
    vectors = extract_caa_vectors(
        model,
        None,
        pairs,
        arguments.layers,
        _position(arguments.token_position),
        batch_size=arguments.batch_size,
        direction=DIRECTIONS[arguments.direction],
        include_first=arguments.include_first,
        seed=arguments.seed,
        template_kwargs=template_kwargs,
        on_status=status_printer(errors, verbose=arguments.verbose),
        journal=folder.with_name(f".{folder.name}{JOURNAL_FOLDER}"),
    )
    vectors.save(folder)
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(layer_table(vectors))
    console.print(best_line(vectors))
    console.print(f"saved in {folder}", soft_wrap=True)
    return 0


def _position(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text
