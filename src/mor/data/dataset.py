"""Packed rows for training and evaluation.

| packing | a row is |
|---|---|
| `concat` | `seq_len` tokens of the stream of all documents, as in the paper's training runs |
| `best_fit` | whole documents, as many as fit, then padding (`mor.data.packing`) |

Every document is ended by the end-of-text token, and begins with BOS where the folder was prepared
so (`mor.data.bos`); a piece of a document that goes on does not. With `document_mask` a row says
which of its tokens belong together, so that attention need not cross from one document to another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mor.data.index import DataIndex
from mor.data.order import Shuffle
from mor.data.rows import BestFit, Concatenated, Layout, Piece
from mor.data.tasks import SolvedMarks
from mor.errors import MorError

Packing = Literal["concat", "best_fit"]
LossOn = Literal["all", "answers"]
IGNORED = -100  # a label that no loss is computed for, as everywhere in Transformers


class PackedDataset(Dataset[dict[str, Tensor]]):
    """The rows of one split of a prepared folder.

    `dataset[i]` is a dict of int64 `[seq_len]`:

    - `input_ids`;
    - `labels`: the same, for a model that shifts them itself; -100 at padding, with
      `document_mask` at the first token of each document, which nothing before it predicts, and
      with `loss_on="answers"` at all but the answers of a task (`mor.data.tasks`). Where answers
      are no words of the documents, the answer after each query and -100 elsewhere, always;
    - with `best_fit`, `attention_mask`: 1, and 0 at the padding that ends a row;
    - with `document_mask`, `document_ids`: 0, 1, 2, ... for each document of the row (padding
      counts to the last), and `position_ids`, which begin at 0 in each.

    Which row `dataset[i]` is depends on `order_seed`, the epoch and i alone:

    - `order_seed=None`: row i, in the order of the text, in every epoch (for evaluation);
    - otherwise a random order of all rows, a new one in every epoch. `set_epoch` says which
      epoch it is. Read the dataset in sequence: `accelerate`, and so the Hugging Face trainer,
      calls `set_epoch` here only where its sampler has none of its own.

    Training goes through `mor.data.TrainingSamples`, which needs no `set_epoch`.

    Attributes:
        index: the folder's index; `vocab_size` and `eos_token_id` are in it.
        split, seq_len, order_seed, epoch, packing, document_mask: as given.
        total_tokens: tokens of the split, those in no whole row included.
    """

    def __init__(
        self,
        data_dir: str | Path,
        split: str,
        seq_len: int,
        *,
        order_seed: int | None = None,
        packing: Packing = "concat",
        document_mask: bool = False,
        loss_on: LossOn = "all",
    ) -> None:
        """Open the shards; each one's header and size are compared with the index.

        Raises:
            MorError: the folder is missing or not a prepared one, the split is unknown, a shard
                is damaged, `seq_len` is below 2 or longer than the split, `order_seed` is
                negative, `packing` or `loss_on` is unknown, or there are no answers.
        """
        self.index = DataIndex.load(data_dir)
        self.split, self.seq_len, self.order_seed, self.epoch = split, seq_len, order_seed, 0
        self.packing, self.document_mask = packing, document_mask
        task = self.index.task
        hidden = isinstance(task, SolvedMarks)
        self.task = task if loss_on == "answers" or hidden else None
        if loss_on not in get_args(LossOn):
            raise MorError(f"loss_on is {loss_on!r}, expected 'all' or 'answers'")
        if loss_on == "answers" and self.task is None:
            raise MorError(
                f"loss_on is 'answers', but {self.index.directory} was prepared from text; "
                f"prepare a task (mor data prepare task:hops), or use 'all'"
            )
        self.shards = self.index.open_shards(split)
        self.total_tokens = self.index.num_tokens(split)
        if seq_len < 2:
            raise MorError(f"seq_len is {seq_len}, expected 2 or more: one token predicts the next")
        if seq_len > self.total_tokens and packing == "concat":
            raise MorError(
                f"seq_len is {seq_len}, but split {split!r} of {self.index.directory} has only "
                f"{self.total_tokens} tokens; shorten seq_len or prepare more text"
            )
        if order_seed is not None and order_seed < 0:
            raise MorError(f"order_seed is {order_seed}, expected 0 or more, or none")
        self._layout: Layout
        if packing == "concat":
            self._layout = Concatenated(self.shards, seq_len, by_document=document_mask)
        elif packing == "best_fit":
            self._layout = BestFit(self.index, split, self.shards, seq_len)
        else:
            raise MorError(f"packing is {packing!r}, expected 'concat' or 'best_fit'")
        self._length = len(self._layout)
        self._order: tuple[int, Shuffle] | None = None

    def __len__(self) -> int:
        """Rows of the split: sequences of one epoch."""
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The row at `index` of this epoch's order.

        Raises:
            MorError: a token id is not below the vocabulary size; the message names the shard.
        """
        return {name: rows[0] for name, rows in read_rows([(self, self.chunk(index))]).items()}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Several rows at once, as a data loader asks for a batch. Raises as `__getitem__`."""
        return split_batch(read_rows([(self, self.chunk(index)) for index in indices]))

    def set_epoch(self, epoch: int) -> None:
        """Use the order of `epoch` (0-based) from now on."""
        self.epoch = epoch

    def chunk(self, index: int, epoch: int | None = None) -> int:
        """Which row of the text stands at `index` in `epoch` (by default the current one)."""
        if not -self._length <= index < self._length:
            raise IndexError(f"chunk {index} of {self._length}")
        index %= self._length
        if self.order_seed is None:
            return index
        epoch = self.epoch if epoch is None else epoch
        if self._order is None or self._order[0] != epoch:
            # Made from seed and epoch anew, never carried on: hence the order needs no state.
            self._order = epoch, Shuffle(self._length, self.order_seed, epoch)
        return self._order[1][index]

    @property
    def num_documents(self) -> int:
        """How many documents the split has."""
        return self.index.num_documents(self.split)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token: bits per byte = NLL in nats / ln 2 / this."""
        return self.index.bytes_per_token(self.split)

    @property
    def padding_fraction(self) -> float:
        """Part of all places that hold no token: 0 with `concat`."""
        if self.packing == "concat":
            return 0.0
        return 1.0 - self.total_tokens / (self._length * self.seq_len)

    def iter_documents(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and tokens (int64 `[length]`, end-of-text included) of every document."""
        for shard in self.shards:
            for number, name in enumerate(shard.names):
                yield name, torch.from_numpy(shard.document(number).astype(np.int64))

    def fill(self, row: int, ids: np.ndarray) -> list[Piece]:
        """Write the tokens of `row` into `ids`, int64 `[seq_len]`; return its pieces."""
        pieces = self._layout.pieces(row)
        place = 0
        for number, start, length in pieces:
            ids[place : place + length] = self.shards[number].tokens[start : start + length]
            place += length
        ids[place:] = self.index.eos_token_id
        return pieces

    def check(self, row: int) -> None:
        """Raise `MorError`, naming the shard, where `row` holds a token that cannot be."""
        for number, start, length in self._layout.pieces(row):
            shard = self.shards[number]
            largest = int(shard.tokens[start : start + length].max(initial=0))
            if largest >= self.index.vocab_size:
                raise MorError(
                    f"shard {shard.path} is damaged: token id {largest} between tokens "
                    f"{start} and {start + length}, expected at most "
                    f"{self.index.vocab_size - 1}; {self.index.remedy}"
                )


def read_rows(wanted: Sequence[tuple[PackedDataset, int]]) -> dict[str, Tensor]:
    """Put rows together as one batch, each tensor int64 `[n, seq_len]`.

    Args:
        wanted: dataset and row (not index: see `PackedDataset.chunk`); all datasets have the same
            `seq_len`, `packing` and `document_mask`.

    Raises:
        MorError: a token id is not below the vocabulary size; the message names the shard.
    """
    model = wanted[0][0]
    ids = np.empty((len(wanted), model.seq_len), dtype=np.int64)
    pieces = [dataset.fill(row, ids[i]) for i, (dataset, row) in enumerate(wanted)]
    if ids.max() >= min(dataset.index.vocab_size for dataset, _ in wanted):
        for dataset, row in wanted:
            dataset.check(row)
    labels = ids.copy()
    batch = {"input_ids": ids, "labels": labels}
    places = np.arange(model.seq_len)
    by_dataset: dict[int, list[int]] = {}
    for row, (dataset, _) in enumerate(wanted):
        by_dataset.setdefault(id(dataset), []).append(row)
    for rows in by_dataset.values():
        task = wanted[rows[0]][0].task
        if task is not None:
            labels[rows, 1:] = task.solve(ids[rows]).targets(IGNORED)
            labels[rows, 0] = IGNORED
    if model.packing == "best_fit":
        used = np.array([sum(length for *_, length in parts) for parts in pieces])
        real = places < used[:, None]
        labels[~real] = IGNORED
        batch["attention_mask"] = real.astype(np.int64)
    if model.document_mask:
        # 1 where a piece begins. A piece that goes on in another shard is another document's:
        # shards hold whole documents.
        heads = np.zeros_like(ids)
        for marks, parts in zip(heads, pieces, strict=True):
            place = 0
            for *_, length in parts:
                marks[place] = 1
                place += length
        labels[heads == 1] = IGNORED
        batch["document_ids"] = heads.cumsum(1) - 1
        batch["position_ids"] = places - np.maximum.accumulate(heads * places, 1)
    return {name: torch.from_numpy(rows) for name, rows in batch.items()}


def split_batch(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The rows of a batch one by one, without copying."""
    names, columns = list(batch), [rows.unbind() for rows in batch.values()]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
