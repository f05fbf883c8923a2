"""What a tick carries, when the coda runs, who gives way, and what is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mor import MoRForCausalLM
from mor.engine import Engine
from mor.engine.memory import pages_for
from mor.engine.request import Wave
from tests.engine.oracle import Oracle, greedy, idle, run
from tests.strategies import make_model, random_ids, small_config


@pytest.fixture(scope="module")
def model() -> MoRForCausalLM:
    return make_model(small_config("threshold"), 1, torch.float64)


def prompts(count: int, length: int = 3) -> list[list[int]]:
    return [random_ids(i, length).tolist() for i in range(count)]


class Watched(Engine):
    """Notes every pass of the block and of the coda."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ticks: list[list[tuple[str, bool, int, int]]] = []
        self.gathered: list[list[str]] = []
        tick, leave = self.runner.tick, self.runner.leave

        def watched_tick(pieces: Any) -> Any:
            self.ticks.append(
                [(p.wave.request.group, p.wave.prompt, p.wave.depth, len(p.places)) for p in pieces]
            )
            return tick(pieces)

        def watched_leave(waves: list[Wave]) -> Any:
            self.gathered.append([w.request.group for w in waves])
            return leave(waves)

        self.runner.tick = watched_tick  # type: ignore[method-assign]
        self.runner.leave = watched_leave  # type: ignore[method-assign]


def test_a_tick_carries_what_it_may_and_mixes_depths(model: MoRForCausalLM) -> None:
    engine = Watched(model, max_num_seqs=3, max_residents=8, prefill_chunk=4, max_model_len=40)
    engine.generate(prompts(8, 7), greedy(8))
    mixed = both = 0
    for tick in engine.ticks:
        new = sum(count for _, prompt, _, count in tick if not prompt)
        chunk = sum(count for _, prompt, _, count in tick if prompt)
        assert new <= 3
        assert chunk <= 4
        assert len({name for name, *_ in tick}) == len(tick)
        mixed += len({depth for _, _, depth, _ in tick}) > 1
        both += bool(new and chunk)
    assert mixed > 5
    assert both > 0
    assert engine.stats.ticks == len(engine.ticks)
    assert engine.stats.tick_tokens == sum(count for tick in engine.ticks for *_, count in tick)


def test_the_coda_waits_for_enough_or_for_nothing_else(model: MoRForCausalLM) -> None:
    engine = Watched(model, max_num_seqs=4, max_residents=8, min_gather=3, max_model_len=40)
    for prompt in prompts(8):
        engine.add_request(prompt, greedy(10))
    seen = 0
    while engine.unfinished:
        could_run = bool(engine.scheduler.ready)
        engine.step()
        if len(engine.gathered) > seen:
            seen += 1
            assert len(engine.gathered[-1]) >= 3 or not could_run
    sizes = [len(names) for names in engine.gathered]
    assert max(sizes) >= 3
    assert engine.stats.gatherings == len(sizes)


def test_more_gathering_means_fewer_passes_of_the_coda(model: MoRForCausalLM) -> None:
    passes = []
    for min_gather in (1, 4):
        engine = Engine(
            model, max_num_seqs=4, max_residents=8, min_gather=min_gather, max_model_len=40
        )
        engine.generate(prompts(8), greedy(10))
        passes.append(engine.stats.gatherings)
    assert passes[1] < passes[0]


def test_without_refill_a_token_waits_for_its_batch(model: MoRForCausalLM) -> None:
    def serve(policy: Any) -> Watched:
        engine = Watched(
            model, max_num_seqs=4, max_residents=8, min_gather=1, max_model_len=40, policy=policy
        )
        oracle = Oracle(model)
        for output in engine.generate([[i] for i in range(8)], greedy(10)):
            oracle.check(output, 10)
        return engine

    waiting, refilled = serve("no_refill"), serve("refill")
    batch: set[str] = set()
    for tick in waiting.ticks:
        names = {name for name, *_ in tick}
        depths = {depth for _, _, depth, _ in tick}
        assert len(depths) == 1
        if depths == {0}:
            batch = names
        assert names <= batch  # nobody joins on the way
    assert waiting.stats.tick_tokens == refilled.stats.tick_tokens
    assert waiting.stats.tokens_per_tick < refilled.stats.tokens_per_tick


def test_admission_stops_before_anybody_gives_way(model: MoRForCausalLM) -> None:
    """Prompts alone fill the pool, one token each: the second has to wait for the first."""
    pages = pages_for(model.config, 12, 3, 4)
    engine = Engine(model, page_size=4, num_pages=pages, max_model_len=20)
    for prompt in prompts(3, 12):
        engine.add_request(prompt, greedy(1))
    engine.step()
    assert len(engine.scheduler.running) == 1
    run(engine)
    assert engine.stats.preemptions == 0
    idle(engine)


def test_the_newest_gives_way_and_the_oldest_never_does() -> None:
    model = make_model(small_config("fixed"), 2, torch.float64)
    engine = Engine(
        model, page_size=1, num_pages=pages_for(model.config, 30, 3, 1), max_model_len=40,
        max_num_seqs=3, min_gather=1,
    )  # fmt: skip
    names = [engine.add_request(prompt, greedy(16)) for prompt in prompts(3)]
    first = engine.scheduler.waiting[0]
    last = engine.scheduler.waiting[2]
    order = list(run(engine))
    assert first.preemptions == 0
    assert last.preemptions > 0
    assert order[0] == names[0]
    idle(engine)


