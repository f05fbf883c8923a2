"""A depth cap for every step: in the network, in the plan, in the log, and over a resume."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor.errors import MorError
from mor.hf.load import load_model
from mor.train import RecipeError, plan_budget, train
from mor.train.plan.budget import PlannedFlops, training_flops
from mor.train.plan.depth import DepthSchedule, first_difference
from mor.train.recipe.sections import Budget, TrainSection
from tests.strategies import small_config
from tests.tiny import SEQ_LEN, tiny_recipe

TOKENS = 2 * 2 * SEQ_LEN
GROW = [[0.25, 1], [0.5, 2], [0.25, 3]]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


@pytest.mark.parametrize("router", ["fixed", "expert_choice", "threshold", "token_choice"])
def test_steps_run_as_deep_as_they_may(router: str, data: Path, tmp_path: Path) -> None:
    folder = train(tiny_recipe(data, tmp_path, router, depth_schedule=GROW))
    steps = steps_of(folder)
    assert [entry["depth_cap"] for entry in steps] == [1, 1, 2, 2, 2, 2, 3, 3]
    for entry in steps:
        ran = [entry[f"router/active_fraction/{depth}"] > 0 for depth in range(3)]
        if router in ("fixed", "expert_choice"):
            assert ran == [depth < entry["depth_cap"] for depth in range(3)]
        assert not any(ran[entry["depth_cap"] :])
        assert entry["router/mean_depth"] <= entry["depth_cap"]
    config = load_model(folder).config
    caps = [entry["depth_cap"] for entry in steps]
    spent = [TOKENS * training_flops(config, SEQ_LEN, n, cap) for n, cap in enumerate(caps)]
    assert steps[-1]["flops"] == pytest.approx(sum(spent))
    assert json.loads((folder / "summary.json").read_text())["train_flops"] == steps[-1]["flops"]


def test_a_cap_of_all_recursions_changes_nothing(data: Path, tmp_path: Path) -> None:
    runs = [
        train(tiny_recipe(data, tmp_path / str(n), "threshold", depth_schedule=schedule))
        for n, schedule in enumerate((None, [[1.0, 3]]))
    ]
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]


@given(
    steps=st.integers(1, 300),
    shares=st.lists(st.integers(1, 9), min_size=1, max_size=4),
)
def test_every_step_has_its_cap(steps: int, shares: list[int]) -> None:
    parts = [(share / sum(shares), cap) for cap, share in enumerate(shares, 1)]
    caps = DepthSchedule(parts, 4).caps(steps)
    assert len(caps) == steps
    assert (np.diff(caps) >= 0).all()
    for share, cap in parts:
        assert (caps == cap).sum() == pytest.approx(share * steps, abs=1)


def test_random_caps_depend_on_the_step_alone() -> None:
    schedule = DepthSchedule("random", 3, seed=5)
    caps = schedule.caps(3000)
    assert (caps[:100] == schedule.caps(100)).all()
    assert (caps != DepthSchedule("random", 3, seed=6).caps(3000)).any()
    counts = np.bincount(caps, minlength=4)
    assert counts[0] == 0
    assert counts[1:] == pytest.approx([1000, 1000, 1000], abs=120)
    # Neighbours do not go together: nine pairs, each about as often.
    pairs = np.bincount(3 * (caps[:-1] - 1) + caps[1:] - 1, minlength=9)
    assert pairs == pytest.approx([333] * 9, abs=80)


@pytest.mark.parametrize("schedule", [GROW, [[0.5, 3], [0.5, 1]], [[0.3, 1], [0.7, 3]], "random"])
@pytest.mark.parametrize("warmup", [0, 6])
def test_a_budget_in_flops_knows_the_caps(schedule: Any, warmup: int) -> None:
    config = small_config("expert_choice", router_capacity_warmup_steps=warmup)
    parts = schedule if schedule == "random" else [tuple(part) for part in schedule]
    depth = DepthSchedule(parts, config.num_recursions, 1)

    def spent(steps: int) -> float:
        flops = PlannedFlops(config, 16, 64, depth.caps(steps))
        return flops.until(steps)

    full = PlannedFlops(config, 16, 64).until(40)
    plan = plan_budget(Budget(flops=full), config, 16, 64, depth)
    assert plan.steps > 40  # cheaper steps, more of them
    assert plan.flops == pytest.approx(spent(plan.steps))
    assert spent(plan.steps) <= full < spent(plan.steps + 1)
    assert plan_budget(Budget(steps=9), config, 16, 64, depth).flops == pytest.approx(spent(9))
    assert plan_budget(Budget(tokens=640), config, 16, 64, depth).steps == 10
    with pytest.raises(RecipeError, match="does not pay for one step"):
        plan_budget(Budget(flops=10.0), config, 16, 64, depth)


@pytest.mark.parametrize("schedule", [GROW, "random"])
def test_resuming_gives_the_same_bits(schedule: Any, data: Path, tmp_path: Path) -> None:
    fields = {"depth_schedule": schedule, "save_steps": 3, "save_total_limit": 9}
    recipe = tiny_recipe(data, tmp_path, "threshold", **copy.deepcopy(fields))
    folder = train(recipe)
    expected = (folder / "model" / "model.safetensors").read_bytes()
    caps = [entry["depth_cap"] for entry in steps_of(folder)]
    shutil.rmtree(folder / "model")
    (folder / "summary.json").unlink()
    for step in (6, 8):
        shutil.rmtree(folder / "checkpoints" / f"checkpoint-{step}")
    other = tiny_recipe(data, tmp_path, "threshold", **fields | {"depth_schedule": [[1.0, 2]]})
    with pytest.raises(MorError, match=r"another recipe: train\.depth_schedule="):
        train(other, resume=True)
    train(recipe, resume=True)
    assert (folder / "model" / "model.safetensors").read_bytes() == expected
    assert [entry["depth_cap"] for entry in steps_of(folder)] == caps


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ([[0.5, 1], [0.4, 2]], r"depth_schedule.*the shares add up to 0\.9; they must add up to 1"),
        ([[1.0, 4]], r"depth_schedule caps depth at 4; model\.num_recursions=3 allows 1 to 3"),
        ([[1.0, 0]], "depth_schedule"),
        ([[0.0, 1], [1.0, 2]], "depth_schedule"),
        ("shallow", "depth_schedule"),
    ],
)
def test_schedules_that_cannot_be(schedule: Any, words: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        tiny_recipe(data, tmp_path, depth_schedule=schedule)


def section_of(schedule: Any) -> TrainSection:
    fields = {"budget": {"steps": 9}, "depth_schedule": schedule}
    return TrainSection.model_validate(fields)


def test_where_two_runs_part() -> None:
    """Caps by share of the run: a shorter one changes sooner. Random caps never part."""
    grow, free, drawn = section_of([[0.5, 1], [0.5, 3]]), section_of(None), section_of("random")
    assert first_difference(grow, 16, grow, 12, 6) is None
    assert first_difference(grow, 16, grow, 12, 7) == 6
    assert first_difference(drawn, 16, drawn, 12, 12) is None
    assert first_difference(free, 16, free, 12, 12) is None
    assert first_difference(grow, 16, free, 16, 1) == 0


@pytest.mark.slow
def test_branches_know_the_caps(data: Path, tmp_path: Path) -> None:
    """With random caps a branch is the direct run; with shares it is refused, before anything."""
    fields = {"budget": {"steps": 16}, "branches": [{"steps": 12}]}
    refused = tiny_recipe(data, tmp_path, **fields, depth_schedule=[[0.5, 1], [0.5, 3]])
    with pytest.raises(RecipeError, match=r"12 steps has other depth caps than one of 16"):
        train(refused)
    assert not list(tmp_path.iterdir())
    train(tiny_recipe(data, tmp_path, **fields, depth_schedule="random"))
    alone = {"budget": {"steps": 12}, "warmup_steps": 3, "depth_schedule": "random"}
    direct = train(tiny_recipe(data, tmp_path / "direct", **alone))
    branch = tmp_path / "tiny-12"
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (branch, direct)]
    assert weights[0] == weights[1]
