"""`tl-persona report`: one HTML page about persona vectors and steering vectors."""

from argparse import Namespace
from collections.abc import Iterable

from tl_persona.data.dataset import PersonaDataset
from tl_persona.data.jsonl import read_records
from tl_persona.data.personas import Persona
from tl_persona.errors import InputError
from tl_persona.report.page import write_report


def run(arguments: Namespace) -> int:
    """Writes the page, says where, and returns the exit code."""
    attributes = {persona.id: persona.persona for persona in _personas(arguments)}
    file = write_report(arguments.path, arguments.output, attributes=attributes)
    print(f"report written to {file} ({file.stat().st_size / 1e6:.1f} MB): open it in a browser, no network needed")
    return 0


def _personas(arguments: Namespace) -> Iterable[Persona]:
    if arguments.personas and arguments.dataset:
        raise InputError("--dataset goes without --personas: give one or the other")
    if arguments.personas:
        return [persona for _, persona in read_records(arguments.personas, Persona)]
    return PersonaDataset.from_hub(arguments.dataset) if arguments.dataset else PersonaDataset.bundled()
