"""Devices and types: everything but the GPU itself, which the test machine has not."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mor.bench import serve
from mor.bench.bound import Work, seconds_per_token
from mor.bench.checks import Checks
from mor.bench.device import parse_device, parse_dtype
from mor.bench.forced import bench_config, bench_model, depths_of_tokens
from mor.bench.serve import run_serve
from mor.bench.systems import EngineSystem
from mor.cli.app import app
from mor.config.choices import default_capacities
from mor.engine.memory import free_memory
from mor.errors import MorError
from tests.bench.test_bound import flat_rates
from tests.bench.test_serve import row, settings

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "serving.py"


def test_devices_and_types_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_device("cpu").type == "cpu"
    assert parse_dtype("bfloat16") == torch.bfloat16
    for word in ("gpu", "mps", "cuda:x", ""):
        with pytest.raises(MorError, match=f"device='{word}' is not known; use cpu, cuda"):
            parse_device(word)
    with pytest.raises(MorError, match="dtype='half' is not known; use one of: float32, bfloat16"):
        parse_dtype("half")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MorError, match="device='cuda', but torch sees no GPU"):
        parse_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parse_device("cuda:1").index == 1
    with pytest.raises(MorError, match="device='cuda:2', but there are 2 GPUs"):
        parse_device("cuda:2")


def test_the_command_refuses_8_bits_beside_another_type() -> None:
    for words, match in (
        (["--int8", "--dtype", "bfloat16"], "int8: .* not bfloat16 on cpu; leave --int8 out"),
        (["--dtype", "float64"], "dtype='float64'"),
        (["--device", "tpu"], "device='tpu'"),
    ):
        with pytest.raises(MorError, match=match):
            CliRunner().invoke(
                app, ["bench", "serve", "--preset", "tiny", *words], catch_exceptions=False
            )


def test_tokens_are_compared_in_float32_and_timed_in_the_type_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[tuple[str, torch.dtype]] = []
    right_check, right_run = serve.check_ours, EngineSystem.run

    def checked(system: EngineSystem, sample: Any) -> Any:
        seen.append(("check", system.model.dtype))
        return right_check(system, sample)

    def ran(system: EngineSystem, workload: Any) -> Any:
        found = right_run(system, workload)
        assert system._engine is not None
        seen.append(("run", system._engine[1].store.pool.keys.dtype))
        return found

    monkeypatch.setattr(serve, "check_ours", checked)
    monkeypatch.setattr(EngineSystem, "run", ran)
    lines: list[str] = []
    out = tmp_path / "out.jsonl"
    asked = settings(("vanilla", "mor3", "mor3:int8", "fake"), rounds=1)
    wide = run_serve(settings(("vanilla",), rounds=1))
    seen.clear()
    found = run_serve(replace(asked, dtype=torch.bfloat16, out=out), lines.append)
    single, half = torch.float32, torch.bfloat16
    # Each is checked and answers once for that; then each is warmed and timed.
    assert seen == [("check", single), ("run", single)] * 2 + [("run", half)] * 4
    assert any("compared in float32" in line and "bfloat16" in line for line in lines)
    assert set(found.left_out) == {"mor3:int8", "fake"}
    assert "need the CPU kernels and float32" in found.left_out["mor3:int8"]
    assert "peers run in float32 on the CPU" in found.left_out["fake"]
    assert set(found.rates) == {"bfloat16"}
    kept = [json.loads(line) for line in out.read_text().splitlines()][:-1]
    assert [(one["device"], one["dtype"]) for one in kept] == [("cpu", "bfloat16")] * 2
    assert row(found, "vanilla")["kv_bytes"] * 2 == row(wide, "vanilla")["kv_bytes"]
    assert row(wide, "vanilla")["dtype"] == "float32"


def test_exits_stay_forced_in_bfloat16() -> None:
    config = bench_config("tiny", 4)
    model = bench_model(config)
    model.to(torch.bfloat16)
    wanted = depths_of_tokens(config, 0, default_capacities(4))
    ids = torch.arange(config.vocab_size).reshape(4, -1)
    assert torch.equal(model(ids, use_cache=False, routing="causal").depths, wanted[ids])


def test_entries_are_priced_at_their_width() -> None:
    config = bench_config("tiny", 2)
    rates, work = flat_rates(config, {1: 1.0, 128: 1.0}), Work((1.0, 0.5), 10.0, 0.0)
    wide = seconds_per_token(config, work, rates, 1, 1)
    half = seconds_per_token(config, work, replace(rates, itemsize=2), 1, 1)
    assert half["attention"] * 2 == wide["attention"]
    assert half["block"] == wide["block"]
    assert replace(rates, itemsize=2).better(rates).itemsize == 2


def test_memory_that_torch_keeps_is_free_for_the_next_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    assert free_memory(torch.device("cuda")) == 140


def test_the_script_checks_every_router_and_kv_mode(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--device", "cpu", "--checks-only"])
    script = runpy.run_path(str(SCRIPT))
    monkeypatch.setitem(script["main"].__globals__, "NEW", 3)
    script["main"]()
    assert capsys.readouterr().out.count("ok engine") == 32  # stages once static, once plain


def test_the_script_stops_at_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path(str(SCRIPT))
    right = script["reference_tokens"]

    def wrong(*arguments: Any) -> list[int]:
        return [*right(*arguments)[:-1], -1]

    monkeypatch.setitem(script["check_output"].__globals__, "reference_tokens", wrong)
    with pytest.raises(MorError, match="generate writes"):
        script["check_engine"](torch.device("cpu"), False, "threshold", "none")


def test_all_checks_run_and_those_that_failed_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    checks, ran = Checks(), []

    def check(name: str, right: bool) -> None:
        ran.append(name)
        if not right:
            raise MorError(f"{name} is off")

    for name, right in (("one", True), ("two", False), ("three", True), ("four", False)):
        checks.run(name, check, name, right=right)
    assert ran == ["one", "two", "three", "four"]
    out = capsys.readouterr().out
    assert "ok one\n" in out
    assert "wrong two: MorError: two is off" in out
    with pytest.raises(SystemExit, match=r"2 checks failed, so nothing is timed:\n  two\n  four"):
        checks.finish()
    Checks().finish()
