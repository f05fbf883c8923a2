"""What several commands share: opening a model, where it runs, writing JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mor.errors import MorError
from mor.hf.load import load_model, load_tokenizer
from mor.hf.modeling import MoRForCausalLM


def open_model(folder: Path) -> tuple[MoRForCausalLM, Any]:
    """Model, on the GPU where there is one, and tokenizer of a model folder or a run folder.

    Raises:
        MorError: see :mod:`mor.hf.load`.
    """
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    if torch.cuda.is_available():
        model.cuda()  # type: ignore[call-arg]
    return model, tokenizer


def write_json(path: Path, content: Any) -> None:
    """Write ``path`` whole or not at all.

    Raises:
        MorError: it cannot be written.
    """
    fresh = path.with_name(path.name + ".partial")
    try:
        fresh.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        raise MorError(f"{path} cannot be written: {error.strerror or error}") from None


def check_file(path: Path | None) -> None:
    """Refuse, before any work, a file that could not be written in the end.

    Raises:
        MorError: its folder does not exist, or it is a folder itself.
    """
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise MorError(f"out={path} must be a file in a folder that exists")
