"""`mor eval DIR --tasks`: lm-eval on a model of ours, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mor.errors import MorError, missing_package

TASKS = Path(__file__).parent / "tasks"

PAPER = ("lambada_openai", "hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge", "mmlu")
"""The tasks of the paper's table, from the hub; ARC counts as the mean of its two parts."""


def local_tasks() -> list[str]:
    """The names of the tasks that need no hub."""
    return sorted(path.stem for path in TASKS.glob("mor_*.yaml"))


def need_harness() -> None:
    """Raise `MorError` where lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise missing_package("few-shot tasks need", "lm-eval", "eval")


def choose_tasks(names: str) -> list[str]:
    """`a,b` as a list; `local` is all tasks without a hub, `paper` the paper's.

    Raises:
        MorError: no name.
    """
    groups = {"local": local_tasks(), "paper": list(PAPER)}
    chosen = [
        task for name in names.split(",") for task in groups.get(name.strip(), [name.strip()])
    ]
    if not all(chosen):
        raise MorError(
            f"tasks={names!r} must be names joined by commas, such as local, paper or "
            f"{local_tasks()[0]}"
        )
    return list(dict.fromkeys(chosen))


def open_tasks(tasks: Sequence[str], metadata: dict[str, str] | None = None) -> Any:
    """lm-eval's manager of tasks, which knows all of these.

    Raises:
        MorError: lm-eval is not installed, or a task is not known.
    """
    need_harness()
    from lm_eval.tasks import TaskManager

    # Looking through lm-eval's own ten thousand files takes seconds.
    ours = set(tasks) <= set(local_tasks())
    manager = TaskManager(include_path=str(TASKS), include_defaults=not ours, metadata=metadata)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise MorError(
            f"task {unknown[0]!r} is not known; without a hub there are {', '.join(local_tasks())}"
        )
    return manager


def run_tasks(
    model: str | Path,
    tasks: Sequence[str],
    *,
    data: str | Path | None = None,
    engine: bool = False,
    batch_size: int = 16,
    num_fewshot: int | None = None,
    limit: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run tasks of lm-eval and return its scores by task.

    Args:
        model: a model folder, a run folder, or the name of a model that ships.
        tasks: names that lm-eval knows, or of :func:`local_tasks`.
        data: a prepared folder, for the tasks made from held-out text.
        engine: see `mor.eval.harness.lm.MorLM`, as for `options`.
        batch_size: rows at a time.
        num_fewshot: examples before each question; default the task's.
        limit: questions of each task; default all.

    Returns:
        `{task: {metric: value, ..., "samples": number}}`; a standard error has the name of its
        metric and `_stderr`.

    Raises:
        MorError: lm-eval is not installed, a task is not known, or data is missing.
    """
    metadata = {"pretrained": str(model)} | ({"data": str(data)} if data else {})
    manager = open_tasks(tasks, metadata)
    from lm_eval import simple_evaluate

    from mor.eval.harness.lm import MorLM

    lm = MorLM(str(model), engine=engine, batch_size=batch_size, **options)
    found = simple_evaluate(
        lm,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=0,
        metadata=metadata,
    )
    counts = found["n-samples"]
    return {
        task: {
            name.removesuffix(",none"): value
            for name, value in scores.items()
            if isinstance(value, float | int) and not isinstance(value, bool)
        }
        | ({"samples": counts[task]["effective"]} if task in counts else {})
        for task, scores in found["results"].items()
    }
