"""Load a model folder and say in one sentence what is wrong with it, if anything is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

from mor.config import MoRConfig
from mor.errors import MorError
from mor.hf.modeling import MoRForCausalLM


def load_model(folder: str | Path, dtype: torch.dtype | None = None) -> MoRForCausalLM:
    """The model of ``folder``, in evaluation mode, every weight accounted for.

    ``from_pretrained`` fills missing weights at random and goes on; here that is an error.

    Raises:
        MorError: no folder, no model in it, another architecture, a file cut short, weights that
            are missing, left over or of another shape.
    """
    folder = _model_folder(Path(folder))
    try:
        config = MoRConfig.from_pretrained(folder)
        loaded: Any = MoRForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype or torch.float32, output_loading_info=True
        )
    except (SafetensorError, OSError, EOFError, json.JSONDecodeError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise MorError(f"{folder} cannot be read, a file is damaged or cut short: {text}") from None
    model, info = loaded
    problems = {
        "missing": info["missing_keys"],
        "not known": info["unexpected_keys"],
        "of another shape": [key[0] for key in info["mismatched_keys"]],
    }
    for what, keys in problems.items():
        if keys:
            some = ", ".join(sorted(keys)[:3])
            raise MorError(f"{folder}: {len(keys)} weights are {what}, among them {some}")
    return model.eval()


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer beside the model.

    Raises:
        MorError: there is none.
    """
    folder = _model_folder(Path(folder))
    if not (folder / "tokenizer_config.json").is_file():
        raise MorError(f"{folder} holds no tokenizer (tokenizer_config.json, tokenizer.json)")
    return AutoTokenizer.from_pretrained(folder)


def _model_folder(folder: Path) -> Path:
    """``folder`` itself or, for a run folder, its ``model``; config.json is checked."""
    if not folder.is_dir():
        raise MorError(f"model folder {str(folder)!r} does not exist")
    if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    path = folder / "config.json"
    if not path.is_file():
        raise MorError(f"{folder} is no model folder: config.json is missing")
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError):
        raise MorError(f"{path} is not a JSON object; the checkpoint is damaged") from None
    if kind != "mor":
        raise MorError(
            f"{path} has model_type={kind!r}, not 'mor'; convert it first: "
            f"mor convert llama {folder} --out DIR"
        )
    return folder
