"""What a model is: its configuration, the rules that hold it together, the paper's shapes."""

from mor.config.config import MoRConfig
from mor.config.fields import field_types
from mor.errors import ConfigError

__all__ = ["ConfigError", "MoRConfig", "field_types"]
