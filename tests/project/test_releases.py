"""The lower bounds are releases that a run of the suite has, and what a run leaves is what it had."""

import json
import re
from pathlib import Path

import pytest
import releases
from releases import ROOT


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / file).read_text(encoding="utf-8").splitlines()
    found = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, version in found}


def test_every_lower_bound_but_that_of_torch_is_a_release_of_the_oldest_run() -> None:
    bounds, oldest = releases.lower_bounds(), pins("corners/oldest.txt")
    assert bounds.pop("torch") == "2.6"
    assert bounds == {name: oldest.get(name) for name in bounds}, "requirements/corners/oldest.txt"


def test_the_tools_are_those_of_the_environment_or_of_the_oldest_run() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    dev = text.partition("dev = [")[2].partition("]\n\n")[0]
    tools = dict(re.findall(r'^    "([\w-]+)>=([\d.]+)",$', dev, re.MULTILINE))
    assert len(tools) > 10
    newest, oldest = pins("test.txt"), pins("corners/oldest.txt")
    assert [name for name, bound in tools.items() if bound not in (newest.get(name), oldest.get(name))] == []


def test_a_run_leaves_its_counts_and_releases(tmp_path: Path) -> None:
    file = tmp_path / "results" / "newest.json"
    releases.leave_result(file, "tl", {"passed": [1, 2], "failed": [3], "": [4]})
    left = json.loads(file.read_text(encoding="utf-8"))
    assert (left["marked"], left["passed"], left["failed"], left["error"], left["skipped"]) == ("tl", 2, 1, 0, 0)
    assert left["releases"]["torch"].startswith("2.") and "+" not in left["releases"]["torch"]


def test_a_requirement_without_a_lower_bound_is_refused() -> None:
    with pytest.raises(AssertionError, match="a lower bound is needed"):
        releases._bound("torch")
