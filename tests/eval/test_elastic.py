"""One checkpoint at many depths and capacities."""

from __future__ import annotations

import math
from typing import Any

import pytest
from torch.utils.data import Dataset

from mor.data import PackedDataset
from mor.errors import MorError
from mor.eval import evaluate
from mor.eval.elastic import Point, elastic_range, has_capacity, measure_elastic
from mor.eval.levels import calibrate_levels
from mor.model.flops import flops_per_token
from tests.strategies import make_model, small_config
from tests.tiny import SEQ_LEN


@pytest.fixture(scope="module")
def dataset(data: Any) -> Dataset:
    return PackedDataset(data, "train", SEQ_LEN)


@pytest.mark.parametrize("router", ["threshold", "expert_choice"])
def test_caps_and_capacities_of_one_checkpoint(dataset: Any, router: str) -> None:
    model = make_model(small_config(router, vocab_size=dataset.index.vocab_size), 1)
    before = evaluate(model, dataset, max_sequences=8)
    levels = calibrate_levels(model, dataset, factors=(0.25, 1.0), max_sequences=8)
    points = measure_elastic(
        model, dataset, levels=levels, capacities=[0.25, 1.0], max_sequences=8, batch_size=3
    )
    after = evaluate(model, dataset, max_sequences=8)
    assert after["causal"] == before["causal"]  # as it was
    caps = [point for point in points if point.kind == "depth"]
    assert [point.value for point in caps] == [1, 2, 3]
    for point, cap in zip(caps, before["depth_cap"], strict=True):
        assert point.nll == pytest.approx(cap["nll"], abs=1e-6)
        assert point.mean_depth == pytest.approx(cap["mean_depth"])
    # On the sample of the calibration each depth has its share.
    for level, point in zip(levels.levels, points[3:], strict=True):
        assert point.kind == "capacity"
        assert point.active_fraction == pytest.approx(level.capacities, abs=0.02)
        assert point.mean_depth == pytest.approx(sum(level.capacities), abs=0.04)
    assert points[3].recursion_flops < points[4].recursion_flops
    rest = {round(point.forward_flops - point.recursion_flops) for point in caps}
    assert max(rest) - min(rest) <= 2 * model.config.hidden_size * 3  # routers alone differ


def test_flops_are_those_of_the_tokens(dataset: Any) -> None:
    """Where every token runs every depth they are what is planned, cut at the cap."""
    model = make_model(small_config("fixed", vocab_size=dataset.index.vocab_size), 1)
    assert not has_capacity(model)
    points = measure_elastic(model, dataset, max_sequences=3)
    planned = flops_per_token(model.config, SEQ_LEN)
    for point in points:
        assert point.recursion_flops == pytest.approx(sum(planned.recurse[: int(point.value)]))
    assert points[-1].forward_flops == pytest.approx(planned.forward)
    assert len(points) == model.config.num_recursions


def test_without_levels_they_are_calibrated(dataset: Any) -> None:
    model = make_model(small_config("threshold", vocab_size=dataset.index.vocab_size), 1)
    with pytest.raises(MorError, match=r"no calibrated levels; run mor calibrate MODEL --levels"):
        measure_elastic(model, dataset, max_sequences=2)
    points = measure_elastic(model, dataset, sample=dataset, capacities=[0.5], max_sequences=2)
    assert points[-1].value == 0.5


def point(flops: float, nll: float, exact: float | None = None) -> Point:
    return Point("capacity", 1.0, 1.0, (1.0,), flops, flops, nll, exact)


def test_the_range_around_the_best() -> None:
    points = [point(1, 3.0), point(2, 2.009), point(3, 2.0), point(4, 2.005), point(8, 2.3)]
    assert elastic_range(points, 0.01) == 2.0
    assert elastic_range(points[::-1], 0.006) == pytest.approx(4 / 3)
    assert elastic_range(points, 0.0) == 1.0
    assert elastic_range(points, math.inf) == 8.0
    # A point beyond a worse one does not count, though it is good itself.
    assert elastic_range([point(1, 2.0), point(2, 2.5), point(4, 2.0)], 0.01) == 1.0
    # Of a task answers count, not nats.
    assert elastic_range([point(1, 9.0, 0.99), point(3, 2.0, 0.985)], 0.01) == 3.0
