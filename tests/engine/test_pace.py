"""Guesses pause where they do not pay, and are tried again."""

from __future__ import annotations

from collections import Counter

from mor.engine.pace import LONGEST, WINDOW, Pace


def spend(pace: Pace, costs: dict[int, float], windows: int, running: int = 1) -> Counter[int]:
    """Windows by number of guesses, where a token takes ``costs`` of seconds."""
    spent: Counter[int] = Counter()
    for _ in range(windows):
        spent[pace.goal] += 1
        for _ in range(WINDOW):
            pace.note(costs[pace.goal] * running, running, running)
    return spent


def test_the_fastest_number_holds_and_the_others_are_tried_now_and_then() -> None:
    for best in (0, 1, 2, 4):
        costs = {number: 1.0 - 0.5 * (number == best) for number in (0, 1, 2, 4)}
        pace = Pace(4)
        assert set(spend(pace, costs, 4)) == {0, 1, 2, 4}
        spent = spend(pace, costs, 400)
        assert spent[best] > 0.9 * 400
        assert all(spent[number] for number in costs)


def test_it_changes_its_mind_when_what_it_measures_does() -> None:
    pace = Pace(2)
    spend(pace, {0: 1.0, 1: 1.1, 2: 1.2}, 100)
    assert pace.goal == 0
    spent = spend(pace, {0: 1.0, 1: 0.9, 2: 0.5}, 12 * LONGEST)
    assert spent[2] > 6 * LONGEST
    spent = spend(pace, {0: 1.0, 1: 1.1, 2: 1.2}, 2 * LONGEST)
    assert spent[0] > LONGEST


def test_every_load_is_judged_by_itself() -> None:
    pace = Pace(1)
    spend(pace, {0: 1.0, 1: 0.5}, 20)
    spend(pace, {0: 1.0, 1: 2.0}, 20, running=8)
    assert pace.goal == 0
    pace.note(1.0, 1, 1)
    assert pace.goal == 1
    pace.note(1.0, 0, 0)  # nobody there
    assert pace.goal == 1


def test_always_and_never() -> None:
    assert spend(Pace(3, always=True), {3: 9.0}, 20) == {3: 20}
    assert spend(Pace(0, always=True), {0: 1.0}, 20) == {0: 20}
