"""Chats with images or sounds: their patches or frames become embeddings of the prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mor.engine import EmbeddedPrompt
from mor.errors import MorError
from mor.hf.frames import MoRFeatureExtractor
from mor.hf.hearing import MoRAudioProcessor
from mor.hf.load_media import load_processor
from mor.hf.modeling import MoRForCausalLM
from mor.hf.processing import MoRProcessor
from mor.hf.vision_language import MoRForConditionalGeneration
from mor.server.attachments import read_frames, read_image
from mor.server.errors import ApiError, too_long
from mor.server.schema.chats import Turns

IMAGE_PART, AUDIO_PART = "image_url", "input_audio"
_NAMES = {IMAGE_PART: "image", AUDIO_PART: "sound"}


class Reader:
    """What a server needs to read images or sounds; the work is done in one thread of its own.

    Attributes:
        part: type of the parts that it reads.
        modality: ``image`` or ``audio``, as the model's card says.
        token, token_id: what stands for one in a chat that the template has written.
        grid: rows and columns of patches in an image; None for sounds.
        size: tokens of one; None where that depends on it.
    """

    part: str
    modality: str
    token: str
    token_id: int
    grid: tuple[int, int] | None = None
    size: int | None = None

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "mor-media")

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False)

    def _take_token(self, processor: Any, config: Any) -> None:
        """Take what stands for one in a text; refuse it where the model means another token."""
        name = f"{self.modality}_token"
        self.token, self.token_id = getattr(processor, name), getattr(processor, f"{name}_id")
        wanted = getattr(config, f"{name}_id")
        if self.token_id != wanted:
            raise MorError(
                f"{name}={self.token!r} of the processor is token {self.token_id}, and "
                f"{name}_id={wanted}"
            )

    def embed(self, path: str, value: Any) -> Tensor:
        """[n, D] of one image or sound; in the thread. Raises ``ApiError`` naming ``path``."""
        raise NotImplementedError

    async def prompt(self, ids: Sequence[int], body: Turns, most: int) -> Sequence[int]:
        """Token ids of a chat with its images or sounds laid at their places.

        Args:
            ids: of the chat as the template wrote it, one ``token_id`` for each.
            body: the chat.
            most: tokens that fit.

        Raises:
            ApiError: 400: one that cannot be taken, more than fit, or a template that leaves some
                out.
        """
        found, name = find_media(body, self.part), _NAMES[self.part]
        places = [place for place, token in enumerate(ids) if token == self.token_id]
        if len(places) != len(found):
            raise ApiError(
                400,
                f"The chat template writes {len(places)} of the {len(found)} {name}s; it must "
                "write every one, once",
                param="messages",
                code="invalid_value",
            )
        count = len(ids) + len(found) * ((self.size or 1) - 1)
        if count > most:
            raise too_long(
                "messages", f"has {count} tokens, {self.size or 1} for each {name}", most
            )
        if not found:
            return ids
        loop = asyncio.get_running_loop()
        features = [
            await loop.run_in_executor(self._thread, self.embed, path, value)
            for path, value in found
        ]
        count = len(ids) - len(found) + sum(map(len, features))
        if count > most:
            raise too_long("messages", f"has {count} tokens with its {name}s", most)
        long: list[int] = []
        at: list[int] = []
        sizes = iter([len(one) for one in features])
        for token in ids:
            repeated = next(sizes) if token == self.token_id else 1
            if token == self.token_id:
                at += range(len(long), len(long) + repeated)
            long += [token] * repeated
        return EmbeddedPrompt(long, torch.cat(features), at)


class ImageReader(Reader):
    """Reads images.

    Args:
        model: whose image part is used; nothing else of it is kept.
        processor: saved beside it.

    Raises:
        MorError: processor and model do not fit each other.
    """

    part, modality = IMAGE_PART, "image"

    def __init__(self, model: MoRForConditionalGeneration, processor: MoRProcessor) -> None:
        super().__init__()
        config = model.config
        if processor.num_image_tokens != config.num_patches:
            raise MorError(
                f"num_image_tokens={processor.num_image_tokens} of the processor is not the "
                f"{config.num_patches} patches of the model's images"
            )
        self._take_token(processor, config)
        self._prefix, self._pixels = model.image_prefix, processor.image_processor
        self.grid, self.size = config.patch_grid, config.num_patches

    def embed(self, path: str, value: Any) -> Tensor:
        """[P, D] of one image."""
        pixels = read_image(value, path)
        taken = self._pixels(pixels, return_tensors="pt")["pixel_values"]
        weight = next(self._prefix.parameters())
        with torch.inference_mode():
            found: Tensor = self._prefix(taken.to(weight.device, weight.dtype))[0]
        return found


class SoundReader(Reader):
    """Reads sounds: of any rate and number of channels, which become the model's.

    Args:
        model: whose audio part is used; nothing else of it is kept.
        processor: saved beside it.

    Raises:
        MorError: processor and model do not fit each other, or it makes frames of no samples.
    """

    part, modality = AUDIO_PART, "audio"

    def __init__(self, model: MoRForConditionalGeneration, processor: MoRAudioProcessor) -> None:
        super().__init__()
        config = model.config
        if processor.conv_stride != config.conv_stride:
            raise MorError(
                f"conv_stride={processor.conv_stride} of the processor is not the model's "
                f"{config.conv_stride}"
            )
        self._take_token(processor, config)
        self._frames = processor.feature_extractor
        if not hasattr(self._frames, "sampling_rate") or isinstance(
            self._frames, MoRFeatureExtractor
        ):
            raise MorError(
                f"the processor's {type(self._frames).__name__} takes frames, not sounds; a chat "
                "brings sounds, so save one that makes frames of them"
            )
        self._prefix = model.audio_prefix

    def embed(self, path: str, value: Any) -> Tensor:
        """[n, D] of one sound."""
        made = read_frames(value, path, self._frames)
        weight = next(self._prefix.parameters())
        frames, mask = made["input_features"], made.get("attention_mask")
        mask = None if mask is None else mask.to(weight.device)
        with torch.inference_mode():
            found, (length,) = self._prefix(frames.to(weight.device, weight.dtype), mask)
        told: Tensor = found[0, :length]
        return told


def open_reader(model: MoRForCausalLM, folder: str | Path) -> Reader | None:
    """What reads images or sounds for ``model`` of ``folder``; None where it takes none.

    Raises:
        MorError: its processor is missing, damaged, or another model's.
    """
    if not isinstance(model, MoRForConditionalGeneration):
        return None
    processor = load_processor(folder)
    reads = ImageReader if model.config.audio_token_id is None else SoundReader
    return reads(model, processor)


def find_media(body: Turns, part_type: str) -> list[tuple[str, Any]]:
    """Every image or sound of a chat in order: the path of its field, and the field as it came."""
    return [
        (f"messages[{i}].content[{j}].{part_type}", getattr(part, part_type))
        for i, message in enumerate(body.messages)
        if isinstance(message.content, list)
        for j, part in enumerate(message.content)
        if part.type == part_type
    ]


def check_media(body: Turns, reader: Reader | None) -> None:
    """Refuse parts that the model does not take, or a role has none of, and texts that mimic one.

    Raises:
        ApiError: 400, naming the part.
    """
    for i, message in enumerate(body.messages):
        parts = message.content if isinstance(message.content, list) else []
        param = f"messages[{i}].content"
        for part in parts:
            if part.type not in _NAMES:
                continue
            if reader is None or part.type != reader.part:
                takes = (
                    "only text" if reader is None else f"this model takes text and {reader.part}"
                )
                raise ApiError(
                    400,
                    f"{param}: parts of type {part.type!r} are not supported; {takes}",
                    param=param,
                    code="unsupported_parameter",
                )
            if message.role != "user":
                name = _NAMES[reader.part]
                raise ApiError(
                    400,
                    f"{param}: role {message.role!r} has no {name}s; role 'user' has them",
                    param=param,
                    code="invalid_value",
                )
        if reader is not None and reader.token in str(message.plain("")["content"]):
            raise ApiError(
                400,
                f"{param}: the text holds {reader.token!r}, which stands for an "
                f"{reader.modality}; leave it out and give a part of type {reader.part!r}",
                param=param,
                code="invalid_value",
            )
