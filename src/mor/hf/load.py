"""Load a model folder and say in one sentence what is wrong with it, if anything is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from mor.config import MoRConfig
from mor.data.index import DataIndex
from mor.data.tokenizer import load_tokenizer as load_data_tokenizer
from mor.errors import MorError
from mor.hf.media import MediaModel
from mor.hf.modeling import MoRForCausalLM
from mor.hf.register import CLASSES, class_for
from mor.model.packed import Quantization, serving_view
from mor.model.packed_layers import copy_around
from mor.run_files import TOKENIZER, beside_model, model_folder

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


def is_media_model(folder: str | Path) -> bool:
    """Whether ``folder`` holds a model of images or sounds. Raises as :func:`load_config`."""
    modality: str = load_config(folder).modality
    return modality != "text"


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
        with _quiet():
            loaded: Any = kind.from_pretrained(
                folder,
                config=config,
                dtype=dtype or torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=True,
            )
    except Exception as error:  # the library raises whatever a broken file happens to cause
        raise _unreadable(folder, error) from error
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


Weights = Literal["float32", "bfloat16"]
"""Types that :func:`open_model` loads weights in."""


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


def load_config(folder: str | Path) -> MoRConfig:
    """The configuration of the model in ``folder``, without its weights.

    Raises:
        MorError: no folder, no model in it, another architecture, or a wrong field.
    """
    folder = model_folder(Path(folder))
    try:
        with _quiet():
            return MoRConfig.from_pretrained(folder)
    except MorError as error:
        raise MorError(f"{folder / 'config.json'}: {error}") from error
    except Exception as error:  # as above
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> MorError:
    return MorError(
        f"{folder} cannot be read, a file is missing, damaged or cut short: {_line(error)}"
    )


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer beside the model.

    Raises:
        MorError: there is none, or it is damaged.
    """
    folder = model_folder(Path(folder))
    if not (folder / TOKENIZER).is_file():
        raise MorError(f"{folder} holds no tokenizer ({TOKENIZER}, tokenizer.json)")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise MorError(f"the tokenizer in {folder} is damaged: {_line(error)}") from error


def tokenizer_beside(folder: str | Path, index: DataIndex) -> Any:
    """The tokenizer beside a model; None where the model came without one.

    Raises:
        MorError: the data was prepared with another: the model would read nonsense.
    """
    found = beside_model(Path(folder), TOKENIZER)
    if found is None:
        return None
    ours = load_tokenizer(found.parent)
    vocabulary, theirs = ours.get_vocab(), load_data_tokenizer(index.tokenizer_dir).get_vocab()
    wrong = [token for token, number in theirs.items() if vocabulary.get(token) != number]
    if wrong:
        raise MorError(
            f"{index.directory} was prepared with another tokenizer than that of {folder} "
            f"({len(wrong)} tokens differ, such as {min(wrong)!r}); prepare the text again with "
            f"--tokenizer {found.parent}"
        )
    return ours


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
