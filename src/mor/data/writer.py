"""Writing token shards, for which see `mor.data.shards`."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from mor.data.shards import HEADER_BYTES, ShardInfo, pack_header, padding, token_dtype
from mor.disk import digest, flush
from mor.errors import MorError


class ShardWriter:
    """Writes one shard, document by document; the file appears under its name only when whole.

    Use it as a context manager: leaving it normally finishes the shard, leaving it by an
    exception removes what was written. `info` holds the result once finished.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        """Open a temporary file beside `path`. Raises `OSError` if that cannot be written."""
        self.path, self.vocab_size = path, vocab_size
        self.num_tokens = self.num_bytes = 0
        self.info: ShardInfo | None = None
        self._dtype = token_dtype(vocab_size)
        self._starts: list[int] = []
        self._names: list[str] = []
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._stream = self._partial.open("w+b")
        self._stream.write(bytes(HEADER_BYTES))

    def append(self, name: str, tokens: npt.ArrayLike, num_bytes: int) -> None:
        """Add one document: its tokens `[num_tokens]` and the byte length of its text.

        Raises:
            MorError: a token id is not in `[0, vocab_size)`.
        """
        ids = np.asarray(tokens, dtype=np.int64).reshape(-1)
        wrong = ids[(ids < 0) | (ids >= self.vocab_size)]
        if wrong.size:
            raise MorError(
                f"document {name} has token id {wrong[0]}, expected 0 to {self.vocab_size - 1}"
            )
        self._starts.append(self.num_tokens)
        self._names.append(name)
        self._stream.write(ids.astype(self._dtype).tobytes())
        self.num_tokens += ids.size
        self.num_bytes += num_bytes

    def close(self) -> ShardInfo:
        """Write boundaries, names and header, and give the file its name."""
        names = json.dumps(self._names).encode("ascii")
        self._stream.write(bytes(padding(self.num_tokens * self._dtype.itemsize)))
        self._stream.write(np.array([*self._starts, self.num_tokens], dtype="<u8").tobytes())
        self._stream.write(names)
        header = pack_header(
            itemsize=self._dtype.itemsize,
            vocab_size=self.vocab_size,
            num_tokens=self.num_tokens,
            num_documents=len(self._starts),
            num_bytes=self.num_bytes,
            name_bytes=len(names),
        )
        self._stream.seek(0)
        self._stream.write(header)
        self._stream.close()
        sha256 = digest(self._partial)
        flush(self._partial)  # the name must not outlive the content in a power cut
        os.replace(self._partial, self.path)
        self.info = ShardInfo(
            self.path.name, self.num_tokens, len(self._starts), self.num_bytes, sha256
        )
        return self.info

    def __enter__(self) -> ShardWriter:
        """Begin writing; the writer itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Finish the shard, or remove what was written if an exception passes."""
        try:
            if kind is None:
                self.close()
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove what was written, unless it was finished."""
        with contextlib.suppress(OSError):  # a full disk refuses what the stream still buffers
            self._stream.close()
        self._partial.unlink(missing_ok=True)


class SegmentWriter:
    """Writes segments: one shard of each split that has documents in that stretch of the source.

    All shards of a segment are closed together, so that after each segment everything read so far
    is in finished shards: what `mor.data.journal` notes. A context manager like `ShardWriter`.
    """

    def __init__(self, folder: Path, vocab_size: int, shard_tokens: int) -> None:
        """Prepare to write `folder/SPLIT-00000.bin` and so on; nothing is written yet."""
        self.shards: dict[str, list[ShardInfo]] = {}
        self._folder, self._vocab_size, self._shard_tokens = folder, vocab_size, shard_tokens
        self._open: dict[str, ShardWriter] = {}

    @property
    def full(self) -> bool:
        """Whether a shard of the open segment holds as many tokens as it should."""
        return any(w.num_tokens >= self._shard_tokens for w in self._open.values())

    def append(self, split: str, name: str, tokens: np.ndarray, num_bytes: int) -> None:
        """Add one document, whole, to the open segment. Raises as `ShardWriter.append`."""
        if split not in self._open:
            number = len(self.shards.get(split, ()))
            path = self._folder / f"{split}-{number:05d}.bin"
            self._open[split] = ShardWriter(path, self._vocab_size)
        self._open[split].append(name, tokens, num_bytes)

    def close_segment(self) -> dict[str, ShardInfo]:
        """Finish the open shards and return them by split."""
        done: dict[str, ShardInfo] = {}
        for split in sorted(self._open):
            done[split] = self._open[split].close()
            self.shards.setdefault(split, []).append(done[split])
        self._open = {}
        return done

    def __enter__(self) -> SegmentWriter:
        """Begin writing; the writer itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Remove what was written of a segment that is still open."""
        for writer in self._open.values():
            writer.discard()
        self._open = {}
