"""What the routes share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from mor.engine import Engine
from mor.folder.levels import Levels
from mor.server.errors import ApiError
from mor.server.images import Reader
from mor.server.loop import EngineLoop
from mor.server.metrics import ServerMetrics
from mor.server.structure.grammars import Grammars
from mor.server.tokens import Tokens


@dataclass
class State:
    """What the routes of one server share.

    Attributes:
        model: the name that clients use.
        loop: the engine's thread.
        tokens: texts to ids.
        grammars: compiled forms of answers.
        metrics: counters.
        levels: capacities that a request may choose; None where none are calibrated.
        images: reads images or sounds; None where the model takes none.
        created: when it started, Unix seconds.
    """

    model: str
    loop: EngineLoop
    tokens: Tokens
    grammars: Grammars
    metrics: ServerMetrics
    levels: Levels | None
    images: Reader | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def engine(self) -> Engine:
        """For what never changes; its methods belong to the loop's thread."""
        return self.loop.engine

    def check_model(self, name: str) -> None:
        """Refuse a model that is not served.

        Raises:
            ApiError: 404.
        """
        refuse_model(name, self.model)

    def card(self) -> dict[str, Any]:
        """The model as /v1/models lists it."""
        config, levels = self.engine.config, self.levels
        capacity = levels and {"lowest": levels.lowest, "highest": levels.highest}
        return {
            "id": self.model,
            "object": "model",
            "created": self.created,
            "owned_by": "mor",
            "max_model_len": self.engine.max_model_len,
            "num_recursions": config.num_recursions,
            "router": config.router,
            "chat": self.tokens.template is not None,
            "capacity": capacity,
            "modalities": ["text", *([self.images.modality] if self.images else [])],
        }


def check_depth_cap(cap: int | None, recursions: int) -> None:
    """Refuse a cap on depth that the model does not reach.

    Raises:
        ApiError: 400.
    """
    if cap is not None and cap > recursions:
        raise ApiError(
            400,
            f"depth_cap={cap} must lie in 1..{recursions}",
            param="depth_cap",
            code="invalid_value",
        )


def refuse_model(name: str, served: str) -> None:
    """Refuse a model that is not the one ``served``.

    Raises:
        ApiError: 404.
    """
    if name != served:
        raise ApiError(
            404,
            f"The model {name[:100]!a} does not exist; this server has {served!r}",
            param="model",
            code="model_not_found",
        )


def get_state(request: Request) -> State:
    """The state of the server that handles ``request``."""
    state = request.app.state.mor
    assert isinstance(state, State)
    return state
