"""The memory estimate against measured peaks, and speeds from logs and probes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mor import MoRConfig, MoRForCausalLM
from mor.data import DataIndex
from mor.model.flops import count_parameters
from mor.train import train
from mor.train.plan.memory import estimate_memory, layer_bytes, loss_bytes
from mor.train.plan.probe import logged_speed, probe_speed
from tests.tiny import tiny_recipe

WIDTHS: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
MODELS: dict[str, dict[str, Any]] = {
    "vanilla": {"num_hidden_layers": 8},
    "recursive": {"num_recursions": 3, "num_recursion_layers": 2},
    "expert_choice": {"num_recursions": 3, "num_recursion_layers": 2, "router": "expert_choice"},
    "threshold": {"num_recursions": 3, "num_recursion_layers": 2, "router": "threshold"},
    "sharing": {
        "num_recursions": 3,
        "num_recursion_layers": 2,
        "router": "expert_choice",
        "kv_sharing": "recursive",
    },
}
BATCH, SEQ = 4, 192
# How far apart estimate and measurement may lie, either way.
FACTOR = 1.5


def measured_peak(config: MoRConfig, dtype: str, checkpointing: bool) -> float:
    """Peak bytes of a training step: what torch's allocator gave out, and what was there before."""
    model = MoRForCausalLM(config).train()
    model.model.gradient_checkpointing = checkpointing
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(config.vocab_size, (BATCH, SEQ))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(ids, labels=ids, use_cache=False, return_logits=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    kineto = found.profiler.kineto_results.events()  # type: ignore[union-attr]
    events = [(e.start_ns(), e.nbytes()) for e in kineto if e.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        now += change
        peak = max(peak, now)
    # Weights and AdamW's means were there already.
    return peak + 3 * 4 * count_parameters(config)[0]


@pytest.mark.parametrize(
    ("model", "dtype", "checkpointing"),
    [
        *((model, "float32", False) for model in MODELS),
        *((model, "float32", True) for model in ("vanilla", "expert_choice")),
        ("vanilla", "bfloat16", False),
        ("expert_choice", "bfloat16", True),
    ],
)
def test_memory_against_a_measured_peak(model: str, dtype: str, checkpointing: bool) -> None:
    config = MoRConfig(**WIDTHS | MODELS[model])
    estimate = estimate_memory(config, BATCH, SEQ, dtype, checkpointing).total
    peak = measured_peak(config, dtype, checkpointing)
    assert peak / FACTOR < estimate < peak * FACTOR
    # Activations dominate here, so that a wrong count of theirs would be seen.
    assert estimate > 1.5 * 16 * count_parameters(config)[0]


def test_the_parts() -> None:
    config = MoRConfig(**WIDTHS | MODELS["expert_choice"])
    memory = estimate_memory(config, 4, 192)
    count = count_parameters(config)[0]
    assert (memory.weights, memory.gradients, memory.optimiser) == (4 * count, 4 * count, 8 * count)
    assert list(memory.activations) == [
        "prelude", "recursion 0", "recursion 1", "recursion 2", "coda", "final norm",
    ]  # fmt: skip
    first, second, third = (memory.activations[f"recursion {d}"] for d in range(3))
    assert first > second > third
    layer = layer_bytes(config, half=False)
    assert layer == 4 * (6 * 128 + 3 * 128 + 4 * 384 + 4)
    assert memory.activations["prelude"] == 4 * 192 * layer
    # Twice the batch, twice what grows with it, and nothing else.
    double = estimate_memory(config, 8, 192)
    logits = 3 * 4 * 4 * 192 * 512
    assert double.loss == memory.loss + logits
    assert double.total - memory.total == pytest.approx(logits + sum(memory.activations.values()))
    half = estimate_memory(config, 4, 192, "bfloat16")
    assert sum(half.activations.values()) < 0.75 * sum(memory.activations.values())
    again = estimate_memory(config, 4, 192, gradient_checkpointing=True)
    assert sum(again.activations.values()) < 0.4 * sum(memory.activations.values())


def test_logits_in_chunks() -> None:
    config = MoRConfig(**WIDTHS)
    assert loss_bytes(config, 1000) == 4 * 512 * (3 * 1000 + 128)
    assert loss_bytes(config, 1000, chunk_tokens=100) == loss_bytes(config, 100)
    assert loss_bytes(config, 50, chunk_tokens=100) == loss_bytes(config, 50)


# Speed -----------------------------------------------------------------------------------------


def test_the_newest_log_of_the_same_recipe(data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(data, tmp_path, budget={"steps": 2})
    assert logged_speed(recipe) is None
    folder = train(recipe)
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-2])
    # Another length, another rate and another name are still the same recipe here.
    same = recipe.model_copy(update={"name": "other"})
    found = logged_speed(same)
    assert found is not None
    assert found.tokens_per_s == last["tokens_per_s"]
    assert f"{folder}, step 2" in found.source
    assert found.peak_memory_bytes == last["peak_memory_bytes"]
    longer = tiny_recipe(data, tmp_path, budget={"tokens": 1e6}, learning_rate=1e-4, seed=3)
    assert logged_speed(longer) == found
    for field in ({"batch_size": 3}, {"dtype": "bfloat16"}, {"gradient_checkpointing": True}):
        assert logged_speed(tiny_recipe(data, tmp_path, **field)) is None
    assert logged_speed(tiny_recipe(data, tmp_path, "threshold")) is None
    newer = train(same)
    stamp = (folder / "log.jsonl").stat().st_mtime + 10
    os.utime(newer / "log.jsonl", (stamp, stamp))
    (folder / "log.jsonl").write_text("{broken\n")
    found = logged_speed(recipe)
    assert found is not None
    assert str(newer) in found.source


@pytest.mark.parametrize("router", ["fixed", "threshold"])
def test_a_probe(router: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(data, tmp_path, router, model={"num_recursions": 2}, threads=1)
    index = DataIndex.load(data)
    config = recipe.model_config_for(index.vocab_size, index.eos_token_id)
    monkeypatch.setattr("mor.train.plan.probe._seconds", lambda work: (work(), 0.25)[1])
    found = probe_speed(recipe, config, rounds=2)
    # Two micro-batches of 2 x 16 tokens and one optimiser step, a quarter of a second each.
    assert found.tokens_per_s == pytest.approx(64 / 0.75)
    assert found.source == "probe of 2 steps on this CPU, 1 threads"
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert probe_speed(recipe, config, rounds=1).tokens_per_s == pytest.approx(4 * 64 / 0.75)
