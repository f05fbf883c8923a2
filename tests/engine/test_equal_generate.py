"""Greedy tokens equal ``model.generate`` one request at a time, whatever the engine does."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mor import MoRConfig
from mor.engine import Engine
from mor.engine.attend import padded_attention, row_attention
from mor.engine.memory import pages_for
from mor.engine.scheduler import Policy
from tests.engine.oracle import Oracle, greedy, idle, run
from tests.strategies import (
    KV_SHARING,
    ROUTERS,
    SEEDS,
    configs,
    make_model,
    random_ids,
    small_config,
)

NEW = 7


def prompts(count: int, seed: int = 0, longest: int = 13) -> list[list[int]]:
    lengths = torch.Generator().manual_seed(seed)
    return [
        random_ids(seed + i, int(torch.randint(1, longest + 1, (), generator=lengths))).tolist()
        for i in range(count)
    ]


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ROUTERS)
def test_knobs_of_every_size_change_no_token(router: str, kv_sharing: str) -> None:
    config = small_config(router, kv_sharing, num_recursion_layers=2, share_norms=False)
    model = make_model(config, 1, torch.float64)
    oracle = Oracle(model)
    knobs: list[dict[str, Any]] = [
        {"max_num_seqs": 1, "max_residents": 1, "prefill_chunk": 1, "page_size": 1},
        {"max_num_seqs": 2, "prefill_chunk": 3, "page_size": 2, "min_gather": 3},
        {"max_num_seqs": 5, "max_residents": 3, "prefill_chunk": 5, "page_size": 7},
        {"max_num_seqs": 8, "prefill_chunk": 64, "page_size": 16, "min_gather": 1},
    ]
    # Two of them in each case, the next two in the next: every router and every mode meets all.
    turn = ROUTERS.index(router) + KV_SHARING.index(kv_sharing)
    for place in (turn % 4, (turn + 1) % 4):
        knob, attention = knobs[place], (row_attention, padded_attention)[place % 2]
        engine = Engine(model, max_model_len=40, num_pages=2000, attention=attention, **knob)
        for output in engine.generate(prompts(4), greedy(NEW)):
            oracle.check(output, NEW)
        assert engine.stats.preemptions == 0
        idle(engine)
    if router != "fixed":  # otherwise nothing was mixed
        assert sum(count > 0 for count in engine.stats.depths) >= 3


@given(
    configs(),
    SEEDS,
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from(get_args(Policy)[:2]),
    st.data(),
)
def test_any_model_any_knob_any_arrival_few_pages(
    config: MoRConfig,
    seed: int,
    max_num_seqs: int,
    residents: int,
    chunk: int,
    page_size: int,
    min_gather: int,
    policy: Any,
    data: st.DataObject,
) -> None:
    """Pages are so few that requests give way to each other, and arrive at any tick."""
    model = make_model(config, seed, torch.float64)
    oracle = Oracle(model)
    longest = data.draw(st.sampled_from([3, 3, 13]), label="longest prompt")
    new = 18 - longest
    every = prompts(data.draw(st.integers(1, 5), label="requests"), seed, longest)
    depth = config.router_fixed_depth or config.num_recursions
    guesses = st.integers(0, 0 if config.interleaved or depth == 1 else min(3, chunk - 1))
    engine = Engine(
        model,
        max_num_seqs=max_num_seqs,
        max_residents=residents,
        prefill_chunk=chunk,
        page_size=page_size,
        min_gather=min_gather,
        max_model_len=18,
        # Just enough for the longest request alone at worst, or a little more.
        num_pages=pages_for(config, 17, depth, page_size) + data.draw(st.integers(0, 30)),
        policy=policy,
        attention=data.draw(st.sampled_from([row_attention, padded_attention])),
        speculate=data.draw(guesses, label="speculate"),
        speculate_always=True,
    )
    done = {}
    for prompt in every:
        engine.add_request(prompt, greedy(new))
        for _ in range(data.draw(st.integers(0, 6))):
            done |= {out.request_id: out for out in engine.step() if out.finished}
            engine.check_integrity()
    done |= run(engine)
    assert len(done) == len(every)
    for output in done.values():
        oracle.check(output, new)
    idle(engine)


@pytest.mark.slow
@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ROUTERS)
def test_requests_that_gave_way_say_the_same(router: str, kv_sharing: str) -> None:
    config = small_config(router, kv_sharing)
    model = make_model(config, 2, torch.float64)
    oracle = Oracle(model)
    engine = Engine(
        model,
        max_num_seqs=6,
        max_residents=6,
        prefill_chunk=8,
        page_size=2,
        max_model_len=40,
        num_pages=pages_for(config, 22, 3, 2),
    )
    every = [random_ids(i, 3 + i).tolist() for i in range(6)]
    for output in engine.generate(every, greedy(10)):
        oracle.check(output, 10)
    assert engine.stats.preemptions > 0
    assert engine.stats.recomputed_tokens > 0
    idle(engine)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_depth_cap_of_the_engine_and_of_a_request(router: str) -> None:
    model = make_model(small_config(router), 3, torch.float64)
    oracle = Oracle(model)
    every = prompts(6, 3)
    for cap in (1, 2, 3):
        engine = Engine(model, max_depth=cap, max_model_len=40, page_size=4)
        caps = [None, 1, 2, 3, 2, 1]
        asked = [greedy(NEW, max_depth=own) for own in caps]
        for output, own in zip(engine.generate(every, asked), caps, strict=True):
            oracle.check(output, NEW, min(cap, own or cap))
        assert max(d for d, n in enumerate(engine.stats.depths) if n) <= cap
        idle(engine)


@pytest.mark.parametrize("kv_sharing", KV_SHARING[:2])
@pytest.mark.parametrize("sharing", ["sequence", "middle_sequence"])
def test_repeated_layers_run_as_one_pass(sharing: str, kv_sharing: str) -> None:
    config = small_config("fixed", kv_sharing, sharing=sharing, num_recursion_layers=2)
    model = make_model(config, 4, torch.float64)
    oracle = Oracle(model)
    for cap in (None, 2):
        engine = Engine(model, max_model_len=40, page_size=4, prefill_chunk=5, max_depth=cap)
        for output in engine.generate(prompts(5, 4), greedy(NEW)):
            oracle.check(output, NEW, cap)
        assert engine.stats.tick_tokens == engine.stats.entry_tokens
        idle(engine)


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
def test_a_vanilla_model_is_one_recursion(kv_sharing: str) -> None:
    config = small_config("fixed", kv_sharing, num_recursions=1, num_recursion_layers=3)
    model = make_model(config, 5, torch.float64)
    oracle = Oracle(model)
    engine = Engine(model, max_model_len=40, page_size=4)
    for output in engine.generate(prompts(5, 5), greedy(NEW)):
        oracle.check(output, NEW)
    assert engine.stats.tick_tokens == engine.stats.entry_tokens


@pytest.mark.parametrize("router", ROUTERS)
def test_full_depth_is_the_model_whose_router_lets_all_through(router: str) -> None:
    config = small_config(router)
    model = make_model(config, 6, torch.float64)
    engine = Engine(model, max_model_len=40, page_size=4, policy="full_depth")
    outputs = engine.generate(prompts(5, 6), greedy(NEW))
    assert engine.stats.depths[:3] == [0, 0, 0]

    network = model.model.router
    start = type(network).start

    def last(hidden: torch.Tensor, max_depth: Any) -> Any:
        said = start(network, hidden, max_depth)
        if said is not None:
            said.choice.fill_(config.num_recursions - 1)
        return said

    network.start = last  # type: ignore[method-assign]
    network.decide = lambda scores, depth: None  # type: ignore[method-assign]
    oracle = Oracle(model)
    for output in outputs:
        oracle.check(output, NEW)


def test_the_order_of_arrival_changes_no_token() -> None:
    model = make_model(small_config("threshold"), 7, torch.float64)
    every = prompts(6, 7)
    texts = []
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 5, 0, 4, 1, 3]):
        engine = Engine(model, max_num_seqs=3, max_model_len=40, page_size=4, prefill_chunk=4)
        names = {i: engine.add_request(every[i], greedy(NEW)) for i in order}
        done = run(engine)
        texts.append([done[names[i]].completions[0].token_ids for i in range(6)])
    assert texts[0] == texts[1] == texts[2]


def test_float32_and_bfloat16_run_through() -> None:
    """Equality is proven in float64; here types must only fit."""
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(small_config("expert_choice"), 8).to(dtype)
        engine = Engine(model, max_model_len=40, page_size=4)
        (output,) = engine.generate([[1, 2, 3]], greedy(NEW))
        assert len(output.completions[0].token_ids) == NEW
        idle(engine)


@pytest.mark.parametrize("router", ["threshold", "token_choice"])
def test_end_of_text_ends_as_in_generate(router: str) -> None:
    model = make_model(small_config(router), 9, torch.float64)
    oracle = Oracle(model)
    every = prompts(4, 9)
    free = [oracle.tokens(tuple(p), 12) for p in every]
    end = free[0][5]
    model.generation_config.eos_token_id = end
    engine = Engine(model, max_model_len=40, page_size=4)
    for output, tokens in zip(engine.generate(every, greedy(12)), free, strict=True):
        done = output.completions[0]
        kept = tokens[: tokens.index(end) + 1] if end in tokens else tokens
        assert list(done.token_ids) == kept
        ended = end in tokens
        assert done.finish_reason == ("stop" if ended else "length")
        assert done.stop_reason == (end if ended else None)
    ignoring = engine.generate(every, greedy(12, ignore_eos=True))
    assert [list(o.completions[0].token_ids) for o in ignoring] == free
    idle(engine)
