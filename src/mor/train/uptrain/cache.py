"""What the teacher said, kept on disk: it is run once, whatever learns from it.

CACHE/manifest.json    what it was made from; written last, so that a kill leaves no half row behind
CACHE/rows.bin         int64 [n, 2]: folder of the mixture and row of each sequence kept
CACHE/ids.bin          int32 [n, T, k], CACHE/logs.bin float16: its k largest log-probabilities
CACHE/hidden.bin       float16 [n, layers, T, D]: its stream after the layers compared with

A cache belongs to one teacher, one way to cut one data folder into sequences, and one temperature;
any order, batch size and length of a run can use it, and what it lacks is added. It is large where
hidden states are kept: 35 kB per token for 30 layers of 576 channels. Without ``distill.cache`` the
teacher runs along, at the price of one forward pass.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mor.data import TrainingSamples
from mor.data.dataset import read_rows
from mor.disk import write_whole
from mor.errors import MorError
from mor.ops.distillation import KnownRows
from mor.train.uptrain.teacher import Lesson, Teacher

PREFIX = "teacher_"
"""Names of what a cached teacher adds to a sample."""


class TeacherCache:
    """The folder described above.

    Args:
        folder: where it is, or will be.
        teacher: asked where something is missing.
        facts: what it must have been made from.

    Raises:
        MorError: what is there was made from something else, or is damaged.
    """

    def __init__(self, folder: Path, teacher: Teacher, facts: dict[str, Any]) -> None:
        self.folder, self.teacher = folder, teacher
        width = teacher.model.config.hidden_size
        length = int(facts["seq_len"])
        kept = {int(layer) for layer in teacher.layers.values()}
        self.facts = facts | {
            "format": "mor-teacher",
            "version": 1,
            "top_k": teacher.top_k if teacher.logits else 0,
            "temperature": teacher.temperature,
            "layers": sorted(kept),
        }
        self.shapes: dict[str, tuple[Any, tuple[int, ...]]] = {"rows": (np.int64, (2,))}
        if teacher.logits:
            shape = (length, teacher.top_k or 0)
            self.shapes |= {"ids": (np.int32, shape), "logs": (np.float16, shape)}
        if kept:
            self.shapes["hidden"] = (np.float16, (len(kept), length, width))
        count = self._check()
        self._open(count)

    def _check(self) -> int:
        path = self.folder / "manifest.json"
        if not path.is_file():
            if self.folder.exists() and any(
                p.suffix != ".bin" and not p.name.endswith(".partial")
                for p in self.folder.iterdir()
            ):
                raise MorError(
                    f"uptrain.distill.cache={str(self.folder)!r} holds other files and no cache of "
                    "a teacher; name another folder"
                )
            return 0
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            count = int(known.pop("count"))
        except (OSError, ValueError, KeyError, AttributeError):
            raise MorError(
                f"{path} is damaged; remove {self.folder} to have it made anew"
            ) from None
        for name, ours in self.facts.items():
            if known.get(name) != ours:
                raise MorError(
                    f"uptrain.distill.cache={str(self.folder)!r} was made with "
                    f"{name}={_short(known.get(name))}, this run has {_short(ours)}; name another "
                    "folder, or remove that one"
                )
        for name in self.shapes:
            file = self.folder / f"{name}.bin"
            if not file.is_file() or file.stat().st_size < count * self._bytes(name):
                raise MorError(
                    f"{file} is missing or cut short; remove {self.folder} to have it made anew"
                )
        return count

    def _bytes(self, name: str) -> int:
        kind, shape = self.shapes[name]
        return int(np.dtype(kind).itemsize * np.prod(shape))

    def _open(self, count: int) -> None:
        self.maps: dict[str, np.ndarray] = {}
        for name, (kind, shape) in self.shapes.items():
            file = self.folder / f"{name}.bin"
            self.maps[name] = (
                np.memmap(file, kind, "r", shape=(count, *shape))
                if count
                else np.empty((0, *shape), kind)
            )
        rows = np.asarray(self.maps["rows"]).tolist()
        self.slots = {(part, row): slot for slot, (part, row) in enumerate(rows)}

    def fill(self, samples: TrainingSamples, batch: int, tell: Any = None) -> None:
        """Have the teacher say what is missing about the sequences of ``samples``.

        Args:
            samples: of a run.
            batch: sequences at a time.
            tell: called with sequences done and to do.

        Raises:
            MorError: a state is too large for float16, or the disk is full.
        """
        wanted: dict[tuple[int, int], Any] = {}
        for sample in range(len(samples)):
            part, row = samples.locate(sample)
            wanted[samples.parts.index(part), row] = part
        missing = [key for key in wanted if key not in self.slots]
        if not missing:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        count = len(self.slots)
        files = {}
        try:
            for name in self.shapes:
                files[name] = (self.folder / f"{name}.bin").open("r+b" if count else "wb")
                files[name].truncate(count * self._bytes(name))
                files[name].seek(0, 2)
            for start in range(0, len(missing), batch):
                keys = missing[start : start + batch]
                for name, array in self._said([(wanted[key], key[1]) for key in keys]).items():
                    files[name].write(array.tobytes())
                files["rows"].write(np.array(keys, np.int64).tobytes())
                count += len(keys)
                if tell is not None:
                    tell(start + len(keys), len(missing))
        except OSError as error:
            raise MorError(f"{self.folder} cannot be written: {error.strerror or error}") from None
        finally:
            for file in files.values():
                file.close()
        write_whole(
            self.folder / "manifest.json", json.dumps(self.facts | {"count": count}, indent=2)
        )
        self._open(count)

    def _said(self, rows: Sequence[tuple[Any, int]]) -> dict[str, np.ndarray]:
        inputs = read_rows(rows)
        ids = inputs["input_ids"].to(self.teacher.model.device)
        lesson = self.teacher.ask({"input_ids": ids})
        said = {}
        if lesson.rows is not None:
            found, logs = lesson.rows.logs(0, ids.numel())
            assert found is not None
            said["ids"] = found.cpu().numpy().astype(np.int32)
            said["logs"] = logs.cpu().numpy().astype(np.float16)
        if lesson.hidden:
            by_layer = {self.teacher.layers[n]: state for n, state in lesson.hidden.items()}
            stacked = torch.stack([by_layer[layer] for layer in self.facts["layers"]])
            narrow = stacked.view(len(stacked), *ids.shape, -1).transpose(0, 1).half().cpu()
            if not bool(narrow.isfinite().all()):
                raise MorError(
                    "the teacher's stream is too large for float16, in which the cache keeps it; "
                    "leave uptrain.distill.cache out, so that the teacher runs live"
                )
            said["hidden"] = narrow.contiguous().numpy()
        return said

    def read(self, part: int, row: int) -> dict[str, Tensor]:
        """What was said about one sequence, by the names of a sample's additions."""
        slot = self.slots[part, row]
        return {
            PREFIX + name: torch.from_numpy(np.array(array[slot]))
            for name, array in self.maps.items()
            if name != "rows"
        }

    def take_lesson(self, inputs: dict[str, Any]) -> Lesson:
        """The batch's additions, taken out of ``inputs``."""
        lesson = Lesson()
        if "ids" in self.shapes:
            ids, logs = inputs.pop(PREFIX + "ids"), inputs.pop(PREFIX + "logs")
            lesson.rows = KnownRows(ids.flatten(0, 1), logs.flatten(0, 1))
        if "hidden" in self.shapes:
            stacked = inputs.pop(PREFIX + "hidden").transpose(0, 1).flatten(1, 2)
            places = {layer: place for place, layer in enumerate(self.facts["layers"])}
            lesson.hidden = {
                ours: stacked[places[theirs]] for ours, theirs in self.teacher.layers.items()
            }
        return lesson


class TaughtSamples(Dataset[dict[str, Tensor]]):
    """The samples of a run, each with what the teacher says about it."""

    def __init__(self, samples: TrainingSamples, cache: TeacherCache) -> None:
        self.samples, self.cache = samples, cache

    def __len__(self) -> int:
        """Samples of the run."""
        return len(self.samples)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """One sample, see :meth:`__getitems__`."""
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Tensor]]:
        """Samples by their numbers; the teacher's additions begin with ``teacher_``."""
        found = self.samples.__getitems__(numbers)
        for number, sample in zip(numbers, found, strict=True):
            part, row = self.samples.locate(number)
            sample |= self.cache.read(self.samples.parts.index(part), row)
        return found


def say_progress(done: int, total: int) -> None:
    """A line every tenth."""
    if done * 10 // total > max(0, done - 1) * 10 // total:
        print(f"teacher: {done} of {total} sequences", file=sys.stderr)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."
