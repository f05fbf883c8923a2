"""The network: layers, routers, the recursion loop, caches."""

from mor.model.cache import DepthCache
from mor.model.model import MoRModel
from mor.model.output import ModelOutput

__all__ = ["DepthCache", "MoRModel", "ModelOutput"]
