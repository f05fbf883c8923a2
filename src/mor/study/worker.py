"""One job of a study, in a process of its own: train, then evaluate. Goes on where it stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mor.data import PackedDataset
from mor.disk import write_whole
from mor.errors import Interrupted, MorError
from mor.run_files import EVAL, RECIPE, SUMMARY
from mor.train import Recipe, load_recipe, train
from mor.train.run import with_branches
from mor.train.state.differences import Changes, describe_changes, find_differences, read_recipe

TASKS = "tasks.json"


def is_trained(part: Recipe) -> bool:
    """Whether the run folder holds a finished run of this very recipe."""
    if not (part.run_dir / SUMMARY).is_file() or not (part.run_dir / RECIPE).is_file():
        return False
    try:
        return not _changes(part)
    except MorError:  # its recipe cannot be read; the job of that run says so
        return False


def _changes(part: Recipe) -> Changes:
    """What a finished run was trained with and its recipe says otherwise now, the data included.

    Fields that decide no weight, such as the rhythm of the log, may differ.
    """
    began = read_recipe(part.run_dir / RECIPE)
    changed = find_differences(began, part)
    changed.pop("train.branch_from", None)  # the run that it names is a part of the job itself
    folders = [[str(path) for path, _ in one.data.folders] for one in (began, part)]
    if folders[0] != folders[1]:
        changed["data.path"] = folders[0], folders[1]
    return changed


def is_scored(part: Recipe, settings: dict[str, Any]) -> bool:
    """Whether the run was evaluated with these settings after it was trained."""
    wanted = [EVAL, *([TASKS] if settings["tasks"] else [])]
    for name in wanted:
        path = part.run_dir / name
        if not path.is_file() or path.stat().st_mtime < (part.run_dir / SUMMARY).stat().st_mtime:
            return False
        if json.loads(path.read_text(encoding="utf-8")).get("study") != settings:
            return False
    return True


def work(recipe: Recipe, settings: dict[str, Any]) -> None:
    """Train what is not trained yet, and score what is not scored yet.

    Args:
        recipe: of the job; its branches belong to it.
        settings: `max_sequences`, `batch_size`, `tasks`, `questions`.

    Raises:
        MorError: as training and evaluation, and where a finished run has another recipe.
    """
    parts = with_branches(recipe)
    for part in parts:
        if (part.run_dir / SUMMARY).is_file() and (changed := _changes(part)):
            raise MorError(
                f"{part.run_dir} was trained with another recipe: {describe_changes(changed)}; "
                "give the study another --out, or remove that folder"
            )
    if not all(map(is_trained, parts)):
        train(recipe, resume=any(part.run_dir.exists() for part in parts))
    for part in parts:
        if not is_scored(part, settings):
            score(part, settings)


def score(part: Recipe, settings: dict[str, Any]) -> None:
    """Write `eval.json`, and `tasks.json` where there are tasks."""
    from mor.eval import evaluate
    from mor.eval.harness.run import run_tasks
    from mor.folder.tokenizer import load_tokenizer
    from mor.hf.load import open_model

    run, section = part.run_dir, part.data
    held_out = section.validation_path or section.folders[0][0]
    dataset = PackedDataset(held_out, section.validation_split, section.seq_len)
    sizes = {name: settings[name] for name in ("max_sequences", "batch_size")}
    result = evaluate(open_model(run), dataset, load_tokenizer(run), **sizes)
    write_whole(run / EVAL, json.dumps(result | {"study": settings}) + "\n")
    if settings["tasks"]:
        folder, limit = section.folders[0][0], settings["questions"]
        scores = run_tasks(run, settings["tasks"], data=folder, limit=limit)
        write_whole(run / TASKS, json.dumps({"tasks": scores, "study": settings}) + "\n")


def main(arguments: list[str]) -> int:
    """Do the job of ``arguments``, RECIPE SETTINGS; 130 when interrupted, 2 on an error."""
    recipe, settings = arguments
    try:
        work(load_recipe(Path(recipe)), json.loads(settings))
    except Interrupted as error:
        print(error, file=sys.stderr)
        return 130
    except (MorError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
