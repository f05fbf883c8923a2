"""What makes Transformers know ``model_type: mor``."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoProcessor,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import is_vision_available

from mor.config import MoRConfig
from mor.hf.frames import MoRFeatureExtractor
from mor.hf.heads import MoRBaseModel, MoRForSequenceClassification
from mor.hf.hearing import MoRAudioProcessor
from mor.hf.media import MoRForAudioClassification, MoRForImageClassification
from mor.hf.modeling import MoRForCausalLM
from mor.hf.next_frame import MoRForNextFrame
from mor.hf.pretrained import MoRPreTrainedModel
from mor.hf.processing import MoRProcessor
from mor.hf.vision_language import MoRForConditionalGeneration

CLASSES = {
    "AutoModel": MoRBaseModel,
    "AutoModelForAudioClassification": MoRForAudioClassification,
    "AutoModelForCausalLM": MoRForCausalLM,
    "AutoModelForImageClassification": MoRForImageClassification,
    "AutoModelForImageTextToText": MoRForConditionalGeneration,
    "AutoModelForPreTraining": MoRForNextFrame,
    "AutoModelForSequenceClassification": MoRForSequenceClassification,
}
"""Our class for each Auto class."""


# Pipelines ask these lists; the Auto classes do not fill them.
_LISTS: dict[type, Any] = {
    MoRForAudioClassification: MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    MoRForConditionalGeneration: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MoRForImageClassification: MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MoRForSequenceClassification: MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}


class _ImageText(MoRConfig):
    """Stands for configurations with an ``image_token_id`` in AutoProcessor's list."""


class _AudioText(MoRConfig):
    """The same of those with an ``audio_token_id``."""


def register() -> None:
    """Register the configuration, classes and processors with Transformers' Auto classes."""
    AutoConfig.register("mor", MoRConfig, exist_ok=True)
    AutoModel.register(MoRConfig, MoRBaseModel, exist_ok=True)
    AutoModelForCausalLM.register(MoRConfig, MoRForCausalLM, exist_ok=True)
    AutoModelForPreTraining.register(MoRConfig, MoRForNextFrame, exist_ok=True)
    AutoModelForSequenceClassification.register(
        MoRConfig, MoRForSequenceClassification, exist_ok=True
    )
    AutoModelForAudioClassification.register(MoRConfig, MoRForAudioClassification, exist_ok=True)
    AutoModelForImageClassification.register(MoRConfig, MoRForImageClassification, exist_ok=True)
    AutoModelForImageTextToText.register(MoRConfig, MoRForConditionalGeneration, exist_ok=True)
    for kind, names in _LISTS.items():
        names[f"mor:{kind.__name__}"] = kind.__name__
    # By its name, which `processor_config.json` has: under MoRConfig a folder of text alone would
    # be asked for an image processor, where AutoProcessor gives its tokenizer.
    AutoProcessor.register(_ImageText, MoRProcessor, exist_ok=True)
    AutoProcessor.register(_AudioText, MoRAudioProcessor, exist_ok=True)
    AutoFeatureExtractor.register(MoRConfig, MoRFeatureExtractor, exist_ok=True)
    if is_vision_available():  # Pillow
        from mor.hf.grey import MoRImageProcessor

        AutoImageProcessor.register(
            MoRConfig, image_processor_classes={"pil": MoRImageProcessor}, exist_ok=True
        )


def class_for(config: MoRConfig) -> type[MoRPreTrainedModel]:
    """The class that a configuration is for: of texts, images or sounds, by its head."""
    if config.head_type == "vocabulary":
        plain = config.media_token_id is None
        return MoRForCausalLM if plain else MoRForConditionalGeneration
    if config.head_type == "regression":
        return MoRForNextFrame
    return MoRForImageClassification if config.modality == "image" else MoRForAudioClassification
