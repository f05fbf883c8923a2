"""Real runs of a few steps: what they leave behind, and what their log says."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.testing import assert_close

from mor.data import PackedDataset
from mor.errors import MorError
from mor.eval.passes import run_pass
from mor.folder.tokenizer import load_tokenizer
from mor.hf.load import load_model
from mor.model.flops import count_parameters
from mor.train import load_recipe, train
from mor.train.logs.log import ProgressBar
from mor.train.plan.budget import training_flops
from mor.train.step.optimiser import trapezoid
from tests.tiny import SEQ_LEN, prepare_tiny, tiny_recipe

TOKENS = 2 * 2 * SEQ_LEN  # of one step of the tiny recipe


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [entry for entry in log_of(folder) if "loss" in entry]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder).state_dict()


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run of 8 steps, with capacity warm-up; read only."""
    output = tmp_path_factory.mktemp("runs")
    model = {"router_capacity_warmup_steps": 4}
    rhythm = {"eval_steps": 3, "save_steps": 3, "decay_fraction": 0.5}
    return train(tiny_recipe(data, output, model=model, **rhythm))


def test_the_folder(run: Path, data: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names == {"model", "checkpoints", "recipe.yaml", "log.jsonl", "summary.json"}
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"checkpoint-6", "checkpoint-8"}
    assert load_recipe(run / "recipe.yaml").model["router_capacity_warmup_steps"] == 4
    model, tokenizer = load_model(run), load_tokenizer(run)
    assert len(tokenizer) <= model.config.vocab_size
    assert not list(run.rglob("*.partial"))


def test_the_log(run: Path) -> None:
    steps = steps_of(run)
    assert [entry["step"] for entry in steps] == list(range(1, 9))
    promised = {
        "loss",
        "lm_loss",
        "grad_norm",
        "learning_rate",
        "tokens",
        "flops",
        "elapsed_s",
        "cpu_s",
    }
    promised |= {"tokens_per_s", "peak_memory_bytes", "router/aux_loss", "router/mean_depth"}
    promised |= {"router/entropy", "router/max_vio", "router/dead_tokens"}
    promised |= {
        f"router/{name}/{depth}"
        for name in ("active_fraction", "accuracy", "boundary")
        for depth in range(3)
    }
    for entry in steps:
        assert promised <= set(entry)
        assert all(math.isfinite(value) for value in entry.values())
        assert entry["tokens"] == entry["step"] * TOKENS
        assert entry["loss"] == pytest.approx(entry["lm_loss"] + 0.001 * entry["router/aux_loss"])
        assert entry["tokens_per_s"] > 0
        assert entry["peak_memory_bytes"] > 2**20
        assert entry["router/active_fraction/0"] == 1
    elapsed = [entry["elapsed_s"] for entry in steps]
    assert elapsed == sorted(elapsed)
    # Capacity warm-up: at step 0 all run everything, from step 4 on two thirds and one third.
    assert steps[0]["router/active_fraction/2"] == 1
    assert steps[4]["router/active_fraction/1"] == 10 / 16
    assert steps[4]["router/active_fraction/2"] == 5 / 16


def test_flops_follow_the_warmup(run: Path) -> None:
    config = load_model(run).config
    spent = [TOKENS * training_flops(config, SEQ_LEN, step) for step in range(8)]
    flops = [entry["flops"] for entry in steps_of(run)]
    assert flops == pytest.approx([sum(spent[: n + 1]) for n in range(8)])
    assert spent[0] > spent[4] == spent[7]


def test_trapezoid(run: Path) -> None:
    """8 steps: 2 of warm-up from 0, 2 at the top, 4 down to 0 (which step 9 would have)."""
    rates = [entry["learning_rate"] for entry in steps_of(run)]
    assert rates == pytest.approx([0, 0.005, 0.01, 0.01, 0.01, 0.0075, 0.005, 0.0025])


@pytest.mark.parametrize("steps", range(1, 12))
@pytest.mark.parametrize("warmup", [0.0, 0.3, 0.5, 1.0])
def test_warmup_and_decay_never_overlap(steps: int, warmup: float, data: Path) -> None:
    section = tiny_recipe(data, data, warmup_fraction=warmup, decay_fraction=1 - warmup).train
    up, down = trapezoid(section, steps)
    assert up >= 0
    assert down >= 0
    assert up + down <= steps
    assert up == pytest.approx(warmup * steps, abs=0.5)


def test_evaluation_on_the_way(run: Path, data: Path) -> None:
    """Every eval_steps, and after the last step; the rule and the sample are ``mor eval``'s."""
    scores = {entry["step"]: entry["eval_nll"] for entry in log_of(run) if "eval_nll" in entry}
    assert list(scores) == [3, 6, 8]
    dataset = PackedDataset(data, "validation", SEQ_LEN)
    found = run_pass(load_model(run).eval(), dataset, 3, 3, "causal")
    assert found.nll == pytest.approx(scores[8], rel=1e-5)


