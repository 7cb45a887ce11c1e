"""The tutorial runs as it stands: its code in order in one namespace, each block printing what the page says."""

import contextlib
import doctest
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"
_BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _steps(page: str) -> Iterator[tuple[str, str | None]]:
    """Every block of code with the output that stands below it, None where there is none."""
    blocks = [(found[1], found[2]) for found in _BLOCK.finditer(page)]
    for (kind, text), (next_kind, next_text) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if kind == "python":
            yield text, next_text if next_kind == "text" else None


def _follow(page: str) -> dict[str, object]:
    """Run the page and return its names; fails at the first block that prints something else than the page says."""
    names: dict[str, object] = {"__name__": "__main__"}
    same = doctest.OutputChecker().check_output
    for code, expected in _steps(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "tutorial.md", "exec"), names)
        if expected is not None:
            got = printed.getvalue()
            assert same(expected, got, doctest.ELLIPSIS), f"after\n{code}\nthe page says\n{expected}\nbut it is\n{got}"
    return names


def test_a_page_that_says_something_else_is_noticed() -> None:
    page = "```python\none = 1\n```\n\nText.\n\n```python\nprint(one + 1)\n```\n\n```text\n{}\n```\n"
    assert _follow(page.format("2"))["one"] == 1
    with pytest.raises(AssertionError, match="the page says"):
        _follow(page.format("3"))


@pytest.mark.slow
def test_the_tutorial_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    assert len(list(_steps(text))) == len(re.findall("^```python$", text, re.MULTILINE)) > 5
    names: Any = _follow(text)
    assert "people.html" in {path.name for path in tmp_path.iterdir()}
    heatmap = names["figure"].data[0]
    assert list(heatmap.x) == list(heatmap.y) == list(names["names"].values())
    rows = np.stack([names["store"].load("templated", person)[10].numpy() for person in names["people"]])
    rows = rows - rows.mean(axis=0)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert np.abs(heatmap.z - rows @ rows.T).max() < 1e-4
