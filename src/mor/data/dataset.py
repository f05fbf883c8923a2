"""Packed batches for training and evaluation.

The documents of a split stand one after another, each ended by the end-of-text token, and that
stream of tokens is cut into chunks of `seq_len`. There is no padding and no BOS, and attention
crosses document boundaries, as in the paper's training runs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mor.data.index import DataIndex
from mor.errors import MorError


class PackedDataset(Dataset[dict[str, Tensor]]):
    """The chunks of one split of a prepared folder.

    `dataset[i]` is `{"input_ids": int64 [seq_len], "labels": the same}`; a Hugging Face model
    shifts the labels itself. Which chunk that is depends on `order_seed`, the epoch and i alone,
    so a run that is resumed needs no state but its position:

    - `order_seed=None`: chunk i, in the order of the text, in every epoch (for evaluation);
    - otherwise a random order of all chunks, a new one in every epoch. `set_epoch` says which
      epoch it is. Read the dataset in sequence: `accelerate`, and so the Hugging Face trainer,
      calls `set_epoch` here only where its sampler has none of its own.

    The tokens after the last whole chunk are left out.

    Attributes:
        index: the folder's index; `vocab_size` and `eos_token_id` are in it.
        split, seq_len, order_seed, epoch: as given.
        total_tokens: tokens of the split, those after the last whole chunk included.
    """

    def __init__(
        self, data_dir: str | Path, split: str, seq_len: int, *, order_seed: int | None = None
    ) -> None:
        """Open the shards.

        Raises:
            MorError: the folder is missing or not a prepared one, the split is unknown, a shard
                is damaged, `seq_len` is below 2 or longer than the split, or `order_seed` is
                negative.
        """
        self.index = DataIndex.load(data_dir)
        self.split, self.seq_len, self.order_seed, self.epoch = split, seq_len, order_seed, 0
        self.shards = self.index.open_shards(split)
        self.total_tokens = self.index.num_tokens(split)
        if seq_len < 2:
            raise MorError(f"seq_len is {seq_len}, expected 2 or more: one token predicts the next")
        if seq_len > self.total_tokens:
            raise MorError(
                f"seq_len is {seq_len}, but split {split!r} of {self.index.directory} has only "
                f"{self.total_tokens} tokens; shorten seq_len or prepare more text"
            )
        if order_seed is not None and order_seed < 0:
            raise MorError(f"order_seed is {order_seed}, expected 0 or more, or none")
        self._ends = list(accumulate(shard.num_tokens for shard in self.shards))
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """The number of whole chunks."""
        return self.total_tokens // self.seq_len

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The chunk at `index` of this epoch's order.

        Raises:
            MorError: a token id is not below the vocabulary size; the message names the shard.
        """
        ids = self._read(self.chunk(index) * self.seq_len, self.seq_len)
        return {"input_ids": ids, "labels": ids.clone()}

    def set_epoch(self, epoch: int) -> None:
        """Use the order of `epoch` (0-based) from now on."""
        self.epoch = epoch

    def chunk(self, index: int, epoch: int | None = None) -> int:
        """Which chunk of the text stands at `index` in `epoch` (by default the current one)."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"chunk {index} of {len(self)}")
        if self.order_seed is None:
            return index % len(self)
        epoch = self.epoch if epoch is None else epoch
        if self._order is None or self._order[0] != epoch:
            # Made from seed and epoch anew, never carried on: hence the order needs no state.
            generator = np.random.default_rng([self.order_seed, epoch])
            self._order = epoch, generator.permutation(len(self))
        return int(self._order[1][index])

    @property
    def num_documents(self) -> int:
        """Documents of the split."""
        return self.index.num_documents(self.split)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token: bits per byte = NLL in nats / ln 2 / this."""
        return self.index.bytes_per_token(self.split)

    def iter_documents(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and tokens (int64 `[length]`, end-of-text included) of every document."""
        for shard in self.shards:
            for number, name in enumerate(shard.names):
                yield name, _to_tensor(shard.document(number))

    def _read(self, start: int, length: int) -> Tensor:
        """`length` tokens of the whole split from `start` on, across shards where need be."""
        pieces = []
        number = bisect_right(self._ends, start)
        while length > 0:
            shard, end = self.shards[number], self._ends[number]
            inside = start - (end - shard.num_tokens)
            piece = shard.tokens[inside : inside + length]
            if piece.size and int(piece.max()) >= self.index.vocab_size:
                raise MorError(
                    f"shard {shard.path} is damaged: token id {piece.max()} between tokens "
                    f"{inside} and {inside + piece.size}, expected at most "
                    f"{self.index.vocab_size - 1}"
                )
            pieces.append(piece)
            start, length, number = start + piece.size, length - piece.size, number + 1
        return _to_tensor(np.concatenate(pieces))


def _to_tensor(tokens: np.ndarray) -> Tensor:
    return torch.from_numpy(tokens.astype(np.int64))
