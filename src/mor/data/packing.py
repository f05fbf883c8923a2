"""Best-fit packing: rows of whole documents, with as little padding as possible.

Documents longer than a row are cut into pieces of one row each and a remainder; the pieces are
then put together by best fit decreasing: longest first, each into the fullest row that has room
(Ding et al. 2024, "Fewer Truncations Improve Language Modeling", https://arxiv.org/abs/2404.10830,
section 3.1). Nothing is dropped and no piece is cut that fits into a row.

Each shard is packed by itself, so a plan is small, quick to make, and known by the shard alone. It
is kept in `DIR/packing` where that can be written, and read by memory map.
"""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mor.data.index import PACKING_FOLDER
from mor.data.shards import ShardInfo, TokenShard
from mor.disk import replace_file
from mor.errors import MorError

VERSION = 1
_NUMBER = np.dtype("<i8")  # what a kept plan consists of
_HEADER = 5  # numbers before the plan: version, seq_len, start of the shard's SHA-256, rows, pieces


@dataclass(frozen=True)
class Plan:
    """How one shard is packed.

    Attributes:
        rows: `[num_rows + 1]` int64; row i holds the pieces `rows[i]` to `rows[i + 1]`.
        starts: `[num_pieces]` int64, where each piece begins in the shard, in tokens.
        lengths: `[num_pieces]` int64, tokens of each piece.
    """

    rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @property
    def num_rows(self) -> int:
        """Rows of the shard."""
        return len(self.rows) - 1


def load_plan(shard: TokenShard, info: ShardInfo, seq_len: int) -> Plan:
    """The plan of a shard: the one that is kept, or a new one, which is kept if it can be.

    Raises:
        MorError: the shard's document boundaries are damaged.
    """
    path = shard.path.parent / PACKING_FOLDER / f"{shard.path.stem}-{seq_len}.plan"
    header = [VERSION, seq_len, int(info.sha256[:15], 16)]
    with contextlib.suppress(OSError, ValueError):
        plan = _read(path, header)
        if plan is not None:
            return plan
    plan = make_plan(shard, seq_len)
    with contextlib.suppress(
        OSError
    ):  # a folder that is read only: the plan is made anew next time
        _write(path, header, plan)
    return plan


def _read(path: Path, header: list[int]) -> Plan | None:
    """The plan in a file; None if it is another's, or not whole."""
    with path.open("rb") as stream:
        memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    if len(memory) % _NUMBER.itemsize or len(memory) < _HEADER * _NUMBER.itemsize:
        return None
    content = np.frombuffer(memory, _NUMBER)
    *found, num_rows, num_pieces = content[:_HEADER].tolist()
    starts = _HEADER + num_rows + 1
    lengths = starts + num_pieces
    if found != header or len(content) != lengths + num_pieces:
        return None
    return Plan(content[_HEADER:starts], content[starts:lengths], content[lengths:])


def _write(path: Path, header: list[int], plan: Plan) -> None:
    path.parent.mkdir(exist_ok=True)
    numbers = [*header, plan.num_rows, len(plan.starts)]
    with replace_file(path, contended=True) as fresh, fresh.open("wb") as file:
        for part in (numbers, plan.rows, plan.starts, plan.lengths):
            file.write(np.asarray(part, dtype=_NUMBER).tobytes())


def make_plan(shard: TokenShard, seq_len: int) -> Plan:
    """Pack the documents of a shard; the same shard always gives the same plan.

    Rows stand in the order of their first pieces in the text, as do the pieces of a row.

    Raises:
        MorError: the shard's document boundaries are damaged.
    """
    begins = shard.starts.astype(np.int64)
    sizes = np.diff(begins)
    if sizes.size and int(sizes.min()) < 0:
        raise MorError(f"shard {shard.path} is damaged: its document boundaries are not in order")
    whole, rest = np.divmod(sizes, seq_len)
    first = np.cumsum(whole) - whole
    full = np.repeat(begins[:-1], whole)
    full += (np.arange(len(full)) - np.repeat(first, whole)) * seq_len
    left = np.flatnonzero(rest)
    starts = np.concatenate([full, begins[:-1][left] + whole[left] * seq_len])
    lengths = np.concatenate([np.full(len(full), seq_len), rest[left]])
    row = np.concatenate([np.arange(len(full)), len(full) + best_fit(rest[left], seq_len)])
    order = np.lexsort((starts, row))
    row, starts, lengths = row[order], starts[order], lengths[order]
    heads = np.flatnonzero(np.diff(row, prepend=-1))
    counts = np.diff(heads, append=len(row))
    by_text = np.argsort(starts[heads], kind="stable")
    # Pieces of row `by_text[0]` first, then those of `by_text[1]`, and so on.
    ends = np.cumsum(counts[by_text])
    pieces = np.arange(len(row)) + np.repeat(
        heads[by_text] - (ends - counts[by_text]), counts[by_text]
    )
    return Plan(np.concatenate([[0], ends]), starts[pieces], lengths[pieces])


def best_fit(lengths: np.ndarray, size: int) -> np.ndarray:
    """Best fit decreasing: the bin of each piece, `[n]` int64, bins numbered from 0.

    Pieces of equal length are placed together: best fit gives them, bin by bin, as many as fit
    into each of the fullest bins, because a bin that took one is then the fullest with room.

    Args:
        lengths: `[n]`, each from 1 to `size`.
        size: of a bin.
    """
    bins = np.empty(len(lengths), dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    values, begins = np.unique(-lengths[order], return_index=True)
    room = np.zeros(size + 1, dtype=np.int64)  # how many bins have this much room
    waiting: list[list[np.ndarray]] = [[] for _ in range(size + 1)]
    opened = 0

    def put(which: np.ndarray, space: int) -> None:
        if len(which) and space:
            waiting[space].append(which)
            room[space] += len(which)

    for value, pieces in zip(values, np.split(order, begins[1:]), strict=len(order) > 0):
        length = -int(value)
        while len(pieces):
            fitting = np.flatnonzero(room[length:])
            if fitting.size:
                space = length + int(fitting[0])
                which = (
                    waiting[space][0]
                    if len(waiting[space]) == 1
                    else np.concatenate(waiting[space])
                )
                waiting[space], room[space] = [], 0
            else:
                space = size
                which = np.arange(opened, opened - (-len(pieces) // (size // length)))
                opened += len(which)
            each = space // length
            used = min(len(which), -(-len(pieces) // each))
            taken = np.repeat(which[:used], each)[: len(pieces)]
            bins[pieces[: len(taken)]] = taken
            partly = len(taken) - (used - 1) * each  # pieces in the last bin used
            put(which[: used - 1], space - each * length)
            put(which[used - 1 : used], space - partly * length)
            put(which[used:], space)
            pieces = pieces[len(taken) :]
    return bins
