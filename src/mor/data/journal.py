"""Long work that survives being killed: a folder written segment by segment, and its journal.

`OUT` is made in a hidden neighbour, which is there only while `OUT` is not finished:

.OUT.partial/folder/         what will be `OUT`
.OUT.partial/journal.jsonl   first what is being made, then one line per finished segment
.OUT.partial/old/            what `OUT` was before, for the moment in which it is replaced
.OUT.partial/lock            held by the process at work

A segment counts once its line is in the journal, and its line is written after its shards. So at
any moment, however the process ended, the journal says exactly which shards are finished and where
in the source to go on; all else in the folder is removed. The folder takes its name in one rename.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mor.data.index import TOKENIZER_FOLDER
from mor.disk import append_jsonl, flush, lock
from mor.errors import MorError

FORMAT = "mor-data-journal"
VERSION = 1


class Workshop:
    """The hidden neighbour of one output folder.

    Attributes:
        target: the folder to make.
        folder: where to write it.
        preparation: what is being made; None until `begin`.
        segments: the records of the finished segments.
    """

    def __init__(self, target: Path) -> None:
        """Read the journal, if one is there."""
        self.target = target
        final = target.resolve()
        self.path = final.with_name(f".{final.name}.partial")
        self.folder, self._journal = self.path / "folder", self.path / "journal.jsonl"
        self._final, self._old = final, self.path / "old"
        self.preparation: Mapping[str, Any] | None = None
        self.segments: list[Mapping[str, Any]] = []
        self._read()

    def _read(self) -> None:
        lines: list[Mapping[str, Any]] = []
        self.preparation, self.segments = None, []
        if not self.folder.is_dir():
            return  # nothing was begun, or all is finished and a kill left the rest behind
        with contextlib.suppress(FileNotFoundError):
            for line in self._journal.read_bytes().split(b"\n"):
                try:
                    lines.append(json.loads(line))
                except ValueError:
                    break  # the last line, cut short by a kill
        if lines and (lines[0].get("format"), lines[0].get("version")) == (FORMAT, VERSION):
            self.preparation, self.segments = lines[0]["preparation"], lines[1:]

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the folder while working in it.

        Left by an exception, finished segments stay for the next time; where there are none,
        nothing stays.

        Raises:
            MorError: another process works in it, or something could not be written; the message
                names `target`, and says what is kept.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            busy = (
                f"another process is preparing {self.target}; wait for it, or choose another folder"
            )
            with lock(self.path / "lock", busy):
                self._read()
                try:
                    yield
                finally:
                    self._leave()
        except OSError as error:
            kept = f"; {self.kept}" if self.segments else ""
            reason = error.strerror or error
            raise MorError(f"cannot write {self.target}: {reason}{kept}") from error

    def sweep(self) -> None:
        """Remove what a kill left behind just after the folder had been finished."""
        if self.path.is_dir() and not self.folder.is_dir():
            with self.open():
                pass

    @property
    def kept(self) -> str:
        """For messages: what stays, and how to go on."""
        return (
            f"{len(self.segments)} finished segments are kept in {self.path}, and the same command "
            f"goes on from there"
        )

    def _leave(self) -> None:
        if self.segments:
            self._clean()
        else:
            shutil.rmtree(self.path, ignore_errors=True)

    def discard(self) -> None:
        """Remove the finished segments and what is being made."""
        self.preparation, self.segments = None, []
        self._journal.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def begin(self, preparation: Mapping[str, Any]) -> None:
        """Note what is made, once `folder` holds what every segment needs."""
        self.preparation = preparation
        _sync_small_files(self.folder)
        self._append({"format": FORMAT, "version": VERSION, "preparation": preparation})

    def commit(self, record: Mapping[str, Any]) -> None:
        """Note a finished segment: `record["shards"]` by split, and whatever goes on needs."""
        flush(self.folder)
        self._append(record)
        self.segments.append(record)

    def resume(self) -> None:
        """Remove what belongs to no finished segment.

        Raises:
            MorError: a finished shard is missing.
        """
        self._clean()
        for segment in self.segments:
            for shard in segment["shards"].values():
                if not (self.folder / shard["file"]).is_file():
                    raise MorError(
                        f"{self.folder / shard['file']} is missing, though {self._journal} counts "
                        f"it as finished; remove {self.path} and prepare the data again"
                    )

    def _clean(self) -> None:
        finished = {
            shard["file"] for segment in self.segments for shard in segment["shards"].values()
        }
        if self.folder.is_dir():
            for entry in self.folder.iterdir():
                if entry.name not in finished and entry.name != TOKENIZER_FOLDER:
                    entry.unlink(missing_ok=True)

    def finish(self) -> None:
        """Give the folder its name, in place of what has it now, and leave nothing else."""
        _sync_small_files(self.folder)
        if self._final.is_dir():
            # A kill between the two renames leaves no folder under the name; the next try, which
            # finds the finished one here, ends what this one began.
            shutil.rmtree(self._old, ignore_errors=True)
            self._final.rename(self._old)
        try:
            self.folder.rename(self._final)
        except BaseException:
            if self._old.is_dir():
                self._old.rename(self._final)
            raise
        flush(self._final.parent)
        self.segments = []

    def _append(self, record: Mapping[str, Any]) -> None:
        append_jsonl(self._journal, record)
        flush(self._journal)
        flush(self.path)


def _sync_small_files(folder: Path) -> None:
    """Bring tokenizer and index to the disk; shards are there already."""
    tokenizer = folder / TOKENIZER_FOLDER
    for path in (*folder.glob("*.json"), *tokenizer.glob("*"), tokenizer, folder):
        flush(path)
