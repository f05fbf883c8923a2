"""The processor beside a model that reads images or sounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor

from mor.errors import MorError
from mor.folder.config import load_config
from mor.hf.hearing import MoRAudioProcessor
from mor.hf.processing import MoRProcessor
from mor.run_files import model_folder


def load_processor(folder: str | Path) -> Any:
    """What makes inputs of images or sounds for the model in ``folder``.

    Returns:
        An image processor or a feature extractor; for a model of text that reads images a
        :class:`MoRProcessor`, for one that hears sounds a
        :class:`~mor.hf.hearing.MoRAudioProcessor`.

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
    wanted = MoRProcessor if config.audio_token_id is None else MoRAudioProcessor
    if config.modality == "text" and not isinstance(found, wanted):
        what = "images" if wanted is MoRProcessor else "sounds"
        raise MorError(
            f"{folder} holds no processor of {what} (processor_config.json); save a "
            f"{wanted.__name__} beside the model"
        )
    return found
