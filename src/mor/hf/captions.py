"""A picture or recording, a question and its answer as rows for ``MoRForConditionalGeneration``.

The processor here is made of a prepared folder alone: its images' size and colours, or how its
sounds became frames, and a tokenizer of what :mod:`mor.data.media.pairs` says of them. The same
folder gives the same processor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mor.config import MoRConfig
from mor.data import train_tokenizer
from mor.data.media import IMAGES, MediaIndex
from mor.data.media.pairs import (
    NOTHING,
    PICTURES,
    RECORDINGS,
    Pair,
    Wording,
    class_names,
    wording_of,
)
from mor.hf.hearing import MoRAudioProcessor
from mor.hf.processing import MoRProcessor
from mor.hf.processors import feature_extractor, image_processor

IMAGE, AUDIO = "<image>", "<audio>"
VOCABULARY = 340
# A turn is what was said; an answer ends with the end of text.
TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ 'TOKEN' if p.type == 'TYPE' else p.text }}{% endfor %}"
    "{% endif %}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def caption_tokenizer(index: MediaIndex) -> Any:
    """A tokenizer of what is said of pairs of the folder's examples.

    ``<image>``, or ``<audio>`` for sounds, is its last token.
    """
    names, wording = class_names(index.classes), wording_of(index.kind)
    first, second = wording.places
    said = [wording.caption({first: a, second: b}) for a in names for b in (*names[:20], None)]
    if wording.alone[1] is not None:
        said += [wording.caption({first: None, second: a}) for a in names]
    tokenizer = train_tokenizer([*said, *map(wording.ask, wording.places), NOTHING], VOCABULARY)
    token, kind = (IMAGE, "image") if index.kind == IMAGES else (AUDIO, "audio")
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    tokenizer.chat_template = TEMPLATE.replace("TOKEN", token).replace("TYPE", kind)
    return tokenizer


def caption_processor(index: MediaIndex, config: MoRConfig) -> MoRProcessor | MoRAudioProcessor:
    """What makes inputs of text and of a picture, twice as wide as the folder's images, or a sound.

    Args:
        index: of the folder.
        config: of the model, whose patches or strides count.
    """
    tokenizer = caption_tokenizer(index)
    if index.kind != IMAGES:
        return MoRAudioProcessor(feature_extractor(index), tokenizer, config.conv_stride, AUDIO)
    height, width, _ = index.shape
    pixels = image_processor(index, (height, 2 * width))
    return MoRProcessor(pixels, tokenizer, num_image_tokens=config.num_patches, image_token=IMAGE)


class PairEncoder(ABC):
    """Pairs as rows of token ids, and pictures or recordings as the model takes them.

    Args:
        tokenizer: with ``<image>`` or ``<audio>``.
        config: of the model; its patches or strides and its end of text count.
        mean, std: of each channel, of values in [0, 1], or of each coefficient of a frame.

    Attributes:
        wording: how pairs are told of.
        name: of the picture or the frames among what the model takes.
        token: id that stands where the picture or recording is.
    """

    wording: Wording
    name: str

    def __init__(
        self, tokenizer: Any, config: MoRConfig, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.tokenizer, self.config = tokenizer, config
        token: Any = config.media_token_id
        self.token: int = token
        self.pad, self.end = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)

    @abstractmethod
    def media(self, pair: Pair) -> Tensor:
        """The picture [C, H, W] or the frames [n, bins], as the model takes them."""

    @abstractmethod
    def batch(self, media: Sequence[Tensor], length: int | None = None) -> dict[str, Tensor]:
        """What the model takes of several, by name. Frames are padded, to ``length`` if given."""

    @abstractmethod
    def count_places(self, size: int) -> int:
        """Tokens of a picture or a recording that is ``size`` long."""

    def question(self, pair: Pair, size: int | None = None) -> list[int]:
        """Ids of the places of picture or recording and the question, as in the chat template.

        Args:
            pair: what to ask.
            size: length of a recording, where it was changed.
        """
        places = self.count_places(len(pair.media) if size is None else size)
        return [self.token] * places + self._ids(pair.question)

    def answer(self, pair: Pair) -> list[int]:
        """Ids of the answer and its end."""
        return [*self._ids(pair.answer), self.end]

    def row(
        self, pair: Pair, length: int | None = None, size: int | None = None
    ) -> dict[str, Tensor]:
        """Question, answer, end; the loss is on the answer alone.

        Args:
            pair: what to say.
            length: tokens of the row, padded at its end; None for its own.
            size: as of :meth:`question`.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels`` [length].
        """
        head, tail = self.question(pair, size), self.answer(pair)
        own = len(head) + len(tail)
        spare = 0 if length is None else length - own
        rows = {
            "input_ids": [*head, *tail, *[self.pad] * spare],
            "attention_mask": [1] * own + [0] * spare,
            "labels": [-100] * len(head) + tail + [-100] * spare,
        }
        return {name: torch.tensor(row) for name, row in rows.items()}

    def longest(self, names: Sequence[str], size: int) -> int:
        """Tokens of the longest row about classes of these names and so long a recording."""
        # Words are cut into tokens one by one, so that the longest name makes the longest row.
        name, wording = max(names, key=lambda one: len(self._ids(f" {one}"))), self.wording
        media = torch.zeros(size)
        told = [Pair(media, "", wording.caption(dict.fromkeys(wording.places, name)))]
        told += [
            Pair(media, wording.ask(place), one)
            for place in wording.places for one in [*names, NOTHING]
        ]  # fmt: skip
        return max(len(self.question(pair)) + len(self.answer(pair)) for pair in told)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids


class PictureEncoder(PairEncoder):
    """Of pictures, all of one size."""

    wording, name = PICTURES, "pixel_values"

    def media(self, pair: Pair) -> Tensor:
        """[C, H, W]."""
        values = (pair.media.float() / 255 - self.mean) / self.std
        return values.permute(2, 0, 1).contiguous()

    def batch(self, media: Sequence[Tensor], length: int | None = None) -> dict[str, Tensor]:
        """``pixel_values`` [B, C, H, W]."""
        return {self.name: torch.stack(list(media))}

    def count_places(self, size: int) -> int:
        """Patches of a picture."""
        return self.config.num_patches


class RecordingEncoder(PairEncoder):
    """Of recordings of any length."""

    wording, name = RECORDINGS, "input_features"

    def media(self, pair: Pair) -> Tensor:
        """[frames, bins]."""
        return (pair.media - self.mean) / self.std

    def batch(self, media: Sequence[Tensor], length: int | None = None) -> dict[str, Tensor]:
        """``input_features`` [B, longest, bins] and ``feature_attention_mask`` [B, longest]."""
        frames = pad_sequence(list(media), batch_first=True)
        if length is not None:
            frames = F.pad(frames, (0, 0, 0, length - frames.shape[1]))
        sizes = torch.tensor([len(one) for one in media])
        mask = torch.arange(frames.shape[1])[None] < sizes[:, None]
        return {self.name: frames, "feature_attention_mask": mask.long()}

    def count_places(self, size: int) -> int:
        """Tokens of so many frames."""
        return self.config.tokens_of_frames(size)


def make_encoder(index: MediaIndex, config: MoRConfig) -> PairEncoder:
    """What makes rows of the folder's pairs."""
    size = index.shape[-1]
    mean, std = index.mean or (0.0,) * size, index.std or (1.0,) * size
    kind = PictureEncoder if index.kind == IMAGES else RecordingEncoder
    return kind(caption_tokenizer(index), config, mean, std)


def encoder_of(processor: MoRProcessor | MoRAudioProcessor, config: MoRConfig) -> PairEncoder:
    """The one that does as a processor."""
    tokenizer = processor.tokenizer
    if isinstance(processor, MoRProcessor):
        images = processor.image_processor
        return PictureEncoder(tokenizer, config, images.image_mean, images.image_std)
    # Transformers' extractors of log-mel have done all that is done to frames; ours has numbers.
    mean, std = (getattr(processor.feature_extractor, name, None) for name in ("mean", "std"))
    bins = config.num_mel_bins or 1
    return RecordingEncoder(tokenizer, config, mean or [0.0] * bins, std or [1.0] * bins)
