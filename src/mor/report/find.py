"""Which of the folders that were named are finished runs: ``runs/*`` names others too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mor.errors import MorError
from mor.run_files import CHECKPOINTS, RECIPE, SUMMARY


def find_runs(paths: Sequence[str | Path]) -> tuple[list[Path], list[str]]:
    """The run folders among ``paths``, in order, each once.

    A folder that is no run but holds runs, as ``runs/demo`` does, stands for those.

    Args:
        paths: run folders, and whatever else a pattern of the shell matched.

    Returns:
        The finished runs, and a line for each path that is none and why.

    Raises:
        MorError: there is no finished run among them.
    """
    runs: dict[Path, Path] = {}
    said = []
    for path in map(Path, paths):
        if not path.exists():
            said.append(f"skipped: {path} is not a folder, and not there at all")
            continue
        inside = sorted(summary.parent for summary in path.glob(f"*/{SUMMARY}"))
        if (path / SUMMARY).is_file():
            runs.setdefault(path.resolve(), path)
        elif inside:
            for run in inside:
                runs.setdefault(run.resolve(), run)
            said.append(f"{path} holds runs: {', '.join(run.name for run in inside)}")
        else:
            said.append(f"skipped: {path} {_why_not(path)}")
    if not runs:
        raise MorError(f"there is no finished run: {'; '.join(said)}" if said else "name a run")
    return list(runs.values()), said


def _why_not(path: Path) -> str:
    if not path.is_dir():
        return "is a file, no run folder"
    if (path / RECIPE).is_file() or (path / CHECKPOINTS).is_dir():
        return f"is a run that is not finished ({SUMMARY} is missing)"
    return f"is no run folder ({SUMMARY} is missing)"
