"""What several commands share: opening a model, where it runs, writing JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from mor.data import DataIndex
from mor.data import load_tokenizer as load_data_tokenizer
from mor.data.bos import check_same_bos, model_bos
from mor.disk import check_folder, write_whole
from mor.errors import MorError
from mor.folder.config import is_media_model, load_config
from mor.folder.tokenizer import tokenizer_beside
from mor.hf.load import load_media_model
from mor.hf.load import open_model as open_model
from mor.run_files import CONFIG, beside_model


def open_any_model(folder: Path) -> Any:
    """The same for models of images and sounds too. Raises as :func:`open_model`."""
    if not is_media_model(folder):
        return open_model(folder)
    model = load_media_model(folder)
    return model.cuda() if torch.cuda.is_available() else model  # type: ignore[call-arg]


def tokenizer_for(folder: Path, index: DataIndex) -> Any:
    """The tokenizer beside a model, or the data's where a checkpoint came without one.

    Raises:
        MorError: the data was prepared with another, or its documents begin otherwise than the
            model's texts: it would read nonsense.
    """
    ours = tokenizer_beside(folder, index)
    found = beside_model(folder, CONFIG)
    if found is not None:
        bos = model_bos(load_config(found.parent), ours)
        check_same_bos(bos, index.bos, f"the model in {folder}", index.directory)
    return load_data_tokenizer(index.tokenizer_dir) if ours is None else ours


@contextmanager
def show_progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error where that is a terminal, else a line every fifth.

    Args:
        label: what is being done.
        total: steps of the whole work.

    Yields:
        What to call after each step.
    """
    console = Console(stderr=True, highlight=False)
    done = 0
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)

        def tick() -> None:
            nonlocal done
            done += 1
            bar.advance(task)
            if not console.is_terminal and done * 5 // total > (done - 1) * 5 // total:
                console.print(f"{label}: {done * 100 // total}%")

        yield tick


def write_json(path: Path, content: Any) -> None:
    """Write ``path`` whole or not at all.

    Raises:
        MorError: it cannot be written.
    """
    try:
        write_whole(path, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise MorError(f"{path} cannot be written: {error.strerror or error}") from None


def check_file(path: Path | None, *, folder_exists: bool = True) -> None:
    """Refuse, before any work, a file that could not be written in the end.

    Args:
        path: of the file; None for none.
        folder_exists: whether its folder has to be there already.

    Raises:
        MorError: its folder does not exist, or it is a folder itself.
    """
    if path is None:
        return
    if not folder_exists:
        check_folder(path.absolute().parent)
    if path.is_dir() or (folder_exists and not path.absolute().parent.is_dir()):
        raise MorError(f"out={path} must be a file in a folder that exists")
