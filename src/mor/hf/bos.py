"""A model's BOS policy (`mor.data.bos`) in its configuration, and its tokenizer to match."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from mor.config import MoRConfig
from mor.data.bos import Bos, apply_bos, model_bos, own_frame, resolve_bos
from mor.hf.modeling import MoRForCausalLM


def set_bos(model: MoRForCausalLM, bos: Bos) -> None:
    """Write a policy into the configuration, and the token into the generation settings."""
    config, settings = model.config, model.generation_config
    if bos.token is not None:
        if settings is not None and settings.bos_token_id in (None, config.bos_token_id):
            settings.bos_token_id = bos.token
        config.bos_token_id = bos.token
    config.add_bos_token = bool(bos.added)


def record_bos(model: MoRForCausalLM, tokenizer: Any, *, imported: bool = False) -> None:
    """Write down what the tokenizer beside a model does, where the configuration says nothing.

    A tokenizer that begins texts with several tokens is left to do so by itself.

    Args:
        model: its configuration is changed.
        tokenizer: the one that it was trained with.
        imported: whether others trained it: then their tokenizer alone decides.
    """
    if model.config.add_bos_token is None and len(own_frame(tokenizer)[0]) < 2:
        bos = resolve_bos(tokenizer, "auto") if imported else model_bos(model.config, tokenizer)
        set_bos(model, bos)


def tokenizer_of(folder: Path) -> Any | None:
    """The tokenizer of a folder, as its own library class; None where none can be read."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception:  # whatever is wrong is said, by name, by whoever needs the tokenizer
        return None


def save_tokenizer(tokenizer: Any, config: MoRConfig, folder: Path) -> None:
    """Write the tokenizer beside a model so that of itself it does what the model's policy is.

    Raises:
        MorError: the tokenizer cannot do so.
    """
    if config.add_bos_token is not None:
        tokenizer = apply_bos(tokenizer, model_bos(config))
    tokenizer.save_pretrained(folder)
