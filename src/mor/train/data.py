"""From a recipe's ``data`` section to what a run reads: its stream of samples, its validation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import Subset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mor.data import DataIndex, PackedDataset, TrainingSamples, console_progress
from mor.train.recipe.recipe import Recipe
from mor.train.recipe.sections import DataSection


@dataclass(frozen=True)
class RunData:
    """What a run trains on and is scored on.

    Attributes:
        stream: the samples in training order; ``stream.take(n)`` is a run of n.
        validation: the first sequences of the validation split, or of the mixture of them.
        index: of the (first) folder: vocabulary and tokenizer, the same in all.
    """

    stream: TrainingSamples
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
            )
            for number, (folder, _) in enumerate(section.folders)
        ]

    seed = recipe.train.seed
    train = parts(section.train_split, seed)
    stream = TrainingSamples(train, weights, per_step=per_step, seed=seed)
    if other is not None:
        elsewhere = PackedDataset(other, section.validation_split, section.seq_len)
        elsewhere.index.check_same_tokenizer(train[0].index)
        scored = TrainingSamples([elsewhere])
    else:
        scored = TrainingSamples(parts(section.validation_split, None), weights)
    count = min(recipe.train.eval_sequences, scored.num_fresh)
    return RunData(stream, Subset(scored, range(count)), train[0].index)


def indexes(section: DataSection) -> list[DataIndex]:
    """The index of every folder, tokenizers compared. Raises ``MorError`` where they differ."""
    found = [DataIndex.load(folder) for folder, _ in section.folders]
    for other in found[1:]:
        other.check_same_tokenizer(found[0])
    return found


def passes(section: DataSection, tokens: int) -> str:
    """How often ``tokens`` of training go through each folder, for people to read."""
    total = sum(weight for _, weight in section.folders)
    return ", ".join(
        f"{tokens * weight / total / index.num_tokens(section.train_split):.2f}"
        for index, (_, weight) in zip(indexes(section), section.folders, strict=True)
    )


class EpochCallback(TrainerCallback):
    """Makes the logged epoch count passes over the data.

    To the Trainer a run is one epoch of ``TrainingSamples``, and after a resume it would count
    from 0 again.
    """

    def __init__(self, stream: TrainingSamples) -> None:
        self.stream = stream

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A function of the step, so the same with and without a resume."""
        state.epoch = self.stream.epoch_at(state.global_step * self.stream.per_step)
