"""Studies: what a file asks for, runs that go on where they stopped, the report, the law."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mor.errors import MorError
from mor.study import builtin_studies, load_study, run_study, runs, write_report
from mor.study.cost import plan_study
from mor.study.file import Study, expand, more_seeds
from mor.study.runs import settings_of
from mor.study.worker import is_scored, is_trained, main, work
from mor.train import dump_recipe
from mor.train.run import with_branches
from tests.study.studies import tiny_study, written


def test_rounds_of_jobs(study: Study, tmp_path: Path) -> None:
    first = expand(study, tmp_path, scale=2)
    assert [job.name for job in first] == [
        "vanilla-seed-0",
        "expert-learning_rate-0.01-seed-0",
        "expert-learning_rate-0.001-seed-0",
    ]
    assert first[0].recipe.train.budget.steps == 16
    assert first[0].recipe.train.branches[0].steps == 10
    assert first[2].recipe.train.learning_rate == 1e-3
    assert first[2].recipe.model["router"] == "expert_choice"
    assert first[0].recipe.run_dir == tmp_path / "runs" / "vanilla-seed-0"
    second = more_seeds(study, "expert", {"train.learning_rate": 1e-3}, tmp_path)
    assert [job.name for job in second] == ["expert-learning_rate-0.001-seed-1"]
    assert second[0].recipe.train.seed == 1
    assert more_seeds(study, "vanilla", {}, tmp_path) == []
    # Budgets of a row's own are scaled once, however many jobs are made of it.
    again = expand(study, tmp_path, scale=2)[0].recipe.train
    assert (again.budget.steps, again.branches[0].steps) == (16, 10)


def test_plan_counts_what_is_trained(study: Study, tmp_path: Path) -> None:
    costs = {cost.name: cost for cost in plan_study(study, tmp_path)}
    assert len(costs) == 4
    trunk = costs["vanilla-seed-0"]
    # 8 steps of 4 sequences of 16; the branch trains its cool-down alone, a quarter of its 5 steps.
    assert trunk.runs == 2
    assert trunk.tokens == pytest.approx((8 + 1) * 64, abs=1)
    assert costs["expert-learning_rate-0.01-seed-1"].tokens == 8 * 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": {}}, r"rows=\{\}: .*at least 1 item"),
        ({"titel": "x"}, r"titel is not a field"),
        ({"reference": "dense"}, r"reference='dense' must be one of the rows: vanilla, expert"),
        ({"seeds": []}, r"seeds=\[\]: .*at least 1 item"),
        ({"evaluate": {"batch_size": 0}}, r"evaluate\.batch_size=0: .*greater than or equal to 1"),
        ({"rows": {"a": {"grid": {"x": []}}}}, r"rows\.a\.grid\.x=\[\]: .*at least 1 item"),
    ],
)
def test_wrong_files(data: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MorError, match=message):
        load_study(written(tmp_path, tiny_study(data) | {"reference": None} | changes))


def test_wrong_rows_and_names(data: Path, tmp_path: Path) -> None:
    wrong = tiny_study(data, reference=None, rows={"odd": {"train": {"learning_rat": 1}}})
    with pytest.raises(MorError, match=r"row odd: train\.learning_rat is not a field"):
        expand(load_study(written(tmp_path, wrong)), tmp_path)
    twice = {"seeds": [1, 1]}, {"grid": {"train.learning_rate": [0.1, 1e-1]}}
    for row in twice:
        again = tiny_study(data, reference=None, rows={"odd": row})
        with pytest.raises(MorError, match=r"row odd makes odd.*-seed-\d twice; seeds and grid"):
            expand(load_study(written(tmp_path, again)), tmp_path)
    seeded = tiny_study(data, reference=None, rows={"odd": {"grid": {"train.seed": [1, 2]}}})
    with pytest.raises(MorError, match=r"row odd: train\.seed=1 must be left out; use seeds"):
        expand(load_study(written(tmp_path, seeded)), tmp_path)
    with pytest.raises(MorError, match=r"study 'smok' does not exist; did you mean smoke\?"):
        load_study("smok")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(MorError, match=r"list\.yaml must hold a mapping of title, base, rows"):
        load_study(tmp_path / "list.yaml")


@pytest.mark.parametrize("name", builtin_studies())
def test_studies_that_come_along_are_right(name: str, data: Path, tmp_path: Path) -> None:
    study = load_study(name, [f"base.data.path={data}", "base.data.seq_len=64"])
    jobs = expand(study, tmp_path)
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        job.recipe.model_config_for(300, 0)


def test_main_rows_have_the_parameters_of_the_goal(data: Path, tmp_path: Path) -> None:
    study = load_study("main", [f"base.data.path={data}", "base.data.seq_len=64"])
    sizes = {cost.row: cost.parameters for cost in plan_study(study, tmp_path)}
    assert sizes["expert-2"] <= 0.55 * sizes["vanilla"]


# Runs -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_study_from_start_to_report(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = settings_of(study)
    jobs = expand(study, out) + more_seeds(study, "expert", {"train.learning_rate": 1e-2}, out)
    for job in jobs:
        work(job.recipe, settings)
    best = min(jobs[1:3], key=runs.final_nll).point
    if best != jobs[3].point:
        work(more_seeds(study, "expert", best, out)[0].recipe, settings)
    trunk, branch = with_branches(jobs[0].recipe)
    assert is_trained(trunk)
    assert is_scored(branch, settings)
    assert not is_scored(branch, settings | {"max_sequences": 1})
    before = (branch.run_dir / "eval.json").stat().st_mtime_ns
    work(jobs[0].recipe, settings)  # nothing is left to do
    assert (branch.run_dir / "eval.json").stat().st_mtime_ns == before

    lines: list[str] = []
    records = run_study(study, out, workers=2, tell=lines.append)
    assert len(lines) == 4
    assert all(line.endswith("kept from before") for line in lines)
    vanilla = [record for record in records if record["row"] == "vanilla"]
    assert [record["budget"] for record in vanilla] == [0, 1]
    assert [record["paper"]["nll"] for record in vanilla] == [3.0, 2.0]  # the smallest first
    assert vanilla[0]["summary"]["train_flops"] < vanilla[1]["summary"]["train_flops"]
    assert vanilla[0]["summary"]["shared_parameters"] > 0

    page = write_report(study, records, out / "report")
    names = {path.name for path in page.parent.iterdir()}
    assert names == {"results.jsonl", "report.md", "rows.png", "index.html"}
    text = (page.parent / "report.md").read_text()
    assert "| expert | 1 | 2 |" in text  # two seeds at the best point
    assert "## Grid of expert" in text
    results = (page.parent / "results.jsonl").read_text().splitlines()
    assert len(results) == len(records) == 5
    assert page.read_text().count("<tr>") == 1 + 3 + 1 + 2


def test_a_job_that_was_stopped_goes_on(study: Study, tmp_path: Path) -> None:
    recipe = expand(study, tmp_path)[1].recipe
    recipe.run_dir.mkdir(parents=True)  # killed before its first checkpoint
    (recipe.run_dir / "recipe.yaml").write_text(dump_recipe(recipe))
    work(recipe, settings_of(study))
    assert is_trained(recipe)
    # What decides no weight may change; what does is told rather than mixed.
    other = {"logging_steps": 3, "learning_rate": 0.5}
    quiet, loud = (
        recipe.model_copy(update={"train": recipe.train.model_copy(update={name: value})})
        for name, value in other.items()
    )
    assert is_trained(quiet)
    with pytest.raises(
        MorError, match=r"another recipe: train\.learning_rate=0\.5 was 0\.01; give"
    ):
        work(loud, settings_of(study))


@pytest.mark.slow
def test_a_job_that_fails_leaves_the_others(study: Study, tmp_path: Path) -> None:
    class Unlucky:
        """Runs jobs here, but one."""

        def run(self, tasks: Any, began: Any, ended: Any, tell: Any) -> None:
            for task in tasks:
                began(task)
                failed = "0.001" in task.name
                ended(task, "error: no luck" if failed or main(list(task.command[3:])) else None)

    message = r"1 of 4 jobs failed \(expert-learning_rate-0\.001-seed-0\), .* error: no luck; "
    with pytest.raises(runs.StudyFailed, match=message) as failure:
        run_study(study, tmp_path, launcher=Unlucky())
    page = write_report(study, failure.value.records, tmp_path / "report").read_text()
    assert "vanilla" in page
    assert "0.001" not in page  # the point that failed
    trained = {path.parent.name for path in (tmp_path / "runs").glob("*/eval.json")}
    assert "expert-learning_rate-0.01-seed-1" in trained  # the best point of those that ran
    assert len(trained) == 4  # the branch too


def test_tasks_that_cannot_be_scored_are_told_before_training(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Never:
        def run(self, *_: Any) -> None:
            raise AssertionError("a training began")

    monkeypatch.setattr("mor.eval.harness.run.find_spec", lambda name: None)
    wanted = study.model_copy(update={"tasks": ["mor_gloss"]})
    with pytest.raises(MorError, match="few-shot tasks need the package lm-eval"):
        run_study(wanted, tmp_path, launcher=Never())


def test_the_worker_says_what_is_wrong(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = expand(study, tmp_path)[1].recipe
    gone = recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": tmp_path})})
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(gone))
    assert main([str(path), json.dumps(settings_of(study))]) == 2
    assert capsys.readouterr().err.startswith("error: ")
