"""What routers did, in numbers: the paper's router metrics and the causal rule's accuracy."""

from __future__ import annotations

import torch
from torch import Tensor

from mor.model.recorder import DepthTrace
from mor.model.routers import BoundaryRouter, as_mask
from mor.model.routers.base import Router


def depth_shares(depths: Tensor, num_recursions: int) -> Tensor:
    """Share of tokens that ended after 0..R recursions, [R + 1], from ``depths`` of any shape."""
    counts = torch.bincount(depths.flatten(), minlength=num_recursions + 1)
    return counts / counts.sum().clamp(min=1)


def active_fraction(depths: Tensor, num_recursions: int) -> list[float]:
    """Share of tokens that ran each depth, [R]."""
    return [float((depths > depth).float().mean()) for depth in range(num_recursions)]


def entropy(shares: Tensor) -> float:
    """Entropy in nats of the distribution of final depths; ln(R) where all are used alike."""
    # Never below 0, nor -0.0, which is what one depth for all comes to.
    return max(0.0, float(-(shares * shares.clamp(min=1e-12).log()).sum()))


def max_violation(shares: Tensor) -> float:
    """MaxVio = (largest load - mean load) / mean load over final depths 1..R (paper, table 3)."""
    load = shares[1:]
    mean = load.mean()
    return max(0.0, float((load.max() - mean) / mean)) if mean > 0 else 0.0


def dead_positions(reached: Tensor) -> float:
    """Share of positions whose token never ran the last depth.

    Args:
        reached: [positions] bool, whether any sequence ran the last depth there. The paper looks at
            500 sequences; the number falls with how many are looked at.
    """
    return float(1 - reached.float().mean())


@torch.no_grad()
def decision_accuracy(router: Router, trace: DepthTrace, depth: int) -> tuple[Tensor, Tensor]:
    """How often ``decide`` agrees with the selection at one depth: (agreements, candidates)."""
    like = trace.active
    valid = None if trace.candidates is None else trace.candidates.valid
    decided = as_mask(router.decide(trace.scores, depth), like.float(), valid)
    agree = decided == trace.active
    if valid is not None:
        agree = agree & valid
    count = like.numel() if valid is None else valid.sum()
    return agree.sum(), torch.as_tensor(count)


@torch.no_grad()
def batch_metrics(
    router: Router,
    depths: Tensor,
    traces: tuple[DepthTrace, ...],
    token_mask: Tensor | None = None,
) -> dict[str, float]:
    """Metrics of one training batch [B, T], by name; depths in names are 0-based.

    Args:
        router: of the model.
        depths: [B, T] recursions that each token ran.
        traces: one per depth, or none.
        token_mask: [B, T] which tokens are real; padding counts nowhere. None where all are.
    """
    recursions = router.num_recursions
    reached = (depths == recursions).any(0)
    if token_mask is not None:
        real = token_mask.bool()
        depths, reached = depths[real], reached[real.any(0)]
    shares = depth_shares(depths, recursions)
    found = {"mean_depth": float(depths.float().mean()), "entropy": entropy(shares)}
    for depth, share in enumerate(active_fraction(depths, recursions)):
        found[f"active_fraction/{depth}"] = share
    found["max_vio"] = max_violation(shares)
    found["dead_tokens"] = dead_positions(reached)
    for depth, trace in enumerate(traces):
        agree, count = decision_accuracy(router, trace, depth)
        found[f"accuracy/{depth}"] = float(agree / count.clamp(min=1))
        if isinstance(router, BoundaryRouter):
            found[f"boundary/{depth}"] = float(router.boundary[depth])
    return found
