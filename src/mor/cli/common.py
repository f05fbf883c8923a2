"""What several commands share: opening a model, where it runs, writing JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mor.config import MoRConfig
from mor.data import DataIndex
from mor.data import load_tokenizer as load_data_tokenizer
from mor.data.bos import check_same_bos, model_bos
from mor.errors import MorError
from mor.hf.load import load_model, load_tokenizer
from mor.hf.modeling import MoRForCausalLM
from mor.train.state.run_folder import write_whole


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
        MorError: the data was prepared with another, or its documents begin otherwise than the
            model's texts: it would read nonsense.
    """
    theirs = load_data_tokenizer(index.tokenizer_dir)
    places = [p for p in (folder, folder / "model") if (p / "tokenizer_config.json").is_file()]
    if not places:
        _check_bos(folder, None, index)
        return theirs
    ours = load_tokenizer(places[0])
    vocabulary = ours.get_vocab()
    wrong = [t for t, i in theirs.get_vocab().items() if vocabulary.get(t) != i]
    if wrong:
        raise MorError(
            f"{index.directory} was prepared with another tokenizer than that of {folder} "
            f"({len(wrong)} tokens differ, such as {min(wrong)!r}); prepare the text again with "
            f"--tokenizer {places[0]}"
        )
    _check_bos(folder, ours, index)
    return ours


def _check_bos(folder: Path, tokenizer: Any, index: DataIndex) -> None:
    for place in (folder, folder / "model"):
        if (place / "config.json").is_file():
            bos = model_bos(MoRConfig.from_pretrained(place), tokenizer)
            check_same_bos(bos, index.bos, f"the model in {folder}", index.directory)
            return


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
