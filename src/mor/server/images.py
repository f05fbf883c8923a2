"""Chats with images: their patches become embeddings of the prompt."""

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
from mor.hf.load_media import load_processor
from mor.hf.modeling import MoRForCausalLM
from mor.hf.processing import MoRProcessor
from mor.hf.vision_language import MoRForConditionalGeneration
from mor.server.attachments import read_image
from mor.server.errors import ApiError, too_long
from mor.server.schema.chats import Turns

IMAGE_PART = "image_url"


class ImageReader:
    """What a server needs to read images; the work is done in one thread beside asyncio's.

    Args:
        model: whose image part is used; nothing else of it is kept.
        processor: saved beside it.

    Raises:
        MorError: processor and model do not fit each other.
    """

    def __init__(self, model: MoRForConditionalGeneration, processor: MoRProcessor) -> None:
        config = model.config
        if processor.num_image_tokens != config.num_patches:
            raise MorError(
                f"num_image_tokens={processor.num_image_tokens} of the processor is not the "
                f"{config.num_patches} patches of the model's images"
            )
        if processor.image_token_id != config.image_token_id:
            raise MorError(
                f"image_token={processor.image_token!r} of the processor is token "
                f"{processor.image_token_id}, and image_token_id={config.image_token_id}"
            )
        self._prefix, self._pixels = model.image_prefix, processor.image_processor
        self.token, self.token_id = processor.image_token, processor.image_token_id
        self.grid, self.size = config.patch_grid, config.num_patches
        self._thread = ThreadPoolExecutor(1, "mor-images")

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False)

    async def prompt(self, ids: Sequence[int], body: Turns, most: int) -> Sequence[int]:
        """Token ids of a chat with its images laid at their places.

        Args:
            ids: of the chat as the template wrote it, one ``token_id`` for each image.
            body: the chat.
            most: tokens that fit.

        Raises:
            ApiError: 400: an image that cannot be taken, more than fit, or a template that leaves
                some out.
        """
        found = find_images(body)
        places = [place for place, token in enumerate(ids) if token == self.token_id]
        if len(places) != len(found):
            raise ApiError(
                400,
                f"The chat template writes {len(places)} of the {len(found)} images; it must write "
                "every one, once",
                param="messages",
                code="invalid_value",
            )
        count = len(ids) + len(found) * (self.size - 1)
        if count > most:
            raise too_long("messages", f"has {count} tokens, {self.size} for each image", most)
        if not found:
            return ids
        loop = asyncio.get_running_loop()
        features = [
            await loop.run_in_executor(self._thread, self._embed, path, value)
            for path, value in found
        ]
        long: list[int] = []
        starts = []
        for token in ids:
            if token == self.token_id:
                starts.append(len(long))
                long += [token] * self.size
            else:
                long.append(token)
        at = [start + place for start in starts for place in range(self.size)]
        return EmbeddedPrompt(long, torch.cat(features), at)

    def _embed(self, path: str, value: Any) -> Tensor:
        """[P, D] of one image; in the thread."""
        pixels = read_image(value, path)
        taken = self._pixels(pixels, return_tensors="pt")["pixel_values"]
        weight = next(self._prefix.parameters())
        with torch.inference_mode():
            found: Tensor = self._prefix(taken.to(weight.device, weight.dtype))[0]
        return found


def open_reader(model: MoRForCausalLM, folder: str | Path) -> ImageReader | None:
    """What reads images for ``model`` of ``folder``; None where it takes none.

    Raises:
        MorError: its processor is missing, damaged, or another model's.
    """
    if not isinstance(model, MoRForConditionalGeneration):
        return None
    return ImageReader(model, load_processor(folder))


def find_images(body: Turns) -> list[tuple[str, Any]]:
    """Every image of a chat in order: the path of its field, and the field as it came."""
    return [
        (f"messages[{i}].content[{j}].{IMAGE_PART}", part.image_url)
        for i, message in enumerate(body.messages)
        if isinstance(message.content, list)
        for j, part in enumerate(message.content)
        if part.type == IMAGE_PART
    ]


def check_images(body: Turns, reader: ImageReader | None) -> None:
    """Refuse images where the model takes none, or a role has none, and texts that mimic one.

    Raises:
        ApiError: 400, naming the part.
    """
    for i, message in enumerate(body.messages):
        parts = message.content if isinstance(message.content, list) else []
        if any(part.type == IMAGE_PART for part in parts):
            param = f"messages[{i}].content"
            if reader is None:
                raise ApiError(
                    400,
                    f"{param}: parts of type {IMAGE_PART!r} are not supported; only text",
                    param=param,
                    code="unsupported_parameter",
                )
            if message.role != "user":
                raise ApiError(
                    400,
                    f"{param}: role {message.role!r} has no images; role 'user' has them",
                    param=param,
                    code="invalid_value",
                )
        if reader is not None and reader.token in str(message.plain("")["content"]):
            raise ApiError(
                400,
                f"messages[{i}].content: the text holds {reader.token!r}, which stands for an "
                "image; leave it out and give a part of type 'image_url'",
                param=f"messages[{i}].content",
                code="invalid_value",
            )
