"""Text to tokens, many documents at a time, in this process or in several.

Batches of documents go to worker processes in turn and come back in the same order, so what is
written does not depend on how many there are.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np

from mor.data.documents import BadRow, Document
from mor.data.sources import Reading
from mor.data.tokenizer import DocumentEncoder
from mor.errors import MorError

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

    Context = ForkServerContext | SpawnContext

_BATCH_BYTES = 2**20  # text encoded at a time: enough to keep the encoder's threads busy
_BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class Batch:
    """Documents that are encoded together.

    Attributes:
        names, texts: `[n]` each; the text of a bad row is empty.
        bad: bad rows by their place.
        before: the position in the source from which the first of them is read next.
    """

    names: list[str]
    texts: list[str]
    bad: Mapping[int, BadRow]
    before: Mapping[str, Any]


@dataclass(frozen=True)
class Encoded:
    """What a batch has become.

    Attributes:
        tokens: `[total]` uint32, document after document, as `DocumentEncoder` makes them.
        ends: `[n]` int64, where each document ends in `tokens`.
        num_bytes: `[n]` int64, UTF-8 bytes of each text.
        hashes: `[n]` uint64, a hash of each text (`text_hash`).
        blank: `[n]` bool, texts that hold nothing but white space.
    """

    tokens: np.ndarray
    ends: np.ndarray
    num_bytes: np.ndarray
    hashes: np.ndarray
    blank: np.ndarray


def text_hash(data: bytes, seed: int) -> int:
    """64 bits that depend on seed and text alone: equal texts have equal hashes."""
    salt = (seed % 2**64).to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, salt=salt).digest(), "little")


def batches(reading: Reading) -> Iterator[Batch]:
    """Group what `reading` yields. Raises as the reading does."""
    before = reading.position()
    names: list[str] = []
    texts: list[str] = []
    bad: dict[int, BadRow] = {}
    size = 0
    for row in reading:
        if isinstance(row, BadRow):
            bad[len(names)] = row
            row = Document("", "")
        names.append(row.name)
        texts.append(row.text)
        size += len(row.text)
        if size >= _BATCH_BYTES or len(names) >= _BATCH_DOCUMENTS:
            yield Batch(names, texts, bad, before)
            before, names, texts, bad, size = reading.position(), [], [], {}, 0
    if names:
        yield Batch(names, texts, bad, before)


def encode_batch(encode: DocumentEncoder, texts: list[str], seed: int) -> Encoded:
    """Tokens, sizes and hashes of `texts`."""
    pieces = list(encode(texts))
    raw = [text.encode("utf-8") for text in texts]
    return Encoded(
        tokens=np.concatenate(pieces).astype(np.uint32),
        ends=np.cumsum([piece.size for piece in pieces], dtype=np.int64),
        num_bytes=np.array([len(data) for data in raw], dtype=np.int64),
        hashes=np.array([text_hash(data, seed) for data in raw], dtype=np.uint64),
        blank=np.array([not text.strip() for text in texts]),
    )


@contextmanager
def encoder(encode: DocumentEncoder, seed: int, workers: int) -> Iterator[Pipeline]:
    """Start `workers` processes (below 2: none, the tokenizer's own threads do the work)."""
    with ExitStack() as stack:
        if workers < 2:
            yield Pipeline([], encode, seed)
            return
        context = _context()
        pool = [stack.enter_context(_worker(context, encode, seed)) for _ in range(workers)]
        yield Pipeline(pool, encode, seed)


class Pipeline:
    """Encodes batches in order; made by `encoder`."""

    def __init__(self, pool: list[Connection], encode: DocumentEncoder, seed: int) -> None:
        self._pool, self._encode, self._seed = pool, encode, seed

    def run(self, source: Iterable[Batch]) -> Iterator[tuple[Batch, Encoded]]:
        """Yield each batch with what it has become.

        Each worker has one batch at a time: with more, both ends of a pipe could wait for the
        other to read. One more batch is read ahead, so that a worker that is done gets the next.

        Raises:
            MorError: as the source does, or a worker ended, as when the system killed it because
                memory ran out.
        """
        if not self._pool:
            for batch in source:
                yield batch, encode_batch(self._encode, batch.texts, self._seed)
            return
        stream = iter(source)
        waiting: deque[tuple[Connection, Batch]] = deque()
        for connection in self._pool:
            if (first := next(stream, None)) is not None:
                _send(connection, first)
                waiting.append((connection, first))
        while waiting:
            following = next(stream, None)
            connection, batch = waiting.popleft()
            encoded = _receive(connection)
            if following is not None:
                _send(connection, following)
                waiting.append((connection, following))
            yield batch, encoded


def _context() -> Context:
    # Not "fork": this process has threads (the tokenizer's, Arrow's) whose locks a forked one
    # would inherit half-held. A fork server imports this module once for all workers.
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@contextmanager
def _worker(context: Context, encode: DocumentEncoder, seed: int) -> Iterator[Connection]:
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, encode, seed), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()  # the worker sees the end of the pipe, as it does when this process is killed
        process.join(timeout=1)
        if process.is_alive():
            process.terminate()
            process.join()


def _serve(connection: Connection, encode: DocumentEncoder, seed: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
    while True:
        try:
            texts = connection.recv()
            connection.send(encode_batch(encode, texts, seed))
        except (EOFError, OSError):
            return


def _send(connection: Connection, batch: Batch) -> None:
    try:
        connection.send(batch.texts)
    except OSError as error:
        raise _lost() from error


def _receive(connection: Connection) -> Encoded:
    try:
        encoded: Encoded = connection.recv()
    except (EOFError, OSError) as error:
        raise _lost() from error
    return encoded


def _lost() -> MorError:
    return MorError(
        "a tokenising process ended unexpectedly, perhaps because memory ran out; the same "
        "command goes on from what is done, with fewer --workers it needs less memory"
    )
