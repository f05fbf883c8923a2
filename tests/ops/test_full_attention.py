"""Attention in both directions over segments, held equal to one mask over all tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mor.ops.full_attention import Meeting, masked_attention, meeting_attention
from mor.ops.segments import Segments
from tests.ops.test_segments import both_ways, segments_of, tokens


def plain(query: Tensor, key: Tensor, value: Tensor, meeting: Meeting) -> Tensor:
    """One mask: a query sees the keys of its own segment."""
    ours = torch.tensor(meeting.queries.names).repeat_interleave(
        torch.tensor(meeting.queries.lengths)
    )
    theirs = torch.tensor(meeting.keys.names).repeat_interleave(torch.tensor(meeting.keys.lengths))
    seen = ours[:, None] == theirs
    one, two, three = (part.transpose(0, 1)[None] for part in (query, key, value))
    return masked_attention(one, two, three, seen)[0].transpose(0, 1)


@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (3, 1)])
@pytest.mark.parametrize("lengths", [[1], [5], [3, 3], [7, 1, 9, 2], [8, 7, 9]])
def test_segments_are_blind_to_each_other(lengths: list[int], heads: tuple[int, int]) -> None:
    count = sum(lengths)
    query = tokens(1, count, heads[0], 4)
    key, value = tokens(2, count, heads[1], 4), tokens(3, count, heads[1], 4)
    segments = segments_of(lengths)
    meeting = Meeting(segments, segments)
    found = meeting_attention(query, key, value, meeting)
    both_ways(found, plain(query, key, value, meeting), [query, key, value])


@pytest.mark.parametrize("kept", [[2, 1, 4], [3, 0, 5], [0, 0, 1], [3, 2, 7]])
def test_few_queries_meet_all_stored_keys(kept: list[int]) -> None:
    stored = [3, 2, 7]
    runs = [run for run, number in enumerate(kept) if number]
    queries = segments_of([kept[run] for run in runs], runs)
    query = tokens(1, sum(kept), 4, 6)
    key, value = tokens(2, sum(stored), 2, 6), tokens(3, sum(stored), 2, 6)
    meeting = Meeting(queries, segments_of(stored))
    found = meeting_attention(query, key, value, meeting)
    both_ways(found, plain(query, key, value, meeting), [query, key, value])


def test_what_stands_in_other_segments_changes_nothing() -> None:
    segments = Segments.of(torch.tensor([0, 0, 0, 1, 1]))
    inputs = [tokens(seed, 5, 2, 4).detach() for seed in range(3)]
    before = meeting_attention(*inputs, Meeting(segments, segments))[:3]
    for part in inputs:
        part[3:] = torch.nan
    after = meeting_attention(*inputs, Meeting(segments, segments))[:3]
    assert torch.equal(before, after)
