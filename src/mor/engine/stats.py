"""What the engine counts, for a benchmark and for a server's metrics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass
class EngineStats:
    """Totals since the engine was made (or since :meth:`Engine.reset_stats`).

    Attributes:
        recursions: R.
        ticks: passes of the block.
        tick_tokens: tokens that they carried.
        entries, entry_tokens: passes of embedding and prelude, and their tokens.
        gatherings, gathered_tokens: passes of the coda, and their tokens.
        sampled: new tokens, one row of the head each.
        depths: tokens by the recursions they ran (0..R), prompts and what is recomputed included.
        new_depths: the same of the positions that new tokens were sampled from.
        requests, finished, aborted: completions that came, ended, and were given up.
        preemptions, recomputed_tokens: requests put back for want of pages, and what it cost.
        reused_tokens: tokens that were not computed, since what is left of them was cached.
        drafts: guesses of some tokens that were checked together.
        draft_tokens, accepted_tokens: guesses, and those that were right.
        peak_pages: most pages in use at a time.
    """

    recursions: int = 1
    ticks: int = 0
    tick_tokens: int = 0
    entries: int = 0
    entry_tokens: int = 0
    gatherings: int = 0
    gathered_tokens: int = 0
    sampled: int = 0
    depths: list[int] = field(default_factory=list)
    new_depths: list[int] = field(default_factory=list)
    requests: int = 0
    finished: int = 0
    aborted: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    reused_tokens: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    peak_pages: int = 0

    def __post_init__(self) -> None:
        """Make the histograms: one count for each depth 0..R."""
        self.depths = [0] * (self.recursions + 1)
        self.new_depths = [0] * (self.recursions + 1)

    def note_ticked(self, tokens: int) -> None:
        """One more tick, of so many tokens."""
        self.ticks += 1
        self.tick_tokens += tokens

    def note_entered(self, tokens: int) -> None:
        """Count a pass of embedding and prelude."""
        self.entries += 1
        self.entry_tokens += tokens

    def note_gathered(self, waves: Iterable[Sequence[int]]) -> None:
        """Count a pass of the coda: the depths of the tokens of each wave."""
        self.gatherings += 1
        for depths in waves:
            self.gathered_tokens += len(depths)
            for depth in depths:
                self.depths[depth] += 1

    def reset(self) -> None:
        """Set every counter to zero, in place: others hold this object too."""
        vars(self).update(vars(EngineStats(self.recursions)))

    def numbers(self) -> dict[str, float]:
        """The counters and their quotients by name; histograms apart."""
        counters = {
            name: float(value) for name, value in vars(self).items() if isinstance(value, int)
        }
        del counters["recursions"]
        return counters | {
            "tokens_per_tick": self.tokens_per_tick,
            "tokens_per_gathering": self.tokens_per_gathering,
            "mean_depth": self.mean_depth,
        }

    @property
    def tokens_per_tick(self) -> float:
        """Mean tokens that a pass of the block carried."""
        return self.tick_tokens / self.ticks if self.ticks else 0.0

    @property
    def tokens_per_gathering(self) -> float:
        """Mean tokens that a pass of the coda carried."""
        return self.gathered_tokens / self.gatherings if self.gatherings else 0.0

    @property
    def mean_depth(self) -> float:
        """Mean recursions per token, prompts included."""
        return sum(d * n for d, n in enumerate(self.depths)) / max(1, sum(self.depths))
