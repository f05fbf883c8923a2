"""From the engine's updates to the choices of an answer, whole or chunk by chunk."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from mor.engine import TokenLogprobs
from mor.server.jobs import Job, Update
from mor.server.schema.requests import ChatRequest, CompletionRequest
from mor.server.structure.messages import next_delta, whole_message
from mor.server.structure.reader import CallReader
from mor.server.tokens import Tokens

LOWEST = -9999.0  # JSON has no minus infinity


def completion_logprobs(
    likely: Sequence[TokenLogprobs], offsets: Sequence[int], tokens: Tokens
) -> dict[str, Any]:
    """Log-probabilities in the form of /v1/completions."""
    return {
        "tokens": [tokens.piece(one.token)[0] for one in likely],
        "token_logprobs": [max(one.logprob, LOWEST) for one in likely],
        "top_logprobs": [
            {tokens.piece(token)[0]: max(value, LOWEST) for token, value in one.top.items()}
            for one in likely
        ],
        "text_offset": list(offsets),
    }


def chat_logprobs(likely: Sequence[TokenLogprobs], tokens: Tokens) -> dict[str, Any]:
    """Log-probabilities in the form of /v1/chat/completions."""

    def show(token: int, value: float) -> dict[str, Any]:
        name, raw = tokens.piece(token)
        return {"token": name, "logprob": max(value, LOWEST), "bytes": list(raw)}

    content = []
    for one in likely:
        top = [show(token, value) for token, value in one.top.items()]
        content.append(show(one.token, one.logprob) | {"top_logprobs": top})
    return {"content": content}


class Offsets:
    """Where in a completion's text each token begins, as far as whole characters tell."""

    def __init__(self, tokens: Tokens) -> None:
        self._text, self._at = tokens.begin_text(), 0

    def of(self, ids: Sequence[int]) -> list[int]:
        """Offsets (characters) of the next tokens."""
        found = []
        for token in ids:
            found.append(self._at)
            self._text.push(token)
            self._at = len(self._text.text(False))
        return found


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
    """

    body: CompletionRequest | ChatRequest
    job: Job
    model: str
    tokens: Tokens
    created: int
    readers: Sequence[CallReader | None]

    def __post_init__(self) -> None:
        """Look up once what every chunk needs."""
        self.chat = isinstance(self.body, ChatRequest)
        count = self.job.left
        self._offsets = [Offsets(self.tokens) for _ in range(count)]
        self._echo = [""] * count
        if isinstance(self.body, CompletionRequest) and self.body.echo:
            texts = [self.tokens.decode(prompt) for prompt in self.job.prompts]
            self._echo = [text for text in texts for _ in range(self.job.params.n)]

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
            choice = self._choice(parts)
            new += len(choice["depths"])
            if self.chat:
                message = whole_message(text, self.readers[index])
                choice["message"] = {"role": "assistant"} | message
                self._name_calls(choice)
            else:
                choice["text"] = text
            choices.append(choice)
        kind = "chat.completion" if self.chat else "text_completion"
        return self._frame(kind, choices) | {"usage": self._usage(new)}

    def _choice(self, parts: Sequence[Update]) -> dict[str, Any]:
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
                choice["logprobs"] = completion_logprobs(likely, offsets, self.tokens)
        if self.body.return_token_ids:
            choice["token_ids"] = ids
        return choice

    def _name_calls(self, choice: dict[str, Any]) -> None:
        """A completion that came to its end with calls did so for these."""
        reader = self.readers[choice["index"]]
        if reader is not None and reader.calls and choice["finish_reason"] == "stop":
            choice["finish_reason"] = "tool_calls"

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.job.name,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _usage(self, new: int) -> dict[str, int]:
        asked = sum(map(len, self.job.prompts))
        return {
            "prompt_tokens": asked,
            "completion_tokens": new,
            "total_tokens": asked + new,
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
        for index, text in enumerate(self._echo):
            opening: dict[str, Any] = {
                "index": index,
                "logprobs": None,
                "finish_reason": None,
                "depths": [],
            }
            if self.chat:
                opening["delta"] = {"role": "assistant", "content": ""}
            elif text:
                opening["text"] = text
            else:
                continue
            yield self._frame(kind, [opening]) | more
        new = 0
        async for update in self.job.updates():
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
