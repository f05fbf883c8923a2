"""Chats with images or sounds: their patches or frames become embeddings of the prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from mor.engine import EmbeddedPrompt
from mor.errors import MorError
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