def test_outputs_come_token_by_token(model: MoRForCausalLM) -> None:
    engine = Engine(model, max_model_len=40)
    name = engine.add_request([1, 2, 3], greedy(6))
    lengths = []
    while engine.unfinished:
        for output in engine.step():
            assert output.request_id == name
            lengths.append(len(output.completions[0].token_ids))
            assert output.finished == (lengths[-1] == 6)
    assert lengths == [1, 2, 3, 4, 5, 6]
    times = output.completions[0].timings
    assert times.queue is not None
    assert times.first_token is not None
    assert times.total is not None
    assert 0 <= times.queue <= times.first_token <= times.total
    assert len(times.between_tokens) == 5
    assert times.first_token + sum(times.between_tokens) <= times.total
    assert engine.step() == []  # an engine without work may be stepped


@pytest.mark.parametrize("steps", range(0, 26, 2))
def test_an_abort_frees_all_pages_at_any_moment(model: MoRForCausalLM, steps: int) -> None:
    oracle = Oracle(model)
    engine = Engine(
        model, max_num_seqs=2, max_residents=3, prefill_chunk=3, page_size=2, min_gather=2,
        max_model_len=30, num_pages=pages_for(model.config, 30, 3, 2),
    )  # fmt: skip
    names = [engine.add_request(prompt, greedy(7)) for prompt in prompts(5, 8)]
    done = {}
    for _ in range(steps):
        done |= {out.request_id: out for out in engine.step() if out.finished}
    given = {name: engine.abort(name) for name in (names[1], names[3], names[4])}
    engine.check_integrity()
    for output in given.values():
        if output is not None:
            completion = output.completions[0]
            assert output.finished
            assert completion.finish_reason == "abort"
            wanted = oracle.tokens(output.prompt_token_ids, 7)
            assert list(completion.token_ids) == wanted[: len(completion.token_ids)]
    done |= run(engine)
    assert done.keys() >= {names[0], names[2]}
    for output in done.values():
        oracle.check(output, 7)
    assert engine.stats.aborted + engine.stats.finished == engine.stats.requests == 5
    idle(engine)
    assert engine.abort("nobody") is None


def test_what_is_counted(model: MoRForCausalLM) -> None:
    engine = Engine(model, max_model_len=40, page_size=4)
    outputs = engine.generate(prompts(4, 5), greedy(6))
    stats = engine.stats
    done = [out.completions[0] for out in outputs]
    assert (stats.requests, stats.finished, stats.aborted, stats.preemptions) == (4, 4, 0, 0)
    assert stats.sampled == 24
    assert stats.entry_tokens == stats.gathered_tokens == sum(stats.depths) == 4 * (5 + 6 - 1)
    depths = [d for c in done for d in c.depths]
    assert stats.new_depths == [depths.count(d) for d in range(4)]
    # The first new token comes from the prompt's last position.
    every = [d for c in done for d in (*c.prompt_depths, *c.depths[1:])]
    assert stats.depths == [every.count(d) for d in range(4)]
    assert stats.tick_tokens == sum(every)
    assert stats.mean_depth == pytest.approx(sum(every) / len(every))
    assert 0 < stats.peak_pages <= engine.store.pool.num_pages
    told = engine.metrics()
    assert told["ticks"] == stats.ticks
    assert told["tokens_per_tick"] == stats.tick_tokens / stats.ticks
    assert told["tokens_per_gathering"] == stats.gathered_tokens / stats.gatherings
    assert (told["waiting"], told["running"], told["pages_used"], told["kv_bytes"]) == (0, 0, 0, 0)
    engine.add_request([1, 2], greedy(3), "more")
    assert engine.metrics()["waiting"] == 1
    engine.step()
    told = engine.metrics()
    assert told["running"] == 1
    assert told["pages_used"] == engine.store.pool.used > 0
    assert told["kv_bytes"] == engine.kv_bytes() > 0
    engine.abort("more")
    engine.reset_stats()
    assert engine.stats.ticks == engine.scheduler.stats.ticks == engine.stats.peak_pages == 0
    assert engine.stats.depths == [0, 0, 0, 0]


@pytest.mark.parametrize(("kv_sharing", "ended"), [("none", 0), ("propagate", 1)])
def test_kv_bytes_are_those_of_active_tokens(kv_sharing: str, ended: int) -> None:
    """Stopped in the middle: an entry for each pass, and one of how each token ended."""
    model = make_model(small_config("threshold", kv_sharing), 1, torch.float64)
    engine = Engine(model, max_model_len=40, page_size=4)
    engine.add_request([1, 2, 3, 4, 5], greedy(6))
    while engine.stats.sampled < 4:
        engine.step()
    request = engine.scheduler.running[0]
    while engine.scheduler.ready:  # until the coda is all that is missing
        engine.step()
    ids = request.tokens
    depths = Oracle(model).depths(ids)
    config = model.config
    entries = (2 + ended) * len(ids) + sum(depths)
    assert engine.kv_bytes() == entries * 2 * config.num_key_value_heads * config.head_dim * 8
    engine.abort("request-0")
    idle(engine)


def test_a_broken_engine_is_noticed(model: MoRForCausalLM) -> None:
    from mor.errors import MorError

    engine = Engine(model, max_model_len=40, page_size=4)
    engine.add_request([1, 2, 3], greedy(6))
    engine.step()
    engine.check_integrity()
    engine.scheduler.free_rows.append(0)
    with pytest.raises(MorError, match="row"):
        engine.check_integrity()
    engine.scheduler.free_rows.pop()
    engine.lanes.give([0])
    with pytest.raises(MorError, match="lanes"):
        engine.check_integrity()
