"""`tl-persona show`: what a saved vector says of itself; of steering vectors, one of them or a set by layer."""

from argparse import Namespace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tl_persona.files import is_folder
from tl_persona.provenance import UNKNOWN, Provenance
from tl_persona.store.file import ArtifactDescription, describe
from tl_persona.store.header import format_of
from tl_persona.vectors.files import FORMAT
from tl_persona.vectors.vector import SteeringVector
from tl_persona.vectors.vector_set import SteeringVectorSet


def is_steering(path: Path) -> bool:
    """Whether a steering vector, or a set of them, is to be shown; what is there may be damaged.

    Raises:
        StoreError: The system will not say what is there.
    """
    return is_folder(path) or path.suffix in (".pt", ".json") or format_of(path) == FORMAT


def show(path: Path, console: Console) -> None:
    """Prints what a saved vector or a folder with a set says of itself.

    Raises:
        NotStoredError: The folder holds no set of steering vectors.
        StoreError: A file cannot be read or trusted.
    """
    if not is_folder(path):
        console.print(_facts_of_set(SteeringVector.load(path)))
        return
    vectors = SteeringVectorSet.load(path)
    console.print(layer_table(vectors))
    if len(vectors):
        console.print(best_line(vectors))
        console.print(_provenance(Table.grid(padding=(0, 2)), next(iter(vectors))))


def layer_table(vectors: SteeringVectorSet) -> Table:
    """What is known of each layer, best seen side by side."""
    table = Table(title=f"steering vectors for {vectors.behavior}", title_justify="left", box=None)
    for heading in ("layer", "norm", "split half", "agreement"):
        table.add_column(heading, justify="right")
    rows = vectors.summary().rows
    # Without outliers and notes, which most sets have none of, the table fits 80 columns.
    outlying, noted = any(row["outliers"] for row in rows), any(row["note"] for row in rows)
    optional = [*(["outliers", "largest share"] if outlying else []), *(["note"] if noted else [])]
    for heading in ("AUC [95 %]", "d' [95 %]", *optional):
        table.add_column(heading)
    for row in rows:
        table.add_row(
            str(row["layer"]),
            f"{row['norm']:.4g}",
            *(_number(row[name]) for name in ("split_half", "agreement")),
            *(_interval(row[name], row[f"{name}_low"], row[f"{name}_high"]) for name in ("auc", "d_prime")),
            *(
                ["" if row["outliers"] is None else str(row["outliers"]), _number(row["largest_share"])]
                if outlying
                else []
            ),
            *([row["note"] or ""] if noted else []),
        )
    return table


def best_line(vectors: SteeringVectorSet) -> str:
    """The layer that `get_best` chooses, by what, and what to be wary of."""
    choice = vectors.best_layer()
    best = vectors[choice.layer]
    line = f"best layer: {best.layer_index} ({best.hook_name}, norm {best.norm:.4g}), "
    if choice.metric == "norm":
        return line + "by norm, which says little: too few pairs for a held-out separation"
    warning = f"\nwarning: {choice.caution}" if choice.caution else ""
    return f"{line}by held-out separation: {choice.reason}{warning}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    ends = "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
    return f"{_number(value)}{ends}"


def _facts_of_set(vector: SteeringVector) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("behavior", vector.behavior)
    table.add_row("hook", f"{vector.hook_name} (layer {vector.layer_index})")
    table.add_row("model", vector.model_name)
    table.add_row("method", vector.extraction_method)
    table.add_row("vector", f"{vector.dim} d_model, {str(vector.vector.dtype).removeprefix('torch.')}")
    table.add_row("norm", f"{vector.norm:.4g}")
    found = dict(vector.metadata)
    outliers, statistics = found.pop("outliers", None), found.pop("statistics", None)
    for name, value in found.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    for name, value in statistics.items() if isinstance(statistics, dict) else ():
        if value is not None:
            table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    if outliers is not None:
        counts = isinstance(outliers, dict)
        table.add_row("outliers", ", ".join(f"{k} {v}" for k, v in outliers.items()) if counts else str(outliers))
    return _provenance(table, vector)


def _provenance(table: Table, vector: SteeringVector) -> Table:
    recorded = vector.provenance
    if recorded is None:
        table.add_row("provenance", "none recorded")
        return table
    table.add_row("from", f"{recorded.model_name} ({_identity(recorded)}), {recorded.dtype}")
    table.add_row("weights", recorded.weights)
    _add_interventions(table, recorded)
    table.add_row("texts", f"{len(recorded.sample_ids)}, digest {recorded.prompts_digest}")
    table.add_row("notes", ", ".join(f"{key} {value}" for key, value in recorded.notes.items()))
    return table


def _identity(recorded: Provenance) -> str:
    return recorded.revision or recorded.weights_digest or "revision not known"


def _add_interventions(table: Table, recorded: Provenance) -> None:
    known = recorded.known_interventions
    if known != "":
        table.add_row("interventions", UNKNOWN if known is None else known)


def run(arguments: Namespace) -> int:
    """Prints the description; a failed checksum gives exit code 1."""
    console = Console(highlight=False, markup=False, emoji=False)
    path = Path(arguments.path)
    if is_steering(path):
        show(path, console)
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
    table.add_row("model", f"{recorded.model_name} ({_identity(recorded)}), {recorded.dtype}")
    table.add_row("weights", recorded.weights)
    _add_interventions(table, recorded)
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
