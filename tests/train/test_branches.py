"""One run, several budgets: a branch is the run that had that budget from the start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mor.data import prepare
from mor.errors import MorError
from mor.train import Recipe, train
from mor.train.loop import Loop
from tests.tiny import SEQ_LEN, tiny_recipe, write_corpus

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "threshold": ("threshold", {"router_capacity_warmup_steps": 9}),
    "token_choice": ("token_choice", {"router_balancing": "loss_free"}),
    "random": ("random", {}),
    "aux_router": ("expert_choice", {"router_objective": "aux_router"}),
}
pytestmark = pytest.mark.slow
# Warm-up to step 2; the trunk cools down from 12 to 16, a branch of 12 steps from 9.
LONG = {"budget": {"steps": 16}, "warmup_steps": 2, "save_total_limit": 9}


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def named(recipe: Recipe, name: str) -> Recipe:
    return recipe.model_copy(update={"name": name})


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_branch_is_the_direct_run(kind: str, data: Path, tmp_path: Path) -> None:
    """Bit for bit: weights, router, data order, schedule, random states."""
    router, model = KINDS[kind]
    long = train(tiny_recipe(data, tmp_path, router, model, **LONG, save_steps=7))
    source = long / "checkpoints" / "checkpoint-7"
    short = LONG | {"budget": {"steps": 12}, "eval_steps": 4}
    direct = train(named(tiny_recipe(data, tmp_path, router, model, **short), "direct"))
    branch = named(
        tiny_recipe(data, tmp_path, router, model, **short, branch_from=source), "branch"
    )
    train(branch)
    assert weights(branch.run_dir) == weights(direct)
    assert weights(branch.run_dir) != weights(long)
    rates = [[e["learning_rate"] for e in log(r) if "loss" in e] for r in (branch.run_dir, direct)]
    assert rates[0] == rates[1]
    assert len(rates[0]) == 12
    assert rates[0][8:] == pytest.approx([0.01, 0.01, 0.02 / 3, 0.01 / 3])


@pytest.fixture(scope="module")
def trunk(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The long run, a checkpoint after each step; read only."""
    return train(tiny_recipe(data, tmp_path_factory.mktemp("trunk"), **LONG, keep_every=1))


def branch_of(trunk: Path, data: Path, output: Path, step: int = 7, **fields: Any) -> Recipe:
    source = trunk / "checkpoints" / f"checkpoint-{step}"
    fields = LONG | {"budget": {"steps": 12}, "branch_from": source} | fields
    return named(tiny_recipe(data, output, **fields), "branch")


def test_the_summary_says_where_it_came_from(trunk: Path, data: Path, tmp_path: Path) -> None:
    recipe = branch_of(trunk, data, tmp_path)
    found = json.loads((train(recipe) / "summary.json").read_text())
    whole = json.loads((trunk / "summary.json").read_text())
    assert found["branched_from"] == str(trunk / "checkpoints" / "checkpoint-7")
    assert found["branched_at_step"] == 7
    assert found["branch_changes"] == {}
    tokens = 2 * 2 * SEQ_LEN
    assert (found["steps"], found["tokens"], found["own_tokens"]) == (12, 12 * tokens, 5 * tokens)
    assert found["train_flops"] == pytest.approx(whole["train_flops"] * 12 / 16)
    assert found["own_flops"] == pytest.approx(whole["train_flops"] * 5 / 16)
    assert "branched_from" not in whole
    # The log begins with that of its source, so that a curve is whole.
    assert [entry["step"] for entry in log(recipe.run_dir) if "loss" in entry] == list(range(1, 13))
    assert found["wall_s"] > log(trunk)[6]["elapsed_s"]


def test_longer_than_planned(trunk: Path, data: Path, tmp_path: Path) -> None:
    """A budget may grow too, as long as the cool-down has not begun."""
    recipe = branch_of(trunk, data, tmp_path, step=12, budget={"steps": 20})
    direct = named(tiny_recipe(data, tmp_path, **LONG | {"budget": {"steps": 20}}), "direct")
    assert weights(train(recipe)) == weights(train(direct))


