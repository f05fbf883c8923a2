"""Pictures or recordings and what is said of them as a run reads them (``data.kind: captions``).

The folder is one of images or sounds. A picture is two images side by side, or one beside nothing;
a recording is one or two sounds (:mod:`mor.data.media.pairs`). The model reads patches or frames,
maybe a question, and learns the answer. Sample n is a function of n, the seed and the data alone,
so that there is no end of them: an epoch is said to have as many as there are examples.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mor.config import MoRConfig
from mor.data.media import IMAGES, MediaDataset, MediaIndex
from mor.data.media.pairs import CaptionedPairs, class_names
from mor.errors import MorError
from mor.hf.captions import AUDIO, IMAGE, caption_tokenizer, make_encoder
from mor.train.classify.augment import augment
from mor.train.recipe.media import AugmentSection
from mor.train.recipe.recipe import Recipe
from mor.train.recipe.sections import RecipeError

# Of the pairs that validation and tests show; a training run has its own.
VALIDATION_SEED = 104_729
# Rows that the mean length is taken over.
_COUNTED = 512


class CaptionSamples(Dataset[dict[str, Tensor]]):
    """Rows of picture or recording, question and answer, all padded to one length.

    Args:
        examples: a split of a prepared folder.
        config: of the model.
        per_step: samples of one optimiser step.
        seed: of the draw.
        samples: how many there are; None for an epoch.
        changes: small ones of every picture or recording.

    Attributes:
        parts: the one dataset of examples.
        per_step: samples of one optimiser step.
        epoch_length: samples of what is called an epoch.
    """

    def __init__(
        self,
        examples: MediaDataset,
        config: MoRConfig,
        *,
        per_step: int = 1,
        seed: int = 0,
        samples: int | None = None,
        changes: AugmentSection | None = None,
    ) -> None:
        self.parts, self.per_step, self.seed, self.changes = [examples], per_step, seed, changes
        self.epoch_length = max(1, len(examples) // per_step) * per_step
        self.encoder = make_encoder(examples.index, config)
        self._pairs = CaptionedPairs(examples, samples or self.epoch_length, seed=seed)
        self._size = size_of(examples.index)
        self.length = self.encoder.longest(self._pairs.names, self._size)

    def take(self, num_samples: int) -> CaptionSamples:
        """The first ``num_samples`` of it: what a whole run reads."""
        taken = copy.copy(self)
        taken._pairs = CaptionedPairs(self.parts[0], num_samples, seed=self.seed)
        return taken

    def __len__(self) -> int:
        """Samples."""
        return len(self._pairs)

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        """A row, as of :meth:`mor.hf.captions.PairEncoder.row`, and what it is about."""
        pair, encoder = self._pairs[sample], self.encoder
        media = encoder.media(pair)
        if self.changes is not None:
            draw = torch.Generator().manual_seed(self.seed * 1_000_003 + sample)
            media = augment({encoder.name: media}, self.changes, draw)[encoder.name]
        about = encoder.batch([media], self._size)
        row = encoder.row(pair, self.length, len(media))
        return row | {name: values[0] for name, values in about.items()}

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


def size_of(index: MediaIndex) -> int:
    """Most frames of a recording; pixels along a picture."""
    return index.shape[0] if index.max_frames is None else 2 * index.max_frames


def caption_config(recipe: Recipe, index: MediaIndex) -> MoRConfig:
    """The network of a recipe over pairs of the folder's examples and its vocabulary.

    Raises:
        RecipeError: a wrong value, or one that contradicts the data.
    """
    tokenizer = caption_tokenizer(index)
    of_data: dict[str, Any] = {
        "modality": "text",
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if index.kind == IMAGES:
        if recipe.model.get("patch_size") is None:
            raise RecipeError("model.patch_size is missing: pixels of a patch, one side or both")
        height, width, channels = index.shape
        of_data |= {
            "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE),
            "image_size": [height, 2 * width],
            "num_channels": channels,
        }
    else:
        of_data |= {
            "audio_token_id": tokenizer.convert_tokens_to_ids(AUDIO),
            "num_mel_bins": index.shape[0],
        }
    given = {name: value for name, value in recipe.model.items() if value is not None}
    for name, value in of_data.items():
        if given.get(name, value) != value:
            raise RecipeError(
                f"model.{name}={given[name]!r} contradicts pairs of {index.directory}, "
                f"which have {value!r}; leave it out"
            )
    try:
        config = MoRConfig(**(of_data | given))
    except MorError as error:
        raise RecipeError(f"model.{error}") from None
    names = class_names(index.classes)
    longest = make_encoder(index, config).longest(names, size_of(index))
    if longest > config.max_position_embeddings:
        image = index.kind == IMAGES
        what, field = ("picture", "patch_size") if image else ("recording", "conv_stride")
        raise RecipeError(
            f"model.max_position_embeddings={config.max_position_embeddings}: the longest row of "
            f"{what} and answer has {longest} tokens; raise it, or {field}"
        )
    return config
