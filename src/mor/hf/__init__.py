"""Hugging Face: the model as Transformers' users expect it, its cache, conversion.

Importing this package registers the model with Transformers' Auto classes.
"""

from mor.hf.cache import MoRCache
from mor.hf.frames import MoRFeatureExtractor
from mor.hf.heads import MoRBaseModel, MoRForSequenceClassification
from mor.hf.hearing import MoRAudioProcessor
from mor.hf.media import MoRForAudioClassification, MoRForImageClassification
from mor.hf.modeling import MoRForCausalLM
from mor.hf.next_frame import MoRForNextFrame
from mor.hf.outputs import (
    MoRBaseOutput,
    MoRCausalLMOutput,
    MoRClassifierOutput,
    MoRMediaOutput,
)
from mor.hf.processing import MoRProcessor
from mor.hf.register import register
from mor.hf.vision_language import MoRForConditionalGeneration

__all__ = [
    "MoRAudioProcessor",
    "MoRBaseModel",
    "MoRBaseOutput",
    "MoRCache",
    "MoRCausalLMOutput",
    "MoRClassifierOutput",
    "MoRFeatureExtractor",
    "MoRForAudioClassification",
    "MoRForCausalLM",
    "MoRForConditionalGeneration",
    "MoRForImageClassification",
    "MoRForNextFrame",
    "MoRForSequenceClassification",
    "MoRMediaOutput",
    "MoRProcessor",
    "register",
]

register()
