"""`tl-persona verify`: whether everything that was saved can still be trusted."""

from argparse import Namespace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

from tl_persona.checking import Checkup, Problem, check_saved


def run(arguments: Namespace) -> int:
    """Checks, repairs if asked to, prints what was found, and returns the exit code."""
    root = Path(arguments.path)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("checking", total=None)
        found = check_saved(
            root,
            repair=arguments.repair,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    console = Console(highlight=False, markup=False, emoji=False)
    if found.problems:
        console.print(_table(found.problems, root))
    for line in found.repairs:
        console.print(line, soft_wrap=True)
    console.print(_summary(found), soft_wrap=True)
    return 0 if all(problem.repaired for problem in found.problems) else 1


def _table(problems: tuple[Problem, ...], root: Path) -> Table:
    table = Table(title="what is wrong", title_justify="left")
    for heading in ("file", "kind", "what was found"):
        table.add_column(heading, overflow="fold")
    for problem in problems:
        inside = problem.path.is_relative_to(root) and problem.path != root
        table.add_row(str(problem.path.relative_to(root) if inside else problem.path), problem.kind, problem.what)
    return table


def _summary(found: Checkup) -> str:
    counts = [f"{found.n_files:,} file{'' if found.n_files == 1 else 's'} checked"]
    if found.n_unrecorded:
        counts.append(f"{found.n_unrecorded:,} without a checksum to compare with")
    if found.n_without_provenance:
        counts.append(f"{found.n_without_provenance:,} without provenance")
    counts.append(f"{len(found.problems):,} problem{'' if len(found.problems) == 1 else 's'}")
    return ", ".join(counts)
