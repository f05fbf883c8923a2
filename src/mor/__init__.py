"""mor: train, evaluate, generate with Mixture-of-Recursions language models (arXiv 2507.10524).

``import mor`` registers :class:`MoRConfig` and :class:`MoRForCausalLM` with Transformers'
AutoConfig and AutoModelForCausalLM.
"""

from mor.config import ConfigError, MoRConfig
from mor.config.presets import preset
from mor.errors import MorError
from mor.hf import MoRCache, MoRForCausalLM, register

__version__ = "0.1.0"
__all__ = ["ConfigError", "MoRCache", "MoRConfig", "MoRForCausalLM", "MorError", "preset"]

register()
