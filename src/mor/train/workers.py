"""Data workers that leave it to their parent to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

PATIENCE_S = 600


class Patient:
    """Called in a data worker as it starts: a signal to the whole job does not end it.

    Batch systems and terminals signal every process of a job. PyTorch's workers die of SIGTERM, and
    the training process of the news, in the middle of the step that it wanted to finish. Here they
    go on: they end when the parent stops asking, or when it is gone. One that hangs ends by itself,
    ``PATIENCE_S`` after it was told to.

    Args:
        before: what else to call there.
    """

    def __init__(self, before: Callable[[int], Any] | None) -> None:
        self.before = before

    def __call__(self, worker: int) -> None:
        """Take the signals of this worker."""
        if self.before is not None:
            self.before(worker)
        for name in ("SIGINT", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        if hasattr(signal, "alarm"):
            signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(PATIENCE_S))
