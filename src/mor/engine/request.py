"""A request on its way through the engine."""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mor.engine.draft import Draft
from mor.engine.embedded import Embeddings
from mor.engine.outputs import TokenLogprobs, Told
from mor.engine.params import SamplingParams
from mor.engine.prefix import Node
from mor.engine.text import GrowingText


class Wave:
    """Consecutive tokens of one request that go through the recursions together.

    A chunk of a prompt, or a new token. All run depth r before any runs depth r + 1, and a request
    has one wave at a time: what a token attends to was written before.

    Args:
        request: whose.
        start: position of its first token.
        count: how many tokens.
        prompt: whether it is a chunk of several tokens, for the budgets.
        cap: recursions that its tokens may take where that is less than their request's.

    Attributes:
        end: position after its last token.
        limit: depth cap of its tokens.
        lanes: one per token, once it has entered.
        depth: what ``pending`` runs next.
        pending: places (0 is the first token) that still have to run ``depth``, ascending.
        deeper: places that ran it and go on.
        depths: recursions that each token ran.
        unpublished: places that deeper passes were not told of (``propagate``), ascending.
        first_slots: place of each token in depth 0's table, where keys are shared.
    """

    # One is made for every token: no dictionary, and nothing is worked out again and again.
    __slots__ = (
        "cap", "deeper", "depth", "depths", "end", "first_slots", "lanes", "limit", "pending",
        "prompt", "request", "start", "unpublished",
    )  # fmt: skip

    def __init__(
        self, request: Request, start: int, count: int, prompt: bool, cap: int | None = None
    ) -> None:
        self.request, self.start, self.end, self.prompt = request, start, start + count, prompt
        self.cap, self.limit = cap, request.limit if cap is None else cap
        self.lanes: list[int] = []
        self.depth = 0
        # Never changed in place, so that one stands for all that are alike.
        self.pending: Sequence[int] = ()
        self.deeper: list[int] = []
        self.depths = [0] * count
        self.unpublished: Sequence[int] = ()
        self.first_slots = [0] * count

    def __len__(self) -> int:
        """How many tokens the wave has."""
        return self.end - self.start

    @property
    def ids(self) -> list[int]:
        """Its tokens; guesses follow those that are settled."""
        request, own = self.request, self.request.tokens[self.start : self.end]
        if request.draft is None:
            return own
        settled = len(request.tokens)
        return own + request.draft.tokens[max(0, self.start - settled) : self.end - settled]

    @property
    def wanted(self) -> int:
        """After how many of its last tokens the next one is chosen, or guessed."""
        request = self.request
        if request.draft is not None:
            return len(self)
        return int(request.max_new > 0 and self.end == len(request.tokens))

    def note_ran(self, places: Sequence[int], go_on: Sequence[bool], recursions: int) -> None:
        """Note that the first pending ``places`` ran, and which of them go on deeper."""
        if len(self.depths) == 1:  # nearly always
            self.depths[0] += recursions
            self.depth += recursions
            self.pending = places if go_on[0] else ()
            return
        for place, goes in zip(places, go_on, strict=True):
            self.depths[place] += recursions
            if goes:
                self.deeper.append(place)
        self.pending = self.pending[len(places) :]
        if not self.pending:
            self.pending, self.deeper = self.deeper, []
            self.depth += recursions

    @property
    def exited(self) -> bool:
        """Whether every token is through with the recursions."""
        return not self.pending and not self.deeper


