"""The index of a prepared folder of images or sounds: what is in it and how it came about.

DIR/index.json              this
DIR/train.safetensors       the examples of a split
DIR/validation.safetensors
DIR/test.safetensors
DIR/skipped.jsonl           files that were left out, each with the reason; only where there are any
DIR/preprocessor_config.json  Transformers' feature extractor, where sounds were made into log-mel

| kind | tensors of a split |
|---|---|
| `images` | `images` uint8 `[n, H, W, C]`, `labels` int64 `[n]` |
| `audio` | `frames` float32 `[total frames, coefficients]`, the examples' frames end to end;
  `lengths` int64 `[n]`, frames of each; `labels` int64 `[n]` |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mor.disk import digest, write_whole
from mor.errors import MorError, describe_missing

FORMAT, VERSION = "mor-media", 1
INDEX_FILE, SKIPPED_FILE = "index.json", "skipped.jsonl"
PREPROCESSOR_FILE = "preprocessor_config.json"
IMAGES, SOUNDS = "images", "audio"
TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = (TRAIN, VALIDATION, TEST)


@dataclass(frozen=True)
class MediaSplit:
    """One split: its file, how many examples and, of sounds, frames it has, and its SHA-256."""

    file: str
    examples: int
    sha256: str
    frames: int | None = None


@dataclass(frozen=True)
class MediaIndex:
    """A prepared folder of images or sounds.

    Attributes:
        directory: the folder; not stored in it, so a folder can be moved.
        kind: `images` or `audio`.
        classes: their names; a label is a place in this list.
        splits: by name, of `train`, `validation` and `test`.
        shape: `[H, W, C]` of an image in pixels, `[coefficients]` of a frame.
        max_frames: the longest sound of all splits, in frames; None for images.
        mean, std: what `MediaDataset` takes off and divides by, per channel (of values in [0, 1])
            or per coefficient, from the training split; None where frames come normalised.
        source: what was asked for, such as `digits` or a path.
        licence: what the source says of itself.
        command, program: the command line and the program that made it.
        preparation: everything that decides the content.
        num_duplicates: exact copies left out before the split.
        skipped: how many files were left out; `skipped.jsonl` names them.
        reused: True if the preparation found the folder there and made nothing (not stored).
    """

    directory: Path
    kind: str
    classes: tuple[str, ...]
    splits: Mapping[str, MediaSplit]
    shape: tuple[int, ...]
    source: str
    max_frames: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    licence: str = ""
    command: str = ""
    program: str = ""
    preparation: Mapping[str, Any] = field(default_factory=dict)
    num_duplicates: int = 0
    skipped: int = 0
    reused: bool = False

    def split(self, name: str) -> MediaSplit:
        """The split of that name. Raises `MorError` naming those there are."""
        if name not in self.splits:
            raise MorError(
                f"{self.directory} has no split {name!r}; its splits: {', '.join(self.splits)}"
            )
        return self.splits[name]

    def verify(self) -> None:
        """Compare every byte of every split with its SHA-256.

        Raises:
            MorError: naming each file that is missing or damaged.
        """
        wrong = []
        for split in self.splits.values():
            path = self.directory / split.file
            if not path.is_file():
                wrong.append(f"{path} is missing")
            elif digest(path) != split.sha256:
                wrong.append(f"{path} is damaged: its bytes are not those that were written")
        if wrong:
            raise MorError("; ".join(wrong) + "; prepare the data again")

    def save(self) -> None:
        """Write `index.json` into `directory`."""
        content: dict[str, Any] = {"format": FORMAT, "version": VERSION} | asdict(self)
        del content["directory"], content["reused"]
        write_whole(self.directory / INDEX_FILE, json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> MediaIndex:
        """Read the index of a prepared folder.

        Raises:
            MorError: the folder is missing, holds no images or sounds that `mor data prepare`
                made, or its index is damaged or of another version.
        """
        folder = Path(directory).expanduser()
        path = folder / INDEX_FILE
        if not folder.is_dir():
            raise MorError(
                f"data folder {folder} {describe_missing(folder)}; make it with mor data prepare"
            )
        if not is_media(folder):
            raise MorError(
                f"{folder} is not a prepared folder of images or sounds; make one with "
                f"mor data prepare images DIR, audio DIR, digits, ..."
            )
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("version", None) != VERSION:
            raise MorError(f"{path} is not of version {VERSION}; prepare the data again")
        del content["format"]
        try:
            content["splits"] = {
                name: MediaSplit(**split) for name, split in content["splits"].items()
            }
            for name in ("classes", "shape", "mean", "std"):
                content[name] = None if content[name] is None else tuple(content[name])
            index = cls(directory=folder, **content)
        except (KeyError, TypeError, AttributeError) as error:
            raise MorError(f"{path} is damaged: {error!r}") from error
        if index.kind not in (IMAGES, SOUNDS) or not index.classes or not index.shape:
            raise MorError(f"{path} is damaged: kind, classes or shape is wrong")
        return index


def is_media(folder: str | Path) -> bool:
    """Whether a folder holds prepared images or sounds, by its index; False for one of text."""
    try:
        content = json.loads((Path(folder).expanduser() / INDEX_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT
