"""The configuration in a model folder, and one sentence for whatever is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

from mor.config import MoRConfig
from mor.errors import MorError
from mor.folder.weights import one_line
from mor.run_files import model_folder


def load_config(folder: str | Path) -> MoRConfig:
    """The configuration of the model in ``folder``, without its weights.

    Raises:
        MorError: no folder, no model in it, another architecture, or a wrong field.
    """
    folder = model_folder(Path(folder))
    try:
        with quiet():
            return MoRConfig.from_pretrained(folder)
    except MorError as error:
        raise MorError(f"{folder / 'config.json'}: {error}") from error
    except Exception as error:  # the library raises whatever a broken file happens to cause
        raise unreadable(folder, error) from error


def is_media_model(folder: str | Path) -> bool:
    """Whether ``folder`` holds a model of images or sounds. Raises as :func:`load_config`."""
    modality: str = load_config(folder).modality
    return modality != "text"


def unreadable(folder: Path, error: Exception) -> MorError:
    """One sentence for what a library raised over a file of ``folder``."""
    return MorError(
        f"{folder} cannot be read, a file is missing, damaged or cut short: {one_line(error, 200)}"
    )


@contextmanager
def quiet() -> Iterator[None]:
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
