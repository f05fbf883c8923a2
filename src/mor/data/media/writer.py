"""Write a prepared folder of images or sounds, whole or not at all."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from mor.data.media.index import (
    IMAGES,
    SKIPPED_FILE,
    SOUNDS,
    SPLITS,
    TRAIN,
    MediaIndex,
    MediaSplit,
)
from mor.disk import digest, replace_folder
from mor.errors import MorError

# A coefficient that hardly varies is not blown up.
_LEAST_DEVIATION = 1e-3


@dataclass
class Examples:
    """The examples of one split while they are gathered.

    Attributes:
        values: images uint8 [H, W, C], all of one shape; or frames float32 [length, coefficients].
        labels: of each, a place in the list of classes.
    """

    values: list[np.ndarray] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(self, value: np.ndarray, label: int) -> None:
        """Put one example at the end."""
        self.values.append(value)
        self.labels.append(label)


@dataclass(frozen=True)
class Gathered:
    """All that a source gave: what goes into the folder.

    Attributes:
        kind: `images` or `audio`.
        classes: names of the classes.
        splits: the examples of each split.
        normalise: whether mean and deviation of the training split are to be taken off.
        skipped: `{"file": ..., "reason": ...}` of each file left out.
        extras: further files, by name.
    """

    kind: str
    classes: Sequence[str]
    splits: Mapping[str, Examples]
    normalise: bool = True
    licence: str = ""
    num_duplicates: int = 0
    skipped: Sequence[Mapping[str, str]] = ()
    extras: Mapping[str, str] = field(default_factory=dict)


def write_media(
    gathered: Gathered,
    out: Path,
    *,
    source: str,
    preparation: Mapping[str, Any],
    program: str,
    overwrite: bool = False,
) -> MediaIndex:
    """Write the folder `out` and return its index.

    Raises:
        MorError: no example to train on, images of several shapes, or a disk that refuses.
    """
    splits = {name: gathered.splits[name] for name in SPLITS if gathered.splits.get(name)}
    splits = {name: examples for name, examples in splits.items() if examples.values}
    if TRAIN not in splits:
        raise MorError(f"source {source} gave no example to train on")
    shape = _shape(gathered.kind, splits)
    mean, std = _moments(gathered.kind, splits[TRAIN]) if gathered.normalise else (None, None)
    lengths = [len(v) for e in splits.values() for v in e.values]
    try:
        with replace_folder(out, overwrite=overwrite) as folder:
            infos = {name: _write(gathered.kind, e, folder, name) for name, e in splits.items()}
            index = MediaIndex(
                directory=folder,
                kind=gathered.kind,
                classes=tuple(gathered.classes),
                splits=infos,
                shape=shape,
                max_frames=max(lengths) if gathered.kind == SOUNDS else None,
                mean=mean,
                std=std,
                source=source,
                licence=gathered.licence,
                command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
                program=program,
                preparation=preparation,
                num_duplicates=gathered.num_duplicates,
                skipped=len(gathered.skipped),
            )
            index.save()
            for name, content in gathered.extras.items():
                (folder / name).write_text(content, encoding="utf-8")
            if gathered.skipped:
                lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in gathered.skipped]
                (folder / SKIPPED_FILE).write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise MorError(f"cannot write {out}: {error.strerror or error}") from error
    return MediaIndex.load(out)


def _shape(kind: str, splits: Mapping[str, Examples]) -> tuple[int, ...]:
    shapes = {v.shape if kind == IMAGES else v.shape[1:] for e in splits.values() for v in e.values}
    if len(shapes) != 1:
        raise MorError(f"examples of one folder need one shape, found {sorted(shapes)[:3]}")
    return tuple(int(size) for size in shapes.pop())


def _moments(kind: str, train: Examples) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel of values in [0, 1], or per coefficient."""
    scale = 255.0 if kind == IMAGES else 1.0
    width = train.values[0].shape[-1]
    total, squares, count = np.zeros(width), np.zeros(width), 0
    for value in train.values:
        flat = value.reshape(-1, width).astype(np.float64) / scale
        total, squares, count = total + flat.sum(0), squares + (flat**2).sum(0), count + len(flat)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0)).clip(min=_LEAST_DEVIATION)
    return tuple(map(float, mean)), tuple(map(float, std))


def _write(kind: str, examples: Examples, folder: Path, name: str) -> MediaSplit:
    tensors: dict[str, Tensor] = {"labels": torch.tensor(examples.labels, dtype=torch.int64)}
    frames = None
    if kind == IMAGES:
        tensors["images"] = torch.from_numpy(np.stack(examples.values))
    else:
        lengths = [len(value) for value in examples.values]
        tensors["lengths"] = torch.tensor(lengths, dtype=torch.int64)
        joined = np.concatenate(examples.values).astype(np.float32, copy=False)
        tensors["frames"] = torch.from_numpy(joined)
        frames = sum(lengths)
    path = folder / f"{name}.safetensors"
    save_file(tensors, path)
    return MediaSplit(path.name, len(examples.labels), digest(path), frames)
