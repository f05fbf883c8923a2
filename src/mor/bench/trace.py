"""What one run of a workload took: from the times of its tokens to the numbers of the table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from mor.errors import MorError


@dataclass(frozen=True)
class Trace:
    """One request as it went; seconds on any clock.

    Attributes:
        sent: when the client sent it.
        times: when each new token was there.
        tokens: the new tokens.
        prompt_tokens: length of the prompt.
    """

    sent: float
    times: tuple[float, ...]
    tokens: tuple[int, ...]
    prompt_tokens: int


@dataclass(frozen=True)
class Run:
    """One run of a workload on one system.

    Attributes:
        began, ended: seconds, on the clock of the traces.
        traces: one per request, in the order of the workload.
        concurrency: clients.
        depths: recursions of each new token; empty where there are none.
        counters: what the engine counted (``Engine.metrics``); empty for a peer.
        kv_bytes: most bytes of keys and values at a time; None where nobody says.
    """

    began: float
    ended: float
    traces: tuple[Trace, ...]
    concurrency: int
    depths: tuple[int, ...] = ()
    counters: dict[str, float] = field(default_factory=dict)
    kv_bytes: float | None = None


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value below which ``share`` of ``values`` lie, between neighbours linearly."""
    if not values:
        return None
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def check_lengths(run: Run, wanted: Sequence[int]) -> None:
    """Refuse a run that did not write what was asked for.

    Raises:
        MorError: naming the first request that is too short or too long.
    """
    for number, (trace, count) in enumerate(zip(run.traces, wanted, strict=True)):
        if not len(trace.tokens) == len(trace.times) == count:
            raise MorError(
                f"request {number} has {len(trace.tokens)} new tokens and {len(trace.times)} "
                f"times, but {count} were asked for; nothing is reported of this run"
            )


def steady_tokens_per_s(run: Run) -> float | None:
    """Tokens per second while every client is busy.

    From the first answer's end (by then requests are at different places) to when the last request
    was sent, after which clients fall idle. None where that is no stretch of time at all.
    """
    begin = min(trace.times[-1] for trace in run.traces)
    end = max(trace.sent for trace in run.traces)
    if end <= begin:
        return None
    tokens = sum(begin < at <= end for trace in run.traces for at in trace.times)
    return tokens / (end - begin)


def peak_entries(run: Run) -> int:
    """Most tokens that were kept at a time by requests under way, one entry for each."""
    changes: list[tuple[float, int]] = []
    for trace in run.traces:
        changes.append((trace.sent, trace.prompt_tokens))
        changes += [(at, 1) for at in trace.times[:-1]]
        changes.append((trace.times[-1], -(trace.prompt_tokens + len(trace.times) - 1)))
    most = now = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


def numbers(run: Run) -> dict[str, float | None]:
    """The measures of one run: tokens per second, seconds to the first and between tokens."""
    tokens = sum(len(trace.tokens) for trace in run.traces)
    first = [trace.times[0] - trace.sent for trace in run.traces]
    between = [b - a for trace in run.traces for a, b in pairwise(trace.times)]
    return {
        "seconds": run.ended - run.began,
        "tokens_per_s": tokens / (run.ended - run.began),
        "steady_tokens_per_s": steady_tokens_per_s(run),
        "first_token_p50_s": quantile(first, 0.5),
        "first_token_p95_s": quantile(first, 0.95),
        "between_tokens_p50_s": quantile(between, 0.5),
        "between_tokens_p95_s": quantile(between, 0.95),
        "kv_bytes": run.kv_bytes,
        "mean_depth": statistics.fmean(run.depths) if run.depths else None,
    }


def medians(rounds: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """Median over rounds of every measure, with the least and the most of tokens per second."""
    middle: dict[str, float | None] = {}
    for name in rounds[0]:
        values = [one[name] for one in rounds]
        known = [value for value in values if value is not None]
        middle[name] = statistics.median(known) if known else None
    speeds = [one["tokens_per_s"] or 0.0 for one in rounds]
    return middle | {"tokens_per_s_low": min(speeds), "tokens_per_s_high": max(speeds)}


def best_within(points: Sequence[tuple[float, float | None]], limit: float) -> float | None:
    """Most tokens per second of ``(tokens per second, p95 between tokens)`` within the limit."""
    good = [speed for speed, p95 in points if p95 is not None and p95 <= limit]
    return max(good, default=None)
