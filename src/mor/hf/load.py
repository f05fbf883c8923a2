"""Load a model folder and say in one sentence what is wrong with it, if anything is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mor.errors import MorError
from mor.folder.config import load_config, quiet, unreadable
from mor.folder.network import Weights
from mor.folder.weights import refuse_misfits
from mor.hf.media import MediaModel
from mor.hf.modeling import MoRForCausalLM
from mor.hf.register import CLASSES, class_for
from mor.model.packed import Quantization, serving_view
from mor.model.packed_layers import copy_around
from mor.run_files import model_folder

# What writes text, and what else a folder of ours may hold and what loads it.
_WRITERS = {kind.__name__: kind for kind in CLASSES.values() if issubclass(kind, MoRForCausalLM)}
_OTHERS = {kind.__name__: auto for auto, kind in CLASSES.items() if kind.__name__ not in _WRITERS}


def load_model(folder: str | Path, dtype: torch.dtype | None = None) -> MoRForCausalLM:
    """The language model of ``folder``, in evaluation mode, every weight accounted for.

    ``from_pretrained`` fills missing weights at random and goes on; here that is an error.

    Raises:
        MorError: no folder, no model in it, another architecture, a file cut short, weights that
            are missing, left over or of another shape.
    """
    found: MoRForCausalLM = load_as(MoRForCausalLM, folder, dtype)
    return found


def load_media_model(folder: str | Path, dtype: torch.dtype | None = None) -> MediaModel:
    """The model of images or sounds in ``folder``, as :func:`load_model` has those of texts.

    Raises:
        MorError: as :func:`load_model`, and where it is a model of texts.
    """
    config = load_config(folder)
    if config.modality == "text":
        raise MorError(f"{folder} holds a model of texts, not of images or sounds")
    found: MediaModel = load_as(class_for(config), folder, dtype)
    return found


def load_as(kind: Any, folder: str | Path, dtype: torch.dtype | None = None) -> Any:
    """The model of ``folder`` as one of class ``kind``; see :func:`load_model`."""
    config = load_config(folder)
    folder = model_folder(Path(folder))
    named = (config.architectures or [kind.__name__])[0]
    if named in _OTHERS and kind is MoRForCausalLM:
        raise MorError(
            f"{folder} holds a {named}, not a {kind.__name__}: it has no vocabulary "
            f"projection; load it with {_OTHERS[named]}, or give the model that it was made from"
        )
    if kind is MoRForCausalLM:  # or one of it that reads more than text
        kind = _WRITERS.get(named, kind)
    try:
        with quiet():
            loaded: Any = kind.from_pretrained(
                folder,
                config=config,
                dtype=dtype or torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=True,
            )
    except Exception as error:  # the library raises whatever a broken file happens to cause
        raise unreadable(folder, error) from error
    model, info = loaded
    problems = {
        "missing": info["missing_keys"],
        "not known": info["unexpected_keys"],
        "of another shape": [key[0] for key in info["mismatched_keys"]],
    }
    refuse_misfits(folder, problems)
    return model.eval()


def open_model(folder: str | Path, dtype: Weights = "float32") -> MoRForCausalLM:
    """The model of a model folder or a run folder, on the GPU where there is one.

    Args:
        folder: of the model or the run.
        dtype: of its weights.

    Raises:
        MorError: see :func:`load_model`.
    """
    model = load_model(folder, torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    if torch.cuda.is_available():
        model.cuda()  # type: ignore[call-arg]
    return model


def serving_copy(model: MoRForCausalLM, quantization: Quantization | None = None) -> MoRForCausalLM:
    """``model`` over the weights that the engine serves it with: what do 8 bits cost in nats?

    Parameters are shared; what is packed is made here.

    Args:
        model: in evaluation mode; it is not changed.
        quantization: as of :func:`mor.model.packed.serving_view`.

    Raises:
        MorError: the quantization cannot run here.
    """
    return copy_around(model, model=serving_view(model.model, quantization))
