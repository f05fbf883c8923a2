"""Runs of tokens that see each other, laid end to end: sequences, or documents within them.

Tokens that are active at one depth are as many in each row as the router likes. Laid end to end
they need no padding; :class:`Segments` says where one run ends and the next begins. Attention over
segments is causal within each and blind to the others, so it also keeps packed documents apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from mor.ops.native import Pieces

# Attention over a group of rows may cost this much more than over its runs alone.
_WASTE = 1.2

How = TypeVar("How")


@dataclass(frozen=True)
class Group:
    """Some runs of a :class:`Segments` as rows of one length.

    Attributes:
        runs: their numbers, ascending.
        longest: places of a row.
        tokens: [n] which of all tokens are in the group.
        places: [n] where each stands in the rows, [runs x longest].
    """

    runs: tuple[int, ...]
    longest: int
    tokens: Tensor
    places: Tensor

    def rows(self, tokens: Tensor) -> Tensor:
        """[N, ...] -> [runs, longest, ...], zeros behind the shorter runs."""
        places = len(self.runs) * self.longest
        if places == len(tokens) == len(self.tokens):  # all runs, all equally long
            return tokens.unflatten(0, (len(self.runs), self.longest))
        shape = (places, *tokens.shape[1:])
        every = len(self.tokens) == len(tokens)
        taken = tokens if every else tokens.index_select(0, self.tokens)
        filled = tokens.new_zeros(shape).index_copy(0, self.places, taken)
        return filled.unflatten(0, (len(self.runs), self.longest))

    def flat(self, rows: Tensor) -> Tensor:
        """[runs, longest, ...] -> [n, ...] in the order of ``tokens``."""
        flat = rows.flatten(0, 1)
        return flat if len(self.places) == len(flat) else flat.index_select(0, self.places)


@dataclass(frozen=True)
class Segments:
    """Consecutive runs within N tokens.

    Attributes:
        names: which run each is (batch row, or document), ascending.
        lengths: tokens of each, all at least 1.
        device: of the tokens.
    """

    names: tuple[int, ...]
    lengths: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, ids: Tensor) -> Segments:
        """From the run of every token, ``ids`` [N], non-decreasing. Asks the device once."""
        names, counts = torch.unique_consecutive(ids, return_counts=True)
        runs = torch.stack((names, counts)).tolist()
        return cls(tuple(runs[0]), tuple(runs[1]), ids.device)

    @classmethod
    def of_rows(cls, rows: int, width: int, device: torch.device) -> Segments:
        """``rows`` runs of ``width`` tokens, named by their number."""
        return cls(tuple(range(rows)), (width,) * rows, device)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First token of each run."""
        ends = [0]
        for length in self.lengths:
            ends.append(ends[-1] + length)
        return tuple(ends[:-1])

    @property
    def longest(self) -> int:
        """Tokens of the longest run."""
        return max(self.lengths)

    @cached_property
    def offsets(self) -> Tensor:
        """int32 [runs + 1], as kernels for sequences of unequal length want them."""
        total = self.starts[-1] + self.lengths[-1]
        return torch.tensor([*self.starts, total], dtype=torch.int32, device=self.device)

    @cached_property
    def pieces(self) -> Pieces:
        """Each run over itself, for the CPU's kernel."""
        return Pieces([(a, n, a, n) for a, n in zip(self.starts, self.lengths, strict=True)])

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The runs in groups of similar length: rows as long as the longest then waste little."""
        chosen: list[list[int]] = []
        pairs = longest = 0
        for run in sorted(range(len(self.lengths)), key=lambda run: -self.lengths[run]):
            own = self.lengths[run] ** 2
            if not chosen or longest * (len(chosen[-1]) + 1) > _WASTE * (pairs + own):
                chosen.append([])
                pairs, longest = 0, own
            chosen[-1].append(run)
            pairs += own
        return tuple(self.selected(sorted(runs)) for runs in chosen)

    def selected(self, runs: list[int]) -> Group:
        """Some runs, ascending, as rows."""
        lengths = torch.tensor([self.lengths[run] for run in runs], device=self.device)
        starts = torch.tensor([self.starts[run] for run in runs], device=self.device)
        row = torch.arange(len(runs), device=self.device).repeat_interleave(lengths)
        before = lengths.cumsum(0) - lengths
        offset = torch.arange(len(row), device=self.device) - before[row]
        longest = int(lengths.max())
        return Group(tuple(runs), longest, starts[row] + offset, row * longest + offset)

    @cached_property
    def table(self) -> tuple[Tensor, Tensor]:
        """Index [runs, longest] into the tokens, clamped to each run, and which places are real."""
        lengths = torch.tensor(self.lengths, device=self.device)
        places = torch.arange(self.longest, device=self.device)
        real = places < lengths[:, None]
        starts = torch.tensor(self.starts, device=self.device)
        return starts[:, None] + torch.minimum(places, lengths[:, None] - 1), real

    def merged(self, parts: list[Tensor]) -> Tensor:
        """Results of all groups, each [n, ...], in the order of the tokens, [N, ...]."""
        return parts[0] if len(parts) == 1 else torch.cat(parts).index_select(0, self._back)

    @cached_property
    def _back(self) -> Tensor:
        """Where each token stands among the groups' tokens, one group after another."""
        order = torch.cat([group.tokens for group in self.groups])
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=self.device)
        return back

    def pad(self, tokens: Tensor) -> Tensor:
        """[N, ...] -> [runs, longest, ...], each run's last token repeated behind it."""
        index, _ = self.table
        return tokens[index]

    def unpad(self, rows: Tensor) -> Tensor:
        """[runs, longest, ...] -> [N, ...], the inverse of :meth:`pad`."""
        return rows.flatten(0, 1).index_select(0, self._real)

    @cached_property
    def _real(self) -> Tensor:
        """[N] place of each token in the padded rows. Found once: it asks the device, and layers
        that each index with a mask would each wait for it."""
        return self.table[1].flatten().nonzero()[:, 0]


