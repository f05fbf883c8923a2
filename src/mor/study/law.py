"""What is a loop worth? The recurrence law of 2604.21106, fitted.

    L = E + A (N_once + R^phi N_rec)^-a + B D^-b

No constant but phi is negative: E is a floor, and no loss grows with size or tokens.
N_once are the parameters that a token passes once, N_rec those of the shared block, R the passes
over it and D the tokens. phi = 1: a loop is worth as much as fresh parameters; phi = 0: nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from mor.errors import MorError

_STARTS = [(phi, a, b) for phi in (0.0, 0.5, 1.0) for a in (0.2, 0.5) for b in (0.2, 0.5)]


@dataclass(frozen=True)
class Point:
    """One trained model: parameters passed once, shared parameters, passes, tokens, nats."""

    once: float
    shared: float
    passes: float
    tokens: float
    nll: float


@dataclass(frozen=True)
class Law:
    """The fitted law.

    Attributes:
        phi: the exponent of a loop's worth.
        interval: 5% and 95% of phi over resampled points; None where it was not asked for, or where
            most draws hold too few different points.
        e, a, alpha, b, beta: E, A, a, B, b; `b` and `beta` are 0 where all points have the same D
            (then `e` holds that term too).
        error: root mean square of the residuals, nats.
        points: how many.
    """

    phi: float
    interval: tuple[float, float] | None
    e: float
    a: float
    alpha: float
    b: float
    beta: float
    error: float
    points: int


def fit_recurrence_law(points: Sequence[Point], resamples: int = 0, seed: int = 0) -> Law:
    """Fit phi and the other five constants by least squares, those five at least 0.

    E, A and B are linear given the exponents, so only these are searched for, from several starts.
    A constant that no number above 0 helps is 0: E is where losses are far from their floor.

    Args:
        points: runs with several numbers of passes and several sizes.
        resamples: draws with replacement for the interval of phi; 0 for none.
        seed: of these draws.

    Raises:
        MorError: too few points that differ in more than their nats (seeds say nothing new of the
            constants), or all with the same number of passes: phi cannot be told.
    """
    same_tokens = (
        max(p.tokens for p in points) < 1.01 * min(p.tokens for p in points) if points else True
    )
    needed = 5 if same_tokens else 7
    settings = [(p.once, p.shared, p.passes, p.tokens) for p in points]
    if len(set(settings)) < needed:
        raise MorError(
            f"{len(set(settings))} points, expected at least {needed} to fit the law that differ "
            "in size, passes or tokens"
        )
    if len({p.passes for p in points if p.shared > 0}) < 2:
        raise MorError("all points have the same number of passes, so phi cannot be told")
    table = torch.tensor(
        [[p.once, p.shared, p.passes, p.tokens, p.nll] for p in points], dtype=torch.float64
    )
    starts = [
        torch.tensor((phi, *map(math.log, rest)), dtype=torch.float64) for phi, *rest in _STARTS
    ]
    best = min((_search(table, start, same_tokens) for start in starts), key=lambda fit: fit[1])
    interval = None
    if resamples:
        draw, found = np.random.default_rng(seed), []
        for _ in range(resamples):
            rows = draw.integers(0, len(points), len(points))
            drawn = {settings[row] for row in rows}
            if len(drawn) >= needed and len({passes for _, _, passes, _ in drawn}) > 1:
                found.append(float(_search(table[rows], best[0], same_tokens)[0][0]))
        if 2 * len(found) >= resamples:  # of fewer the interval would be an accident
            low, high = np.quantile(found, [0.05, 0.95])
            interval = (float(low), float(high))
    phi, alpha, beta = _exponents(best[0]).tolist()
    columns, linear = _solve(table, best[0], same_tokens)
    scale_n, scale_d = _scales(table)
    constants = linear.tolist()
    residual = columns @ linear - table[:, 4]
    return Law(
        phi=phi,
        interval=interval,
        e=constants[0],
        a=constants[1] * scale_n**alpha,
        alpha=alpha,
        b=0.0 if same_tokens else constants[2] * scale_d**beta,
        beta=0.0 if same_tokens else beta,
        error=float(residual.square().mean().sqrt()),
        points=len(points),
    )


def _scales(table: Tensor) -> tuple[float, float]:
    """Sizes near 1 keep the columns apart."""
    return float((table[:, 0] + table[:, 1]).mean()), float(table[:, 3].mean())


def _exponents(searched: Tensor) -> Tensor:
    """phi, a and b; the last two are searched for by their logarithms."""
    return torch.cat((searched[:1], searched[1:].exp()))


def _solve(table: Tensor, searched: Tensor, same_tokens: bool) -> tuple[Tensor, Tensor]:
    """The columns of the linear part [P, 2 or 3] and its best solution without a negative one."""
    phi, alpha, beta = _exponents(searched)
    once, shared, passes, tokens, nll = table.unbind(1)
    scale_n, scale_d = _scales(table)
    size = ((once + passes**phi * shared) / scale_n) ** -alpha
    columns = [torch.ones_like(size), size]
    if not same_tokens:
        columns.append((tokens / scale_d) ** -beta)
    matrix = torch.stack(columns, 1)
    solutions = []
    for count in range(1, len(columns) + 1):
        for kept in combinations(range(len(columns)), count):
            part = matrix[:, list(kept)]
            # A little ridge keeps the derivative finite where two columns are nearly the same.
            gram = part.T @ part + 1e-12 * torch.eye(count, dtype=part.dtype)
            own = torch.linalg.solve(gram, part.T @ nll)
            if (own >= 0).all():
                whole = torch.zeros(len(columns), dtype=own.dtype).index_put(
                    (torch.tensor(kept),), own
                )
                error = (matrix @ whole - nll).detach().square().sum()
                solutions.append((float(error), whole))
    return matrix, min(solutions, key=lambda found: found[0])[1]


def _search(table: Tensor, start: Tensor, same_tokens: bool) -> tuple[Tensor, float]:
    """What to search for near `start` with the smallest squared error, and that error."""
    searched = start.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [searched], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        columns, linear = _solve(table, searched, same_tokens)
        # Exponents of no meaning are kept away from; the bounds are far from any fit.
        middle, width = torch.tensor([[0.5, -1.5, -1.5], [2.0, 2.5, 2.5]], dtype=torch.float64)
        outside = (searched - middle).abs() - width
        error = (columns @ linear - table[:, 4]).square().mean()
        return 1e4 * error + outside.clamp(min=0).square().sum()

    def closure() -> Tensor:
        search.zero_grad()
        value = loss()
        value.backward()
        return value

    search.step(closure)
    with torch.no_grad():
        value = float(loss())
    return searched.detach(), value if np.isfinite(value) else float("inf")