@dataclass(eq=False)
class Request:
    """One completion under way. (A prompt with n completions is n of these.)

    Attributes:
        group: id that the user knows.
        index: which of the n completions.
        prompt: prompt token ids.
        params: what was asked for.
        max_new: most new tokens, from ``max_tokens`` and from what fits.
        limit: depth cap.
        stop_ids: token ids that end it.
        draw: source of its random numbers.
        text: turns tokens into text; None without a tokenizer.
        constraint: its way through a grammar, where it has one.
        embedded: what is read in the place of some tokens of the prompt, where there is such.
        computed: tokens that are through with all stages, their entries in the pool.
        row: its row in the page tables while it is resident.
        wave: its tokens between entering and leaving.
        needs_prompt_logits: the logits of every position of the prompt are asked for, so that none
            of it may come from the cache.
        tail: where it is among the cached texts; None at their root.
        claim: what others that need the same tokens wait for it to compute.
        cached_tokens: tokens of the prompt that came from the cache at the first reading.
        furthest: most tokens that it had computed before it was put back.
        draft: what it guesses to say next; None while it does not.
        told: what has been said of it; see :func:`mor.engine.telling.tell_completion`.
        plain_at: from so many tokens on nothing is asked for but what ``params.plain`` allows.
    """

    group: str
    index: int
    prompt: tuple[int, ...]
    params: SamplingParams
    max_new: int
    limit: int
    stop_ids: frozenset[int]
    draw: random.Random
    text: GrowingText | None
    arrival: float
    constraint: Any = None  # a `mor.engine.constraint.Constraint`
    embedded: Embeddings | None = None
    tokens: list[int] = field(default_factory=list)
    token_depths: list[int] = field(default_factory=list)
    position_depths: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    computed: int = 0
    row: int | None = None
    wave: Wave | None = None
    needs_prompt_logits: bool = False
    tail: Node | None = None
    claim: tuple[Node, Hashable] | None = None
    cached_tokens: int = 0
    furthest: int = 0
    preemptions: int = 0
    draft: Draft | None = None
    admitted: float | None = None
    token_times: list[float] = field(default_factory=list)
    ended: float | None = None
    told: Told = field(default_factory=Told)
    plain_at: float = field(init=False)

    def __post_init__(self) -> None:
        """The prompt is the beginning of its tokens."""
        self.tokens = list(self.prompt)
        settled = len(self.prompt) + self.params.min_tokens
        self.plain_at = settled if self.params.plain else math.inf

    @property
    def new_tokens(self) -> list[int]:
        """Ids of the tokens sampled so far."""
        return self.tokens[len(self.prompt) :]

    @property
    def spelling(self) -> Sequence[Hashable]:
        """Its tokens, as cached texts are found by them."""
        return self.tokens if self.embedded is None else self.embedded.spell(self.tokens)

    @property
    def salt(self) -> Hashable:
        """What else than its tokens decides about the entries that they leave."""
        return self.limit, self.params.boundaries

    @property
    def reusable(self) -> int:
        """How many of its first tokens may come from the cache: never one whose logits it needs."""
        if self.needs_prompt_logits:
            return 0
        last = len(self.tokens) - 1
        if self.params.prompt_logprobs is not None:
            last = min(last, self.params.prompt_logprobs_start - 1)
        return last

    @property
    def made(self) -> int:
        """How many tokens were sampled so far."""
        return len(self.tokens) - len(self.prompt)

    @property
    def finished(self) -> bool:
        """Whether the completion has ended, for whatever reason."""
        return self.finish_reason is not None

    def take(self, token: int, now: float, logprobs: TokenLogprobs | None) -> int:
        """Append a sampled token.

        Args:
            token: its id.
            now: seconds on the engine's clock.
            logprobs: of the token, where they were asked for.

        Returns:
            How many recursions ran at the position that it was sampled from.
        """
        depth = self.position_depths[-1]
        self.tokens.append(token)
        self.token_depths.append(depth)
        self.token_times.append(now)
        if self.params.logprobs is not None:
            assert logprobs is not None
            self.logprobs.append(logprobs)
        return depth

    def end_reason(self) -> str | None:
        """Why the token taken last ends the completion; None to go on.

        ``stop``, ``length``, or ``error`` where its grammar fails. To be asked once per token: the
        text grows by it, and ``stop_reason`` is noted.
        """
        token, made = self.tokens[-1], len(self.tokens) - len(self.prompt)
        if self.constraint is not None:
            self.constraint.take(token)
            if self.constraint.failed:
                return "error"
        may_stop = made >= self.params.min_tokens
        ends = may_stop and token in self.stop_ids
        text = None if ends and not self.params.include_stop else self.text
        if text is not None and text.push(token, may_stop):
            self.stop_reason = text.stopped_by
            return "stop"
        if ends:
            self.stop_reason = token
            return "stop"
        if self.constraint is not None and self.constraint.finished:
            return "stop"
        return "length" if made >= self.max_new else None
