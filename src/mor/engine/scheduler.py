"""Who runs next: admission, waves, ticks, gatherings, and what gives way when pages run out."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import Literal

from mor.engine.batch import Piece
from mor.engine.draft import Draft
from mor.engine.drafting import Drafting
from mor.engine.lanes import Lanes
from mor.engine.request import Request, Wave
from mor.engine.reuse import Reuse
from mor.engine.stats import EngineStats
from mor.engine.store import KVStore

Policy = Literal["refill", "no_refill", "full_depth"]


class Scheduler:
    """Requests from the queue to their last token. It moves numbers and never a tensor.

    Args:
        store: pages.
        lanes: of tokens in flight.
        stats: counters.
        residents: requests that may hold pages at a time.
        max_num_seqs: new tokens that one tick carries.
        prefill_chunk: tokens of a prompt in one chunk, and of all prompts in one tick.
        min_gather: waves that wait for the coda before it runs.
        policy: ``no_refill``: the tokens of a tick stay together until the last of them is through.
        prefix_caching: whether requests share the pages of equal beginnings.
        drafting: who guesses tokens.

    Attributes:
        waiting: requests without pages, first come first.
        running: resident requests, oldest first.
        ready: waves with tokens to run, first come first.
        exited: waves that are through with the recursions.
        flying: waves whose stage runs, what the router says of them not read yet.
    """

    def __init__(
        self,
        store: KVStore,
        lanes: Lanes,
        stats: EngineStats,
        *,
        residents: int,
        max_num_seqs: int,
        prefill_chunk: int,
        min_gather: int,
        policy: Policy,
        prefix_caching: bool,
        drafting: Drafting,
    ) -> None:
        self.drafting = drafting
        self.store, self.lanes, self.stats = store, lanes, stats
        self.reuse = Reuse(store, stats, prefix_caching)
        self.max_num_seqs, self.prefill_chunk = max_num_seqs, prefill_chunk
        self.min_gather, self.policy = min_gather, policy
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.ready: dict[Wave, None] = {}
        self.exited: dict[Wave, None] = {}
        self.cohort: dict[Wave, None] = {}
        self.flying: dict[Wave, None] = {}
        self.free_rows = list(range(residents - 1, -1, -1))
        # Where all residents can hold all that they may, nobody has to count.
        most = store.most_pages(store.private.max_tokens, store.limit)
        self.roomy = residents * most <= store.pool.num_pages
        # Every resident request has a lane for a new token; what is left over is for prompts.
        self.prompt_lanes = lanes.count - residents

    # Residence -----------------------------------------------------------------------------------

    def admit(self, now: float) -> None:
        """Let requests in while there is a row, and pages for all their tokens so far at worst."""
        promised = None
        while self.waiting and self.free_rows:
            request = self.waiting[0]
            needed = self._worst(request)
            if self.running and not self.roomy:
                if promised is None:
                    promised = sum(self._still_wanted(other) for other in self.running)
                if needed + promised > self.store.pool.free:
                    needed -= self.reuse.shared_pages(request)
                if needed + promised > self.store.pool.free:
                    return
                promised += needed
            else:
                promised = needed
            self.waiting.popleft()
            request.row = self.free_rows.pop()
            self.running.append(request)
            if request.admitted is None:
                request.admitted = now

    def _worst(self, request: Request) -> int:
        return self.store.most_pages(len(request.tokens), request.limit)

    def _still_wanted(self, request: Request) -> int:
        """Pages that a request which reads its prompt may still take for that."""
        return max(0, self._worst(request) - self.store.owned(request))

    def drop(self, request: Request) -> None:
        """Take a request out, wherever it is, and give back all that it holds."""
        if request.row is None:
            self.waiting.remove(request)
            return
        if request.wave is not None:
            self._forget(request.wave)
        request.draft = None
        self.reuse.forget(request)
        self.store.release(request)
        self.free_rows.append(request.row)
        request.row = None
        self.running.remove(request)

    def _forget(self, wave: Wave) -> None:
        for waves in (self.ready, self.exited, self.cohort, self.flying):
            waves.pop(wave, None)
        self._release(wave)

    def _release(self, wave: Wave) -> None:
        """Of a wave that nobody waits for any more: its lanes are free, its request has none."""
        self.lanes.give(wave.lanes)
        if wave.prompt:
            self.prompt_lanes += len(wave)
        wave.request.wave = None

    def _preempt(self, request: Request) -> None:
        """Back to the head of the queue; its tokens stay, what was computed of them is lost."""
        self.stats.preemptions += 1
        request.furthest = max(request.furthest, request.computed)
        self.drop(request)
        request.computed = 0
        request.preemptions += 1
        self.waiting.appendleft(request)

    def _make_room(self, pages: int, request: Request) -> bool:
        """Free ``pages`` pages, newest requests first; False where ``request`` itself had to go.

        The oldest request never has to: alone it fits, which was checked when it came.
        """
        while self.store.pool.free < pages:
            newest = self.running[-1]
            self._preempt(newest)
            if newest is request:
                return False
        return True

    # What runs next ------------------------------------------------------------------------------

    def select_leaving(self) -> list[Wave]:
        """Waves for the coda: when enough wait, or when nothing else can run."""
        enough = len(self.exited) >= self.min_gather and self.policy != "no_refill"
        if self.exited and (enough or not (self._candidates() or self.flying)):
            waves, self.exited = list(self.exited), {}
            return waves
        return []

    def note_left(self, waves: Sequence[Wave]) -> None:
        """``waves``, those of :meth:`select_leaving`, are through with the coda."""
        page_size = self.store.pool.page_size
        for wave in waves:
            request = wave.request
            request.computed = wave.end
            request.position_depths[wave.start : wave.end] = wave.depths
            self._release(wave)
            if self.cohort:
                self.cohort.pop(wave, None)
            if wave.prompt or not wave.end % page_size:  # full pages alone are kept
                self.reuse.note_left(request)

    def note_guessed(self, wave: Wave) -> None:
        """``wave``, a guess, is through with the coda; nothing of it is settled."""
        self._forget(wave)

    def note_checked(self, wave: Wave, draft: Draft, kept: int) -> None:
        """Of ``wave``, which checked ``draft``, the first ``kept`` tokens are right."""
        request = wave.request
        request.computed, request.draft = wave.start + kept, None
        request.position_depths[wave.start :] = wave.depths[:kept]
        self.store.rewind(request, draft.lengths, wave.depths[:kept])
        self._forget(wave)
        self.reuse.note_left(request)

    def select_entering(self) -> list[Wave]:
        """A wave for every resident request that has none: a new token, or a chunk of a prompt."""
        waves = []
        for request in list(self.running):
            if request.wave is not None or request.row is None:
                continue
            wave = self._next_wave(request)
            if wave is None:
                continue
            if not self.store.enter(wave):
                if not self._make_room(self.store.missing_to_enter(wave), request):
                    continue
                self.store.enter(wave)
            count = wave.end - wave.start
            wave.lanes = self.lanes.take(count)
            if self.store.ends:
                wave.unpublished = range(count)
            if wave.prompt:
                self.prompt_lanes -= count
            if count > 1 and request.draft is None:
                self.reuse.claim(request)
            request.wave = wave
            if request.furthest > wave.start:
                again = min(wave.end, request.furthest) - wave.start
                self.stats.recomputed_tokens += again
            waves.append(wave)
        entering = [w for w in waves if w.request.wave is w]
        self.flying |= dict.fromkeys(entering)
        return entering

    def _next_wave(self, request: Request) -> Wave | None:
        """Of a request that has none; None where it has to wait."""
        if request.draft is None:
            left = len(request.tokens) - request.computed
            if left == 1 and not self.drafting.asked.tokens:  # nearly always
                return Wave(request, request.computed, 1, False)
            if left > 1:  # one token is less than a page: nothing cached can take its place
                self.reuse.take(request)
                left = len(request.tokens) - request.computed
            count = min(left, self.prefill_chunk)
            # Until the chunks of others are through, or another has computed what it needs.
            if left > 1 and (count > self.prompt_lanes or self.reuse.must_wait(request)):
                return None
            if not left:  # its next token is not read yet
                return None
            if left == 1:
                request.draft = self.drafting.begin(request)
        if request.draft is not None:
            return self.drafting.next_wave(request, request.draft, self.prompt_lanes)
        return Wave(request, request.computed, count, left > 1)

    def select_pieces(self) -> list[Piece]:
        """Tokens of one tick: of any depth, oldest first, as many as it carries."""
        if self.policy == "no_refill" and not self.cohort and not self.exited:
            self.cohort = {wave: None for wave, _ in self._fit_into_tick(self.ready)}
        pieces = []
        for wave, count in self._fit_into_tick(self._candidates()):
            if wave.request.wave is not wave:
                continue  # it had to give way to an older one just now
            places = wave.pending if count == len(wave.pending) else wave.pending[:count]
            ran = self.store.run(wave, places)
            if ran is None:
                if not self._make_room(self.store.missing_to_run(wave, count), wave.request):
                    continue
                ran = self.store.run(wave, places)
                assert ran is not None
            pieces.append(Piece(wave, places, *ran))
        pieces = [piece for piece in pieces if piece.wave.request.wave is piece.wave]
        waves = [piece.wave for piece in pieces]
        for wave in waves:
            self.ready.pop(wave, None)
        self.flying |= dict.fromkeys(waves)
        return pieces

    def _candidates(self) -> Collection[Wave]:
        if self.policy != "no_refill":
            return self.ready
        if not self.cohort and not self.exited:
            return self.ready
        return [w for w in self.cohort if not w.exited and w not in self.flying]

    def _fit_into_tick(self, waves: Collection[Wave]) -> list[tuple[Wave, int]]:
        """Waves that fit into one tick, and how many of their tokens."""
        new, prompt = self.max_num_seqs, self.prefill_chunk
        chosen = []
        for wave in waves:
            if not wave.prompt:
                if new:
                    chosen.append((wave, 1))
                    new -= 1
            elif prompt:
                count = min(len(wave.pending), prompt)
                chosen.append((wave, count))
                prompt -= count
            if not (new or prompt):
                break
        return chosen

    def fills_tick(self) -> bool:
        """Whether what is ready now nearly fills the next tick, without any answer."""
        enough = (3 * self.max_num_seqs) // 4
        count = 0
        for wave in self.ready:
            count += len(wave.pending)
            if count >= enough:
                return True
        return False
