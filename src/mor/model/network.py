"""The network and its router inside any wrapper: DDP, PEFT, torch.compile."""

from __future__ import annotations

from torch import nn

from mor.model.model import MoRModel
from mor.model.routers.base import Router, active_router


def find_network(model: nn.Module) -> MoRModel:
    """The network inside ``model``, however it is wrapped."""
    return next(m for m in model.modules() if isinstance(m, MoRModel))


def find_router(model: nn.Module) -> Router:
    """The router in use inside ``model``: with PEFT, the one that is trained."""
    return active_router(find_network(model).router)
