"""A call of the API on its way through the engine, and the updates it gets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

from mor.engine import Completion, RequestOutput, SamplingParams, TokenLogprobs
from mor.engine.outputs import OutputKind
from mor.server.errors import ApiError


@dataclass(slots=True)  # not frozen: one is made for every token, and that costs
class Update:
    """What is new of one completion.

    Attributes:
        index: which completion of the job: those of the first prompt, of the second, and so on.
        token_ids, depths, logprobs: of the new tokens; ``logprobs`` is empty where not asked for.
        text: what the text grew by.
        finish_reason: set in the last update of a completion.
        stop_reason: stop id or stop text that ended it.
        prompt_logprobs: of the prompt, in the first update where they were asked for.
        prompt_depths: recursions of each token of the prompt, in the first update.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str
    depths: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: str | None
    stop_reason: int | str | None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    prompt_depths: tuple[int, ...] = ()


@dataclass
class Cursor:
    """What is known of a completion that is sent to the client piece by piece.

    Attributes:
        begun, done: whether its first and its last piece have been sent.
        cached: tokens of its prompt that came from the cache.
    """

    begun: bool = False
    done: bool = False
    cached: int = 0


@dataclass(eq=False)
class Job:
    """One call of the API: some prompts with n completions each.

    Attributes:
        name: its id.
        prompts: token ids.
        params: of all prompts.
        every_token: tell each token as it comes, not only whole completions.
        fits: tokens of prompt and answer that fit, where ``max_tokens`` is only a wish.
        inbox: updates, or the error that ends the job; belongs to asyncio's thread.
    """

    name: str
    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    every_token: bool
    fits: int | None = None
    inbox: asyncio.Queue[Update | ApiError | None] = field(default_factory=asyncio.Queue)
    cursors: list[Cursor] = field(default_factory=list)
    left: int = 0

    def __post_init__(self) -> None:
        """Begin with nothing sent. The engine tells what is new, or the whole at the end."""
        kind: OutputKind = "delta" if self.every_token else "final_only"
        self.params = replace(self.params, output_kind=kind)
        self.left = len(self.prompts) * self.params.n
        self.cursors = [Cursor() for _ in range(self.left)]

    @property
    def cached_tokens(self) -> int:
        """Tokens of all prompts that no completion had to compute."""
        n = self.params.n
        firsts = range(0, len(self.cursors), n)
        return sum(min(cursor.cached for cursor in self.cursors[i : i + n]) for i in firsts)

    def params_of(self, prompt: Sequence[int]) -> SamplingParams:
        """Parameters of one prompt: where none were asked for, new tokens as far as they fit."""
        if self.fits is None:
            return self.params
        room = self.fits - len(prompt)
        return replace(self.params, max_tokens=min(self.params.max_tokens or room, room))

    def take(self, first: int, output: RequestOutput) -> list[tuple[Update, Completion]]:
        """What is new in an output of the engine.

        Args:
            first: the job's index of the output's first completion.
            output: of one prompt.
        """
        fresh = []
        for done in output.completions:
            cursor = self.cursors[first + done.index]
            over = done.finish_reason is not None
            # Others of its group may have ended, or said something, while it did not.
            if cursor.done or not (over or (self.every_token and done.token_ids)):
                continue
            update = Update(
                first + done.index,
                done.token_ids,
                done.text or "",
                done.depths,
                done.logprobs or (),
                done.finish_reason,
                done.stop_reason,
                () if cursor.begun else done.prompt_logprobs or (),
                () if cursor.begun else done.prompt_depths,
            )
            fresh.append((update, done))
            cursor.begun, cursor.done, cursor.cached = True, over, done.cached_tokens
            self.left -= over
        return fresh

    async def accepted(self) -> None:
        """Wait until the engine has taken it.

        Raises:
            ApiError: it was refused.
        """
        first = await self.inbox.get()
        if isinstance(first, ApiError):
            raise first

    async def updates(self) -> AsyncIterator[Update]:
        """All updates, until every completion is finished.

        Raises:
            ApiError: the engine failed, or the server was shut down.
        """
        left = len(self.prompts) * self.params.n
        while left:
            item = await self.inbox.get()
            if isinstance(item, ApiError):
                raise item
            assert item is not None
            yield item
            left -= item.finish_reason is not None
