"""A user's own files, laid out as the library `datasets` wants them (ImageFolder, AudioFolder).

DIR/cat/1.png, DIR/dog/2.png              the folder is the class
DIR/train/cat/1.png, DIR/test/dog/2.png   with splits; `valid`, `val`, `dev` are validation
DIR/1.png, DIR/metadata.csv               columns `file_name`, and `label` or another name
DIR/train/1.wav, DIR/train/metadata.jsonl
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mor.data.media.index import TEST, TRAIN, VALIDATION
from mor.errors import MorError, describe_missing

SUFFIXES = {
    "images": {
        *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".pnm"),
    },
    "audio": {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff"},
}
METADATA = ("metadata.csv", "metadata.jsonl")
_SPLIT_NAMES = {
    "train": TRAIN,
    "training": TRAIN,
    **dict.fromkeys(("validation", "valid", "val", "dev"), VALIDATION),
    **dict.fromkeys(("test", "testing", "eval"), TEST),
}
LABEL_FIELD = "label"


@dataclass(frozen=True)
class LabelledFile:
    """A file with its class and its split; `name` is its path below the folder."""

    name: str
    label: str
    split: str


@dataclass(frozen=True)
class Listing:
    """What a folder holds: the files to read, and those left out with the reason."""

    files: list[LabelledFile]
    skipped: list[dict[str, str]]

    @property
    def classes(self) -> list[str]:
        """Names of the classes, numbers in their own order, all else by the alphabet."""
        names = {file.label for file in self.files}
        numbers = all(name.isascii() and name.isdigit() for name in names)
        return sorted(names, key=(lambda n: (int(n), n)) if numbers else None)

    @property
    def splits(self) -> set[str]:
        """The splits that the folder itself has."""
        return {file.split for file in self.files}


def list_folder(folder: Path, kind: str, label_field: str = LABEL_FIELD) -> Listing:
    """The labelled files of a folder, sorted by path; hidden files and folders are passed over.

    Args:
        folder: see the module.
        kind: `images` or `audio`.
        label_field: the column of `metadata.csv` or the field of `metadata.jsonl`.

    Raises:
        MorError: there is no such folder, it holds no such file, fewer than two classes or none to
            train on, or its metadata are wrong; files without a class are listed as skipped.
    """
    if not folder.is_dir():
        raise MorError(f"folder {folder} of {kind} {describe_missing(folder)}")
    names = _names_below(folder)
    split_folders = _split_folders(folder, names)
    tables = _read_tables(folder, names, label_field)
    files, skipped = [], []
    listed: set[str] = set()
    for name in names:
        path = PurePosixPath(name)
        if path.name in METADATA:
            continue
        split = split_folders.get(path.parts[0], TRAIN) if len(path.parts) > 1 else TRAIN
        table = next((t for p, t in tables.items() if path.is_relative_to(p)), None)
        if path.suffix.lower() not in SUFFIXES[kind]:
            skipped.append(_skip(name, f"its suffix {path.suffix!r} is none of {kind}"))
        elif table is not None:
            if name in table:
                listed.add(name)
                files.append(LabelledFile(name, table[name], split))
            else:
                skipped.append(_skip(name, "the metadata do not name it"))
        elif path.parent == PurePosixPath(".") or (
            len(path.parts) == 2 and path.parts[0] in split_folders
        ):
            skipped.append(_skip(name, "it is in no folder of a class, and no metadata name it"))
        else:
            files.append(LabelledFile(name, path.parent.name, split))
    for table in tables.values():
        skipped += [
            _skip(n, "the metadata name it, and it is not there") for n in table if n not in listed
        ]
    return _checked(folder, kind, Listing(files, skipped))


def _checked(folder: Path, kind: str, listing: Listing) -> Listing:
    if not listing.files:
        why = (
            f"; {listing.skipped[0]['file']}: {listing.skipped[0]['reason']}"
            if listing.skipped
            else ""
        )
        raise MorError(
            f"folder {folder} holds no labelled {kind}: expected {folder}/CLASS/FILE, "
            f"{folder}/train/CLASS/FILE, or files beside a metadata.csv{why}"
        )
    if len(listing.classes) < 2:
        raise MorError(
            f"folder {folder} has one class, {listing.classes[0]!r}; expected two or more"
        )
    if TRAIN not in listing.splits:
        raise MorError(f"folder {folder} has no training split: {sorted(listing.splits)} only")
    return listing


def _skip(name: str, reason: str) -> dict[str, str]:
    return {"file": name, "reason": reason}


def _names_below(folder: Path) -> list[str]:
    def fail(error: OSError) -> None:
        raise MorError(f"cannot read {error.filename}: {error.strerror}") from error

    names = []
    for parent, folders, files in os.walk(folder, onerror=fail, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(parent).relative_to(folder)
        names += [(below / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(names)


def _split_folders(folder: Path, names: list[str]) -> dict[str, str]:
    """Folders that are splits, where all first folders have such names; else they are classes."""
    first = {name.split("/")[0] for name in names if "/" in name}
    if not first or any(name.lower() not in _SPLIT_NAMES for name in first):
        return {}
    # Two classes named `train` and `test` would be odd; files right inside need metadata then.
    return {name: _SPLIT_NAMES[name.lower()] for name in first}


def _read_tables(
    folder: Path, names: list[str], label_field: str
) -> dict[PurePosixPath, Mapping[str, str]]:
    """The label of each file by its path below `folder`, for each folder that has metadata."""
    tables: dict[PurePosixPath, Mapping[str, str]] = {}
    for name in names:
        path = PurePosixPath(name)
        if path.name not in METADATA:
            continue
        if path.parent in tables:
            raise MorError(f"{folder / path.parent} has both {METADATA[0]} and {METADATA[1]}")
        tables[path.parent] = _read_table(folder / name, path.parent, label_field)
    # The innermost first.
    return dict(sorted(tables.items(), key=lambda item: -len(item[0].parts)))


def _read_table(path: Path, parent: PurePosixPath, label_field: str) -> Mapping[str, str]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise MorError(f"cannot read {path}: {error}") from error
    table: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        found = {} if not isinstance(row, dict) else row
        name, label = found.get("file_name"), found.get(label_field)
        if not isinstance(name, str) or not name:
            raise MorError(f"{path}: row {number} has no file_name")
        if isinstance(label, bool) or not isinstance(label, str | int) or str(label).strip() == "":
            raise MorError(
                f"{path}: row {number} ({name}) has no {label_field!r}; name the column with "
                "--label-field"
            )
        place = PurePosixPath(os.path.normpath(parent / name.replace("\\", "/"))).as_posix()
        if place.startswith(("..", "/")):
            raise MorError(f"{path}: row {number} names {name!r}, which lies outside the folder")
        if table.setdefault(place, str(label).strip()) != str(label).strip():
            raise MorError(f"{path}: {name} is there twice, with different labels")
    return table
