"""What an evaluation found, kept in the run folder as ``eval.json``, where a report reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mor.data import TRAIN
from mor.disk import write_whole
from mor.run_files import EVAL, MODEL, SUMMARY

# Two results of the same texts differ in nothing but how many of them were looked at.
_SAME = ("data", "split", "seq_len")


def run_of(folder: Path) -> Path | None:
    """The finished run that ``folder`` is, or whose ``model`` it is; None for other models."""
    folder = folder.expanduser()
    if (folder / SUMMARY).is_file():
        return folder
    inside = folder.resolve().name == MODEL and (folder.resolve().parent / SUMMARY).is_file()
    return folder.resolve().parent if inside else None


def keep_result(folder: Path, result: dict[str, Any]) -> str | None:
    """Write ``eval.json`` into the run that ``folder`` belongs to.

    A result of more tokens of the same split, found after the training, is not replaced by one of
    fewer: a quick look does not cost a long evaluation.

    Args:
        folder: the run folder, or its model; for a model of no run nothing is kept.
        result: of :func:`mor.eval.evaluate`.

    Returns:
        What was done, for people; None where there is no run.
    """
    run = run_of(folder)
    if run is None:
        return None
    if result["split"] == TRAIN:
        return f"not kept: {run} keeps what is scored on texts that were held out"
    path = run / EVAL
    before = _read(path)
    if (
        all(before.get(key) == result.get(key) for key in _SAME)
        and before.get("tokens", 0) > result["tokens"]
        and path.stat().st_mtime > (run / SUMMARY).stat().st_mtime
    ):
        return f"not kept: {path} has scored more of it, {before['tokens']:,} tokens"
    try:
        write_whole(path, json.dumps(result, indent=2) + "\n")
    except OSError as error:
        return f"not kept: {path} cannot be written: {error.strerror or error}"
    return f"kept: {path}"


def _read(path: Path) -> dict[str, Any]:
    """What is there; nothing where it is no result."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found["tokens"], int) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
