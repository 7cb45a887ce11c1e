"""`tl-persona merge`: several stores into one."""

from argparse import Namespace

from rich.console import Console
from rich.table import Table

from tl_persona.store.merge import MergedFolder, merge_stores


def run(arguments: Namespace) -> int:
    """Merges, prints what was done in each folder, and returns the exit code."""
    with Console(stderr=True).status(f"merging {len(arguments.sources)} stores"):
        folders = merge_stores(arguments.sources, arguments.into, arguments.on_conflict)
    Console(highlight=False).print(_summary(folders))
    return 0


def _summary(folders: list[MergedFolder]) -> Table:
    table = Table(title="merged persona vectors")
    for heading in ("model", "strategy", "variant"):
        table.add_column(heading, overflow="fold")
    for heading in ("copied", "same", "replaced", "left"):
        table.add_column(heading, justify="right")
    for done in folders:
        counts = (done.copied, done.same, done.replaced, done.left)
        table.add_row(*done.folder.parts[-3:], *(f"{count:,}" for count in counts))
    table.caption = f"under {folders[0].folder.parents[2]}"
    return table
