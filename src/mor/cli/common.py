"""What several commands share: opening a model, where it runs, writing JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mor.data import DataIndex
from mor.data import load_tokenizer as load_data_tokenizer
from mor.disk import write_whole
from mor.errors import MorError
from mor.hf.load import load_model, load_tokenizer
from mor.hf.modeling import MoRForCausalLM
from mor.run_files import beside_model


def open_model(folder: Path) -> MoRForCausalLM:
    """The model of a model folder or a run folder, on the GPU where there is one.

    Raises:
        MorError: see :mod:`mor.hf.load`.
    """
    model = load_model(folder)
    if torch.cuda.is_available():
        model.cuda()  # type: ignore[call-arg]
    return model


def tokenizer_for(folder: Path, index: DataIndex) -> Any:
    """The tokenizer beside a model, or the data's where a checkpoint came without one.

    Raises:
        MorError: the data was prepared with another: the model would read nonsense.
    """
    theirs = load_data_tokenizer(index.tokenizer_dir)
    found = beside_model(folder, "tokenizer_config.json")
    if found is None:
        return theirs
    ours = load_tokenizer(found.parent)
    vocabulary = ours.get_vocab()
    wrong = [t for t, i in theirs.get_vocab().items() if vocabulary.get(t) != i]
    if wrong:
        raise MorError(
            f"{index.directory} was prepared with another tokenizer than that of {folder} "
            f"({len(wrong)} tokens differ, such as {min(wrong)!r}); prepare the text again with "
            f"--tokenizer {found.parent}"
        )
    return ours


def write_json(path: Path, content: Any) -> None:
    """Write ``path`` whole or not at all.

    Raises:
        MorError: it cannot be written.
    """
    try:
        write_whole(path, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise MorError(f"{path} cannot be written: {error.strerror or error}") from None


def check_file(path: Path | None) -> None:
    """Refuse, before any work, a file that could not be written in the end.

    Raises:
        MorError: its folder does not exist, or it is a folder itself.
    """
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise MorError(f"out={path} must be a file in a folder that exists")
