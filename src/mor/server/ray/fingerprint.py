"""Whether two replicas have the same model: one line that stands for a model folder's content."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mor.disk import digest
from mor.errors import MorError
from mor.run_files import model_folder

# What decides answers: weights, configuration, tokenizer, chat template, calibrated levels.
SUFFIXES = frozenset({".bin", ".jinja", ".json", ".model", ".pt", ".safetensors", ".txt"})


def fingerprint(folder: Path) -> str:
    """The sha256 over names and contents of the files that decide what a model answers.

    Args:
        folder: a model folder, a run folder, or the name of a model that ships.

    Raises:
        MorError: there is no model, or a file of it cannot be read.
    """
    place = model_folder(folder)
    whole = hashlib.sha256()
    try:
        for path in sorted(place.iterdir()):
            if path.suffix in SUFFIXES and path.is_file():
                whole.update(f"{path.name}\0{digest(path)}\n".encode())
    except OSError as error:
        raise MorError(f"{place} cannot be read: {error.strerror or error}") from None
    return whole.hexdigest()


def check_fingerprint(folder: Path, expected: str, where: str) -> None:
    """Refuse a folder whose content is not the expected one.

    Args:
        folder: of the model.
        expected: what :func:`fingerprint` said where the server was started.
        where: whose folder it is, for the message.

    Raises:
        MorError: another content, or no model at all.
    """
    try:
        found = fingerprint(folder)
    except MorError as error:
        raise MorError(f"{where}: {error}") from None
    if found != expected:
        raise MorError(
            f"{where}: the model in {folder} (sha256 {found[:12]}) is not the one that the server "
            f"was started with (sha256 {expected[:12]}); put the same files there, or start anew"
        )
