"""A job array of SLURM: written, submitted, watched; found again by the same command."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mor.disk import write_whole
from mor.errors import Interrupted, MorError
from mor.study.launchers.base import Task, last_line

_OWN = ("array", "chdir", "output", "error", "job-name", "signal", "requeue", "open-mode", "wait")
_OPTION = re.compile(r"[a-z][a-z0-9-]*(=\S(.*\S)?)?")
PATIENCE = 20
"""Failures of squeue in a row before it is given up."""


class SlurmLauncher:
    """An array of jobs, each of which is told before its time limit, saves, and queues again.

    Args:
        out: folder of the study, on a file system that all nodes share.
        workers: jobs at a time; None for no limit.
        options: of sbatch, without dashes: `partition=gpu`, `gres=gpu:1`, `time=8:00:00`.
        seconds: between two looks at the queue.

    Raises:
        MorError: an option that is none, or that this launcher sets itself.
    """

    def __init__(
        self,
        out: Path,
        workers: int | None = None,
        options: Sequence[str] = (),
        seconds: float = 30,
    ) -> None:
        for option in options:
            if not _OPTION.fullmatch(option) or "\n" in option:
                raise MorError(
                    f"launcher_option={option!r} must be an option of sbatch without dashes, such "
                    "as partition=gpu"
                )
            name = option.partition("=")[0]
            if name in _OWN:
                raise MorError(
                    f"launcher_option={option!r}: the study sets {name} itself; leave it out"
                )
        self.folder, self.workers = out.resolve() / "slurm", workers
        self.options, self.seconds = list(options), seconds

    def run(
        self,
        tasks: Sequence[Task],
        began: Callable[[Task], None],
        ended: Callable[[Task, str | None], None],
        tell: Callable[[str], None],
    ) -> None:
        """See :class:`mor.study.launchers.base.Launcher`; jobs submitted before are waited for.

        Raises:
            MorError: sbatch is not there (the script is written all the same), or refuses.
        """
        if not tasks:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = self.folder / "job.json"
        if kept.is_file():
            before = json.loads(kept.read_text(encoding="utf-8"))
            self._watch(str(before["id"]), tell)
            kept.unlink()
            tasks = [task for task in tasks if _status(self.folder, task) != 0]
        if not tasks:
            return
        script = self.folder / "array.sh"
        write_whole(script, self.script(tasks))
        script.chmod(0o755)
        if shutil.which("sbatch") is None:
            raise MorError(
                f"launcher='slurm': sbatch is not on PATH; {script} is written: submit it where "
                "SLURM runs, and give the same command again when its jobs have ended"
            )
        for task in tasks:
            (self.folder / f"{task.name}.status").unlink(missing_ok=True)
        submitted = subprocess.run(
            ["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False
        )
        if submitted.returncode:
            said = (submitted.stderr or submitted.stdout).strip().splitlines()
            raise MorError(f"sbatch refused {script}: {said[-1] if said else 'no reason given'}")
        job = submitted.stdout.strip().splitlines()[-1].partition(";")[0]
        write_whole(kept, json.dumps({"id": job, "tasks": [task.name for task in tasks]}) + "\n")
        for task in tasks:
            began(task)
        self._watch(job, tell)
        kept.unlink()
        for task in tasks:
            status = _status(self.folder, task)
            if status == 0:
                ended(task, None)
            elif status is None:
                ended(task, f"SLURM ended it without an exit status: {last_line(task.log)}")
            else:
                ended(task, last_line(task.log, status))

    def script(self, tasks: Sequence[Task]) -> str:
        """The script for sbatch: a case for each task."""
        limit = "" if self.workers is None else f"%{self.workers}"
        lines = [
            "#!/bin/bash",
            "#SBATCH --job-name=mor-study",
            f"#SBATCH --array=0-{len(tasks) - 1}{limit}",
            f"#SBATCH --chdir={shlex.quote(str(Path.cwd()))}",
            "#SBATCH --output=" + shlex.quote(f"{self.folder}/%A_%a.log"),
            "#SBATCH --open-mode=append",
            "#SBATCH --requeue",
            "#SBATCH --signal=USR1@120",
            *(f"#SBATCH --{option}" for option in self.options),
            "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}",
            "case $SLURM_ARRAY_TASK_ID in",
        ]
        for number, task in enumerate(tasks):
            status = self.folder / f"{task.name}.status"
            lines.append(
                f"{number}) log={shlex.quote(str(task.log.resolve()))} "
                f"status={shlex.quote(str(status))}; set -- {shlex.join(task.command)} ;;"
            )
        lines += [
            "*) echo no such task: $SLURM_ARRAY_TASK_ID; exit 1 ;;",
            "esac",
            'srun "$@" >"$log" 2>&1',
            "ended=$?",
            "# Told to stop before the time limit, a training has saved a checkpoint: queue again.",
            'if [ $ended -eq 130 ]; then scontrol requeue "$SLURM_JOB_ID"; exit 130; fi',
            'echo $ended >"$status"',
            "exit $ended",
        ]
        return "\n".join(lines) + "\n"

    def _watch(self, job: str, tell: Callable[[str], None]) -> None:
        """Wait until no task of the array is queued or runs."""
        tell(f"SLURM job {job}: waiting for it (squeue --job {job} shows it)")
        failures = 0
        try:
            while True:
                seen = subprocess.run(
                    ["squeue", "--noheader", "--job", job],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if seen.returncode and "nvalid job id" not in seen.stderr:
                    failures += 1  # the controller may be away for a moment
                    if failures >= PATIENCE:
                        said = seen.stderr.strip().splitlines()
                        raise MorError(
                            f"squeue does not answer for SLURM job {job}: "
                            f"{said[-1] if said else seen.returncode}; the same command looks again"
                        )
                elif seen.returncode or not seen.stdout.strip():
                    return
                else:
                    failures = 0
                time.sleep(self.seconds)
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped watching; SLURM job {job} goes on (scancel {job} ends it), and the same "
                "command waits for it again"
            ) from None
        except FileNotFoundError:
            raise MorError(
                f"squeue is not on PATH, and SLURM job {job} may still run; give the command where "
                "SLURM runs"
            ) from None


def _status(folder: Path, task: Task) -> int | None:
    """The exit status that a task has left; None where it has left none."""
    try:
        return int((folder / f"{task.name}.status").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
