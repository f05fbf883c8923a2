"""Add, step and abort in any order: whatever survives is right, and no page is ever lost."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mor.engine import Engine
from mor.engine.memory import pages_for
from tests.engine.oracle import Oracle, greedy, idle, run
from tests.strategies import make_model, random_ids, small_config

KINDS = [
    ("threshold", "none"), ("threshold", "recursive_update"), ("token_choice", "recursive"),
    ("expert_choice", "recursive"), ("random", "none"), ("fixed", "none"),
    ("threshold", "propagate"),
]  # fmt: skip
_oracles: dict[Any, Oracle] = {}


def oracle_of(router: str, kv_sharing: str) -> Oracle:
    """One model per kind, so that its answers are computed once."""
    key = (router, kv_sharing)
    if key not in _oracles:
        config = small_config(router, kv_sharing)
        _oracles[key] = Oracle(make_model(config, 11, torch.float64))
    return _oracles[key]


def prompt(number: int) -> list[int]:
    """Of three texts, as far as it goes: many begin alike."""
    return random_ids(number % 3, 11).tolist()[: 1 + number % 11]


class Serving(RuleBasedStateMachine):
    """An engine with few pages under requests that come and go."""

    @initialize(
        kind=st.sampled_from(KINDS),
        page_size=st.sampled_from([1, 3, 4]),
        max_num_seqs=st.integers(1, 4),
        residents=st.integers(1, 6),
        chunk=st.integers(1, 6),
        min_gather=st.integers(1, 5),
        tokens=st.integers(20, 60),
        policy=st.sampled_from(["refill", "refill", "no_refill"]),
        prefix_caching=st.sampled_from([True, True, False]),
        speculate=st.integers(0, 4),
        draft_depth=st.integers(1, 2),
    )
    def build(
        self, kind: Any, page_size: int, max_num_seqs: int, residents: int, chunk: int,
        min_gather: int, tokens: int, policy: Any, prefix_caching: bool, speculate: int,
        draft_depth: int,
    ) -> None:  # fmt: skip
        self.oracle = oracle_of(*kind)
        config = self.oracle.model.config
        self.engine = Engine(
            self.oracle.model, page_size=page_size, max_num_seqs=max_num_seqs,
            max_residents=residents, prefill_chunk=chunk, min_gather=min_gather, max_model_len=20,
            num_pages=pages_for(config, tokens, 3, page_size), policy=policy,
            prefix_caching=prefix_caching, speculate=min(speculate, chunk - 1),
            draft_depth=draft_depth, speculate_always=True,
        )  # fmt: skip
        self.asked: dict[str, int] = {}
        self.said: list[tuple[int, ...]] = []

    @rule(number=st.integers(0, 12), new=st.integers(1, 8), n=st.integers(1, 2))
    def add(self, number: int, new: int, n: int) -> None:
        self.asked[self.engine.add_request(prompt(number), greedy(new, n=n))] = new

    @rule(data=st.data(), more=st.lists(st.integers(0, 60), max_size=3), new=st.integers(1, 4))
    def next_turn(self, data: st.DataObject, more: list[int], new: int) -> None:
        if self.said:
            ids = [*data.draw(st.sampled_from(self.said)), *more][:16]
            self.asked[self.engine.add_request(ids, greedy(new))] = new

    @rule()
    def forget(self) -> None:
        self.engine.forget_prefixes()

    def _step(self) -> None:
        for output in self.engine.step():
            new = self.asked[output.request_id]
            wanted = self.oracle.tokens(output.prompt_token_ids, new)
            for completion in output.completions:
                assert list(completion.token_ids) == wanted[: len(completion.token_ids)]
            if output.finished:
                self.oracle.check(output, self.asked.pop(output.request_id))
                answer = output.completions[0].token_ids
                self.said.append(output.prompt_token_ids + answer)
        self.engine.check_integrity()

    @rule(times=st.integers(1, 8))
    def step(self, times: int) -> None:
        for _ in range(times):
            self._step()

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.asked:
            name = data.draw(st.sampled_from(sorted(self.asked)))
            del self.asked[name]
            given = self.engine.abort(name)
            assert given is not None
            assert given.finished
            assert self.engine.abort(name) is None

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_integrity()
            if not self.asked:
                idle(self.engine)

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            done = run(self.engine)
            assert set(done) == set(self.asked)
            for name, output in done.items():
                self.oracle.check(output, self.asked[name])
            idle(self.engine)


TestServing = Serving.TestCase
TestServing.settings = settings(stateful_step_count=20)


@pytest.mark.slow
def test_no_page_is_lost_in_many_random_operations() -> None:
    oracle = oracle_of("random", "none")
    config = oracle.model.config
    draw = random.Random(0)
    engine = Engine(
        oracle.model, page_size=2, max_num_seqs=4, max_residents=7, prefill_chunk=5, min_gather=2,
        max_model_len=20, num_pages=pages_for(config, 24, 3, 2), speculate=2,
        speculate_always=True,
    )  # fmt: skip
    asked: dict[str, int] = {}
    finished = 0
    for _ in range(10_000 if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else 1_600):
        kind = draw.random()
        if kind < 0.15 and len(asked) < 12:
            new = draw.randint(1, 16)
            asked[engine.add_request(prompt(draw.randint(0, 3)), greedy(new))] = new
        elif kind < 0.2 and asked:
            name = draw.choice(sorted(asked))
            del asked[name]
            engine.abort(name)
        else:
            for output in engine.step():
                if output.finished:
                    finished += 1
                    new = asked.pop(output.request_id)
                    wanted = oracle.tokens(output.prompt_token_ids, new)
                    assert list(output.completions[0].token_ids) == wanted
        engine.check_integrity()
    assert engine.stats.reused_tokens > 300
    assert engine.stats.preemptions > 15
    assert engine.stats.accepted_tokens > 30
    assert engine.stats.aborted > 15
    assert finished > 60
    run(engine)
    idle(engine)
