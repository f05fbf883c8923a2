"""Model FLOPs utilisation: the table, the measured peak, what the log says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mor import MoRConfig
from mor.hf.load import load_model
from mor.model.flops import flops_per_token
from mor.train import train
from mor.train.plan.budget import training_flops
from mor.train.plan.mfu import FlopsMeter, measured_peak, peak_flops, peak_of
from tests.tiny import SEQ_LEN, tiny_recipe

BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("name", "bf16", "tf32", "f32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0, 156.0, 19.5),
        ("NVIDIA A100 80GB PCIe", 312.0, 156.0, 19.5),
        ("NVIDIA H100 80GB HBM3", 989.4, 494.7, 66.9),
        ("NVIDIA H100 PCIe", 756.0, 378.0, 51.0),
        ("NVIDIA H100 NVL", 835.5, 417.5, 60.0),
        ("NVIDIA H200", 989.4, 494.7, 66.9),
        ("NVIDIA GH200 480GB", 989.4, 494.7, 66.9),
        ("NVIDIA L40S", 362.0, 183.0, 91.6),
        ("NVIDIA L4", 121.0, 60.0, 30.3),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6, 82.6),
        ("NVIDIA A10", 125.0, 62.5, 31.2),
    ],
)
def test_known_gpus(name: str, bf16: float, tf32: float, f32: float) -> None:
    found = [peak_of(name, BF16), peak_of(name, F32, tf32=True), peak_of(name, F32)]
    assert found == pytest.approx([bf16 * 1e12, tf32 * 1e12, f32 * 1e12])


@pytest.mark.parametrize("name", ["NVIDIA A10G", "NVIDIA L40", "NVIDIA GeForce RTX 3090 Ti", "x"])
def test_gpus_that_only_look_alike(name: str) -> None:
    assert peak_of(name, BF16) is None


def test_float32_on_a_gpu_depends_on_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    assert peak_flops(F32) == 19.5e12
    assert peak_flops(BF16) == 312e12
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert peak_flops(F32) == 156e12
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_cpu_is_measured_once() -> None:
    measured_peak.cache_clear()
    first = measured_peak(F32, 1, seconds=0.01)
    assert 1e8 < first < 1e14
    assert measured_peak(F32, 1, seconds=0.01) == first
    assert measured_peak.cache_info().misses == 1


def test_planned_flops_over_time() -> None:
    meter = FlopsMeter(MoRConfig(), 16, 10, lambda step: 100.0 * step, peak=50.0)
    # A session that began after step 4: its FLOPs alone, by its time alone.
    assert meter.read(6, 2, 8.0, {}) == {"flops_per_s": 25.0, "mfu": 0.5}
    assert meter.read(8, 4, 10.0, {}) == {"flops_per_s": 40.0, "mfu": 0.8}
    unknown = FlopsMeter(MoRConfig(), 16, 10, lambda step: 100.0 * step, peak=None)
    assert unknown.read(1, 1, 1.0, {}) == {"flops_per_s": 100.0}


def test_token_choice_is_counted_by_its_load() -> None:
    config = MoRConfig(num_recursions=2, num_recursion_layers=1, router="token_choice")
    meter = FlopsMeter(config, 16, 10, lambda step: 1.0, peak=None)
    load = {"router/active_fraction/0": 1.0, "router/active_fraction/1": 0.25}
    one = flops_per_token(config, 16, [1.0, 0.25]).training
    assert meter.read(3, 3, 2.0, load)["flops_per_s"] == pytest.approx(30 * one / 2)
    planned = FlopsMeter(
        MoRConfig(num_recursions=2, router="expert_choice"), 16, 10, lambda step: 7.0 * step, None
    )
    assert planned.read(3, 3, 2.0, load)["flops_per_s"] == 10.5


def test_the_log(data: Path, tmp_path: Path) -> None:
    folder = train(tiny_recipe(data, tmp_path, budget={"steps": 3}, peak_flops=1e9))
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in lines if "loss" in entry]
    one = training_flops(load_model(folder).config, SEQ_LEN)
    for entry in steps:
        assert entry["flops_per_s"] == pytest.approx(one * entry["tokens_per_s"], rel=1e-6)
        assert entry["mfu"] == pytest.approx(entry["flops_per_s"] / 1e9)
    assert json.loads((folder / "summary.json").read_text())["mfu"] == steps[-1]["mfu"]


def test_the_log_knows_the_cpus_peak(data: Path, tmp_path: Path) -> None:
    folder = train(tiny_recipe(data, tmp_path, budget={"steps": 1}, peak_flops=None))
    entry = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    peak = peak_flops(F32)
    assert peak
    assert entry["mfu"] == pytest.approx(entry["flops_per_s"] / peak)
