"""Run the jobs of a study, several at a time, and collect what they left."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from mor.config import MoRConfig
from mor.disk import lock, write_whole
from mor.errors import MorError
from mor.eval.harness.run import open_tasks
from mor.hf.modeling import MoRForCausalLM
from mor.model.flops import active_fractions
from mor.run_files import EVAL, MODEL, SUMMARY
from mor.study.file import Job, Study, expand, more_seeds
from mor.study.launchers import Launcher, ProcessLauncher, Task, taking_sigterm
from mor.study.worker import TASKS, is_scored, is_trained
from mor.train import Recipe, dump_recipe
from mor.train.run import with_branches

# Not `-m`: importing the package imports the worker, and Python then warns of a second one.
_WORK = "import sys; from mor.study.worker import main; sys.exit(main(sys.argv[1:]))"

Tell = Callable[[str], None]
Record = dict[str, Any]


class StudyFailed(MorError):
    """Some jobs of a study failed, all others are done.

    Attributes:
        records: of what is done, as `run_study` returns them.
    """

    def __init__(self, message: str, records: list[Record]) -> None:
        super().__init__(message)
        self.records = records


def run_study(
    study: Study,
    out: Path,
    *,
    scale: float = 1.0,
    workers: int | None = None,
    tell: Tell = lambda line: None,
    launcher: Launcher | None = None,
) -> list[Record]:
    """Train and evaluate everything that is not there yet; returns a record for each run.

    Each job has a process and one CPU thread (or GPU) of its own, so that its time and memory are
    its own.
    A job that fails does not stop the others. Stopped by whatever, the same call goes on.

    Args:
        study: loaded.
        out: folder for `runs`, `jobs` (their recipes) and `logs`.
        scale: every budget is multiplied by it.
        workers: jobs at a time; default the number of GPUs, or of cores.
        tell: called with a line when a job begins and ends.
        launcher: where jobs run (:mod:`mor.study.launchers`), in place of processes here.

    Raises:
        MorError: another process works on `out`.
        StudyFailed: jobs failed: those that did are named, and all others are done.
        Interrupted: Ctrl-C or SIGTERM; the jobs at hand have saved what they had.
    """
    launcher = launcher or ProcessLauncher(workers)
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(lock(out, f"another process works on the study in {out}"))
        first = expand(study, out, scale)
        failed = run_jobs(study, first, out, launcher, tell)
        done = [job for job in first if job.name not in failed]
        second = []
        for row in study.rows:
            found = [job for job in done if job.row == row]
            if found and len(study.seeds_of(row)) > 1:
                best = min(found, key=lambda job: final_nll(job))
                second += more_seeds(study, row, best.point, out, scale)
        failed |= run_jobs(study, second, out, launcher, tell)
    jobs = [*first, *second]
    if failed:
        names = ", ".join(failed)
        reason = next(iter(failed.values()))
        raise StudyFailed(
            f"{len(failed)} of {len(jobs)} jobs failed ({names}), the first with: {reason}; the "
            f"others are done, and the same command tries again (logs are in {out / 'logs'})",
            collect(study, [job for job in jobs if job.name not in failed]),
        )
    return collect(study, jobs)


def settings_of(study: Study) -> dict[str, Any]:
    """How runs are scored, for the worker and for telling whether one was scored so."""
    how = {"sample": "spread"}  # runs that were scored on the first sequences are scored again
    return study.evaluate.model_dump() | how | {"tasks": study.tasks, "questions": study.questions}


def run_jobs(
    study: Study, jobs: Sequence[Job], out: Path, launcher: Launcher, tell: Tell
) -> dict[str, str]:
    """Run jobs that are not done; returns the last line of those that failed, by name.

    Raises:
        MorError: few-shot tasks are asked for that cannot be scored here.
    """
    settings = settings_of(study)
    waiting: dict[str, Job] = {}
    for job in jobs:
        if _is_done(job.recipe, settings):
            tell(f"{job.name}: kept from before")
        else:
            waiting[job.name] = job
    if waiting and study.tasks:  # before hours of training, not after
        open_tasks(study.tasks)
    failed: dict[str, str] = {}
    numbers = {name: f"[{number}/{len(waiting)}] " for number, name in enumerate(waiting, 1)}

    def began(task: Task) -> None:
        tell(f"{numbers[task.name]}{task.name}: begins")

    def ended(task: Task, reason: str | None) -> None:
        if reason is not None:
            failed[task.name] = reason
        outcome = reason or f"causal NLL {final_nll(waiting[task.name]):.4f}"
        tell(f"{numbers[task.name]}{task.name}: {outcome}")

    tasks = [make_task(job, settings, out) for job in waiting.values()]
    with taking_sigterm():
        launcher.run(tasks, began, ended, tell)
    for job in waiting.values():  # whatever a launcher says, files decide
        if job.name not in failed and not _is_done(job.recipe, settings):
            failed[job.name] = f"it ended, but {job.recipe.run_dir} is not finished"
    return failed


def _is_done(recipe: Recipe, settings: dict[str, Any]) -> bool:
    parts = with_branches(recipe)
    return all(is_trained(part) and is_scored(part, settings) for part in parts)


def make_task(job: Job, settings: dict[str, Any], out: Path) -> Task:
    """Write the recipe of a job; the command that trains and evaluates it."""
    for folder in ("jobs", "logs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    recipe, log = out / "jobs" / f"{job.name}.yaml", out / "logs" / f"{job.name}.log"
    write_whole(recipe, dump_recipe(job.recipe))
    words = (
        sys.executable, "-c", _WORK, str(recipe.resolve()), json.dumps(settings),
    )  # fmt: skip
    return Task(job.name, words, log)


def final_nll(job: Job) -> float:
    """Causal NLL (nats/token) of the job's whole budget."""
    path = with_branches(job.recipe)[0].run_dir / EVAL
    return float(json.loads(path.read_text(encoding="utf-8"))["causal"]["nll"])


