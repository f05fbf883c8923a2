"""How depth is trained: a cap by step, and routes from the loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mor.train.recipe.base import Section
from mor.train.recipe.fields import decides

DepthPart = Annotated[
    tuple[Annotated[float, Field(gt=0, le=1)], Annotated[int, Field(ge=1)]], Field(strict=False)
]
DepthParts = list[DepthPart] | Literal["random"]
"""Shares of the steps of a run with the depth cap of each; or a random cap for each step."""


class RouteByLossSection(Section):
    """Trunk and router from the first step on: a token goes deeper while it is wrong here."""

    margin: float = decides(
        "weights", 0.1, ge=0, description="nats of loss above which a token is to go deeper"
    )
    sharpness: float = decides(
        "weights", 50.0, gt=0, description="of the target sigmoid(sharpness (loss - margin))"
    )
    every_exit: float = decides(
        "weights and speed",
        0.0,
        ge=0,
        description="weight of the loss at each exit that a token passes by, beside its own",
    )
    linger: int = decides(
        "weights",
        0,
        ge=0,
        description="passes that a token stays for once it is right, so that others see its answer",
    )
    confidence: float = decides(
        "weights", 0.5, gt=0, lt=1, description="a token goes deeper where the router is surer"
    )
