"""From the engine's updates to the choices of an answer, whole or chunk by chunk."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mor.engine import EmbeddedPrompt
from mor.server.jobs import Job, Update
from mor.server.likelihoods import (
    Offsets,
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs,
    prompt_offsets,
)
from mor.server.schema.requests import ChatRequest, CompletionRequest
from mor.server.structure.messages import next_delta, whole_message
from mor.server.structure.reader import CallReader
from mor.server.tokens import Tokens


@dataclass
class Renderer:
    """Answers to one request.

    Attributes:
        body: the request.
        job: what the engine works on.
        model: the name that answers carry.
        tokens: for names of tokens.
        created: Unix seconds.
        readers: one per completion where it may hold calls of functions, else None.
        grid: rows and columns of patches in an image of the prompt, for models that read images.
    """

    body: CompletionRequest | ChatRequest
    job: Job
    model: str
    tokens: Tokens
    created: int
    readers: Sequence[CallReader | None]
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Look up once what every chunk needs."""
        self.chat = isinstance(self.body, ChatRequest)
        count = self.job.left
        self._echo = [""] * count
        self._echoes = False
        if isinstance(self.body, CompletionRequest) and self.body.echo:
            self._echoes = True
            texts = self._sent(self.body.prompt)
            self._echo = [text for text in texts for _ in range(self.job.params.n)]
        self._offsets = [Offsets(self.tokens, len(text)) for text in self._echo]

    def _sent(self, prompt: Any) -> list[str]:
        """The prompts as they were sent; of token ids, their text with special tokens."""
        texts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
        return [
            text if isinstance(text, str) else self.tokens.decode(ids)
            for text, ids in zip(texts, self.job.prompts, strict=True)
        ]

    # Whole ---------------------------------------------------------------------------------------

    async def whole(self) -> dict[str, Any]:
        """The answer, once everything is finished.

        Raises:
            ApiError: it never will be.
        """
        updates: list[list[Update]] = [[] for _ in self._offsets]
        async for update in self.job.updates():
            updates[update.index].append(update)
        choices = []
        new = 0
        for index, parts in enumerate(updates):
            text = self._echo[index] + "".join(part.text for part in parts)
            choice = self._choice(parts, self._prompt_part(parts[0]))
            new += len(choice["depths"])
            if self.chat:
                message = whole_message(text, self.readers[index])
                choice["message"] = {"role": "assistant"} | message
                self._name_calls(choice)
            else:
                choice["text"] = text
            choices.append(choice)
        kind = "chat.completion" if self.chat else "text_completion"
        whole = self._frame(kind, choices) | {"usage": self._usage(new)}
        if self.body.prompt_logprobs is not None:
            for choice, (first, *_) in zip(choices, updates, strict=True):
                told = prompt_logprobs(
                    first.prompt_logprobs, self.body.prompt_logprobs, self.tokens
                )
                (whole if self.chat else choice)["prompt_logprobs"] = told
        return whole

    def _prompt_part(self, first: Update) -> dict[str, Any] | None:
        """Log-probabilities of an echoed prompt; None where they were not asked for."""
        body = self.body
        if not isinstance(body, CompletionRequest) or not body.echo or body.logprobs is None:
            return None
        prompt = self.job.prompts[first.index // self.job.params.n]
        likely = [
            one and replace(one, top=dict(list(one.top.items())[: body.logprobs]))
            for one in first.prompt_logprobs
        ]
        offsets = prompt_offsets(prompt, self._echo[first.index], self.tokens)
        return completion_logprobs(likely, offsets, self.tokens, first_token=prompt[0])

    def _choice(
        self, parts: Sequence[Update], before: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        index, ids = parts[0].index, [token for part in parts for token in part.token_ids]
        likely = [one for part in parts for one in part.logprobs]
        choice: dict[str, Any] = {
            "index": index,
            "logprobs": None,
            "finish_reason": parts[-1].finish_reason,
            "stop_reason": parts[-1].stop_reason,
            "depths": [depth for part in parts for depth in part.depths],
        }
        if self.job.params.logprobs is not None:
            if self.chat:
                choice["logprobs"] = chat_logprobs(likely, self.tokens)
            else:
                offsets = self._offsets[index].of(ids)
                told = completion_logprobs(likely, offsets, self.tokens)
                if before is not None:
                    told = {name: before[name] + values for name, values in told.items()}
                choice["logprobs"] = told
        if self.body.return_token_ids:
            choice["token_ids"] = ids
        if self.grid and (shown := self._image_depths(index, parts[0].prompt_depths)):
            choice["image_depths"] = shown
        return choice

    def _image_depths(self, index: int, depths: Sequence[int]) -> list[dict[str, Any]]:
        """Recursions of each patch of the images in a completion's prompt; none if not told."""
        prompt = self.job.prompts[index // self.job.params.n]
        if not depths or not isinstance(prompt, EmbeddedPrompt) or self.grid is None:
            return []
        rows, columns = self.grid
        patches, size = [depths[place] for place in prompt.places], rows * columns
        return [
            {"grid": [rows, columns], "depths": patches[start : start + size]}
            for start in range(0, len(patches), size)
        ]

    def _name_calls(self, choice: dict[str, Any]) -> None:
        """A completion that came to its end with calls did so for these."""
        reader = self.readers[choice["index"]]
        if reader is not None and reader.calls and choice["finish_reason"] == "stop":
            choice["finish_reason"] = "tool_calls"

    def _opening(self, index: int) -> dict[str, Any]:
        """A choice before its first token."""
        return {"index": index, "logprobs": None, "finish_reason": None, "depths": []}

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.job.name,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _usage(self, new: int) -> dict[str, Any]:
        asked = sum(map(len, self.job.prompts))
        return {
            "prompt_tokens": asked,
            "completion_tokens": new,
            "total_tokens": asked + new,
            "prompt_tokens_details": {"cached_tokens": self.job.cached_tokens},
        }

    # Chunk by chunk ------------------------------------------------------------------------------

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """One chunk per token and completion; at the end usage, where asked for.

        Raises:
            ApiError: the engine failed on the way.
        """
        options = self.body.stream_options
        with_usage = bool(options and options.include_usage)
        more: dict[str, Any] = {"usage": None} if with_usage else {}
        if with_usage and options and options.continuous_usage_stats:
            more = {"usage": self._usage(0)}
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        with_likelihoods = self._echoes and self.body.logprobs is not None
        for index, text in enumerate(self._echo):
            if self.chat:
                opening = self._opening(index) | {"delta": {"role": "assistant", "content": ""}}
            elif text and not with_likelihoods:
                opening = self._opening(index) | {"text": text}
            else:
                continue
            yield self._frame(kind, [opening]) | more
        new = 0
        begun: set[int] = set()
        async for update in self.job.updates():
            if with_likelihoods and update.index not in begun:
                begun.add(update.index)
                opening = self._opening(update.index) | {"text": self._echo[update.index]}
                opening["logprobs"] = self._prompt_part(update)
                yield self._frame(kind, [opening]) | more
            choice = self._choice([update])
            new += len(update.token_ids)
            if self.chat:
                over = update.finish_reason is not None
                choice["delta"] = next_delta(update.text, self.readers[update.index], over)
                self._name_calls(choice)
            else:
                choice["text"] = update.text
            if with_usage and options and options.continuous_usage_stats:
                more = {"usage": self._usage(new)}
            yield self._frame(kind, [choice]) | more
        if with_usage:
            yield self._frame(kind, []) | {"usage": self._usage(new)}
