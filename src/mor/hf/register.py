"""What makes Transformers know ``model_type: mor``."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from mor.config import MoRConfig
from mor.hf.heads import MoRBaseModel, MoRForSequenceClassification
from mor.hf.modeling import MoRForCausalLM

CLASSES = {
    "AutoModel": MoRBaseModel,
    "AutoModelForCausalLM": MoRForCausalLM,
    "AutoModelForSequenceClassification": MoRForSequenceClassification,
}
"""Our class for each Auto class."""


def register() -> None:
    """Register the configuration and our classes with Transformers' Auto classes."""
    AutoConfig.register("mor", MoRConfig, exist_ok=True)
    AutoModel.register(MoRConfig, MoRBaseModel, exist_ok=True)
    AutoModelForCausalLM.register(MoRConfig, MoRForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(
        MoRConfig, MoRForSequenceClassification, exist_ok=True
    )
    # Pipelines ask this list; the Auto classes do not fill it.
    name = MoRForSequenceClassification.__name__
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[f"mor:{name}"] = name
