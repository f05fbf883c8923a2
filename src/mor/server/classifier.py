"""A model of images or sounds behind a server: from what came to classes, and how deep it went.

Inputs that wait at the same time go through the model together; each answer is the one that it gets
alone, since no token sees or competes with those of another input.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mor.config import MoRConfig
from mor.errors import MorError
from mor.hf.frames import MoRFeatureExtractor
from mor.hf.media import MediaModel
from mor.server import failures
from mor.server.attachments import read_frames, read_image
from mor.server.errors import ApiError
from mor.server.schema.classify import Item


@dataclass(eq=False)
class Wanted:
    """An input on its way through the model.

    Attributes:
        inputs: what the model's forward takes, of one row.
        depth_cap: most recursions per token.
        answer: its outcome, on asyncio's loop.
    """

    inputs: dict[str, Tensor]
    depth_cap: int | None
    answer: asyncio.Future[dict[str, Any]]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What has to be alike for two inputs to share a batch."""
        masked = "attention_mask" in self.inputs
        shapes = [(name, one.shape[2:] if masked else one.shape) for name, one in
                  self.inputs.items()]  # fmt: skip
        return self.depth_cap, *shapes


class Classifier:
    """One model, run in one thread beside asyncio's; what comes is decoded in another.

    It takes the place of the engine's loop for the server around it.

    Args:
        model: in evaluation mode, with classes.
        processor: the image processor or feature extractor that was saved beside it.
        max_waiting: inputs that may be under way; more are answered 429.
        max_batch: inputs that go through the model together.

    Raises:
        MorError: a model without classes.
    """

    def __init__(
        self, model: MediaModel, processor: Any, max_waiting: int = 128, max_batch: int = 16
    ) -> None:
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
        self.most, self.under_way, self.max_batch = max_waiting, 0, max_batch
        self.draining = False
        self.asyncio_loop: asyncio.AbstractEventLoop | None = None
        self._thread = ThreadPoolExecutor(1, "mor-classify")
        self._decoder = ThreadPoolExecutor(1, "mor-decode")
        self._waiting: list[Wanted] = []
        self._running: asyncio.Task[None] | None = None

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
        """End the threads."""
        for thread in (self._decoder, self._thread):
            thread.shutdown(wait=False, cancel_futures=True)

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
            taken = [
                await loop.run_in_executor(self._decoder, self._inputs, item, f"input[{number}]")
                for number, item in enumerate(items)
            ]
            wanted = [Wanted(inputs, depth_cap, loop.create_future()) for inputs in taken]
            self._waiting += wanted
            if self._running is None or self._running.done():
                self._running = loop.create_task(self._run())
            # All are awaited before any failure is told, so that none is left unheard.
            found = await asyncio.gather(*(one.answer for one in wanted), return_exceptions=True)
        finally:
            self.under_way -= len(items)
        for number, one in enumerate(found):
            if isinstance(one, ValueError):  # too many frames
                path = f"input[{number}]"
                raise ApiError(400, f"{path}: {one}", param=path, code="invalid_value")
            if isinstance(one, BaseException):
                raise one
        return [{"index": number} | one for number, one in enumerate(found)]  # type: ignore[operator]

    async def _run(self) -> None:
        """Take what waits, together as far as it goes, until nothing does."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            # A client that has gone away wants nothing more.
            self._waiting = [one for one in self._waiting if not one.answer.done()]
            if not self._waiting:
                return
            kind = self._waiting[0].kind
            batch = [one for one in self._waiting if one.kind == kind][: self.max_batch]
            self._waiting = [one for one in self._waiting if one not in batch]
            try:
                answers: list[Any] = await loop.run_in_executor(self._thread, self._answer, batch)
            except Exception as error:
                answers = [error] * len(batch)
            for one, answer in zip(batch, answers, strict=True):
                if one.answer.done():  # its client went away
                    continue
                if isinstance(answer, Exception):
                    one.answer.set_exception(answer)
                else:
                    one.answer.set_result(answer)

    def _answer(self, batch: Sequence[Wanted]) -> list[dict[str, Any] | ValueError]:
        """In the thread: an answer for each input, or what is wrong with it."""
        try:
            return list(self._classes(batch))
        except ValueError as error:
            if len(batch) == 1:
                return [error]
            return [self._answer([one])[0] for one in batch]  # which of them is it

    def _classes(self, batch: Sequence[Wanted]) -> list[dict[str, Any]]:
        """Classes and depths of inputs that go through the model together."""
        weight = next(self.model.parameters())
        # A mask of whole numbers stays one.
        inputs = {
            name: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
            for name, value in join([one.inputs for one in batch]).items()
        }
        with torch.inference_mode():
            output = self.model(**inputs, max_depth=batch[0].depth_cap)
        logits, real = output.logits.double(), output.token_mask
        several = self.config.problem_type == "multi_label_classification"
        shares = logits.sigmoid() if several else logits.softmax(-1)
        return [
            {
                "label": self.labels[int(logits[row].argmax())],
                "probs": shares[row].tolist(),
                "num_classes": len(self.labels),
                "depths": (depths if real is None else depths[real[row].bool()]).tolist(),
                "grid": list(self.config.patch_grid) if self.kind == "image" else None,
            }
            for row, depths in enumerate(output.depths)
        ]

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
            return read_frames(item.input_audio, where, self.processor)
        frames = item.input_features or []
        if not frames or any(len(row) != self.config.num_mel_bins for row in frames):
            raise ApiError(
                400,
                f"{where}: give at least one frame, and {self.config.num_mel_bins} numbers in each",
                param=where,
                code="invalid_value",
            )
        return dict(self.processor(torch.tensor(frames).numpy(), return_tensors="pt"))


def join(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Inputs of one row each as a batch; where they have masks, shorter ones are padded."""
    longest = {name: max(row[name].shape[1] for row in rows) for name in rows[0]}

    def fill(value: Tensor, length: int) -> Tensor:
        spare = length - value.shape[1]
        return F.pad(value, (*(0, 0) * (value.dim() - 2), 0, spare)) if spare else value

    return {name: torch.cat([fill(row[name], longest[name]) for row in rows]) for name in rows[0]}
