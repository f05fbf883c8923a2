"""Progress of long work, told to whoever asked for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[str, int, int | None], None]
"""Called with the stage's name, the bytes done in it, and their total (None while unknown)."""


def no_progress(stage: str, done: int, total: int | None) -> None:
    """Tell nobody."""


@contextmanager
def console_progress(console: Console | None = None) -> Iterator[Progress]:
    """Draw one bar per stage with the time left, on standard error unless `console` is given."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console or Console(stderr=True)) as bars:
        tasks: dict[str, progress.TaskID] = {}

        def tell(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield tell
