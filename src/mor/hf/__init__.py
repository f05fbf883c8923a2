"""Hugging Face: the model as Transformers' users expect it, its cache, conversion.

Importing this package registers the model with Transformers' Auto classes.
"""

from mor.hf.cache import MoRCache
from mor.hf.modeling import MoRForCausalLM, register
from mor.hf.outputs import MoRCausalLMOutput

__all__ = ["MoRCache", "MoRCausalLMOutput", "MoRForCausalLM", "register"]

register()
