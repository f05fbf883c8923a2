"""Run the jobs of a study, several at a time, and collect what they left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from mor.config import MoRConfig
from mor.disk import lock, write_whole
from mor.errors import Interrupted, MorError
from mor.hf.modeling import MoRForCausalLM
from mor.run_files import EVAL, MODEL, SUMMARY
from mor.study.file import Job, Study, expand, more_seeds
from mor.study.worker import TASKS, is_scored, is_trained
from mor.train import Recipe, dump_recipe
from mor.train.run import with_branches

Tell = Callable[[str], None]
Record = dict[str, Any]


def run_study(
    study: Study,
    out: Path,
    *,
    scale: float = 1.0,
    workers: int | None = None,
    tell: Tell = lambda line: None,
) -> list[Record]:
    """Train and evaluate everything that is not there yet; returns a record for each run.

    Each job has a process and one CPU thread of its own, so that its time and memory are its own.
    A job that fails does not stop the others. Stopped by whatever, the same call goes on.

    Args:
        study: loaded.
        out: folder for `runs`, `jobs` (their recipes) and `logs`.
        scale: every budget is multiplied by it.
        workers: jobs at a time; default the number of cores.
        tell: called with a line when a job begins and ends.

    Raises:
        MorError: another process works on `out`; or jobs failed: those that did are named, and all
            others are done.
        Interrupted: Ctrl-C; the jobs at hand have saved what they had.
    """
    workers = workers or os.cpu_count() or 1
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(lock(out, f"another process works on the study in {out}"))
        first = expand(study, out, scale)
        failed = run_jobs(study, first, out, workers, tell)
        done = [job for job in first if job.name not in failed]
        second = []
        for row in study.rows:
            found = [job for job in done if job.row == row]
            if found and len(study.seeds_of(row)) > 1:
                best = min(found, key=lambda job: final_nll(job))
                second += more_seeds(study, row, best.point, out, scale)
        failed |= run_jobs(study, second, out, workers, tell)
    jobs = [*first, *second]
    if failed:
        names = ", ".join(failed)
        reason = next(iter(failed.values()))
        raise MorError(
            f"{len(failed)} of {len(jobs)} jobs failed ({names}), the first with: {reason}; the "
            f"others are done, and the same command tries again (logs are in {out / 'logs'})"
        )
    return collect(study, jobs)


def settings_of(study: Study) -> dict[str, Any]:
    """How runs are scored, for the worker and for telling whether one was scored so."""
    return study.evaluate.model_dump() | {"tasks": study.tasks, "questions": study.questions}


def run_jobs(
    study: Study, jobs: Sequence[Job], out: Path, workers: int, tell: Tell
) -> dict[str, str]:
    """Run jobs that are not done; returns the last line of those that failed, by name."""
    settings = settings_of(study)
    waiting = []
    for job in jobs:
        if _is_done(job.recipe, settings):
            tell(f"{job.name}: kept from before")
        else:
            waiting.append(job)
    failed: dict[str, str] = {}
    children: list[subprocess.Popen[bytes]] = []

    def run(numbered: tuple[int, Job]) -> None:
        number, job = numbered
        tell(f"[{number}/{len(waiting)}] {job.name}: begins")
        reason = _run_job(job, settings, out, children)
        if reason is not None:
            failed[job.name] = reason
        tell(f"[{number}/{len(waiting)}] {job.name}: {reason or _outcome(job)}")

    pool = ThreadPoolExecutor(workers)
    try:
        list(pool.map(run, enumerate(waiting, 1)))
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.terminate()  # as Ctrl-C: training saves a checkpoint and ends
        for child in children:
            child.wait()
        raise Interrupted("stopped; the same command goes on from what was saved") from None
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def _is_done(recipe: Recipe, settings: dict[str, Any]) -> bool:
    parts = with_branches(recipe)
    return all(is_trained(part) and is_scored(part, settings) for part in parts)


def _outcome(job: Job) -> str:
    return f"causal NLL {final_nll(job):.4f}"


def _run_job(
    job: Job, settings: dict[str, Any], out: Path, children: list[subprocess.Popen[bytes]]
) -> str | None:
    """Run one job to its end; None, or the last line that it said."""
    for folder in ("jobs", "logs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    recipe, log = out / "jobs" / f"{job.name}.yaml", out / "logs" / f"{job.name}.log"
    write_whole(recipe, dump_recipe(job.recipe))
    command = [sys.executable, "-m", "mor.study.worker", str(recipe), json.dumps(settings)]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    with log.open("wb") as file:
        child = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        children.append(child)
        status = child.wait()
        children.remove(child)
    if status == 0:
        return None
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit status {status}"


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
                    "summary": summary | {"shared_parameters": count_shared(run)},
                    "causal": scores["causal"],
                    "leaky": scores["leaky"],
                    "gap": scores["gap"],
                    "depth_cap": scores["depth_cap"],
                    "tasks": tasks,
                    "few_shot": few_shot(tasks),
                    "paper": said,
                }
            )
    return records


def count_shared(run: Path) -> int:
    """Parameters of the shared block of a finished run."""
    config = MoRConfig.from_pretrained(run / MODEL)
    with torch.device("meta"):
        model = MoRForCausalLM(config)
    return sum(weight.numel() for weight in model.model.block.parameters())


def few_shot(tasks: Mapping[str, Mapping[str, float]]) -> float | None:
    """Mean accuracy of the tasks in percent; None where there are none."""
    values = [scores["acc"] for scores in tasks.values() if "acc" in scores]
    return 100 * sum(values) / len(values) if values else None


def _read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record
