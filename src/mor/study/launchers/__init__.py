"""Where the jobs of a study run: processes of this machine, SLURM, Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mor.errors import MorError, nearest
from mor.study.launchers.base import Launcher, Task, taking_sigterm
from mor.study.launchers.process import ProcessLauncher

__all__ = ["LAUNCHERS", "Launcher", "ProcessLauncher", "Task", "make_launcher", "taking_sigterm"]

LAUNCHERS = ("process", "slurm", "ray")


def make_launcher(
    name: str, out: Path, workers: int | None = None, options: Sequence[str] = ()
) -> Launcher:
    """The launcher of that name.

    Args:
        name: one of `LAUNCHERS`.
        out: folder of the study, on a file system that all machines share.
        workers: jobs at a time; None for one per core or GPU (process), no limit (slurm), or as
            many as the cluster has room for (ray).
        options: `KEY=VALUE`. Of slurm: options of sbatch, such as `partition=gpu`, or `exclusive`
            alone. Of ray: `address`, `num_cpus`, `num_gpus` of a job.

    Raises:
        MorError: no such launcher, an option that it does not take, or Ray is not installed.
    """
    if name == "process":
        if options:
            raise MorError(
                f"launcher_option={options[0]!r}: launcher=process takes no options; slurm and ray "
                "do"
            )
        return ProcessLauncher(workers)
    if name == "slurm":
        from mor.study.launchers.slurm import SlurmLauncher

        return SlurmLauncher(out, workers, options)
    if name == "ray":
        from mor.study.launchers.rays import RayLauncher

        return RayLauncher(workers, options)
    close = nearest(name, LAUNCHERS)
    hint = f"; did you mean {close}?" if close else ""
    raise MorError(f"launcher={name!r} must be one of: {', '.join(LAUNCHERS)}{hint}")
