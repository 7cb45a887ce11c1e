"""The example notebook runs from top to bottom, in a kernel of this environment, and shows what it says."""

import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "persona_vectors.ipynb"


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_kept_without_outputs(notebook: Any) -> None:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.slow
def test_the_notebook_runs_and_finds_people_in_their_other_half(
    notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbclient import NotebookClient

    # The kernel is a process of its own: it finds this checkout whether or not it is installed.
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parent.parent), prepend=os.pathsep)
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    found = re.search(r"layer \d+: (-?[\d.]+) with the same person's other half, (-?[\d.]+) with", printed)
    assert found, printed
    own, others = float(found[1]), float(found[2])
    # With their mean removed, vectors that have nothing of the person in common lie at -1/(n-1) to zero, all alike.
    assert own > 0.3 and own - others > 0.4
    pairs = re.findall(r"^(.+?) +-> (.+)$", printed, re.MULTILINE)
    assert len(pairs) == 5 and sum(one.strip() == other for one, other in pairs) >= 4
    (figure,) = [
        output.data["application/vnd.plotly.v1+json"]
        for output in outputs
        if "data" in output and "application/vnd.plotly.v1+json" in output.data
    ]
    assert [trace["name"] for trace in figure["data"]] == ["the same person", "other people"]
