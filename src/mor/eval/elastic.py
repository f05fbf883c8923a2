"""One checkpoint at many depths and capacities: what each costs and what it scores.

FLOPs are those of tokens as they were really routed (:func:`mor.model.flops.batch_flops`), forward,
per token of the text. *Recursion FLOPs* are those of the shared block alone, what a cap or a
capacity can save.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mor.data import PackedDataset
from mor.errors import MorError
from mor.eval.answers import Collector
from mor.eval.levels import calibrate_levels
from mor.eval.passes import PassResult, Tick, check_sample, run_pass
from mor.folder.levels import Levels
from mor.hf.modeling import MoRForCausalLM
from mor.model.flops import batch_flops
from mor.model.routers import BoundaryRouter

CAPACITIES = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Factors on the trained capacities, as :class:`mor.eval.levels.Level` has them."""


@dataclass(frozen=True)
class Point:
    """A checkpoint at one setting.

    Attributes:
        kind: what is set: a cap on depth, or the capacity.
        value: the cap, or the factor on the trained capacities.
        mean_depth: recursions per token. active_fraction: share of tokens at each depth.
        recursion_flops, forward_flops: per token, forward; of the shared block, and of everything.
        nll: nats per token, causal.
        exact_match: share of right answers, for a task's data.
    """

    kind: Literal["depth", "capacity"]
    value: float
    mean_depth: float
    active_fraction: tuple[float, ...]
    recursion_flops: float
    forward_flops: float
    nll: float
    exact_match: float | None = None

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def has_capacity(model: MoRForCausalLM) -> bool:
    """Whether boundaries set how many tokens go on, at any depth."""
    router = model.model.router
    below = any(share < 1 for share in model.config.router_capacities or ())
    return isinstance(router, BoundaryRouter) and below


def measure_elastic(
    model: MoRForCausalLM,
    dataset: PackedDataset,
    *,
    levels: Levels | None = None,
    sample: PackedDataset | None = None,
    capacities: Sequence[float] = CAPACITIES,
    max_sequences: int | None = None,
    batch_size: int = 8,
    tick: Tick = lambda: None,
) -> list[Point]:
    """Score one model with depth capped at 1..R, then at each capacity.

    Args:
        model: left as it was.
        dataset: what it is scored on.
        levels: calibrated capacities; those between two are interpolated. None: calibrated here, on
            64 sequences of `sample`.
        sample: where there are no levels: text to calibrate on, not `dataset`.
        capacities: factors on the trained capacities. A router without boundaries, or whose depths
            all take every token, has none: only depth is capped.
        max_sequences: so many, spread over the split; None for all of it.
        batch_size: sequences at a time.
        tick: called after each batch.

    Raises:
        MorError: nothing to score, a capacity outside the levels, or neither levels nor a sample.
    """
    count = check_sample(dataset, max_sequences, batch_size)
    was_training = model.training
    model.eval()

    def score(kind: Literal["depth", "capacity"], value: float, cap: int | None) -> Point:
        return _score(model, dataset, count, batch_size, kind, value, cap, tick)

    try:
        points = [score("depth", cap, cap) for cap in range(1, model.config.num_recursions + 1)]
        if not capacities or not has_capacity(model):
            return points
        if levels is None:
            if sample is None:
                raise MorError(
                    "the model has no calibrated levels; run mor calibrate MODEL --levels, or give "
                    "data with a training split"
                )
            wanted = sorted({*capacities, 1.0, 0.5 * min(capacities)})  # a file needs two of them
            levels = calibrate_levels(model, sample, factors=wanted, batch_size=batch_size)
        levels.check_depths(model.config.num_recursions)
        for capacity in capacities:
            with stored_boundaries(model, levels.boundaries(capacity)):
                points.append(score("capacity", capacity, None))
        return points
    finally:
        model.train(was_training)


def _score(
    model: MoRForCausalLM,
    dataset: PackedDataset,
    count: int,
    batch_size: int,
    kind: Literal["depth", "capacity"],
    value: float,
    cap: int | None,
    tick: Tick,
) -> Point:
    answers = None if dataset.index.task is None else Collector(dataset)
    sums, tokens = [0.0, 0.0], 0

    def look(ids: Tensor, output: Any) -> None:
        nonlocal tokens
        flops = batch_flops(model.config, output.depths.cpu())
        sums[0] += sum(flops.recurse) * ids.numel()
        sums[1] += flops.forward * ids.numel()
        tokens += ids.numel()
        if answers is not None:
            answers.look(ids, output)

    result: PassResult = run_pass(model, dataset, count, batch_size, "causal", cap, tick, look=look)
    shares = result.shares
    return Point(
        kind=kind,
        value=value,
        mean_depth=float((shares * torch.arange(len(shares))).sum()),
        active_fraction=tuple(float(shares[d + 1 :].sum()) for d in range(result.recursions)),
        recursion_flops=sums[0] / tokens,
        forward_flops=sums[1] / tokens,
        nll=result.nll,
        exact_match=None if answers is None else float(answers.answers().hits.mean()),
    )


@contextmanager
def stored_boundaries(model: MoRForCausalLM, boundaries: Sequence[float]) -> Iterator[None]:
    """Decide by these boundaries [R] for a while, in place of those that the model has stored."""
    router = model.model.router
    assert isinstance(router, BoundaryRouter)
    before = router.boundary.clone(), router.config.router_decision_rule
    try:
        with torch.no_grad():
            router.boundary.copy_(torch.tensor(boundaries))
        router.config.router_decision_rule = "boundary"
        yield
    finally:
        with torch.no_grad():
            router.boundary.copy_(before[0])
        router.config.router_decision_rule = before[1]


def elastic_range(points: Sequence[Point], tolerance: float) -> float:
    """How many times the recursion FLOPs can vary at next to no loss.

    The ratio of the highest to the lowest recursion FLOPs of neighbours, around the best point,
    that lose at most `tolerance` against it; 1 where nothing else does. Text loses nats, tasks the
    share of right answers.
    """
    ordered = sorted(points, key=lambda point: point.recursion_flops)
    losses = [point.nll if point.exact_match is None else -point.exact_match for point in ordered]
    best = min(range(len(ordered)), key=losses.__getitem__)
    limit = losses[best] + tolerance
    low = high = best
    while low > 0 and losses[low - 1] <= limit:
        low -= 1
    while high + 1 < len(ordered) and losses[high + 1] <= limit:
        high += 1
    return ordered[high].recursion_flops / ordered[low].recursion_flops
