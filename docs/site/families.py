"""Writes the table of decoder families in `compatibility.md` from what the tests of extraction left: `make families`.

They leave a JSON file where `TL_PERSONA_FAMILIES` names one. Given it, this script puts it in the place of
`families.json`, beside the page. A test compares the page with that file.
"""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "reference"
PAGE, RESULTS = DOCS / "compatibility.md", DOCS / "families.json"

_HEADS = ("family", "transformers class", "taken as", "persona", "pairs", "beyond lengths", "largest error")
_PLACE = re.compile(r"(<!-- families: [^>]* -->\n).*?(<!-- end -->)", re.DOTALL)


def page() -> str:
    """The page, with its table as the results say."""
    families: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = [_HEADS, ["---"] * len(_HEADS), *(_row(name, families[name]) for name in sorted(families))]
    table = "".join("| " + " | ".join(row) + " |\n" for row in rows).replace("| --- | ", "|---|", 1)
    text, found = _PLACE.subn(lambda place: f"{place[1]}\n{table}\n{place[2]}", PAGE.read_text(encoding="utf-8"))
    if found != 1:
        raise ValueError(f"{PAGE.name}: there is no place for the table of families")
    return text


def _row(name: str, seen: dict[str, Any]) -> list[str]:
    if "refused" in seen:
        return [name, seen["architecture"], "refused", "", "", "", _reason(seen["refused"])]
    plans = seen["plans"]
    beyond = sorted({plan["sharing"] for key, plan in plans.items() if key.startswith("around")})
    sharing = [plans["persona"]["sharing"], plans["pairs"]["sharing"], ", ".join(beyond)]
    worst = max(plan["error"] for plan in plans.values())
    return [name, seen["architecture"], seen["class"], *sharing, f"{worst:.0e}"]


def _reason(message: str) -> str:
    """The part of an error that is about this model."""
    found = re.search(
        r"\((\w*Error: .*?)\): try|: (blocks\.\d+\.\w+ differs by [\d.e-]+) of|(has no hook \S+):", message
    )
    return message if found is None else next(part for part in found.groups() if part)


def main() -> None:
    """Take in the file that is named, then write the page."""
    if len(sys.argv) > 1:
        shutil.copyfile(sys.argv[1], RESULTS)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
