"""What every launcher does with a command, and what it is asked for."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Task:
    """A job as a command.

    Attributes:
        name: of the job.
        command: words; exit status 0 when all is done, 130 when it was stopped and can go on.
        log: where its output goes.
    """

    name: str
    command: tuple[str, ...]
    log: Path


class Launcher(Protocol):
    """Runs commands somewhere."""

    def run(
        self,
        tasks: Sequence[Task],
        began: Callable[[Task], None],
        ended: Callable[[Task, str | None], None],
        tell: Callable[[str], None],
    ) -> None:
        """Run all tasks; one that fails does not stop the others.

        Args:
            tasks: none of them done.
            began, ended: called as each begins and ends, `ended` with the reason of a failure.
            tell: called with lines for people.

        Raises:
            MorError: nothing could be started.
            Interrupted: Ctrl-C.
        """


@contextmanager
def taking_sigterm() -> Iterator[None]:
    """Take SIGTERM, which batch systems send, as Ctrl-C, so that no job is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only there can signals be caught
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def last_line(log: Path, status: int | None = None) -> str:
    """The last line of a log; the exit status where there is none."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else f"exit status {status}" if status is not None else "no output"


def start(
    command: Sequence[str], log: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start a command, with one thread unless the environment says otherwise."""
    with log.open("wb") as file:
        return subprocess.Popen(
            list(command),
            stdout=file,
            stderr=file,
            env={"OMP_NUM_THREADS": "1"} | os.environ | dict(environment),
        )


def wait(child: subprocess.Popen[bytes], log: Path) -> str | None:
    """Wait for a command; None, or why it failed. Stopped meanwhile, it is told to stop as well."""
    try:
        status = child.wait()
    except BaseException:
        child.send_signal(signal.SIGTERM)  # as Ctrl-C: training saves a checkpoint and ends
        child.wait()
        raise
    return None if status == 0 else last_line(log, status)
