"""Which releases a run had, and what came of it: `make` asks whole runs to leave that for the compatibility page."""

import json
import platform
import re
import time
import tomllib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def lower_bounds() -> dict[str, str]:
    """What pyproject.toml asks of the packages it names, the tools of the developers left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    groups = [project["dependencies"], *(extras[name] for name in ("gguf", "remote", "plots", "directions"))]
    return dict(_bound(requirement) for group in groups for requirement in group)


def _bound(requirement: str) -> tuple[str, str]:
    found = re.fullmatch(r"([\w.-]+)>=([\d.]+)(,<\d+)?", requirement)
    assert found is not None, f"{requirement} in pyproject.toml: a lower bound is needed"
    return found[1], found[2]


def installed() -> dict[str, str]:
    """The releases of these packages that a run has, Python's among them; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in lower_bounds():
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return found


def leave_result(file: Path, marked: str, stats: Mapping[str, list[Any]]) -> None:
    """Write which tests ran, what pytest counted, and with which releases, for docs/site/compatibility.py."""
    counts = {name: len(stats.get(name, [])) for name in ("passed", "failed", "error", "skipped")}
    result = {"date": time.strftime("%Y-%m-%d"), "marked": marked, **counts, "releases": installed()}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
