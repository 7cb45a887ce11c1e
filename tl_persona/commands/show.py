"""`tl-persona show`: what a saved vector says of itself."""

from argparse import Namespace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tl_persona.commands import show_vectors
from tl_persona.store.file import ArtifactDescription, describe


def run(arguments: Namespace) -> int:
    """Prints the description; a failed checksum gives exit code 1."""
    console = Console(highlight=False, markup=False, emoji=False)
    path = Path(arguments.path)
    if show_vectors.is_steering(path):
        show_vectors.show(path, console)
        return 0
    found = describe(path)
    console.print(_facts(found))
    console.print(_norms(found))
    return 0 if found.checksum_ok is not False else 1


def _facts(found: ArtifactDescription) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("persona", f"{found.persona_name or '(no name recorded)'} ({found.persona_id})")
    table.add_row("shape", f"{found.shape[0]} layers x {found.shape[1]} d_model, {found.dtype}")
    checksum = {True: "ok", False: "WRONG: the tensor was altered, extract it again", None: "none recorded"}
    table.add_row("checksum", checksum[found.checksum_ok])
    if found.sample_ids is not None:
        table.add_row("samples", f"{len(found.sample_ids)}: {_shortened(found.sample_ids)}")
    if found.provenance is None:
        table.add_row("provenance", "none recorded")
        return table
    recorded = found.provenance
    table.add_row("model", f"{recorded.model_name} ({recorded.revision or 'revision not known'}), {recorded.dtype}")
    table.add_row("weights", recorded.weights)
    table.add_row("strategy", recorded.strategy)
    table.add_row("hooks", _shortened(recorded.hook_names))
    table.add_row("notes", ", ".join(f"{key} {value}" for key, value in recorded.notes.items()))
    table.add_row("digest", recorded.digest())
    return table


def _shortened(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]} ... {names[-1]}"


def _norms(found: ArtifactDescription) -> Table:
    table = Table("row", "norm", "", title="norm by layer", title_justify="left", box=None)
    largest = max(found.layer_norms)
    names = found.provenance.hook_names if found.provenance else tuple(map(str, range(found.shape[0])))
    for name, norm in zip(names, found.layer_norms, strict=True):
        table.add_row(name, f"{norm:.4g}", "█" * round(30 * norm / largest) if largest else "")
    return table
