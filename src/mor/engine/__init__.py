"""The engine: continuous depth-wise batching over a paged cache per depth."""

from mor.engine.embedded import EmbeddedPrompt
from mor.engine.engine import Engine
from mor.engine.outputs import Completion, RequestOutput, Timings, TokenLogprobs
from mor.engine.params import SamplingParams
from mor.engine.stats import EngineStats

__all__ = [
    "Completion",
    "EmbeddedPrompt",
    "Engine",
    "EngineStats",
    "RequestOutput",
    "SamplingParams",
    "Timings",
    "TokenLogprobs",
]
