"""Tasks of Ray, each with a GPU or a core of its own."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from mor.errors import Interrupted, MorError, missing_package
from mor.study.launchers.base import Task, start, wait

_OPTIONS = ("address", "num_cpus", "num_gpus")


class RayLauncher:
    """Every job is a Ray task that runs the command in a process.

    All nodes need mor in the same place, and the folder of the study on a shared file system.

    Args:
        workers: jobs at a time; None: as many as the cluster has room for.
        options: `address=auto` (default: a cluster named by RAY_ADDRESS, else this machine alone),
            `num_cpus=1`, `num_gpus=1` (default where the cluster has GPUs) of a job.

    Raises:
        MorError: Ray is not installed, or an option is not known or no number.
    """

    def __init__(self, workers: int | None = None, options: Sequence[str] = ()) -> None:
        self.workers, self.options = workers, _parse(options)
        try:
            self.ray: Any = import_module("ray")
        except ImportError:
            raise missing_package("launcher='ray' needs", "ray", "ray") from None

    def run(
        self,
        tasks: Sequence[Task],
        began: Callable[[Task], None],
        ended: Callable[[Task, str | None], None],
        tell: Callable[[str], None],
    ) -> None:
        """See :class:`mor.study.launchers.base.Launcher`.

        Raises:
            MorError: the cluster cannot be reached, or has no room for a single job.
        """
        if not tasks:
            return
        ray, own = self.ray, not self.ray.is_initialized()
        if own:
            try:
                ray.init(address=self.options.get("address"), log_to_driver=False)
            except (ConnectionError, RuntimeError, ValueError) as error:
                named = self.options.get("address", "")
                said = " ".join(str(error).split())[:200]
                raise MorError(f"launcher_option='address={named}': no Ray there: {said}") from None
        try:
            self._run(tasks, began, ended, tell)
        finally:
            if own:
                ray.shutdown()

    def _run(
        self,
        tasks: Sequence[Task],
        began: Callable[[Task], None],
        ended: Callable[[Task, str | None], None],
        tell: Callable[[str], None],
    ) -> None:
        ray, there = self.ray, self.ray.cluster_resources()
        gpus = self.options.get("num_gpus", 1.0 if there.get("GPU", 0) >= 1 else 0.0)
        needs = {"num_cpus": self.options.get("num_cpus", 1.0), "num_gpus": gpus}
        for need, name in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
            if needs[need] > there.get(name, 0):
                raise MorError(
                    f"launcher_option='{need}={needs[need]:g}': the cluster has "
                    f"{there.get(name, 0):g} {name}s, so no job would ever run"
                )
        # A job whose node dies is tried again, and goes on from its checkpoint.
        call = ray.remote(max_retries=3, **needs)(run_command)
        waiting, running = list(tasks), dict[Any, Task]()
        try:
            while waiting or running:
                while waiting and (self.workers is None or len(running) < self.workers):
                    task = waiting.pop(0)
                    began(task)
                    running[call.remote(task.command, str(task.log.resolve()))] = task
                (done,), _ = ray.wait(list(running), num_returns=1)
                task = running.pop(done)
                try:
                    ended(task, ray.get(done))
                except ray.exceptions.RayError as error:
                    ended(task, " ".join(str(error).split())[:200])
        except KeyboardInterrupt:
            for reference in running:
                ray.cancel(reference)
            with contextlib.suppress(Exception):  # they end with a checkpoint
                ray.wait(list(running), num_returns=len(running), timeout=120)
            raise Interrupted("stopped; the same command goes on from what was saved") from None


def run_command(command: Sequence[str], log: str) -> str | None:
    """In a worker of Ray: run a job to its end; None, or why it failed."""
    path = Path(log)
    return wait(start(command, path, {}), path)


def _parse(options: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for option in options:
        key, _, text = option.partition("=")
        if key not in _OPTIONS or not text:
            raise MorError(
                f"launcher_option={option!r}: launcher=ray takes {', '.join(_OPTIONS)}, "
                "as KEY=VALUE"
            )
        try:
            found[key] = text if key == "address" else float(text)
        except ValueError:
            found[key] = math.nan
        if key != "address" and not 0 <= found[key] < math.inf:
            raise MorError(f"launcher_option={option!r} must be a number of 0 or more")
    return found
