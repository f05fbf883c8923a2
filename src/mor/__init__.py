"""mor: train, evaluate, generate with Mixture-of-Recursions language models (arXiv 2507.10524).

``import mor`` registers :class:`MoRConfig`, :class:`MoRForCausalLM` and the classes beside it with
Transformers' Auto classes.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mor.config import ConfigError, MoRConfig
    from mor.config.presets import preset
    from mor.errors import MorError
    from mor.hf import (
        MoRBaseModel,
        MoRCache,
        MoRForAudioClassification,
        MoRForCausalLM,
        MoRForConditionalGeneration,
        MoRForImageClassification,
        MoRForNextFrame,
        MoRForSequenceClassification,
        MoRProcessor,
    )

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "MoRBaseModel",
    "MoRCache",
    "MoRConfig",
    "MoRForAudioClassification",
    "MoRForCausalLM",
    "MoRForConditionalGeneration",
    "MoRForImageClassification",
    "MoRForNextFrame",
    "MoRForSequenceClassification",
    "MoRProcessor",
    "MorError",
    "preset",
]

_HOMES = {
    "ConfigError": "mor.errors",
    "MoRBaseModel": "mor.hf",
    "MoRCache": "mor.hf",
    "MoRConfig": "mor.config",
    "MoRForAudioClassification": "mor.hf",
    "MoRForCausalLM": "mor.hf",
    "MoRForConditionalGeneration": "mor.hf",
    "MoRForImageClassification": "mor.hf",
    "MoRForNextFrame": "mor.hf",
    "MoRForSequenceClassification": "mor.hf",
    "MoRProcessor": "mor.hf",
    "MorError": "mor.errors",
    "preset": "mor.config.presets",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def _is_command() -> bool:
    """Whether this is ``mor`` or ``python -m mor.cli``, which need not register at once."""
    if "mor_command" in sys.modules:
        return True
    words = sys.orig_argv
    # While Python looks for the module of -m, and imports its parents, the first word is -m.
    by_module = sys.argv[:1] == ["-m"] and "-m" in words[:-1]
    return by_module and words[words.index("-m") + 1] in ("mor.cli", "mor.cli.__main__")


# Importing `mor.hf` registers. The command `mor` does without until a command needs the model.
if not _is_command():
    import_module("mor.hf")
