"""Load a model folder and say in one sentence what is wrong with it, if anything is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from mor.config import MoRConfig
from mor.errors import MorError
from mor.hf.modeling import MoRForCausalLM
from mor.run_files import model_folder


def load_model(folder: str | Path, dtype: torch.dtype | None = None) -> MoRForCausalLM:
    """The model of ``folder``, in evaluation mode, every weight accounted for.

    ``from_pretrained`` fills missing weights at random and goes on; here that is an error.

    Raises:
        MorError: no folder, no model in it, another architecture, a file cut short, weights that
            are missing, left over or of another shape.
    """
    folder = model_folder(Path(folder))
    try:
        with _quiet():
            config = MoRConfig.from_pretrained(folder)
            loaded: Any = MoRForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype or torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=True,
            )
    except MorError as error:
        raise MorError(f"{folder / 'config.json'}: {error}") from error
    except Exception as error:  # the library raises whatever a broken file happens to cause
        raise MorError(
            f"{folder} cannot be read, a file is missing, damaged or cut short: {_line(error)}"
        ) from error
    model, info = loaded
    problems = {
        "missing": info["missing_keys"],
        "not known": info["unexpected_keys"],
        "of another shape": [key[0] for key in info["mismatched_keys"]],
    }
    for what, keys in problems.items():
        if keys:
            some = ", ".join(sorted(keys)[:3])
            raise MorError(f"{folder}: weights {what} ({len(keys)}): {some}; convert or save anew")
    return model.eval()


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer beside the model.

    Raises:
        MorError: there is none, or it is damaged.
    """
    folder = model_folder(Path(folder))
    if not (folder / "tokenizer_config.json").is_file():
        raise MorError(f"{folder} holds no tokenizer (tokenizer_config.json, tokenizer.json)")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise MorError(f"the tokenizer in {folder} is damaged: {_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar, and no table of wrong keys: they become one sentence."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