@pytest.mark.parametrize("router", ["threshold", "aux_router"])
def test_another_rate(
    router: str, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The way on after a loss that is no number. AdamW's step is proportional to the rate."""
    kind, model = KINDS[router]
    long = train(tiny_recipe(data, tmp_path, kind, model, **LONG, keep_every=1))
    fields = LONG | {"branch_from": long / "checkpoints" / "checkpoint-7", "learning_rate": 2e-3}
    recipe = named(tiny_recipe(data, tmp_path, kind, model, **fields, keep_every=1), "branch")
    train(recipe)
    assert "train.learning_rate=0.002 was 0.01" in capfd.readouterr().err
    rates = [entry["learning_rate"] for entry in log(recipe.run_dir) if "loss" in entry]
    assert rates[6:9] == pytest.approx([0.01, 0.002, 0.002])
    assert rates[-1] == pytest.approx(0.002 / 4)
    before = load_file(long / "checkpoints" / "checkpoint-7" / "model.safetensors")
    theirs = load_file(long / "checkpoints" / "checkpoint-8" / "model.safetensors")
    ours = load_file(recipe.run_dir / "checkpoints" / "checkpoint-8" / "model.safetensors")
    for name in before:
        if "boundary" not in name:
            step, other = ours[name] - before[name], theirs[name] - before[name]
            torch.testing.assert_close(step, other / 5, rtol=1e-3, atol=1e-6)
    changes = json.loads((recipe.run_dir / "summary.json").read_text())["branch_changes"]
    assert changes == {"train.learning_rate": 0.002}


@pytest.mark.parametrize("step", [2, 9])
def test_the_ends_of_the_stable_phase(step: int, trunk: Path, data: Path, tmp_path: Path) -> None:
    direct = named(tiny_recipe(data, tmp_path, **LONG | {"budget": {"steps": 12}}), "direct")
    assert weights(train(branch_of(trunk, data, tmp_path, step))) == weights(train(direct))


@pytest.mark.parametrize(
    ("step", "changes", "words"),
    [
        (1, {}, r"checkpoint-1 lies in the warm-up of its run, .* stable from step 2 to 12"),
        (13, {"budget": {"steps": 40}}, "checkpoint-13 lies in the cool-down of its run"),
        (10, {}, "checkpoint-10 lies past step 9, where a budget of 12 steps begins to cool down"),
        (7, {"warmup_steps": 8}, r"lies within the 8 steps of warm-up.*train\.warmup_steps=2"),
        (7, {"batch_size": 4}, "trained on 4 sequences per step, this run would take 8"),
        (7, {"dtype": "bfloat16"}, r"another recipe: train\.dtype='bfloat16' was 'float32'"),
        (7, {"seed": 1}, r"another recipe: train\.seed=1 was 0"),
        (7, {"model": {"hidden_size": 32}}, r"another recipe: model\.hidden_size=32 was 16"),
        (99, {}, r"must be RUN/checkpoints/checkpoint-N of a run"),
    ],
)
def test_what_does_not_fit(
    step: int, changes: dict[str, Any], words: str, trunk: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(MorError, match=words):
        train(branch_of(trunk, data, tmp_path, step, **changes))
    assert not list(tmp_path.iterdir())


def test_other_data(trunk: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", documents=11)
    prepare(corpus, tmp_path / "data", vocab_size=300, validation_fraction=0.2)
    with pytest.raises(MorError, match=r"trained on other data than data\.path holds now"):
        train(branch_of(trunk, tmp_path / "data", tmp_path))


def test_a_damaged_source(trunk: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(trunk, tmp_path / "trunk")
    (tmp_path / "trunk" / "checkpoints" / "checkpoint-7" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(MorError, match=r"checkpoint-7 is damaged: optimizer.pt has 0 bytes"):
        train(branch_of(tmp_path / "trunk", data, tmp_path))


def test_a_run_instead_of_a_checkpoint(trunk: Path, data: Path, tmp_path: Path) -> None:
    recipe = branch_of(trunk, data, tmp_path, branch_from=trunk)
    with pytest.raises(MorError, match=r"checkpoints: .*checkpoint-1, .*checkpoint-16"):
        train(recipe)


def test_a_branch_over_its_source(data: Path, tmp_path: Path) -> None:
    folder = train(tiny_recipe(data, tmp_path, **LONG, save_steps=7))
    recipe = named(branch_of(folder, data, tmp_path), "tiny")
    with pytest.raises(MorError, match="which it comes from; give it another name"):
        train(recipe, overwrite=True)
    assert (folder / "model").is_dir()


@pytest.mark.parametrize("save_steps", [None, 2])
def test_a_branch_resumes(
    save_steps: int | None,
    trunk: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From its own checkpoint, or anew from its source where it was stopped before its first."""
    direct = named(tiny_recipe(data, tmp_path, **LONG | {"budget": {"steps": 12}}), "direct")
    train(direct)
    recipe = branch_of(trunk, data, tmp_path, save_steps=save_steps)
    stop_at(10, monkeypatch)
    with pytest.raises(KeyError):
        train(recipe)
    train(recipe, resume=True)
    assert weights(recipe.run_dir) == weights(direct.run_dir)
    assert [entry["step"] for entry in log(recipe.run_dir) if "loss" in entry] == list(range(1, 13))


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, in the middle of a step, as a bug would."""
    before = Loop.learn_micro_batch
    todo = [step]

    def stopping(self: Loop, *args: Any, **kwargs: Any) -> Any:
        if todo and self.step == todo[0]:
            todo.pop()
            raise KeyError
        return before(self, *args, **kwargs)

    monkeypatch.setattr(Loop, "learn_micro_batch", stopping)
