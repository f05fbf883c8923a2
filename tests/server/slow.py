"""An engine that waits before each tick."""

from __future__ import annotations

import time
from typing import Any

from mor.engine import Engine
from tests.server.live import NAME, model, tokenizer

LONG: dict[str, Any] = {
    "model": NAME, "prompt": "the", "max_tokens": 120, "ignore_eos": True, "temperature": 0,
}  # fmt: skip


class SlowEngine(Engine):
    """Every tick takes a while, so that a test can do something in between."""

    pause = 0.01
    broken: Exception | None = None

    def step(self) -> Any:
        time.sleep(self.pause)
        if self.broken is not None:
            raise self.broken
        return super().step()


def slow_engine(**options: Any) -> SlowEngine:
    settings: dict[str, Any] = {"max_num_seqs": 2, "page_size": 4}
    return SlowEngine(model(), tokenizer(), **settings | options)


def wait_for(what: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
