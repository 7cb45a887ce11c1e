"""Writes the tables of `compatibility.md` from what whole runs of the tests left: `make compatibility`.

A run's result is a JSON file, which `tests/support/releases.py` writes. Given a folder of them, this script takes each
into `compatibility.json`, in the place of an older result of the same run. A test compares the page with that file.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "reference"
PAGE, RESULTS = DOCS / "compatibility.md", DOCS / "compatibility.json"

RUNS = {
    "newest": "the environment of the tests",
    "old-transformer-lens": "the oldest TransformerLens",
    "old-transformers": "the oldest transformers",
    "oldest": "the oldest release of everything",
    "transformers-5.23": "the last transformers before the cache got its new name",
    "transformers-5.23-old-transformer-lens": "the same, with the oldest TransformerLens",
    "ndif": "NDIF's server, in the environment of the tests",
    "newest-unpinned": "the newest release of everything beside torch 2.13.0",
}
"""The runs that have a row, in the order of the table, and what is special about their releases."""

COLUMNS = {"transformer-lens": "TransformerLens", "transformers": "transformers", "torch": "torch", "python": "Python"}
SIDE_BY_SIDE = ("oldest", "newest", "newest-unpinned")
"""The runs whose releases of every package are shown."""

Results = dict[str, dict[str, Any]]


def page() -> str:
    """The page, with its tables as the results say."""
    results: Results = json.loads(RESULTS.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    for name, table in (("runs", _runs(results)), ("packages", _packages(results))):
        text = filled(text, name, table)
    return text


def filled(text: str, name: str, table: str) -> str:
    """The text of the page with a table in the place that has its name."""
    place = re.compile(rf"(<!-- {name}: [^>]* -->\n).*?(<!-- end -->)", re.DOTALL)
    text, found = place.subn(lambda around: f"{around[1]}\n{table}\n{around[2]}", text)
    if found != 1:
        raise ValueError(f"{PAGE.name}: there is no place for the table of {name}")
    return text


def _runs(results: Results) -> str:
    rows = [["releases", *COLUMNS.values(), "tests", "result", "on"], ["---"] * (len(COLUMNS) + 4)]
    for name, meaning in RUNS.items():
        if name in results:
            run = results[name]
            releases = [run["releases"].get(column, "") for column in COLUMNS]
            rows.append([meaning, *releases, _tests(name, run), _outcome(run), run["date"]])
    return table_of(rows)


def _tests(name: str, run: dict[str, Any]) -> str:
    if name == "ndif":
        return "`make test-ndif`"
    return "those that touch TransformerLens" if run["marked"] == "tl" else "all"


def _outcome(run: dict[str, Any]) -> str:
    failed, skipped = run["failed"] + run["error"], run["skipped"]
    said = [f"**{failed:,} failed**"] if failed else []
    said += [f"{run['passed']:,} passed"] + ([f"{skipped:,} skipped"] if skipped else [])
    return ", ".join(said)


def _packages(results: Results) -> str:
    runs = {name: results[name]["releases"] for name in SIDE_BY_SIDE if name in results}
    packages = sorted({package for releases in runs.values() for package in releases})
    rows = [["package", *(RUNS[name] for name in runs)], ["---"] * (len(runs) + 1)]
    return table_of([*rows, *([package, *(runs[name].get(package, "") for name in runs)] for package in packages)])


def table_of(rows: list[list[str]]) -> str:
    """Rows as Markdown, the first two being the headings and the line below them."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines[1] = lines[1].replace(" ", "")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Take in the results of the folders that are named, then write the page."""
    results: Results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for folder in sys.argv[1:]:
        for file in sorted(Path(folder).glob("*.json")):
            results[file.stem] = json.loads(file.read_text(encoding="utf-8"))
    ordered = {name: results[name] for name in RUNS if name in results}
    RESULTS.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
