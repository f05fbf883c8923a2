"""How many tokens to guess at a time: what came out fastest lately, none included."""

from __future__ import annotations

from dataclasses import dataclass, field

WINDOW = 32  # tokens of each request that are timed together
PATIENCE = 8  # windows before another number is tried again; doubled while it does not win
LONGEST = 64  # windows between two tries at most
MARGIN = 0.97  # a number has to be so much better than the one that holds


@dataclass
class Load:
    """What is known for about so many requests at a time.

    Attributes:
        costs: seconds per token, by number of guesses.
        goal: guesses at a time, for now.
        best: what was fastest so far.
        left: windows until another number is tried.
        patience: the same after the next try.
        turn: whose turn it is then.
    """

    costs: dict[int, float] = field(default_factory=dict)
    goal: int = 0
    best: int = 0
    left: int = PATIENCE
    patience: int = PATIENCE
    turn: int = 0


class Pace:
    """Times windows of tokens under each number of guesses, and keeps to the fastest.

    Costs hang on how many requests share a pass, so each doubling of that is judged by itself.
    Guesses change no token, only how soon it comes, so trying costs little: one window of 9 at
    first, of 65 later on. Steps in which prompts are read are not timed.

    Args:
        most: guesses at a time at most.
        always: never fewer, and nothing is timed.
    """

    def __init__(self, most: int, always: bool = False) -> None:
        self.most, self.always = most, always
        halves = [most >> place for place in range(most.bit_length())]
        self.numbers = [0, *halves]
        self._loads: dict[int, Load] = {}
        self._now = Load()
        self._running = self._tokens = 0
        self._seconds = 0.0

    @property
    def goal(self) -> int:
        """Tokens to guess before they are checked; 0 for none."""
        return self.most if self.always else self._now.goal

    def note(self, seconds: float, tokens: int, running: int) -> None:
        """Note one step of the engine.

        Args:
            seconds: that it took.
            tokens: that were sampled.
            running: requests with pages.
        """
        if self.always or not running:
            return
        load = self._loads.setdefault((running - 1).bit_length(), Load())
        if load is not self._now:
            self._now = load
            self._restart()
        self._seconds += seconds
        self._tokens += tokens
        self._running = max(self._running, running)
        if self._tokens >= WINDOW * self._running:
            self._judge(self._seconds / self._tokens)
            self._restart()

    def _restart(self) -> None:
        self._seconds, self._tokens, self._running = 0.0, 0, 0

    def _judge(self, cost: float) -> None:
        load = self._now
        load.costs[load.goal] = (load.costs.get(load.goal, cost) + cost) / 2
        untried = [number for number in self.numbers if number not in load.costs]
        if untried:
            load.goal = untried[0]
            return
        tried = load.goal != load.best
        fastest = min(load.costs, key=load.costs.__getitem__)
        if load.costs[fastest] < MARGIN * load.costs[load.best]:
            load.best, load.patience = fastest, PATIENCE
        elif tried:
            load.patience = min(2 * load.patience, LONGEST)
        load.left = load.patience if tried else load.left - 1
        load.goal = load.best
        if load.left <= 0:
            others = [number for number in self.numbers if number != load.best]
            load.goal, load.turn = others[load.turn % len(others)], load.turn + 1
