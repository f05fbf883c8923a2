"""The five routers. ``build_router(config)`` makes the one a configuration names.

expert_choice  each depth picks its top-k among the tokens the previous depth picked (paper 2.2.1)
token_choice   each token picks its depth once, at the start (paper 2.2.1)
threshold      ours: a batch quantile in training, the running estimate of it when decoding
random, fixed  the controls: the same capacity at random, the same depth for all
"""

from __future__ import annotations

from torch import nn

from mor.config import MoRConfig
from mor.model.routers.base import Router
from mor.model.routers.boundary import BoundaryRouter, ExpertChoiceRouter, ThresholdRouter
from mor.model.routers.controls import FixedRouter, RandomRouter
from mor.model.routers.selection import as_mask, batch_boundary, top_k_rows
from mor.model.routers.token_choice import TokenChoiceRouter

__all__ = [
    "BoundaryRouter",
    "ExpertChoiceRouter",
    "FixedRouter",
    "ROUTERS",
    "RandomRouter",
    "ThresholdRouter",
    "TokenChoiceRouter",
    "as_mask",
    "batch_boundary",
    "build_router",
    "top_k_rows",
]

ROUTERS: dict[str, type[Router]] = {
    "fixed": FixedRouter,
    "random": RandomRouter,
    "expert_choice": ExpertChoiceRouter,
    "threshold": ThresholdRouter,
    "token_choice": TokenChoiceRouter,
}


def build_router(config: MoRConfig) -> nn.Module:
    """The router that ``config.router`` names."""
    return ROUTERS[config.router](config)
