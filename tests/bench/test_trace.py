from __future__ import annotations

import numpy as np
import pytest

from mor.bench.trace import (
    Run,
    Trace,
    best_within,
    check_lengths,
    medians,
    numbers,
    peak_entries,
    quantile,
    steady_tokens_per_s,
)
from mor.errors import MorError


def trace(sent: float, *times: float, prompt: int = 2) -> Trace:
    return Trace(sent, times, tuple(range(len(times))), prompt)


RUN = Run(0.0, 8.0, (trace(0, 1, 2), trace(0, 1, 2, 4, 6), trace(2, 4, 6, 8)), 2, depths=(1, 3))


def test_quantiles_are_numpys() -> None:
    values = [5.0, 1.0, 4.0, 2.5]
    for share in (0.0, 0.05, 0.5, 0.95, 1.0):
        assert quantile(values, share) == pytest.approx(np.quantile(values, share))
    assert quantile([], 0.5) is None


def test_numbers_of_a_run() -> None:
    found = numbers(RUN)
    assert found["tokens_per_s"] == 9 / 8
    assert found["first_token_p50_s"] == 1.0  # of 1, 1, 2
    assert found["between_tokens_p50_s"] == 2.0  # of 1, 1, 2, 2, 2, 2
    assert found["between_tokens_p95_s"] == 2.0
    assert found["mean_depth"] == 2.0


def test_the_steady_stretch_begins_at_the_first_end_and_ends_at_the_last_start() -> None:
    assert steady_tokens_per_s(RUN) is None  # both are 2.0
    longer = Run(0.0, 9.0, (trace(0, 1, 2), trace(0, 1, 3, 6), trace(2, 3, 4), trace(5, 9)), 2)
    assert steady_tokens_per_s(longer) == pytest.approx(3 / 3)  # 3, 3, 4 of (2, 5]


def test_peak_entries_count_prompts_and_tokens_but_the_last_of_each() -> None:
    # At 1.0 both have 2 + 1; the first ends at 2 (its last token is never kept). The second and
    # the third are under way then: 2 + 3 and 2 + 2 at 6.0 before the second ends.
    assert peak_entries(Run(0, 2, (trace(0, 1, 2),), 1)) == 3
    assert peak_entries(Run(0, 2, (trace(0, 1, 2), trace(0, 1, 2)), 2)) == 6
    assert peak_entries(Run(0, 4, (trace(0, 1, 2), trace(2, 3, 4)), 1)) == 3


def test_a_run_that_is_too_short_is_refused() -> None:
    check_lengths(RUN, [2, 4, 3])
    with pytest.raises(MorError, match="request 1 has 4 new tokens and 4 times, but 5"):
        check_lengths(RUN, [2, 5, 3])


def test_medians_and_spread() -> None:
    rounds = [{"tokens_per_s": v, "kv_bytes": None} for v in (3.0, 1.0, 2.0)]
    found = medians(rounds)
    assert found["tokens_per_s"] == 2.0
    assert (found["tokens_per_s_low"], found["tokens_per_s_high"]) == (1.0, 3.0)
    assert found["kv_bytes"] is None


def test_best_throughput_within_a_limit() -> None:
    points = [(100.0, 0.01), (200.0, 0.05), (300.0, 0.2), (400.0, None)]
    assert best_within(points, 0.05) == 200.0
    assert best_within(points, 0.001) is None
