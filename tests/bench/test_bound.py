from __future__ import annotations

import pytest

from mor.bench.bound import Work, bounds, flops, kv_bytes_read, seconds_per_token, work_of
from mor.bench.forced import bench_config
from mor.bench.rates import Rates, head_shape, layer_shapes, measure_rates
from mor.bench.trace import Run
from mor.bench.workload import Ask, Workload
from mor.config import MoRConfig
from mor.config.choices import default_capacities


def flat_rates(config: MoRConfig, seconds: dict[int, float]) -> Rates:
    """Every layer takes the same time."""
    shapes = [*layer_shapes(config), head_shape(config)]
    forms = {shape: dict.fromkeys(seconds, "plain") for shape in shapes}
    return Rates({shape: dict(seconds) for shape in shapes}, forms, 1e9, 1)


@pytest.mark.parametrize(
    ("shape", "recursions", "layers", "ratio"),
    [("135m", 3, 30, 1.27), ("360m", 3, 32, 1.37), ("360m", 4, 34, 1.45)],
)
def test_the_relative_bound_is_that_of_the_papers_shapes(
    shape: str, recursions: int, layers: int, ratio: float
) -> None:
    vanilla, mor = bench_config(shape, layers=layers), bench_config(shape, recursions)
    routed = Work(tuple(default_capacities(recursions)), 1.0, 0.0)
    found = flops(vanilla, Work((1.0,), 1.0, 0.0)) / flops(mor, routed)
    assert found == pytest.approx(ratio, abs=0.006)


def test_work_of_a_run() -> None:
    config = bench_config("tiny", 3)
    workload = Workload("w", (Ask((1, 2), 3), Ask((1,) * 4, 1)), 2)
    work = work_of(config, workload, [1, 2, 3, 3])
    assert work.shares == (1.0, 0.75, 0.5)
    assert work.mean_depth == 2.25
    assert work.context == (2 + 3 + 4 + 4) / 4
    assert work.prompts == 6 / 4
    assert work_of(config, workload, []).shares == (1.0, 1.0, 1.0)


def test_entries_are_those_of_every_depth_visited() -> None:
    config = bench_config("tiny", 2)  # 1 + 3 x 2 + 1 layers, one head of 64
    entry = 2 * 64 * 4
    assert kv_bytes_read(config, Work((1.0, 0.5), 10.0, 0.0)) == entry * 10 * (2 + 3 * 1.25)
    config.kv_sharing = "recursive"
    assert kv_bytes_read(config, Work((1.0, 0.5), 10.0, 0.0)) == entry * 10 * (2 + 3 * 1.5)


def test_seconds_add_up_by_layer_and_row() -> None:
    config = bench_config("tiny", 2)
    rates = flat_rates(config, {1: 1.0, 8: 4.0, 16: 16.0})
    work = Work((1.0, 0.5), 0.0, 0.0)
    parts = seconds_per_token(config, work, rates, 16, 4)
    assert parts["block"] == 1.5 * 3 * 4 * 0.5  # 8 rows are the best of those up to 16
    assert parts["prelude_coda"] == 2 * 4 * 1.0  # of those up to 4 there is 1 only
    assert parts["head"] == 1.0
    own = seconds_per_token(config, work, rates, 12, 4.5, own_sizes=True)
    assert own["block"] == pytest.approx(1.5 * 3 * 4 * 10.0 / 12)  # between 8 and 16 linearly
    assert own["head"] == pytest.approx(2.5 / 4.5)


def test_rates_beyond_what_was_measured() -> None:
    rates = flat_rates(bench_config("tiny"), {2: 1.0, 8: 2.0})
    shape = layer_shapes(bench_config("tiny"))[0]
    assert rates.at(shape, 1) == 1.0
    assert rates.at(shape, 16) == 4.0
    assert rates.per_row(shape, 1) == 0.5


def test_bounds_of_a_run() -> None:
    config = bench_config("tiny", 2)
    rates = flat_rates(config, {1: 1e-3, 4: 2e-3, 128: 1.0})
    workload = Workload("w", (Ask((1,), 4),) * 4, 4)
    counters = {"tokens_per_tick": 2.5, "tokens_per_gathering": 1.0}
    run = Run(0, 1, (), 4, depths=(1, 2, 1, 2), counters=counters)
    found = bounds(config, workload, run, rates, True)
    assert found["own_bound"] < found["bound"]
    parts = [found[name] for name in found if name.startswith("bound_")]
    assert found["bound"] == pytest.approx(1 / sum(parts))
    assert "own_bound" not in bounds(config, workload, Run(0, 1, (), 4), rates, False)


def test_rates_are_measured_for_every_shape_and_row_count() -> None:
    config = bench_config("tiny")
    rates = measure_rates([config], [1, 4], seconds=1e-4, rotated_bytes=2 << 20)
    assert set(rates.seconds) == {*layer_shapes(config), head_shape(config)}
    assert all(set(by_rows) == {1, 4} for by_rows in rates.seconds.values())
    assert all(s > 0 for by_rows in rates.seconds.values() for s in by_rows.values())
    assert rates.read_bytes_per_s > 1e8
    told = rates.record()
    assert "128x320" in told["linear_gflop_per_s"]  # type: ignore[operator]


def test_rates_of_8_bits_and_the_better_of_two_measurements() -> None:
    config = bench_config("tiny")
    rates = measure_rates([config], [1], int8=True, seconds=1e-4, rotated_bytes=1 << 20)
    assert set(rates.seconds) == {*layer_shapes(config), head_shape(config)}
    one, other = (flat_rates(config, {1: first, 4: 2.0}) for first in (1.0, 0.5))
    other.forms[head_shape(config)][1] = "own"
    best = one.better(other)
    assert best.seconds == other.seconds
    assert best.forms[head_shape(config)] == {1: "own", 4: "plain"}
