"""How much the host does for each token. On a GPU that decides the speed of small models."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import mor.engine
from mor.engine import Engine
from mor.ops.replay import Function
from tests.engine.oracle import greedy
from tests.strategies import make_model, small_config

HOME = str(Path(mor.engine.__file__).parent)


def calls_per_token(engine: Engine, tokens: int) -> tuple[float, Counter[str]]:
    """Calls of the engine's own functions for each new token of eight streams, after a first run.

    The difference between answers of different lengths, so that requests' beginnings and ends, and
    what a tick costs whatever it carries, count as little as they can.
    """
    counts: list[tuple[int, Counter[str]]] = []
    for new in (tokens, 2 * tokens):
        names: Counter[str] = Counter()

        def note(frame: FrameType, event: str, arg: Any, names: Counter[str] = names) -> None:
            if event == "call" and frame.f_code.co_filename.startswith(HOME):
                names[frame.f_code.co_qualname] += 1

        for place in range(8):
            engine.add_request([1 + place], greedy(new, output_kind="delta"))
        sys.setprofile(note)
        try:
            while engine.unfinished:
                engine.step()
        finally:
            sys.setprofile(None)
        counts.append((names.total(), names))
    more = counts[1][1] - counts[0][1]
    return more.total() / (8 * tokens), more


class First:
    """A stage that gives what its first run gave: what a device does is no work of the host.

    That run is over a buffer without tokens, none of which goes on; here all do.
    """

    def __init__(self, function: Function, device: torch.device) -> None:
        self.found = tuple(found.clone() for found in function())
        for found in self.found:
            if found.dtype == torch.bool:
                found.fill_(True)

    def __call__(self) -> tuple[Tensor, ...]:
        return self.found


@pytest.mark.parametrize(("recursions", "most"), [(1, 45), (3, 65)])
def test_a_token_costs_few_calls(
    recursions: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, since no clock is the same twice. All tokens run all depths."""
    monkeypatch.setattr("mor.engine.stages.record", First)
    model = make_model(small_config("fixed", num_recursions=recursions), 1)
    engine = Engine(
        model, static_stages=True, max_model_len=64, max_num_seqs=8, max_residents=8, page_size=16
    )
    engine.generate([[1]], greedy(4))
    found, names = calls_per_token(engine, 16)
    assert names["KVStore.run"] == recursions * 8 * 16
    assert found <= most, names.most_common(30)
