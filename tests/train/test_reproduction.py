"""The paper's runs as recipes: steps, plans without data, what they cost, and how they start."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from mor.cli.plan import planned_parts
from mor.train import load_recipe
from tools import paper_recipes

ROOT = Path(__file__).resolve().parents[2]


def test_recipes_and_costs_are_those_of_the_cost_model() -> None:
    for path, text in paper_recipes.files().items():
        assert path.read_text(encoding="utf-8") == text, "run: python tools/paper_recipes.py"
    page = paper_recipes.PAGE.read_text(encoding="utf-8")
    assert paper_recipes.page_text(page) == page, "run: python tools/paper_recipes.py"
    # The published numbers.
    assert load_recipe("paper/135m-expert-3").train.budget.steps == 36326
    assert re.search(r"`paper/135m-expert-3` \| 42M \| 36,326 \| .* 2\.9490 \|", page)
    for row in paper_recipes.ROWS:
        published = load_recipe(f"paper/360m-{row}").train.budget.steps
        assert abs(paper_recipes.steps_of("360m", row)[-1] - published) <= 2


def test_budgets_of_a_row_are_one_run_with_branches_before_the_data_is_there(
    tmp_path: Path,
) -> None:
    changes = [f"data.path={tmp_path / 'absent'}"]
    parts = planned_parts(load_recipe("paper/budgets/1.7b-expert-3", changes))
    assert [part.train.budget.steps for part in parts] == [3102, 376, 940]
    # Warm-up is 5% of the smallest budget in all, each branch begins before its own cool-down.
    assert {part.train.warmup_steps for part in parts} == {19}
    starts = [part.train.branch_from.name for part in parts[1:] if part.train.branch_from]
    assert starts == ["checkpoint-301", "checkpoint-752"]


@pytest.fixture
def fakes(tmp_path: Path) -> dict[str, str]:
    """Commands on PATH that say what they were called with; srun ends as FAKE_STATUS says."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("mor", "torchrun", "srun", "scontrol"):
        (folder / name).write_text(
            f'#!/bin/bash\n[ "$1" = show ] && echo node7 && exit\necho {name} "$@"\n'
            + ("exit ${FAKE_STATUS:-0}\n" if name == "srun" else "")
        )
        (folder / name).chmod(0o755)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


def launch(folder: Path, size: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", f"examples/reproduce/{size}.sh", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("size", ["135m", "360m", "730m", "1.7b"])
def test_launcher_scripts(size: str, tmp_path: Path, fakes: dict[str, str]) -> None:
    dry = launch(tmp_path, size, "--dry-run", **fakes).stdout.splitlines()
    assert dry == [f"mor train paper/{size}-{row} --dry-run" for row in paper_recipes.ROWS]
    here = launch(tmp_path, size, "vanilla", "--set", "a=1", **fakes, GPUS="2").stdout
    wanted = f"-m mor.cli train paper/{size}-vanilla --set a=1"
    assert here.strip() == f"torchrun --standalone --nproc-per-node 2 {wanted}"


def test_a_job_that_was_stopped_goes_back_into_the_queue(
    tmp_path: Path, fakes: dict[str, str]
) -> None:
    folder = tmp_path / "runs/paper-135m-recursive-2"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").touch()  # begun before
    job = fakes | {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[7-8]"}
    job |= {"SLURM_ARRAY_TASK_ID": "1", "FAKE_STATUS": "130"}
    stopped = launch(tmp_path, "135m", **job)
    assert stopped.stdout.splitlines()[-1] == "scontrol requeue 7"
    assert "mor paper/135m-recursive-2 --resume" in stopped.stdout
    assert stopped.returncode == 130
    failed = launch(tmp_path, "135m", **(job | {"FAKE_STATUS": "1"}))
    assert "requeue" not in failed.stdout
    assert failed.returncode == 1
    (folder / "summary.json").touch()
    done = launch(tmp_path, "135m", **job)
    assert done.stdout.strip() == "runs/paper-135m-recursive-2 is finished"
