"""Hugging Face: AutoModelForCausalLM wrapper, cache class, conversion."""

from mor.hf.cache import MoRCache
from mor.hf.modeling import MoRCausalLMOutput, MoRForCausalLM, register

__all__ = ["MoRCache", "MoRCausalLMOutput", "MoRForCausalLM", "register"]
