"""What is already there: whether it may be replaced, and whether it is what was asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mor.data.documents import describe_skipped
from mor.data.index import (
    INDEX_FILE,
    PACKING_FOLDER,
    TOKENIZER_FOLDER,
    TRAIN,
    VALIDATION,
    DataIndex,
)
from mor.data.journal import Workshop
from mor.data.progress import Progress
from mor.data.tokenizer import load_tokenizer
from mor.errors import MorError

_OURS = re.compile(
    rf"{re.escape(INDEX_FILE)}|{TOKENIZER_FOLDER}|{PACKING_FOLDER}|({TRAIN}|{VALIDATION})-\d+\.bin"
)


def check_target(out: Path) -> None:
    """Let a missing, an empty or a prepared folder through, nothing else: it may be replaced."""
    try:
        if not out.exists():
            return
        if not out.is_dir():
            raise MorError(f"output {out} is a file, expected a folder")
        names = sorted(entry.name for entry in out.iterdir())
    except OSError as error:
        raise MorError(f"cannot look into output {out}: {error.strerror or error}") from error
    foreign = [name for name in names if not _OURS.fullmatch(name)]
    if foreign:
        raise MorError(
            f"output folder {out} holds other things ({foreign[0]}); choose a new folder"
        )


def begun(out: Path, workshop: Workshop) -> Mapping[str, Any]:
    """What is being made there, or was; empty if nothing."""
    if workshop.preparation is not None:
        return workshop.preparation
    return DataIndex.load(out).preparation if (out / INDEX_FILE).is_file() else {}


def differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Where two preparations differ, in words; empty where they do not."""
    return "; ".join(
        f"{name} is {there.get(name)} there, {value} was asked for"
        for name, value in asked.items()
        if there.get(name) != value
    )


def reuse(
    out: Path, preparation: Mapping[str, Any], skip_bad_rows: bool, progress: Progress
) -> DataIndex:
    """The index of the folder that is there, if it holds this very preparation and is whole.

    Raises:
        MorError: it holds another, or is damaged.
    """
    index = DataIndex.load(out)
    if index.skipped and not skip_bad_rows:
        raise MorError(
            f"{out} was prepared with bad rows left out: {describe_skipped(index.skipped)}; choose "
            "another folder, or skip_bad_rows as there"
        )
    if different := differences(index.preparation, preparation):
        raise MorError(
            f"{out} already holds another preparation ({different}); "
            f"choose another folder, or overwrite it"
        )
    index.verify_all(progress)
    load_tokenizer(index.tokenizer_dir)
    return replace(index, reused=True)
