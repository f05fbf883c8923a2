"""The network in a model folder as an engine takes it, without Transformers' model around it.

It is :meth:`mor.hf.MoRForCausalLM.from_pretrained` for what serving needs: the same tensors, to the
last bit (tests hold them equal). Transformers' modelling code takes longer to import than a model
of 135 million weights takes to load.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig

from mor.config import MoRConfig
from mor.folder.config import load_config, quiet, unreadable
from mor.folder.weights import WEIGHT_NAMES, ConversionError, read_weights, refuse_misfits
from mor.model.model import MoRModel
from mor.model.servable import ServedNetwork
from mor.run_files import model_folder

Weights = Literal["float32", "bfloat16"]
"""Types that weights are loaded in."""
ARCHITECTURE = "MoRForCausalLM"
"""The class that the folder names, which alone is read here."""
PREFIX = "model."
SETTINGS = "generation_config.json"


class _AsMade(TorchFunctionMode):
    """Weights stay as they are made; on ``meta`` even a random draw imports PyTorch's compiler."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """``func`` itself, or its tensor untouched where ``func`` initialises."""
        given = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)


def is_plain(folder: str | Path) -> bool:
    """Whether :func:`load_network` can read ``folder``: text alone, with whole weight files.

    Raises:
        MorError: as :func:`mor.folder.config.load_config`.
    """
    config = load_config(folder)
    named = (config.architectures or [ARCHITECTURE])[0]
    text = config.modality == "text" and config.head_type == "vocabulary"
    alone = config.media_token_id is None
    there = any((model_folder(Path(folder)) / name).is_file() for name in WEIGHT_NAMES)
    return named == ARCHITECTURE and text and alone and there


def load_network(folder: str | Path, dtype: torch.dtype = torch.float32) -> ServedNetwork:
    """The network of ``folder`` in evaluation mode, every weight accounted for.

    Args:
        folder: of a model of texts alone, or a run folder; see :func:`is_plain`.
        dtype: of the weights; a router keeps float32.

    Raises:
        MorError: no folder, no model in it, a file cut short, weights that are missing, left over
            or of another shape.
    """
    config, folder = load_config(folder), model_folder(Path(folder))
    with torch.device("meta"), _AsMade():
        model = MoRModel(config)
    try:
        stored = read_weights(folder)
    except ConversionError as error:
        raise unreadable(folder, error) from error
    assign_weights(model, stored, dtype, folder)
    return ServedNetwork(model.eval(), load_settings(folder, config))


def assign_weights(
    model: MoRModel, stored: dict[str, Tensor], dtype: torch.dtype, folder: Path
) -> None:
    """Make ``stored`` the parameters and buffers of ``model``.

    Args:
        model: on the device ``meta``.
        stored: by the names of a saved :class:`mor.hf.MoRForCausalLM`; it is emptied.
        dtype: of the weights.
        folder: for messages.

    Raises:
        MorError: weights that are missing, left over or of another shape.
    """
    wanted = model.state_dict()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    known = {PREFIX + name: name for name in wanted}
    shapes = [key for key, name in known.items()
              if key in stored and stored[key].shape != wanted[name].shape]  # fmt: skip
    problems = {
        "missing": [key for key, name in known.items() if key not in stored and name not in tied],
        "not known": [key for key in stored if key not in known],
        "of another shape": shapes,
    }
    refuse_misfits(folder, problems)
    taken = {}
    for key, name in known.items():
        if name not in tied:
            own = torch.float32 if name.startswith("router.") else dtype
            tensor = stored.pop(key)
            taken[name] = tensor.to(own) if tensor.is_floating_point() else tensor
    model.load_state_dict(taken, strict=False, assign=True)
    if tied:
        model.lm_head.weight = model.embed_tokens.weight
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def load_settings(folder: Path, config: MoRConfig) -> Any:
    """Transformers' ``GenerationConfig`` beside the model; made from ``config`` where none is.

    Raises:
        MorError: it is damaged.
    """
    try:
        with quiet():
            if (folder / SETTINGS).is_file():
                return GenerationConfig.from_pretrained(folder, local_files_only=True)
            return GenerationConfig.from_model_config(config)
    except Exception as error:  # the library raises whatever a broken file happens to cause
        raise unreadable(folder, error) from error
