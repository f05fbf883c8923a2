"""Progress of long work, for whoever asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mor.data.documents import describe_skipped

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

Progress = Callable[[str, int, int | None], None]
"""Called with the stage's name, the bytes done in it, and their total (None while unknown)."""


def no_progress(stage: str, done: int, total: int | None) -> None:
    """Progress that is not shown."""


def tell_skipped(progress: Progress, skipped: Mapping[str, int]) -> None:
    """Tell how many bad rows were skipped so far, where `progress` has a method `skipped`."""
    tell = getattr(progress, "skipped", None)
    if tell is not None and skipped:
        tell(skipped)


class ConsoleProgress:
    """Bars on a terminal, one per stage, and a line with the bad rows that were skipped."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Move the bar of a stage (see `Progress`)."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)

    def skipped(self, skipped: Mapping[str, int]) -> None:
        """Say how many bad rows were skipped, by kind."""
        words = describe_skipped(skipped)
        if "skipped" not in self._tasks:
            self._tasks["skipped"] = self._bars.add_task(words, total=None)
        self._bars.update(self._tasks["skipped"], description=words)


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
        yield ConsoleProgress(bars)
