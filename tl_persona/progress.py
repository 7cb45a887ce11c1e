"""A progress bar for long work: on standard error, and silent where that is not a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]
"""Tells the bar how many more tokens are done."""


@contextmanager
def token_progress(description: str, total_tokens: int, *, show: bool = True) -> Iterator[Advance]:
    """A bar that counts tokens, with their rate and the time left.

    Args:
        description: What is running.
        total_tokens: When the bar is full.
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
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
        TokenRate(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (show and console.is_terminal),
    )
    with bar:
        task = bar.add_task(description, total=total_tokens)
        yield lambda tokens: bar.advance(task, tokens)
