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

from mor.config import MoRConfig
from mor.data import DataIndex, PackedDataset, ResumableSampler, TrainingSamples, console_progress
from mor.data.media import MediaDataset, MediaIndex, collate_media
from mor.data.samples import spread
from mor.train.classify.captions import VALIDATION_SEED, CaptionSamples, caption_config
from mor.train.classify.data import MediaSamples, media_config, open_index
from mor.train.recipe.recipe import Recipe
from mor.train.recipe.sections import DataSection


@dataclass(frozen=True)
class RunData:
    """What a run trains on and is scored on.

    Attributes:
        samples: all of them in training order; ``samples.take(n)`` is a run of n.
        validation: sequences spread over the validation split, or over the mixture of them.
        index: of the (first) folder: vocabulary and tokenizer, the same in all; or classes.
    """

    samples: Any
    validation: Any
    index: DataIndex | MediaIndex


def open_run_data(recipe: Recipe, per_step: int) -> RunData:
    """Open every folder of the recipe; with ``data.verify``, read and check every byte first.

    Raises:
        MorError: a folder, split or shard is wrong, tokenizers differ, or there is not enough text.
    """
    section = recipe.data
    if section.kind != "text":
        return _open_media(recipe, per_step)
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
    return RunData(samples, Subset(scored, spread(count, scored.num_fresh)), train[0].index)


def _open_media(recipe: Recipe, per_step: int) -> RunData:
    """As :func:`open_run_data`, of images or sounds."""
    section, index = recipe.data, open_index(recipe)
    if section.verify and int(os.environ.get("LOCAL_RANK", "0")) == 0:
        index.verify()
    train = MediaDataset(index.directory, section.train_split)
    if section.kind == "captions":
        return _open_captions(recipe, per_step, train)
    samples = MediaSamples(
        train, per_step=per_step, seed=recipe.train.seed, changes=section.augment
    )
    scored = MediaDataset(index.directory, section.validation_split)
    count = min(recipe.train.eval_sequences, len(scored))
    return RunData(samples, Subset(scored, spread(count, len(scored))), index)


def _open_captions(recipe: Recipe, per_step: int, train: MediaDataset) -> RunData:
    """As :func:`open_run_data`, of pictures or recordings and what is said of them."""
    section, config = recipe.data, caption_config(recipe, train.index)
    samples = CaptionSamples(
        train, config, per_step=per_step, seed=recipe.train.seed, changes=section.augment
    )
    held = MediaDataset(train.index.directory, section.validation_split)
    scored = CaptionSamples(held, config, seed=VALIDATION_SEED, samples=recipe.train.eval_sequences)
    return RunData(samples, scored, train.index)


def find_config(recipe: Recipe, index: DataIndex | MediaIndex | None = None) -> MoRConfig:
    """The network of a recipe over its data: with its vocabulary, or its examples and classes.

    Args:
        recipe: validated.
        index: of the data; None to open it.

    Raises:
        MorError: a folder is wrong, or does not fit the model.
    """
    if recipe.data.kind != "text":
        index = open_index(recipe) if index is None else index
    elif index is None:
        index = load_indexes(recipe.data)[0]
    if isinstance(index, MediaIndex):
        captions = recipe.data.kind == "captions"
        return (caption_config if captions else media_config)(recipe, index)
    return recipe.model_config_for(index.vocab_size, index.eos_token_id, index.known_bos())


def load_indexes(section: DataSection) -> list[DataIndex]:
    """The index of every folder, tokenizers compared. Raises ``MorError`` where they differ."""
    found = [DataIndex.load(folder) for folder, _ in section.folders]
    for other in found[1:]:
        other.check_same_tokenizer(found[0])
    return found


def describe_passes(section: DataSection, tokens: int) -> str:
    """How often ``tokens`` of training go through each folder, for people to read."""
    if section.kind != "text" and section.path is not None:
        examples = MediaIndex.load(section.path).split(section.train_split).examples
        return f"{tokens / (examples * section.seq_len):.2f}"
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
    samples: Any,
    size: int,
    *,
    first: int,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
) -> DataLoader[dict[str, Tensor]]:
    """This rank's micro-batches from sample ``first`` on; what lies before is not even listed.

    The loader draws a seed for its workers from random numbers of its own: from the global state,
    which a checkpoint has just restored, it would shift all that a resumed run draws.
    """
    return DataLoader(
        samples,
        batch_sampler=RankBatches(samples, size, first=first, rank=rank, ranks=ranks),
        collate_fn=collate_media if isinstance(samples, MediaSamples) else default_data_collator,
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


def digest_data(parts: Sequence[Any]) -> str:
    """One number for the tokens, or examples, of the training split of every folder in order."""
    shards = []
    for part in parts:
        if isinstance(part, MediaDataset):
            shards.append(part.index.split(part.split).sha256)
        else:
            shards += [shard.sha256 for shard in part.index.shards(part.split)]
    return hashlib.sha256(" ".join(shards).encode()).hexdigest()
