"""A progress bar for long work: on standard error, and silent where that is not a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]
"""Tells the bar how many more tokens are done."""


@contextmanager
def token_progress(
    description: str, total_tokens: int, *, computed: int | None = None, show: bool = True
) -> Iterator[Advance]:
    """A bar that counts tokens, with their rate, the time left, and how many of them need not be computed.

    Args:
        description: What is running.
        total_tokens: When the bar is full: the tokens of all texts, as a caller counts them.
        computed: How many of them the plan computes, each shared beginning once; None where nothing is shared.
        show: False keeps it silent on a terminal too.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class TokenRate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.0f} tokens/s" if speed else "")

    console = Console(stderr=True)
    if not (show and console.is_terminal):  # a bar that is switched off writes an empty line in older releases of rich
        yield lambda tokens: None
        return
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
        TextColumn(cache_hits(total_tokens, computed), style="green"),
        TokenRate(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task(description, total=total_tokens)
        yield lambda tokens: bar.advance(task, tokens)


def cache_hits(total_tokens: int, computed: int | None) -> str:
    """The share of tokens that need not be computed because another text begins with them; empty where there is none.

    Example:
        >>> cache_hits(1000, 150), cache_hits(1000, 1000), cache_hits(1000, None)
        ('85% shared', '', '')
    """
    shared = 0.0 if computed is None or not total_tokens else 1 - computed / total_tokens
    return f"{shared:.0%} shared" if shared >= 0.005 else ""
