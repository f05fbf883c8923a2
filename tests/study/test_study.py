"""Studies: what a file asks for, runs that go on where they stopped, the report, the law."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mor import MoRForCausalLM
from mor.errors import MorError
from mor.study import builtin_studies, load_study, run_study, runs, tables, write_report
from mor.study.cost import plan_study
from mor.study.file import Study, expand, more_seeds
from mor.study.law import Point, fit_recurrence_law
from mor.study.plots import fit_optimum, isoflop_curves
from mor.study.runs import few_shot, settings_of
from mor.study.tables import comparison, grid_tables, law_points, law_table, whole_budgets
from mor.study.worker import is_scored, is_trained, main, work
from mor.train import dump_recipe
from mor.train.run import with_branches
from tests.strategies import small_config
from tests.tiny import prepare_tiny, tiny_fields


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_tiny(tmp_path_factory.mktemp("study"))


def tiny_study(data: Path, **changes: Any) -> dict[str, Any]:
    """A study of two rows, one with a grid and two seeds, one with a branch."""
    fields = tiny_fields(data, Path("unused"))
    base = {name: fields[name] for name in ("model", "data", "train")}
    base["train"] |= {"eval_sequences": 2, "logging_steps": 4}
    return {
        "title": "Tiny",
        "reference": "vanilla",
        "base": base,
        "evaluate": {"max_sequences": 2, "batch_size": 2},
        "rows": {
            "vanilla": {
                "model": {"num_recursions": 1, "router": "fixed"},
                "train": {"branches": [{"steps": 5}]},
                "paper": {"nll": [3.0, 2.0], "few_shot": 42.3},
            },
            "expert": {
                "grid": {"train.learning_rate": [1e-2, 1e-3]},
                "seeds": [0, 1],
                "paper": {"nll": 1.5},
            },
        },
    } | changes


def written(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture
def study(data: Path, tmp_path: Path) -> Study:
    return load_study(written(tmp_path, tiny_study(data)))


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


def test_the_worker_says_what_is_wrong(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = expand(study, tmp_path)[1].recipe
    gone = recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": tmp_path})})
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(gone))
    assert main([str(path), json.dumps(settings_of(study))]) == 2
    assert capsys.readouterr().err.startswith("error: ")


# Report -----------------------------------------------------------------------------------------


def record(row: str, nll: float, size: int = 100, **changes: Any) -> dict[str, Any]:
    summary = {
        "num_recursions": 2,
        "non_embedding_parameters": size,
        "shared_parameters": size // 2,
        "passes": 2.0,
        "tokens": 10,
        "train_flops": 1.0,
    }
    return {
        "row": row,
        "family": row,
        "seed": 0,
        "point": {},
        "budget": 0,
        "summary": summary | changes.pop("summary", {}),
        "causal": {"nll": nll, "mean_depth": 1.5},
        "gap": None,
        "few_shot": None,
        "paper": None,
    } | changes


def test_differences_stand_beside_the_papers(study: Study) -> None:
    records = [
        record("vanilla", 2.0, paper={"nll": 2.78}),
        record("expert", 1.8, seed=0, paper={"nll": 2.75}, gap=0.001),
        record("expert", 2.0, seed=1, paper={"nll": 2.75}, gap=0.003),
    ]
    table = comparison(study, records)
    line = dict(zip(table.columns, table.rows[1], strict=True))
    assert line["causal NLL"] == "1.9000"
    assert line["± sd"] == "0.1414"
    assert line["causal - leaky"] == "+0.0020"
    assert line["NLL - vanilla"] == "-0.1000"
    assert line["paper's"] == "-0.0300"
    assert line["few-shot %"] == line["time"] == "-"


def test_whole_budgets_stand_against_whole_budgets(study: Study) -> None:
    records = [
        record("vanilla", 2.0),
        record("expert", 2.4),
        record("expert", 1.9, budget=1),
    ]
    table = comparison(study, records)
    lines = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [line["NLL - vanilla"] for line in lines] == ["+0.0000", "-", "-0.1000"]
    assert whole_budgets([("vanilla", 0), ("expert", 0), ("expert", 1)]) == {
        "vanilla": 0,
        "expert": 1,
    }


def test_the_best_point_is_shown_and_every_point_listed(study: Study) -> None:
    field = "train.learning_rate"
    records = [
        record("expert", nll, point={field: rate}) for rate, nll in ((1e-2, 2.0), (1e-3, 1.5))
    ]
    assert comparison(study, records).rows[0][5] == "1.5000"
    (grid,) = grid_tables(study, records)
    assert grid.rows == [["0.001", "1.5000"], ["0.01", "2.0000"]]


def test_few_shot_is_the_mean_accuracy() -> None:
    scores = {"a": {"acc": 0.5, "acc_norm": 0.9}, "b": {"acc": 0.25}, "c": {"perplexity": 3.0}}
    assert few_shot(scores, list(scores)) == 37.5
    assert few_shot({}, []) is None
    assert few_shot(scores, ["a", "gone"]) is None
    # A group counts once, whatever its parts; the parts of ARC count as one.
    parts = {f"mmlu_{number}": {"acc": 0.1} for number in range(9)} | {"mmlu": {"acc": 0.1}}
    arc = {"arc_easy": {"acc": 0.6}, "arc_challenge": {"acc": 0.2}}
    asked = ["a", "mmlu", "arc_easy", "arc_challenge"]
    assert few_shot(scores | parts | arc, asked) == pytest.approx(100 * (0.5 + 0.1 + 0.4) / 3)


def test_optimum_of_a_curve() -> None:
    size, nll = fit_optimum([1e5, 1e6, 1e7], [3.0, 2.5, 3.0]) or (0.0, 0.0)
    assert size == pytest.approx(1e6)
    assert nll == pytest.approx(2.5)
    assert fit_optimum([1e5, 1e6, 1e7], [3.0, 2.5, 2.2]) is None  # it lies outside
    assert fit_optimum([1e5, 1e6], [3.0, 2.5]) is None
    records = [record("a", 3.0, 10), record("b", 2.0, 20), record("c", 1.0, 30)]
    for one in records[:2]:
        one["family"] = "x"
    assert isoflop_curves(records) == {("x", 0): ([10, 20], [3.0, 2.0])}


# The law ----------------------------------------------------------------------------------------


def synthetic(phi: float, tokens: tuple[float, ...], noise: float = 0.0) -> list[Point]:
    points = []
    for size in (1e6, 3e6, 1e7):
        for passes in (1, 2, 3):
            for amount in tokens:
                wobble = noise * (-1) ** len(points)
                effective = 0.2 * size + passes**phi * size
                nll = 1.7 + 400 * effective**-0.4 + 300 * amount**-0.35 + wobble
                points.append(Point(0.2 * size, size, passes, amount, nll))
    return points


@pytest.mark.parametrize("phi", [0.0, 0.46, 1.0])
def test_the_law_finds_a_known_exponent(phi: float) -> None:
    law = fit_recurrence_law(synthetic(phi, (1e6, 4e6, 1e7)))
    assert law.phi == pytest.approx(phi, abs=0.02)
    assert law.e == pytest.approx(1.7, abs=0.05)
    assert law.alpha == pytest.approx(0.4, abs=0.02)
    assert law.a == pytest.approx(400, rel=0.3)
    assert law.error < 1e-3


def test_the_law_at_equal_tokens_and_its_interval() -> None:
    law = fit_recurrence_law(synthetic(0.46, (1e7,), noise=1e-3), resamples=10)
    assert law.b == 0.0
    assert law.phi == pytest.approx(0.46, abs=0.05)
    assert law.interval is not None
    assert law.interval[0] <= law.phi + 0.02
    assert law.interval[1] >= law.phi - 0.02
    assert law.interval[1] - law.interval[0] < 0.5


def test_the_law_needs_loops_and_points() -> None:
    with pytest.raises(MorError, match=r"4 points, expected at least 5"):
        fit_recurrence_law(synthetic(0.5, (1e7,))[:4])
    flat = [point for point in synthetic(0.5, (1e6, 1e7, 1e8)) if point.passes == 2]
    with pytest.raises(MorError, match=r"same number of passes"):
        fit_recurrence_law(flat)
    with pytest.raises(MorError, match=r"0 points"):
        fit_recurrence_law([])


def test_passes_of_a_routed_model_are_the_mean(study: Study) -> None:
    routed = record("expert", 2.0, summary={"passes": 1.5})
    assert law_points([routed, record("plain", 2.0)]) == [
        Point(50, 50, 1.5, 10, 2.0),
        Point(50, 50, 2.0, 10, 2.0),
    ]
    assert law_table([routed]) is None


@pytest.mark.parametrize(
    ("fields", "passes"),
    [
        ({"router": "fixed"}, 3.0),  # though its configuration names capacities
        ({"router": "fixed", "router_fixed_depth": 2}, 2.0),
        ({"router": "threshold", "router_capacities": [1.0, 0.5, 0.1]}, 1.6),
        ({"router": "token_choice"}, 2.0),
    ],
)
def test_passes_are_those_that_the_router_runs(fields: dict[str, Any], passes: float) -> None:
    config = small_config(**fields)
    told = runs.describe_block(config)
    assert told["passes"] == pytest.approx(passes)
    layers = sum(weight.numel() for weight in MoRForCausalLM(config).model.block.parameters())
    assert told["shared_parameters"] == layers > 0


def test_seeds_are_no_further_points_of_the_law() -> None:
    four = synthetic(0.46, (1e7,))[:4]
    with pytest.raises(MorError, match=r"4 points, expected at least 5 .* that differ"):
        fit_recurrence_law([*four, *four, *four])
    # Most draws of five points out of five hold fewer than five different ones.
    assert fit_recurrence_law(synthetic(0.46, (1e7,))[:5], resamples=8).interval is None


def test_a_run_of_one_pass_counts_once_in_its_own_family(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def count(points: list[Point], resamples: int) -> None:
        counts.append(len(points))
        raise MorError("counted")

    monkeypatch.setattr(tables, "fit_recurrence_law", count)
    once = {"num_recursions": 1, "passes": 1.0}
    law_table([record("a", 3.0, family="x", summary=once), record("b", 2.0, family="x")])
    assert counts == [2]
