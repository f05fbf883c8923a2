"""``mor compress``: a model made smaller or faster, from the choice of layers to the report."""

from mor.compress.plan import Goal, Shape
from mor.compress.settings import Settings
from mor.compress.workflow import Compression

__all__ = ["Compression", "Goal", "Settings", "Shape"]