def test_the_summary(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    config = load_model(run).config
    parameters = count_parameters(config)
    assert (summary["parameters"], summary["non_embedding_parameters"]) == parameters
    assert (summary["steps"], summary["tokens"]) == (8, 8 * TOKENS)
    assert summary["train_flops"] == steps_of(run)[-1]["flops"]
    assert summary["family"] == "mor"
    assert summary["capacities"] == config.router_capacities
    assert summary["wall_s"] == steps_of(run)[-1]["elapsed_s"]
    assert {"commit", "machine", "versions", "command", "seed", "dtype"} <= set(summary)


@pytest.mark.parametrize("router", ["fixed", "threshold", "token_choice"])
def test_the_loss_falls(router: str, data: Path, tmp_path: Path) -> None:
    folder = train(tiny_recipe(data, tmp_path, router, budget={"steps": 30}))
    losses = [entry["lm_loss"] for entry in steps_of(folder)]
    assert losses[0] == pytest.approx(math.log(300), abs=0.1)
    assert losses[-1] < losses[0] - 0.5


def test_the_last_step_is_logged_whatever_the_rhythm(data: Path, tmp_path: Path) -> None:
    folder = train(tiny_recipe(data, tmp_path, logging_steps=5))
    steps = steps_of(folder)
    assert [entry["step"] for entry in steps] == [5, 8]
    assert all("router/accuracy/0" in entry for entry in steps)


def test_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal one bar with loss, speed and time left; else a line every tenth."""
    monkeypatch.setenv("COLUMNS", "200")
    said = {}
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
        progress = ProgressBar("tiny", 40, console)
        progress.start(0)
        for step in range(1, 41):
            progress.advance(step)
            if step % 2 == 0:
                entry = {"step": step, "lm_loss": 9 - step / 10, "tokens_per_s": 1234.5}
                progress.show(entry)
        progress.show({"step": 40, "eval_loss": 3.0})
        progress.close()
        progress.close()
        said[terminal] = console.file.getvalue()
    assert "40/40" in said[True]
    assert "loss 5.000 · 1,234 tokens/s" in said[True]
    lines = said[False].splitlines()
    assert len(lines) == 10
    assert lines[0] == "tiny: step 4/40 · loss 8.600 · 1,234 tokens/s · 0 s left"
    assert lines[-1].startswith("tiny: step 40/40 · loss 5.000")


def test_tokens_budget(data: Path, tmp_path: Path) -> None:
    folder = train(tiny_recipe(data, tmp_path, budget={"tokens": 3 * TOKENS + 5}))
    assert json.loads((folder / "summary.json").read_text())["steps"] == 3


# Gradient accumulation -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def more_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_tiny(tmp_path_factory.mktemp("more"), documents=20, words=60)


@pytest.mark.parametrize("model", [{}, {"router_objective": "aux_router"}])
def test_any_split_into_micro_batches(
    model: dict[str, Any], more_data: Path, tmp_path: Path
) -> None:
    """1 x 8, 2 x 4 and 8 x 1 give the same weights: no term grows with accumulation."""
    model = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1} | model
    found, losses = [], []
    for size, accumulated in ((8, 1), (4, 2), (1, 8)):
        recipe = tiny_recipe(
            more_data,
            tmp_path / str(size),
            model=model,
            budget={"steps": 4},
            batch_size=size,
            gradient_accumulation_steps=accumulated,
            # Large enough that rounding errors of tiny gradients are not blown up to whole steps.
            adam_epsilon=1e-3,
        )
        folder = train(recipe)
        weights = weights_of(folder)
        # Where the boundary lies is estimated per micro-batch; no gradient reads it.
        found.append({k: v for k, v in weights.items() if "boundary" not in k})
        losses.append([(entry["loss"], entry["lm_loss"]) for entry in steps_of(folder)])
    for weights, loss in zip(found[1:], losses[1:], strict=True):
        assert_close(weights, found[0], rtol=1e-4, atol=1e-5)
        assert_close(torch.tensor(loss), torch.tensor(losses[0]), rtol=1e-4, atol=1e-5)


def test_every_step_sees_as_many_tokens(data: Path, tmp_path: Path) -> None:
    """An epoch that does not divide into steps is cut, so that no step is a smaller one."""
    sequences = len(PackedDataset(data, "train", SEQ_LEN))
    size = next(n for n in range(3, 9) if sequences % n)
    folder = train(
        tiny_recipe(
            data,
            tmp_path,
            budget={"steps": 2 * (sequences // size) + 1},
            batch_size=1,
            gradient_accumulation_steps=size,
        )
    )
    epochs = [entry["epoch"] for entry in steps_of(folder)]
    assert sum(epoch <= 1 for epoch in epochs) == sequences // size
    assert epochs[-1] > 2


# Options ---------------------------------------------------------------------------------------


def test_bfloat16(data: Path, tmp_path: Path) -> None:
    folder = train(tiny_recipe(data, tmp_path, "threshold", dtype="bfloat16"))
    plain = train(tiny_recipe(data, tmp_path / "plain", "threshold"))
    losses, exact = ([entry["lm_loss"] for entry in steps_of(f)] for f in (folder, plain))
    assert losses == pytest.approx(exact, abs=0.1)
    assert losses != exact
    assert next(iter(weights_of(folder).values())).dtype == torch.float32  # master weights


@pytest.mark.parametrize("router", ["expert_choice", "token_choice"])
def test_gradient_checkpointing_changes_nothing(router: str, data: Path, tmp_path: Path) -> None:
    plain = train(tiny_recipe(data, tmp_path / "plain", router))
    frugal = train(tiny_recipe(data, tmp_path / "frugal", router, gradient_checkpointing=True))
    assert_close(weights_of(frugal), weights_of(plain))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TensorBoard's own
def test_tensorboard(data: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(tiny_recipe(data, tmp_path, report_to=["tensorboard"], budget={"steps": 2}))
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/lm_loss")] == [1, 2]


def test_tensorboard_that_is_not_there(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MorError, match="tensorboard, which is not installed"):
        train(tiny_recipe(data, tmp_path, report_to=["tensorboard"]))
    assert not list(tmp_path.iterdir())
