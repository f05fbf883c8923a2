"""From a recipe's ``data`` section to what a run reads: samples, micro-batches, validation."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Sampler, Subset
from transformers import default_data_collator

from mor.data import DataIndex, PackedDataset, ResumableSampler, TrainingSamples, console_progress
from mor.train.recipe.recipe import Recipe
from mor.train.recipe.sections import DataSection


@dataclass(frozen=True)
class RunData:
    """What a run trains on and is scored on.

    Attributes:
        samples: all of them in training order; ``samples.take(n)`` is a run of n.
        validation: the first sequences of the validation split, or of the mixture of them.
        index: of the (first) folder: vocabulary and tokenizer, the same in all.
    """

    samples: TrainingSamples
    validation: Subset[dict[str, Tensor]]
    index: DataIndex


def open_run_data(recipe: Recipe, per_step: int) -> RunData:
    """Open every folder of the recipe; with ``data.verify``, read and check every byte first.

    Raises:
        MorError: a folder, split or shard is wrong, tokenizers differ, or there is not enough text.
    """
    section = recipe.data
    # Once per node: the ranks of a node read the same disk. The others wait where ranks meet.
    if section.verify and int(os.environ.get("LOCAL_RANK", "0")) == 0:
        with console_progress() as progress:
            for folder, _ in section.folders:
                DataIndex.load(folder).verify_all(progress)
    weights = [weight for _, weight in section.folders]

    other = section.validation_path

    def parts(split: str, seed: int | None) -> list[PackedDataset]:
        return [
            PackedDataset(
                folder,
                split,
                section.seq_len,
                # Two folders of equal size must not be read in the same order.
                order_seed=None if seed is None else seed + number,
                packing=section.packing,
                document_mask=section.document_mask,
                loss_on=section.loss_on,
            )
            for number, (folder, _) in enumerate(section.folders)
        ]

    seed = recipe.train.seed
    train = parts(section.train_split, seed)
    samples = TrainingSamples(train, weights, per_step=per_step, seed=seed)
    if other is not None:
        elsewhere = PackedDataset(
            other, section.validation_split, section.seq_len, loss_on=section.loss_on
        )
        elsewhere.index.check_same_tokenizer(train[0].index)
        scored = TrainingSamples([elsewhere])
    else:
        scored = TrainingSamples(parts(section.validation_split, None), weights)
    count = min(recipe.train.eval_sequences, scored.num_fresh)
    return RunData(samples, Subset(scored, range(count)), train[0].index)


def load_indexes(section: DataSection) -> list[DataIndex]:
    """The index of every folder, tokenizers compared. Raises ``MorError`` where they differ."""
    found = [DataIndex.load(folder) for folder, _ in section.folders]
    for other in found[1:]:
        other.check_same_tokenizer(found[0])
    return found


def describe_passes(section: DataSection, tokens: int) -> str:
    """How often ``tokens`` of training go through each folder, for people to read."""
    total = sum(weight for _, weight in section.folders)
    return ", ".join(
        f"{tokens * weight / total / index.num_tokens(section.train_split):.2f}"
        for index, (_, weight) in zip(load_indexes(section), section.folders, strict=True)
    )


# Micro-batches -----------------------------------------------------------------------------------


class RankBatches(Sampler[list[int]]):
    """The micro-batches of one rank as lists of sample numbers; ranks take them in turn.

    Args:
        samples: of the whole run.
        size: sequences of a micro-batch.
        first: number of the first sample.
        rank, ranks: which of how many this is.
    """

    def __init__(
        self, samples: Any, size: int, *, first: int = 0, rank: int = 0, ranks: int = 1
    ) -> None:
        order = ResumableSampler(samples, lambda: first)
        self._batches = BatchSampler(order, size, drop_last=True)
        self._rank, self._ranks = rank, ranks

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the numbers of one micro-batch after the other."""
        return itertools.islice(iter(self._batches), self._rank, None, self._ranks)


def load_batches(
    samples: Any, size: int, *, first: int, rank: int = 0, ranks: int = 1, workers: int = 0
) -> DataLoader[dict[str, Tensor]]:
    """This rank's micro-batches from sample ``first`` on; what lies before is not even listed.

    The loader draws a seed for its workers from random numbers of its own: from the global state,
    which a checkpoint has just restored, it would shift all that a resumed run draws.
    """
    return DataLoader(
        samples,
        batch_sampler=RankBatches(samples, size, first=first, rank=rank, ranks=ranks),
        collate_fn=default_data_collator,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_signals if workers else None,
        generator=torch.Generator(),
    )


PATIENCE_S = 600


def ignore_signals(worker: int) -> None:
    """Let a data worker live through a signal to the whole job; called in the worker as it starts.

    Batch systems and terminals signal every process of a job. PyTorch's workers die of SIGTERM, and
    the training process of the news, in the middle of the step that it wanted to finish. Here they
    go on: they end when the parent stops asking, or when it is gone. One that hangs ends by itself,
    ``PATIENCE_S`` after the signal.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(PATIENCE_S))


def digest_data(parts: Sequence[PackedDataset]) -> str:
    """One number for the tokens of the training split of every folder, and their order."""
    shards = [shard.sha256 for part in parts for shard in part.index.shards(part.split)]
    return hashlib.sha256(" ".join(shards).encode()).hexdigest()
