"""Pictures and what is said of them as a run reads them (``data.kind: captions``).

The folder is one of images. A picture is two of them side by side, or one beside nothing
(:mod:`mor.data.media.pairs`); the model reads its patches, maybe a question, and learns the answer.
Sample n is a function of n, the seed and the data alone, so that there is no end of them: an epoch
is said to have as many as there are images.
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
from mor.data.media.pairs import CaptionedPairs, class_names
from mor.errors import MorError
from mor.hf.captions import IMAGE, PairEncoder, caption_tokenizer
from mor.train.classify.augment import augment
from mor.train.recipe.media import AugmentSection
from mor.train.recipe.recipe import Recipe
from mor.train.recipe.sections import RecipeError

# Of the pictures that validation and tests show; a training run has its own.
VALIDATION_SEED = 104_729
# Rows that the mean length is taken over.
_COUNTED = 512


class CaptionSamples(Dataset[dict[str, Tensor]]):
    """Rows of picture, question and answer, all padded to one length.

    Args:
        images: a split of a prepared folder.
        config: of the model.
        per_step: samples of one optimiser step.
        seed: of the draw.
        samples: how many there are; None for an epoch.
        changes: small ones of every picture.

    Attributes:
        parts: the one dataset of images.
        per_step: samples of one optimiser step.
        epoch_length: samples of what is called an epoch.
    """

    def __init__(
        self,
        images: MediaDataset,
        config: MoRConfig,
        *,
        per_step: int = 1,
        seed: int = 0,
        samples: int | None = None,
        changes: AugmentSection | None = None,
    ) -> None:
        self.parts, self.per_step, self.seed, self.changes = [images], per_step, seed, changes
        self.epoch_length = max(1, len(images) // per_step) * per_step
        self.encoder = encoder_of(images.index, config)
        self._pairs = CaptionedPairs(images, samples or self.epoch_length, seed=seed)
        self.length = self.encoder.longest(self._pairs.names)

    def take(self, num_samples: int) -> CaptionSamples:
        """The first ``num_samples`` of it: what a whole run reads."""
        taken = copy.copy(self)
        taken._pairs = CaptionedPairs(self.parts[0], num_samples, seed=self.seed)
        return taken

    def __len__(self) -> int:
        """Samples."""
        return len(self._pairs)

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        """A row, as of :meth:`mor.hf.captions.PairEncoder.row`."""
        row = self.encoder.row(self._pairs[sample], self.length)
        if self.changes is None:
            return row
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + sample)
        return augment(row, self.changes, draw)

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Tensor]]:
        """Several at once."""
        return [self[sample] for sample in numbers]

    def epoch_at(self, sample: int) -> float:
        """Epochs gone by before ``sample``."""
        return sample / self.epoch_length

    def mean_length(self) -> int:
        """Tokens of a row without its padding, a mean."""
        rows = self.take(_COUNTED)
        pairs = (rows._pairs[number] for number in range(_COUNTED))
        encoder = self.encoder
        told = sum(len(encoder.question(one)) + len(encoder.answer(one)) for one in pairs)
        return round(told / _COUNTED)


def encoder_of(index: MediaIndex, config: MoRConfig) -> PairEncoder:
    """What makes rows of the folder's images."""
    channels = index.shape[2]
    mean, std = index.mean or (0.0,) * channels, index.std or (1.0,) * channels
    return PairEncoder(caption_tokenizer(index), config, mean, std)


def caption_config(recipe: Recipe, index: MediaIndex) -> MoRConfig:
    """The network of a recipe over pictures of the folder's images and its vocabulary.

    Raises:
        RecipeError: a wrong value, or one that contradicts the data.
    """
    tokenizer = caption_tokenizer(index)
    height, width, channels = index.shape
    of_data: dict[str, Any] = {
        "modality": "text",
        "vocab_size": len(tokenizer),
        "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE),
        "image_size": [height, 2 * width],
        "num_channels": channels,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    given = {name: value for name, value in recipe.model.items() if value is not None}
    for name, value in of_data.items():
        if given.get(name, value) != value:
            raise RecipeError(
                f"model.{name}={given[name]!r} contradicts the pictures of {index.directory}, "
                f"which have {value!r}; leave it out"
            )
    try:
        config = MoRConfig(**(of_data | given))
    except MorError as error:
        raise RecipeError(f"model.{error}") from None
    longest = encoder_of(index, config).longest(class_names(index.classes))
    if longest > config.max_position_embeddings:
        raise RecipeError(
            f"model.max_position_embeddings={config.max_position_embeddings}: the longest row of "
            f"picture and answer has {longest} tokens; raise it, or patch_size"
        )
    return config
