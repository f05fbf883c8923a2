"""The processor beside a model that reads images or sounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor

from mor.errors import MorError
from mor.hf.load import load_config
from mor.hf.processing import MoRProcessor
from mor.run_files import model_folder


def load_processor(folder: str | Path) -> Any:
    """What makes inputs of images or sounds for the model in ``folder``.

    Returns:
        An image processor or a feature extractor; for a model of text that reads images a
        :class:`MoRProcessor`.

    Raises:
        MorError: there is none, it is damaged, or a package is missing that it needs.
    """
    config, folder = load_config(folder), model_folder(Path(folder))
    kinds: dict[str, Any] = {"image": AutoImageProcessor, "audio": AutoFeatureExtractor}
    kind = kinds.get(config.modality, AutoProcessor)
    try:
        found = kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises whatever a broken file happens to cause
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise MorError(f"the processor in {folder} cannot be read: {why}") from error
    if config.modality == "text" and not isinstance(found, MoRProcessor):
        raise MorError(
            f"{folder} holds no processor of images (processor_config.json); save a MoRProcessor "
            "beside the model"
        )
    return found
