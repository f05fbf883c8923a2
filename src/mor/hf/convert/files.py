"""Writing checkpoints: whole or not at all, with what belongs beside the weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from tokenizers import Tokenizer

from mor.disk import check_new, replace_folder
from mor.errors import MorError
from mor.folder.weights import ConversionError, one_line, read_mapping

COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""What belongs to a checkpoint beside weights and configuration, and is copied along."""


def copy_companions(source: Path, out: Path) -> None:
    """Copy tokenizer and generation files of folder ``source`` to ``out``."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def check_tokenizer(folder: Path, vocab_size: int, source: Path) -> None:
    """Refuse a ``tokenizer.json`` in ``folder`` that the model cannot follow.

    Raises:
        ConversionError: it or its configuration is damaged, or it has a token past ``vocab_size``;
            ``source`` is named.
    """
    if (folder / "tokenizer_config.json").is_file():
        try:
            read_mapping(folder / "tokenizer_config.json")
        except ConversionError as error:
            reason = str(error).partition(": ")[2]
            raise ConversionError(
                f"{source / 'tokenizer_config.json'}: the tokenizer is damaged: {reason}"
            ) from error
    if not (folder / "tokenizer.json").is_file():
        return
    try:
        vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    except Exception as error:  # the library has one class for all errors: Exception
        raise ConversionError(
            f"{source / 'tokenizer.json'}: the tokenizer is damaged: {one_line(error)[:200]}"
        ) from error
    token = max(vocabulary, key=vocabulary.__getitem__, default=None)
    if token is not None and vocabulary[token] >= vocab_size:
        raise ConversionError(
            f"{source / 'tokenizer.json'}: token {token!r} has id {vocabulary[token]}, but "
            f"vocab_size={vocab_size}; the tokenizer belongs to another model"
        )


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` to write into; it becomes ``out`` if no exception passes.

    Raises:
        MorError: ``out`` exists, or the disk refuses.
    """
    check_new(out)
    try:
        with replace_folder(out) as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        raise MorError(f"{out}: cannot write: {one_line(error)}") from error
