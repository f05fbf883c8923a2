"""What ``mor compress`` was asked for, and what it has done so far: kept, so that it resumes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mor.compress.plan import Goal, check_goal
from mor.disk import check_new, write_whole
from mor.errors import MorError

STATE = "compress.json"
PILOT_SHARE = 0.05
"""Of the tokens, for each shape's trial."""


@dataclass(frozen=True)
class Settings:
    """What is asked for.

    Attributes:
        source: a vanilla model folder of ours, a Hugging Face folder of a Llama-like model, a GGUF
            file, or a model on the Hub by its name.
        out: folder to make; the model is in its ``model``.
        goal: how small or how fast.
        data: a folder made by ``mor data prepare`` with the source's tokenizer, or what that
            command takes as a source.
        tokens: to train on.
        route: also give the recursive shape a router, in a last stage.
        seq_len, batch_size, learning_rate, seed: of the training.
        sample_tokens: held-out tokens to score models on.
    """

    source: str
    out: Path
    goal: Goal
    data: str
    tokens: float = 1e6
    route: bool = False
    seq_len: int = 512
    batch_size: int = 4
    learning_rate: float = 1e-3
    seed: int = 0
    sample_tokens: int = 8192

    def check(self) -> None:
        """Raise `MorError` naming the first setting out of its range."""
        check_goal(self.goal)
        least = {"seq_len": 2, "batch_size": 1, "sample_tokens": self.seq_len}
        for name, lowest in least.items():
            if (value := getattr(self, name)) < lowest:
                raise MorError(f"{name}={value} must be at least {lowest}")
        if not self.learning_rate > 0:
            raise MorError(f"learning_rate={self.learning_rate:g} must be above 0")
        step = self.seq_len * self.batch_size
        if not step / PILOT_SHARE <= self.tokens < float("inf"):
            raise MorError(
                f"tokens={self.tokens:g} must be at least {step / PILOT_SHARE:,.0f}: "
                f"{PILOT_SHARE:.0%} of them try each shape, and a step takes {step:,}"
            )


@dataclass
class State:
    """The results of the steps that are done, kept in ``compress.json`` as each one ends."""

    settings: Settings
    done: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Where it is kept."""
        return self.settings.out / STATE

    @classmethod
    def open(cls, settings: Settings) -> State:
        """The state of ``settings.out``: new, or what an earlier call left there.

        Raises:
            MorError: the folder holds something else, or was begun with other settings.
        """
        state = cls(settings)
        if not state.path.is_file():
            check_new(settings.out)
            settings.out.mkdir(parents=True, exist_ok=True)
            state.save()
            return state
        try:
            stored = json.loads(state.path.read_text(encoding="utf-8"))
            before, state.done = stored["settings"], stored["done"]
        except (OSError, ValueError, KeyError, TypeError):
            raise MorError(
                f"{state.path} is damaged; remove {settings.out} and begin anew"
            ) from None
        now = state._asked()
        changed = [name for name in now if now[name] != before.get(name)]
        if changed:
            name = changed[0]
            if not state.done:  # nothing of it would be lost
                state.save()
                return state
            raise MorError(
                f"{settings.out} was begun with {name}={before.get(name)!r}, not {now[name]!r}; "
                "repeat the same command to go on, or give another --out"
            )
        return state

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of the step ``name``: what is kept, or ``work()``, which is then kept."""
        if name not in self.done:
            result = work()
            self.done[name] = result
            self.save()
        return self.done[name]

    def save(self) -> None:
        """Write the file whole or not at all."""
        content = {"settings": self._asked(), "done": self.done}
        write_whole(self.path, json.dumps(content, indent=2) + "\n")

    def _asked(self) -> dict[str, Any]:
        asked = {name: value for name, value in asdict(self.settings).items() if name != "out"}
        goal = asked.pop("goal")
        return json.loads(json.dumps(goal | asked))
