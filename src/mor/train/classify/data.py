"""From a recipe's ``data`` section to images or sounds in training order.

A prepared folder says what a model of it must be: the size of an image or the numbers of a frame,
and the classes. :func:`resolve_media` writes that into the recipe once, so that budget, plan, log
and summary count tokens as they do for texts: ``data.seq_len`` is the tokens of one example, the
patches of an image, or the mean over sounds.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mor.config import MoRConfig
from mor.data.media import MediaDataset, MediaIndex
from mor.data.order import Shuffle
from mor.errors import MorError
from mor.train.classify.augment import augment
from mor.train.classify.captions import CaptionSamples, caption_config
from mor.train.recipe.media import AugmentSection
from mor.train.recipe.recipe import Recipe
from mor.train.recipe.sections import RecipeError


class MediaSamples(Dataset[dict[str, Tensor]]):
    """Examples of a split epoch after epoch, as :class:`mor.data.TrainingSamples` has rows.

    Sample n is a function of n, the seed and the data alone, what is changed about it included. An
    epoch holds every example once, in a new order, cut to a whole number of optimiser steps.

    Attributes:
        parts: the one dataset.
        per_step: samples of one optimiser step.
        epoch_length: samples of an epoch.

    Raises:
        MorError: the split does not fill one step.
    """

    def __init__(
        self,
        dataset: MediaDataset,
        *,
        per_step: int = 1,
        seed: int = 0,
        changes: AugmentSection | None = None,
    ) -> None:
        self.parts, self.per_step, self.seed = [dataset], per_step, seed
        self.changes = changes
        self.epoch_length = len(dataset) // per_step * per_step
        if not self.epoch_length:
            raise MorError(
                f"split {dataset.split!r} of {dataset.index.directory} has {len(dataset)} examples,"
                f" fewer than the {per_step} of one optimiser step; lower train.batch_size or "
                "train.gradient_accumulation_steps"
            )
        self._length = self.epoch_length
        self._order: tuple[int, Shuffle] | None = None

    def take(self, num_samples: int) -> MediaSamples:
        """The first ``num_samples`` of it: what a whole run reads."""
        taken = copy.copy(self)
        taken._length = num_samples
        return taken

    def __len__(self) -> int:
        """Samples: one epoch, or what ``take`` was given."""
        return self._length

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        """A sample, as in ``MediaDataset``, changed as ``data.augment`` says."""
        if not 0 <= sample < self._length:
            raise IndexError(f"sample {sample} of {self._length}")
        epoch, place = divmod(sample, self.epoch_length)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, Shuffle(len(self.parts[0]), self.seed, epoch)
        item = self.parts[0][self._order[1][place]]
        if self.changes is None:
            return item
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + sample)
        return augment(item, self.changes, draw)

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Tensor]]:
        """Several samples at once."""
        return [self[sample] for sample in numbers]

    def epoch_at(self, sample: int) -> float:
        """Epochs gone by before ``sample``."""
        return sample / self.epoch_length


def open_index(recipe: Recipe) -> MediaIndex:
    """The index of the recipe's folder.

    Raises:
        MorError: there is none, it is damaged, or it holds another kind than ``data.kind`` says.
    """
    section = recipe.data
    assert section.path is not None
    index = MediaIndex.load(section.path)
    if section.kind not in ("captions", index.kind):
        raise MorError(
            f"data.kind={section.kind!r}, but {index.directory} holds {index.kind!r}; "
            f"set data.kind={index.kind}"
        )
    return index


def resolve_media(recipe: Recipe) -> Recipe:
    """The recipe with ``data.seq_len`` as the data has it; done twice it changes nothing.

    Raises:
        MorError: the folder is wrong, or does not fit ``model``.
    """
    if recipe.data.kind == "text":
        return recipe
    if recipe.train.parallel == "fsdp":
        raise RecipeError(
            f"train.parallel='fsdp' does not go with data.kind={recipe.data.kind!r}; use ddp"
        )
    index = open_index(recipe)
    if recipe.data.kind == "captions":
        examples = MediaDataset(index.directory, recipe.data.train_split)
        tokens = CaptionSamples(examples, caption_config(recipe, index)).mean_length()
    else:
        tokens = tokens_of_example(media_config(recipe, index), index, recipe.data.train_split)
    data = recipe.data.model_copy(update={"seq_len": tokens})
    return recipe.model_copy(update={"data": data})


def tokens_of_example(config: MoRConfig, index: MediaIndex, split: str) -> int:
    """Tokens of one example: the patches, or those of a sound of mean length; counted as 2 if 1."""
    if config.modality == "image":
        return max(2, config.num_patches)
    part = index.split(split)
    return max(2, config.tokens_of_frames(round((part.frames or 0) / max(1, part.examples))))


def media_config(recipe: Recipe, index: MediaIndex) -> MoRConfig:
    """The network of a recipe over the examples and classes of its data.

    Raises:
        RecipeError: a wrong value, or one that contradicts the data.
    """
    if index.kind == "images":
        height, width, channels = index.shape
        size = height if height == width else [height, width]
        of_data: dict[str, Any] = {
            "modality": "image", "image_size": size, "num_channels": channels,
        }  # fmt: skip
    else:
        of_data = {"modality": "audio", "num_mel_bins": index.shape[0]}
    given = {name: value for name, value in recipe.model.items() if value is not None}
    for name, value in of_data.items():
        if given.get(name, value) != value:
            raise RecipeError(
                f"model.{name}={given[name]!r} contradicts the data in {index.directory}, which "
                f"has {value!r}; leave it out"
            )
    names = dict(enumerate(index.classes))
    fields = of_data | given | {"id2label": names, "label2id": {n: i for i, n in names.items()}}
    config = make_config(fields)
    if index.max_frames is not None:
        longest = config.tokens_of_frames(index.max_frames)
        if longest > config.max_position_embeddings:
            raise RecipeError(
                f"model.max_position_embeddings={config.max_position_embeddings}: the longest "
                f"sound of {index.directory} makes {longest} tokens; raise it, or conv_stride"
            )
    return config


def make_config(fields: dict[str, Any]) -> MoRConfig:
    """The configuration of these fields. Raises ``RecipeError`` naming the wrong one."""
    try:
        return MoRConfig(**fields)
    except MorError as error:
        raise RecipeError(f"model.{error}") from None
