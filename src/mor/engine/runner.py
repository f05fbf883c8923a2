"""Runs the network's stages over batches of tokens. There is no layer and no routing rule here."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from mor.engine.attend import PagedAttend, PagedAttention
from mor.engine.batch import ForwardBatch, Piece, block_batch, private_batch
from mor.engine.boundaries import OwnBoundaries
from mor.engine.lanes import Lanes
from mor.engine.mirror import to_int64
from mor.engine.publish import find_ended, find_left, publish
from mor.engine.quick import QuickStages, make_quick_stages
from mor.engine.request import Request, Wave
from mor.engine.sampler import Choice, choose
from mor.engine.store import KVStore
from mor.engine.view import Flat
from mor.model.model import MoRModel
from mor.model.routers import as_mask
from mor.model.routers.base import Scores, active_router
from mor.ops import native
from mor.ops.rope import Rotation


class Runner:
    """The five stages over lanes and pages.

    Args:
        model: the network, in evaluation mode.
        store: pages.
        lanes: streams of tokens in flight.
        attention: form of paged attention.
        limit: depth cap of the engine.
        full_depth: every token runs all recursions up to its cap, whatever the router says.

    Attributes:
        starts_all: whether every token runs depth 0, so that nobody has to read who does.
    """

    def __init__(
        self,
        model: MoRModel,
        store: KVStore,
        lanes: Lanes,
        attention: PagedAttention,
        limit: int,
        full_depth: bool = False,
    ) -> None:
        self.model, self.config, self.router = model, model.config, model.router
        self.store, self.lanes, self.attention = store, lanes, attention
        self.limit, self.full_depth = limit, full_depth
        self.boundaries = OwnBoundaries(lanes.count + 1, self.config.num_recursions)
        self.interleaved = self.config.interleaved
        self.recursions_per_tick = limit if self.interleaved else 1
        self.turns: Rotation | None = None
        self._quick: QuickStages | None = None
        self.needs_origin = model.needs_origin
        self.starts_all: bool = full_depth or active_router(model.router).starts_all

    def enter(self, waves: Sequence[Wave]) -> Tensor:
        """``embed`` and ``prelude`` of new tokens; [N] which of them run depth 0."""
        batch = private_batch(waves, self.store)
        self.boundaries.enter(waves, self.lanes.device)
        ids = to_int64(ids_of(waves), self.lanes.device)
        if all([wave.request.embedded is None for wave in waves]):
            found = self._in_one_call(self.quick.start, batch, ids)
            if found is not None:
                return found
        hidden = self.model.embed(ids[None])
        self._put_embeddings(waves, hidden[0])
        return self._start(batch, hidden)

    def tick(self, pieces: Sequence[Piece]) -> tuple[tuple[Piece, ...], Tensor]:
        """``recurse`` over tokens of mixed depths, and ``update``; which of them go on deeper.

        Returns:
            The pieces in the order they ran in, and an answer for each token, [N].
        """
        batch = block_batch(pieces, self.store)
        return batch.pieces, self._run(batch)

    def leave(self, waves: Sequence[Wave]) -> tuple[Tensor | None, Tensor]:
        """``coda`` of tokens that are through, and ``head`` where a new token is wanted.

        Returns:
            Logits [n, V] after the last tokens of each wave, ``wave.wanted`` of them, in order;
            None where there are none. And what the head reads [N, D] of all tokens.
        """
        hidden = self._finish(private_batch(waves, self.store))
        last = last_rows(waves)
        if not last:
            return None, hidden[0]
        asked = hidden[0].index_select(0, to_int64(last, hidden.device))
        return self.model.head(asked), hidden[0]

    def publish(self, pieces: Sequence[Piece] = (), waves: Sequence[Wave] = ()) -> None:
        """Let deeper passes see how tokens ended; see :mod:`mor.engine.publish`.

        Args:
            pieces: that run a pass next; tokens of their waves that left before it.
            waves: that are through.
        """
        if self.store.ends:
            ended = find_ended(pieces) + find_left(waves)
            quick = None if torch.is_grad_enabled() else self.quick.run
            publish(self.model, self.store, self.lanes, self._all_turns(), ended, quick)

    def choose(self, logits: Tensor, requests: Sequence[Request]) -> Choice:
        """The sampler; see :func:`mor.engine.sampler.choose`."""
        return choose(logits, requests)

    def _start(self, batch: ForwardBatch, hidden: Tensor) -> Tensor:
        attend = PagedAttend(self.config, batch.view, self.attention)
        hidden = self.model.prelude(hidden, self._rope(batch), attend)
        carried = self.model.widen(hidden)
        self.lanes.hidden.index_copy_(0, batch.lanes, carried[0])
        if self.needs_origin:
            self.lanes.origin.index_copy_(0, batch.lanes, carried[0])
        started = self.router.start(hidden, batch.limits)
        if started is not None:
            if self.full_depth and started.choice is not None:
                started.choice.copy_(batch.limits - 1)
            self.lanes.put_scores(batch.lanes, started)
        return self._route(batch, hidden, batch.depths)

    def _run(self, batch: ForwardBatch) -> Tensor:
        found = self._in_one_call(self.quick.run, batch)
        if found is not None:
            return found
        hidden = self.lanes.hidden.index_select(0, batch.lanes)[None]
        rope = self._rope(batch)
        attend = PagedAttend(self.config, batch.view, self.attention, block=True)
        if self.interleaved:
            for depth in range(self.limit):
                hidden = self._recurse(batch, hidden, depth, rope, attend)
        else:
            hidden = self._recurse(batch, hidden, batch.depths, rope, attend)
        self.lanes.hidden.index_copy_(0, batch.lanes, hidden[0])
        after = batch.depths + self.recursions_per_tick
        return self._route(batch, self.model.narrow(hidden), after)

    @property
    def quick(self) -> QuickStages:
        """The stages that run in one call of the kernels."""
        if self._quick is None:
            parts = (self.model, self.store, self.lanes, self.attention, self._all_turns())
            self._quick = QuickStages() if self.full_depth else make_quick_stages(*parts)
        return self._quick

    def _in_one_call(
        self, stage: native.LanePass | None, batch: ForwardBatch, index: Tensor | None = None
    ) -> Tensor | None:
        """What ``stage`` gives; None where there is none, or a token has boundaries of its own."""
        columns = batch.view.columns
        if stage is None or not isinstance(columns, Flat) or torch.is_grad_enabled():
            return None
        if stage.settling is not None and not self.boundaries.none:
            return None
        numbers, tokens, pieces = columns
        return stage(numbers, tokens, pieces, batch.view.writes, index)

    def _finish(self, batch: ForwardBatch) -> Tensor:
        found = self._in_one_call(self.quick.finish, batch)
        if found is not None:
            return found[None]
        hidden = self.model.narrow(self.lanes.hidden.index_select(0, batch.lanes)[None])
        first = len(self.model.prelude_layers)
        attend = PagedAttend(self.config, batch.view, self.attention, first=first)
        return self.model.coda(hidden, self._rope(batch), attend)

    def _put_embeddings(self, waves: Sequence[Wave], hidden: Tensor) -> None:
        """What requests read in the place of tokens, written over these in ``hidden`` [N, D]."""
        start = 0
        for wave in waves:
            if wave.request.embedded is not None:
                own = hidden[start : start + len(wave)]
                wave.request.embedded.put(own, wave.start, wave.end)
            start += len(wave)

    def _rope(self, batch: ForwardBatch) -> Rotation:
        """Looked up: cosines of the same few positions again and again cost more than the rows."""
        cos, sin = self._all_turns()
        at, shape = batch.positions.flatten(), (*batch.positions.shape, -1)
        return cos.index_select(0, at).view(shape), sin.index_select(0, at).view(shape)

    def _all_turns(self) -> Rotation:
        if self.turns is None:
            places = torch.arange(self.store.private.max_tokens, device=self.lanes.hidden.device)
            self.turns = self.model.rope(places, self.lanes.hidden.dtype)
        return self.turns

    def _recurse(
        self,
        batch: ForwardBatch,
        hidden: Tensor,
        depth: int | Tensor,
        rope: Rotation,
        attend: PagedAttend,
    ) -> Tensor:
        origin = hidden
        if self.needs_origin:
            origin = self.lanes.origin.index_select(0, batch.lanes)[None]
        output = self.model.recurse(hidden, depth, rope, attend, origin)
        return self.router.update(hidden, output, origin, self.lanes.scores(batch.lanes), depth)

    def _route(self, batch: ForwardBatch, hidden: Tensor, depths: Tensor) -> Tensor:
        """Ask the router who runs ``depths`` [1, N] next, and keep the scores of the answer."""
        # Tokens at their cap are asked about too, at the last depth; the cap decides for them.
        asked = depths.clamp(max=self.router.num_recursions - 1)
        once = self.router.chooses_once
        started: Scores | None = self.lanes.scores(batch.lanes) if once else None
        scores, active = self.router.answer(hidden, asked, batch.positions, started)
        judged = self.boundaries.judge(scores, batch.lanes, asked)
        if judged is not scores:
            active = self.router.decide(judged, asked)
        if self.full_depth:
            active = None
        if not once:  # what was said at the start is there already
            self.lanes.put_scores(batch.lanes, scores)
        going = as_mask(active, depths, None) & (depths < batch.limits)
        return going[0]


def ids_of(waves: Sequence[Wave]) -> list[int]:
    """The tokens of ``waves``, end to end."""
    if all([wave.end - wave.start == 1 and wave.request.draft is None for wave in waves]):
        return [wave.request.tokens[wave.start] for wave in waves]
    return [token for wave in waves for token in wave.ids]


def last_rows(waves: Sequence[Wave]) -> list[int]:
    """Which of the tokens of ``waves``, end to end, a new token or a guess follows."""
    ends = accumulate([wave.end - wave.start for wave in waves])
    return [
        row for end, wave in zip(ends, waves, strict=True) for row in range(end - wave.wanted, end)
    ]
