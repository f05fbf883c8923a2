"""A picture, a question and its answer as rows for ``MoRForConditionalGeneration``.

The processor here is made of a prepared folder alone: its images' size and colours, and a tokenizer
of what :mod:`mor.data.media.pairs` says of them. The same folder gives the same processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mor.config import MoRConfig
from mor.data import train_tokenizer
from mor.data.media import MediaIndex
from mor.data.media.pairs import NOTHING, SIDES, Pair, ask, caption, class_names
from mor.hf.processing import MoRProcessor
from mor.hf.processors import image_processor

IMAGE = "<image>"
VOCABULARY = 340
# A turn is what was said; an answer ends with the end of text.
TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}"
    "{% endif %}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def caption_tokenizer(index: MediaIndex) -> Any:
    """A tokenizer of what is said of pairs of the folder's images, with ``<image>`` last."""
    names = class_names(index.classes)
    said = [caption({"left": a, "right": b}) for a in names for b in (*names[:20], None)]
    said += [caption({"left": None, "right": a}) for a in names]
    tokenizer = train_tokenizer([*said, *map(ask, SIDES), NOTHING], VOCABULARY)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def caption_processor(index: MediaIndex, num_patches: int) -> MoRProcessor:
    """What makes inputs of a picture, twice as wide as the folder's images, and text.

    Args:
        index: of the folder.
        num_patches: of a picture.
    """
    height, width, _ = index.shape
    pixels = image_processor(index, (height, 2 * width))
    tokenizer = caption_tokenizer(index)
    return MoRProcessor(pixels, tokenizer, num_image_tokens=num_patches, image_token=IMAGE)


class PairEncoder:
    """Pairs as rows of token ids, and pictures as the model takes them.

    Args:
        tokenizer: with ``<image>``.
        config: of the model; its patches and its end of text count.
        mean, std: of each channel, of values in [0, 1].
    """

    def __init__(
        self, tokenizer: Any, config: MoRConfig, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.tokenizer = tokenizer
        image: Any = config.image_token_id
        self.patches: list[int] = [image] * config.num_patches
        self.pad, self.end = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)

    @classmethod
    def of(cls, processor: MoRProcessor, config: MoRConfig) -> PairEncoder:
        """The one that does as a processor."""
        images = processor.image_processor
        return cls(processor.tokenizer, config, images.image_mean, images.image_std)

    def question(self, pair: Pair) -> list[int]:
        """Ids of the picture's places and the question, as the chat template lays them."""
        return self.patches + self._ids(pair.question)

    def answer(self, pair: Pair) -> list[int]:
        """Ids of the answer and its end."""
        return [*self._ids(pair.answer), self.end]

    def row(self, pair: Pair, length: int | None = None) -> dict[str, Tensor]:
        """Picture, question, answer, end; the loss is on the answer alone.

        Args:
            pair: what to say.
            length: tokens of the row, padded at its end; None for its own.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels`` [length], ``pixel_values`` [C, H, W].
        """
        head, tail = self.question(pair), self.answer(pair)
        own = len(head) + len(tail)
        spare = 0 if length is None else length - own
        rows = {
            "input_ids": [*head, *tail, *[self.pad] * spare],
            "attention_mask": [1] * own + [0] * spare,
            "labels": [-100] * len(head) + tail + [-100] * spare,
        }
        found = {name: torch.tensor(row) for name, row in rows.items()}
        return found | {"pixel_values": self.pixels(pair)}

    def pixels(self, pair: Pair) -> Tensor:
        """[C, H, W] as the model takes them."""
        values = (pair.pixels.float() / 255 - self.mean) / self.std
        return values.permute(2, 0, 1).contiguous()

    def longest(self, names: Sequence[str]) -> int:
        """Tokens of the longest row about classes of these names."""
        # Words are cut into tokens one by one, so that the longest name makes the longest row.
        name = max(names, key=lambda one: len(self._ids(f" {one}")))
        told = [Pair(torch.zeros(0), "", caption({"left": name, "right": name}))]
        told += [
            Pair(torch.zeros(0), ask(side), one) for side in SIDES for one in [*names, NOTHING]
        ]
        return max(len(self.question(pair)) + len(self.answer(pair)) for pair in told)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids
