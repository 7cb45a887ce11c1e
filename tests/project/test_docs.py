"""The examples in the README and the pages under docs/ run, and print what the pages say."""

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(str(page.relative_to(ROOT)) for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def _run(text: str, name: str) -> doctest.TestResults:
    """Run the `>>>` examples of a page in one namespace; a code fence ends an expected output, as a blank line does."""
    without_fences = re.sub(r"^ *```.*$", "", text, flags=re.MULTILINE)
    examples = doctest.DocTestParser().get_doctest(without_fences, {"__name__": "__main__"}, name, name, 0)
    return doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples)


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what an example writes stays out of the checkout
    assert _run((ROOT / page).read_text(encoding="utf-8"), page).failed == 0


def test_a_wrong_example_would_be_noticed() -> None:
    page = "```python\n>>> one = 1\n>>> one + 1\n{}\n```\nMore text.\n"
    assert _run(page.format("2"), "right") == doctest.TestResults(failed=0, attempted=2)
    assert _run(page.format("3"), "wrong").failed == 1


def test_the_compatibility_page_says_what_the_runs_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "site"))
    from compatibility import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run: make compatibility"


def test_the_compatibility_page_says_what_the_families_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "site"))
    from families import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run: make families"


def test_the_command_line_page_says_what_the_parser_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "site"))
    from command_line import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run: python docs/site/command_line.py"
