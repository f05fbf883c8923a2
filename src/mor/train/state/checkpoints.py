"""Checkpoints that are whole or absent, whenever the process is killed.

RUN/checkpoints/checkpoint-N/                  whole, if its manifest says so
RUN/checkpoints/checkpoint-N/manifest.json     size and sha256 of every file, and facts of the run
RUN/checkpoints/saving/                        one being written, or one being removed
RUN/checkpoints/aside/checkpoint-N/            newer than what ``--resume-from`` went back to

A checkpoint is written under ``saving``, flushed to the disk, given its manifest and only then
renamed. Removing works the other way round: renamed first, so that no kill leaves half of one
under a name that counts.
"""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mor.disk import digest, flush, flush_tree
from mor.errors import MorError
from mor.train.state import sharded

MANIFEST, STAGING, ASIDE = "manifest.json", "saving", "aside"
_FORMAT, _VERSION = "mor-checkpoint", 1


def step_of(checkpoint: Path) -> int:
    """N of ``checkpoint-N``; -1 for any other name."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number != checkpoint.name and number.isdecimal() else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder by step, whole or not."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted((p for p in entries if step_of(p) >= 0 and p.is_dir()), key=step_of)


# Writing ---------------------------------------------------------------------------------------


def begin(folder: Path) -> Path:
    """An empty place to write into; what a kill left there is removed."""
    place = folder / STAGING
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    return place


def publish(folder: Path, step: int, facts: dict[str, Any]) -> Path:
    """Flush ``saving/checkpoint-N``, write its manifest, and rename it into place.

    Args:
        folder: the checkpoints of one run.
        step: N.
        facts: what a later run must agree with, kept in the manifest.

    Raises:
        OSError: the disk is full, or the like; nothing under a name that counts has changed.
    """
    fresh, final = folder / STAGING / f"checkpoint-{step}", folder / f"checkpoint-{step}"
    flush_tree(fresh)
    files = {
        path.relative_to(fresh).as_posix(): {"bytes": path.stat().st_size, "sha256": digest(path)}
        for path in sorted(fresh.rglob("*"))
        if path.is_file()
    }
    head: dict[str, Any] = {"format": _FORMAT, "version": _VERSION, "step": step}
    text = json.dumps(head | facts | {"files": files}, indent=2) + "\n"
    (fresh / MANIFEST).write_text(text, encoding="utf-8")
    flush(fresh / MANIFEST)
    flush(fresh)
    if final.exists():
        _remove(final)
    fresh.rename(final)
    flush(folder)
    return final


def _remove(checkpoint: Path) -> None:
    gone = checkpoint.parent / STAGING / f"old-{checkpoint.name}"
    gone.parent.mkdir(exist_ok=True)
    shutil.rmtree(gone, ignore_errors=True)
    checkpoint.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def rotate(folder: Path, limit: int | None, keeps: Callable[[int], bool]) -> None:
    """Remove the oldest beyond ``limit``; those that ``keeps`` names stay and do not count."""
    spare = [path for path in list_checkpoints(folder) if not keeps(step_of(path))]
    for path in spare[: -limit if limit else 0]:
        _remove(path)


def recover(folder: Path) -> None:
    """After a kill: move a finished save that was not yet renamed into place, drop the rest."""
    for path in list_checkpoints(folder / STAGING):
        final = folder / path.name
        if (path / MANIFEST).is_file() and damage(path) is None and not final.exists():
            path.rename(final)
            flush(folder)
    shutil.rmtree(folder / STAGING, ignore_errors=True)


# Reading ---------------------------------------------------------------------------------------


def manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest; empty where there is none (a plain Trainer's checkpoint).

    Raises:
        MorError: it cannot be read.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = content["files"]
        if content["format"] != _FORMAT or not all("sha256" in item for item in files.values()):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise MorError(f"{path} is damaged") from None
    if content["version"] != _VERSION:
        raise MorError(
            f"{path} has version {content['version']}; this mor reads version {_VERSION}"
        )
    return content


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None where every byte is as it was written.

    Without a manifest only the form of the files can be looked at.
    """
    try:
        files = manifest(checkpoint).get("files")
    except MorError as error:
        return str(error)
    if files is None:
        return _malformed(checkpoint)
    for name, expected in files.items():  # sizes first: they cost nothing
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{name} has {size} bytes, its manifest says {expected['bytes']}"
    for name, expected in files.items():
        try:
            altered = digest(checkpoint / name) != expected["sha256"]
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
        if altered:
            return f"{name} is not what was written: its sha256 is another"
    return None


def _malformed(checkpoint: Path) -> str | None:
    shards, name = sharded.has_shards(checkpoint), "model.safetensors"
    if shards and not sharded.is_whole(checkpoint):
        return "a shard is missing or cut short"
    try:
        if not shards:
            with safe_open(checkpoint / name, "pt") as weights:
                weights.keys()
        name = "trainer_state.json"
        json.loads((checkpoint / name).read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError):
        return f"{name} is missing or cut short"
    needed = [] if shards else [checkpoint / "optimizer.pt"]
    for path in [*needed, *checkpoint.glob("rng_state*.pth")]:
        if not zipfile.is_zipfile(path):
            return f"{path.name} is missing or cut short"
    return None


def _warn_unsealed(checkpoint: Path) -> None:
    if not (checkpoint / MANIFEST).is_file():
        warnings.warn(
            f"{checkpoint} has no {MANIFEST}, so only the form of its files was checked: a plain "
            "Trainer made it, or an older mor",
            stacklevel=3,
        )


def newest(folder: Path) -> Path | None:
    """The newest checkpoint, every file checked; None where there is none yet.

    Raises:
        MorError: it is damaged; the message names the file and offers the one before it.
    """
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        return None
    wrong = damage(checkpoints[-1])
    if wrong is None:
        _warn_unsealed(checkpoints[-1])
        return checkpoints[-1]
    whole = next((p for p in reversed(checkpoints[:-1]) if damage(p) is None), None)
    offer = (
        "none before it is whole: start anew with --overwrite"
        if whole is None
        else f"the one before it, {whole.name}, is whole: "
        f"go on from there with --resume-from {whole.name}"
    )
    raise MorError(f"{checkpoints[-1]} is damaged: {wrong}; {offer}")


def select_checkpoint(folder: Path, name: str | Path) -> Path:
    """The checkpoint that ``--resume-from`` names, every file checked; newer ones are set aside.

    Raises:
        MorError: there is no such checkpoint in ``folder``, or it is damaged.
    """
    path = folder / Path(name).name
    given = Path(name)
    foreign = len(given.parts) > 1 and given.expanduser().resolve() != path.resolve()
    if foreign or path not in list_checkpoints(folder):
        have = ", ".join(p.name for p in list_checkpoints(folder)) or "none"
        raise MorError(
            f"resume-from={str(name)!r} is no checkpoint of this run; in {folder}: {have} "
            "(to go on from another run's, use --branch-from)"
        )
    wrong = damage(path)
    if wrong is not None:
        raise MorError(f"{path} is damaged: {wrong}")
    _warn_unsealed(path)
    for newer in list_checkpoints(folder):
        if step_of(newer) > step_of(path):
            target = folder / ASIDE / newer.name
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            newer.rename(target)
    return path