def collect(study: Study, jobs: Sequence[Job]) -> list[Record]:
    """A record for each finished run, branches by rising budget: what it is, cost and scored."""
    records = []
    for job in jobs:
        parts = with_branches(job.recipe)
        paper = study.rows[job.row].paper
        found = [part for part in parts if (part.run_dir / EVAL).is_file()]
        summaries = [_read(part.run_dir / SUMMARY) for part in found]
        order = sorted(range(len(found)), key=lambda number: summaries[number]["train_flops"])
        for budget, number in enumerate(order):
            run, summary = found[number].run_dir, summaries[number]
            scores = _read(run / EVAL)
            tasks = _read(run / TASKS)["tasks"] if study.tasks else {}
            said = None if paper is None else paper.model_dump()
            if said is not None and isinstance(said["nll"], list):
                listed = said["nll"]
                said["nll"] = listed[budget] if budget < len(listed) else None
            records.append(
                {
                    "study": study.title,
                    "row": job.row,
                    "family": study.rows[job.row].family or job.row,
                    "seed": job.seed,
                    "point": dict(job.point),
                    "budget": budget,
                    "run": str(run),
                    "summary": summary | describe_block(MoRConfig.from_pretrained(run / MODEL)),
                    "causal": scores["causal"],
                    "leaky": scores["leaky"],
                    "gap": scores["gap"],
                    "depth_cap": scores["depth_cap"],
                    "tasks": tasks,
                    "few_shot": few_shot(tasks, study.tasks),
                    "paper": said,
                }
            )
    return records


def describe_block(config: MoRConfig) -> dict[str, float]:
    """Of the shared block: its parameters, and the passes of a token over it, their planned mean.

    A configuration names capacities whatever its router is; only routers that keep to them run so.
    """
    with torch.device("meta"):
        model = MoRForCausalLM(config)
    shared = sum(weight.numel() for weight in model.model.block.parameters())
    return {"shared_parameters": shared, "passes": sum(active_fractions(config))}


def few_shot(tasks: Mapping[str, Mapping[str, float]], asked: Sequence[str]) -> float | None:
    """Mean accuracy in percent of the tasks that were asked for; None where one has no score.

    A group such as `mmlu` counts once, though its parts are scored beside it. The two parts of ARC
    count as one, as in the paper. Tasks that have no accuracy are left out.
    """
    if not set(asked) <= set(tasks):
        return None
    parts: dict[str, list[float]] = {}
    for name in asked:
        if "acc" in tasks[name]:
            test = "arc" if name in ("arc_easy", "arc_challenge") else name
            parts.setdefault(test, []).append(tasks[name]["acc"])
    return 100 * statistics.mean(map(statistics.mean, parts.values())) if parts else None


def _read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record
