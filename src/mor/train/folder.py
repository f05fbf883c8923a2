"""The run folder: who may write it, which checkpoint to go on from, files that are whole or absent.

RUN/recipe.yaml       the recipe, every default written out
RUN/log.jsonl         one line per log entry
RUN/checkpoints/      checkpoint-N of Transformers' Trainer, to resume from
RUN/tensorboard/      where TensorBoard is installed
RUN/model/            for ``from_pretrained``, tokenizer included; there once the run is finished
RUN/summary.json      written last
"""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from mor.errors import MorError
from mor.train.recipe import Recipe, parse_recipe
from mor.train.recipe_file import dump_recipe

RECIPE, LOG, SUMMARY, MODEL = "recipe.yaml", "log.jsonl", "summary.json", "model"
CHECKPOINTS, TENSORBOARD = "checkpoints", "tensorboard"
_OURS = {RECIPE, LOG, SUMMARY, MODEL, CHECKPOINTS, TENSORBOARD, "eval.json"}
# What may differ between the parts of one run: it changes no weight.
_FREE = {
    "data": {"path", "verify"},
    "train": {
        "logging_steps",
        "eval_steps",
        "eval_sequences",
        "save_steps",
        "save_total_limit",
        "num_workers",
        "threads",
        "report_to",
        "gradient_checkpointing",
    },
}


def claim(recipe: Recipe, *, resume: bool, overwrite: bool) -> Path | None:
    """Make the run folder ours and write the recipe into it.

    Returns:
        The checkpoint to resume from, if that was asked for.

    Raises:
        MorError: the run is there already, or there is nothing to resume, or another recipe made
            it, or ``overwrite`` would remove files that no run has written.
    """
    run_dir = recipe.run_dir
    checkpoint = None
    if resume:
        _check_same(recipe)
        checkpoint = last_checkpoint(run_dir / CHECKPOINTS)
    elif run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        if not overwrite:
            raise MorError(
                f"{run_dir} already holds a run; use --resume, --overwrite or another name"
            )
        _remove(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_whole(run_dir / RECIPE, dump_recipe(recipe))
    except OSError as error:
        raise MorError(f"{run_dir} cannot be written: {error.strerror or error}") from None
    return checkpoint


def _remove(run_dir: Path) -> None:
    names = sorted(entry.name for entry in run_dir.iterdir()) if run_dir.is_dir() else [""]
    foreign = [name for name in names if name.removesuffix(".partial") not in _OURS]
    if foreign:
        raise MorError(
            f"{run_dir} holds {foreign[0] or 'a file, not a folder'}, which no run has written; "
            "overwrite removes whole run folders only: choose another name or output"
        )
    shutil.rmtree(run_dir)


def _check_same(recipe: Recipe) -> None:
    """Refuse to go on with another recipe than the one that began.

    Raises:
        MorError: there is no run, it is finished, or fields differ that change the weights.
    """
    run_dir = recipe.run_dir
    if (run_dir / SUMMARY).is_file():
        raise MorError(f"{run_dir} holds a finished run; nothing is left to resume")
    path = run_dir / RECIPE
    if not path.is_file():
        raise MorError(f"{run_dir} holds no run to resume; start without --resume")
    try:
        began = parse_recipe(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise MorError(f"{path} cannot be read: {error}") from None
    old, new = _decisive(began), _decisive(recipe)
    changed = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    if changed:
        some = ", ".join(f"{n}={new.get(n)!r} was {old.get(n)!r}" for n in changed[:3])
        raise MorError(f"{run_dir} was begun with another recipe: {some}; resume with the same")


def _decisive(recipe: Recipe) -> dict[str, Any]:
    """Fields that decide the weights, by dotted name."""
    flat = {}
    for section in ("model", "data", "train"):
        content = recipe.model_dump(mode="json")[section]
        for name, value in content.items():
            if name == "mixture" and value:
                value = [part["weight"] for part in value]  # folders may move, as data.path may
            if name not in _FREE.get(section, ()):
                flat[f"{section}.{name}"] = value
    return flat


def last_checkpoint(folder: Path) -> Path:
    """The newest checkpoint that is whole; one that a kill cut short is passed over.

    Raises:
        MorError: there is none.
    """
    found = folder.glob("checkpoint-*") if folder.is_dir() else ()
    numbered = [(p.name.removeprefix("checkpoint-"), p) for p in found]
    whole = [(int(n), p) for n, p in numbered if n.isdecimal() and _is_whole(p)]
    if not whole:
        raise MorError(
            f"{folder} holds no whole checkpoint to resume from; start anew with --overwrite "
            "(train.save_steps keeps checkpoints)"
        )
    return max(whole)[1]


def _is_whole(checkpoint: Path) -> bool:
    # The Trainer writes its state last; the rest guards against what a copy or a disk cut short.
    try:
        with safe_open(checkpoint / "model.safetensors", "pt") as weights:
            weights.keys()
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError):
        return False
    needed = [checkpoint / name for name in ("optimizer.pt", "scheduler.pt")]
    return all(map(zipfile.is_zipfile, [*needed, *checkpoint.glob("rng_state*.pth")]))


def write_whole(path: Path, text: str) -> None:
    """Write ``path`` so that it is there whole or not at all."""
    fresh = path.with_name(path.name + ".partial")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)
