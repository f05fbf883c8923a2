"""Processes of this machine: one for each core, or for each GPU."""

from __future__ import annotations

import os
import queue
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from mor.errors import Interrupted
from mor.study.launchers.base import Task, start, wait


class ProcessLauncher:
    """Every job has a process of its own, with one CPU thread or one GPU.

    Args:
        workers: jobs at a time; default the number of GPUs, or of cores where there is none. More
            jobs than GPUs share them.
    """

    def __init__(self, workers: int | None = None) -> None:
        gpus = visible_gpus()
        self.workers = workers or len(gpus) or os.cpu_count() or 1
        self._places: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for number in range(self.workers):
            gpu = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}
            self._places.put(gpu)

    def run(
        self,
        tasks: Sequence[Task],
        began: Callable[[Task], None],
        ended: Callable[[Task, str | None], None],
        tell: Callable[[str], None],
    ) -> None:
        """See :class:`mor.study.launchers.base.Launcher`."""
        children: list[subprocess.Popen[bytes]] = []

        def work(task: Task) -> None:
            place = self._places.get()
            try:
                began(task)
                child = start(task.command, task.log, place)
                children.append(child)
                reason = wait(child, task.log)
                children.remove(child)
                ended(task, reason)
            finally:
                self._places.put(place)

        pool = ThreadPoolExecutor(self.workers)
        try:
            list(pool.map(work, tasks))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.terminate()
            for child in children:
                child.wait()
            raise Interrupted("stopped; the same command goes on from what was saved") from None
        finally:
            pool.shutdown(cancel_futures=True)


def visible_gpus() -> list[str]:
    """Names of the GPUs that jobs may use, as `CUDA_VISIBLE_DEVICES` has them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    if named and count:
        return [name.strip() for name in named.split(",")][:count]
    return [str(number) for number in range(count)]
