"""Writes the table of decoder families in `compatibility.md` from what the tests of extraction left: `make families`.

They leave a JSON file where `TL_PERSONA_FAMILIES` names one. Given it, this script puts it in the place of
`families.json`, beside the page. A test compares the page with that file.
"""

import json
import re
import shutil
import sys
from typing import Any

from compatibility import DOCS, PAGE, filled, table_of

RESULTS = DOCS / "families.json"

_HEADS = ("family", "transformers class", "taken as", "persona", "pairs", "beyond lengths", "largest error")


def page() -> str:
    """The page, with its table as the results say."""
    families: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = [list(_HEADS), ["---"] * len(_HEADS), *(_row(name, families[name]) for name in sorted(families))]
    return filled(PAGE.read_text(encoding="utf-8"), "families", table_of(rows))


def _row(name: str, seen: dict[str, Any]) -> list[str]:
    if "refused" in seen:
        return [name, seen["architecture"], "refused", "", "", "", _reason(seen["refused"])]
    plans = seen["plans"]
    beyond = sorted({plan["sharing"] for key, plan in plans.items() if key.startswith("around")})
    sharing = [plans["persona"]["sharing"], plans["pairs"]["sharing"], ", ".join(beyond)]
    worst = max(plan["error"] for plan in plans.values())
    taken = f"{seen['class']}: {_reason(seen['bridge'])}" if "bridge" in seen else seen["class"]
    return [name, seen["architecture"], taken, *sharing, f"{worst:.0e}"]


def _reason(message: str) -> str:
    """The part of an error that is about this model."""
    found = re.search(
        r"\((\w*Error: .*?)\): try|: (blocks\.\d+\.\w+ differs by [\d.e-]+) of|(has no hook \S+):|"
        "plain transformers: (.*)",
        message,
    )
    return message if found is None else next(part for part in found.groups() if part)


def main() -> None:
    """Take in the file that is named, then write the page."""
    if len(sys.argv) > 1:
        shutil.copyfile(sys.argv[1], RESULTS)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
