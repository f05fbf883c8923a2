"""A model of images or sounds behind a server: from what came to classes, and how deep it went."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from mor.config import MoRConfig
from mor.errors import MorError
from mor.hf.frames import MoRFeatureExtractor
from mor.hf.media import MediaModel
from mor.server import failures
from mor.server.attachments import read_audio, read_image
from mor.server.errors import ApiError
from mor.server.schema.classify import Item


class Classifier:
    """One model, run in one thread beside asyncio's; one input at a time, so that none is padded.

    It takes the place of the engine's loop for the server around it.

    Args:
        model: in evaluation mode, with classes.
        processor: the image processor or feature extractor that was saved beside it.
        max_waiting: inputs that may be under way; more are answered 429.

    Raises:
        MorError: a model without classes.
    """

    def __init__(self, model: MediaModel, processor: Any, max_waiting: int = 128) -> None:
        config: MoRConfig = model.config
        if config.head_type != "classes" or config.problem_type == "regression":
            raise MorError(
                f"head_type={config.head_type!r} with problem_type={config.problem_type!r} gives "
                "no classes to serve"
            )
        if (config.num_labels or 1) < 2:
            raise MorError(
                f"num_labels={config.num_labels} leaves nothing to choose; a classifier needs at "
                "least two classes"
            )
        self.model, self.processor, self.config = model, processor, config
        self.kind = config.modality
        names: dict[Any, str] = dict(config.id2label or {})
        self.labels = [str(names.get(i, f"LABEL_{i}")) for i in range(config.num_labels or 0)]
        self.most, self.under_way = max_waiting, 0
        self.draining = False
        self.asyncio_loop: asyncio.AbstractEventLoop | None = None
        self._thread = ThreadPoolExecutor(1, "mor-classify")
        self._numbers = itertools.count()

    @property
    def takes(self) -> str:
        """What an input is: ``image_url``, ``input_audio`` or ``input_features``."""
        if self.kind == "image":
            return "image_url"
        given = isinstance(self.processor, MoRFeatureExtractor)
        return "input_features" if given else "input_audio"

    def start(self) -> None:
        """From now on it is asked from this asyncio loop."""
        self.asyncio_loop = asyncio.get_running_loop()

    def stop(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def ready(self) -> bool:
        """Whether a request would be taken, but for the load."""
        return not self.draining

    async def drain(self, seconds: float) -> None:
        """Take no more, and let what is under way finish for so long."""
        self.draining = True
        end = asyncio.get_running_loop().time() + seconds
        while self.under_way and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)

    async def classify(self, items: Sequence[Item], depth_cap: int | None) -> list[dict[str, Any]]:
        """Classes of each input, in order.

        Args:
            items: images or sounds.
            depth_cap: most recursions per token.

        Raises:
            ApiError: 400 for an input that cannot be taken, 429 where too much is under way, 503
                while draining.
        """
        if self.draining:
            raise failures.shutting_down({"Retry-After": "5"})
        if self.under_way + len(items) > self.most:
            raise failures.overloaded(self.under_way, self.most)
        self.under_way += len(items)
        loop = asyncio.get_running_loop()
        try:
            return [
                await loop.run_in_executor(self._thread, self._one, number, item, depth_cap)
                for number, item in enumerate(items)
            ]
        finally:
            self.under_way -= len(items)

    def _one(self, number: int, item: Item, depth_cap: int | None) -> dict[str, Any]:
        """In the thread."""
        inputs = self._inputs(item, f"input[{number}]")
        weight = next(self.model.parameters())
        # A mask of whole numbers stays one.
        inputs = {
            name: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        try:
            with torch.inference_mode():
                output = self.model(**inputs, max_depth=depth_cap)
        except ValueError as error:  # too many frames
            raise ApiError(
                400, f"input[{number}]: {error}", param=f"input[{number}]", code="invalid_value"
            ) from None
        logits = output.logits[0].double()
        several = self.config.problem_type == "multi_label_classification"
        shares = logits.sigmoid() if several else logits.softmax(-1)
        depths = output.depths[0].tolist()
        return {
            "index": number,
            "label": self.labels[int(logits.argmax())],
            "probs": shares.tolist(),
            "num_classes": len(self.labels),
            "depths": depths,
            "grid": list(self.config.patch_grid) if self.kind == "image" else None,
        }

    def _inputs(self, item: Item, path: str) -> dict[str, Any]:
        """What the model's forward takes of one input.

        Raises:
            ApiError: 400: another kind than the model takes, or one that cannot be read.
        """
        if item.type != self.takes:
            raise ApiError(
                400,
                f"{path}: parts of type {item.type!r} are not supported by this model; it takes "
                f"{self.takes!r}",
                param=path,
                code="unsupported_parameter",
            )
        where = f"{path}.{item.type}"
        if item.type == "image_url":
            pixels = read_image(item.image_url, where)
            return {"pixel_values": self.processor(pixels, return_tensors="pt")["pixel_values"]}
        if item.type == "input_audio":
            rate = int(self.processor.sampling_rate)
            sound = read_audio(item.input_audio, where, rate)
            return dict(self.processor(sound.samples, sampling_rate=rate, return_tensors="pt"))
        frames = item.input_features or []
        if not frames or any(len(row) != self.config.num_mel_bins for row in frames):
            raise ApiError(
                400,
                f"{where}: give at least one frame, and {self.config.num_mel_bins} numbers in each",
                param=where,
                code="invalid_value",
            )
        return dict(self.processor(torch.tensor(frames).numpy(), return_tensors="pt"))
