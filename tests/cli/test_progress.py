"""The progress bar: what it tells on a terminal, and that it is silent elsewhere."""

import io
import re

import pytest
import rich.console
import torch

from tl_persona.display import cache_hits, token_progress
from tl_persona.plan import Sample, Sharing, make_plan


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Standard error, made a terminal of 200 columns."""
    screen = io.StringIO()
    made = rich.console.Console

    def console(**_options: object) -> rich.console.Console:
        return made(file=screen, force_terminal=True, width=200, color_system=None)

    monkeypatch.setattr(rich.console, "Console", console)
    return screen


def last_frame(screen: io.StringIO) -> str:
    frames = [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", screen.getvalue()).splitlines() if "of" in line]
    return frames[-1]


def test_a_terminal_is_told_tokens_hits_rate_and_time(terminal: io.StringIO) -> None:
    with token_progress("Mara", 1000, computed=200) as advance:
        advance(400)
        advance(600)
    shown = last_frame(terminal)
    assert shown.startswith("Mara") and "1,000 of 1,000 tokens" in shown and "80% shared" in shown
    assert re.search(r"[\d,]+ tokens/s", shown) and re.search(r"\d:\d\d:\d\d", shown)


def test_brackets_in_a_title_are_no_markup(terminal: io.StringIO) -> None:
    with token_progress("Mara [b]", 10) as advance:
        advance(10)
    assert last_frame(terminal).startswith("Mara [b]")


def test_nothing_is_said_of_sharing_where_there_is_none(terminal: io.StringIO) -> None:
    with token_progress("Mara", 10, computed=10) as advance:
        advance(10)
    assert "shared" not in last_frame(terminal)


def test_a_bar_is_silent_where_nobody_watches(capsys: pytest.CaptureFixture[str], terminal: io.StringIO) -> None:
    with token_progress("Mara", 10, show=False) as advance:
        advance(10)
    assert terminal.getvalue() == ""


def test_a_file_as_standard_error_gets_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with token_progress("Mara", 10, computed=5) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")


def test_hits_are_the_share_of_tokens_that_another_text_begins_with() -> None:
    beginning = list(range(90))
    samples = [
        Sample(name, torch.tensor([*beginning, *end]), torch.ones(1, 100, dtype=torch.bool))
        for name, end in (("a", range(100, 110)), ("b", range(200, 210)))
    ]
    plan = make_plan(samples, sharing=Sharing.PACKED)
    assert cache_hits(plan.tokens, plan.tokens_distinct) == "45% shared"  # 90 of 200
    assert cache_hits(0, 0) == ""