def attend_by_groups(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Segments,
    groups: Iterable[tuple[Group, Group, How]],
    attend: Callable[[Tensor, Tensor, Tensor, How], Tensor],
) -> Tensor:
    """Attention of segments, those of similar length as rows of one call.

    Args:
        query: [N, H, d]; key, value: [S, Hkv, d].
        queries: how the N are laid.
        groups: the queries of each call, the keys that they meet, and how.
        attend: takes query [n, H, N', d], key and value [n, Hkv, S', d], and how they meet.

    Returns:
        [N, H, d].
    """
    parts = []
    for group, keys, how in groups:
        rows = (group.rows(query), keys.rows(key), keys.rows(value))
        one, two, three = (tokens.transpose(1, 2) for tokens in rows)
        parts.append(group.flat(attend(one, two, three, how).transpose(1, 2)))
    return queries.merged(parts)


@dataclass(frozen=True)
class Runs:
    """Runs within N tokens laid end to end, whose lengths only the device knows.

    Attributes:
        row_of: [N] the run of each token, ascending among the real ones.
        real: [N] bool which tokens are real; those stand first.
        rows: runs; some may be empty.
        longest: no run has more tokens.
    """

    row_of: Tensor
    real: Tensor
    rows: int
    longest: int

    @cached_property
    def offsets(self) -> Tensor:
        """int32 [rows + 1], as kernels for sequences of unequal length want them."""
        counts = torch.zeros(self.rows + 1, dtype=torch.long, device=self.row_of.device)
        counts = counts.scatter_add(0, self.row_of + 1, self.real.long())
        return counts.cumsum(0).int()

    @cached_property
    def places(self) -> Tensor:
        """[N] the place of each token in padded rows laid end to end; one behind them if unreal."""
        rank = torch.arange(len(self.row_of), device=self.row_of.device)
        rank = rank - self.offsets[self.row_of]
        spare = self.rows * self.longest
        return torch.where(self.real, self.row_of * self.longest + rank, spare)

    def pad(self, tokens: Tensor) -> Tensor:
        """[N, ...] -> [rows, longest, ...], zeros behind each run."""
        room = tokens.new_zeros(self.rows * self.longest + 1, *tokens.shape[1:])
        laid = room.index_copy(0, self.places, tokens)[:-1]
        return laid.unflatten(0, (self.rows, self.longest))

    def unpad(self, rows: Tensor) -> Tensor:
        """[rows, longest, ...] -> [N, ...], the inverse of :meth:`pad`; zeros if unreal."""
        flat = rows.flatten(0, 1)
        return torch.cat((flat, flat.new_zeros(1, *flat.shape[1:]))).index_select(0, self.places)

    def clear(self, tokens: Tensor) -> Tensor:
        """[N, H, d] with zeros in the place of what is not real, and no gradient there."""
        return tokens.masked_fill(~self.real[:, None, None], 0.0)
