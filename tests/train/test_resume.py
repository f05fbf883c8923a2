"""A run that stops and goes on ends as if it had never stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mor.errors import MorError
from mor.train import Recipe, run, train
from mor.train.loop import Loop
from tests.tiny import tiny_recipe

WARM = {"router_capacity_warmup_steps": 7}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "expert_choice, warming up": ("expert_choice", WARM),
    "expert_choice, auxiliary router": ("expert_choice", {"router_objective": "aux_router"}),
    "threshold": ("threshold", WARM),
    "token_choice, loss-free": (
        "token_choice",
        {"router_balancing": "loss_free", "router_balance_warmup_steps": 2},
    ),
    "random": ("random", {}),
}


def weights(folder: Path) -> dict[str, bytes]:
    tensors = load_file(folder / "model" / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def entries(folder: Path) -> list[dict[str, Any]]:
    """The log without what a clock says."""
    clock = (
        "elapsed_s",
        "cpu_s",
        "tokens_per_s",
        "flops_per_s",
        "mfu",
        "peak_memory_bytes",
        "eval_runtime",
    )
    clock += ("eval_samples_per_second", "eval_steps_per_second")
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def as_if_killed(folder: Path, step: int) -> None:
    """What a power cut leaves after ``step`` was saved: more log, no model, half of a line."""
    shutil.rmtree(folder / "model")
    (folder / "summary.json").unlink()
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "los')


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_resuming_gives_the_same_bits(kind: str, data: Path, tmp_path: Path) -> None:
    router, model = KINDS[kind]
    # Three steps or so fill an epoch: the checkpoint lies within a later one.
    recipe = tiny_recipe(
        data,
        tmp_path,
        router,
        model,
        budget={"steps": 9},
        batch_size=4,
        save_steps=5,
        eval_steps=3,
        save_total_limit=9,
    )
    folder = train(recipe)
    assert entries(folder)[4]["epoch"] > 1
    expected, log = weights(folder), entries(folder)
    as_if_killed(folder, 5)
    train(recipe, resume=True)
    assert weights(folder) == expected
    assert entries(folder) == log
    lines = (folder / "log.jsonl").read_text().splitlines()
    counted = [json.loads(line)["elapsed_s"] for line in lines if "elapsed_s" in line]
    assert counted == sorted(counted)


def test_boundaries_and_bias_are_in_the_checkpoint(data: Path, tmp_path: Path) -> None:
    """Otherwise the tests above would compare zeros."""
    for kind, name in (("threshold", "boundary"), ("token_choice, loss-free", "bias")):
        router, model = KINDS[kind]
        recipe = tiny_recipe(data, tmp_path / name, router, model)
        tensor = load_file(train(recipe) / "model" / "model.safetensors")[f"model.router.{name}"]
        assert tensor.abs().max() > 0


def test_the_routers_step_is_the_trainers(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    before = Loop.learn_micro_batch

    def spy(self: Loop, *args: Any, **kwargs: Any) -> Any:
        seen.append((self.step, self.router.step))
        return before(self, *args, **kwargs)

    monkeypatch.setattr(Loop, "learn_micro_batch", spy)
    recipe = tiny_recipe(data, tmp_path, "threshold", save_steps=4, save_total_limit=9)
    folder = train(recipe)
    as_if_killed(folder, 4)
    train(recipe, resume=True)
    twice = [step for step in range(8) for _ in range(2)]  # two micro-batches
    assert seen == [(step, step) for step in [*twice, *twice[8:]]]


# What can be resumed, and what cannot ----------------------------------------------------------


@pytest.fixture
def stopped(data: Path, tmp_path: Path) -> Recipe:
    """A run with checkpoints at 3, 6 and 8 that never came to its end."""
    recipe = tiny_recipe(data, tmp_path, save_steps=3, save_total_limit=9)
    as_if_killed(train(recipe), 8)
    return recipe


def test_what_was_saved_last_need_not_be_trained(stopped: Recipe) -> None:
    """Killed between the last checkpoint and the model: only the model is written."""
    folder = stopped.run_dir
    train(stopped, resume=True)
    saved = load_file(folder / "checkpoints" / "checkpoint-8" / "model.safetensors")
    written = load_file(folder / "model" / "model.safetensors")
    assert all(written[name].equal(saved[name]) for name in saved)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 8
    assert summary["tokens_per_s"] > 0
    assert summary["eval_nll"] > 0


@pytest.mark.parametrize("left", [[], ["recipe.yaml.partial"]])
def test_killed_while_it_began(left: list[str], data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(data, tmp_path)
    recipe.run_dir.mkdir()
    for name in left:
        (recipe.run_dir / name).write_text("name: ti")
    train(recipe, resume=True)
    assert (recipe.run_dir / "model").is_dir()


def test_killed_while_it_was_replaced(data: Path, tmp_path: Path) -> None:
    """Half of a removed run is no run: neither resumed nor overwritten unasked."""
    recipe = tiny_recipe(data, tmp_path, save_steps=3)
    folder = train(recipe)
    as_if_killed(folder, 6)
    (folder / "recipe.yaml").unlink()
    with pytest.raises(MorError, match="holds no run to resume"):
        train(recipe, resume=True)
    with pytest.raises(MorError, match="already holds a run"):
        train(recipe)
    train(recipe, overwrite=True)


def test_nothing_to_resume(data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(data, tmp_path)
    with pytest.raises(MorError, match="holds no run to resume; start without --resume"):
        train(recipe, resume=True)
    assert not recipe.run_dir.exists()
    folder = train(recipe)
    with pytest.raises(MorError, match="holds a finished run; nothing is left to resume"):
        train(recipe, resume=True)
    expected = weights(folder)
    as_if_killed(folder, 0)
    train(recipe, resume=True)  # killed before its first checkpoint: from step 0
    assert weights(folder) == expected
    assert [entry["step"] for entry in entries(folder) if "loss" in entry] == list(range(1, 9))


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 0.5},
        {"batch_size": 4},
        {"gradient_accumulation_steps": 4},
        {"budget": {"steps": 9}},
        {"model": {"hidden_size": 32}},
        {"model": {"router_capacities": [1.0, 0.5, 0.5]}},
    ],
)
def test_another_recipe(changes: dict[str, Any], stopped: Recipe, data: Path) -> None:
    changed = tiny_recipe(
        data, stopped.output, **{"save_steps": 3, "save_total_limit": 9} | changes
    )
    name = next(iter(changes))
    name = f"model.{next(iter(changes['model']))}" if name == "model" else f"train.{name}"
    with pytest.raises(MorError, match=rf"begun with another recipe: {name}=.* was "):
        train(changed, resume=True)


def test_bookkeeping_may_change(stopped: Recipe, data: Path) -> None:
    changed = tiny_recipe(data, stopped.output, logging_steps=2, save_steps=4, eval_steps=4)
    train(changed, resume=True)


def test_the_batch_may_be_split_another_way(data: Path, tmp_path: Path) -> None:
    """What a run that ran out of memory is told to do: as many sequences per step, fewer at once.

    Expert choice selects per sequence and its losses are means, so nothing but rounding differs;
    the boundary alone is estimated per micro-batch.
    """
    fields = {"save_steps": 4, "save_total_limit": 9, "adam_epsilon": 1e-3}
    recipe = tiny_recipe(data, tmp_path, **fields)
    folder = train(recipe)
    whole = load_file(folder / "model" / "model.safetensors")
    as_if_killed(folder, 4)
    changed = tiny_recipe(data, tmp_path, **fields, batch_size=1, gradient_accumulation_steps=4)
    train(changed, resume=True)
    found = load_file(folder / "model" / "model.safetensors")
    assert any(not torch.equal(whole[name], found[name]) for name in whole)
    for name in whole.keys() - {"model.router.boundary"}:
        torch.testing.assert_close(found[name], whole[name], rtol=1e-4, atol=1e-5)


def test_another_number_of_processes(
    stopped: Recipe, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same recipe on twice the ranks is twice the batch, which no resumed run may have."""
    facts = run.digest_data
    manifest = stopped.run_dir / "checkpoints" / "checkpoint-8" / "manifest.json"
    content = json.loads(manifest.read_text())
    assert content["sequences_per_step"] == 4
    manifest.write_text(json.dumps(content | {"sequences_per_step": 8}))
    with pytest.raises(MorError, match="trained on 8 sequences per step, this run would take 4"):
        train(stopped, resume=True)
    manifest.write_text(json.dumps(content))
    monkeypatch.setattr(run, "digest_data", lambda packed: facts(packed)[::-1])
    with pytest.raises(MorError, match=r"other data than data\.path holds now"):
        train(stopped, resume=True)
