"""The network: layers, routers, the recursion loop, caches."""

from mor.model.cache import DepthCache
from mor.model.model import ModelOutput, MoRModel

__all__ = ["DepthCache", "MoRModel", "ModelOutput"]
