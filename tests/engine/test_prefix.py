"""Prefix caching: what was computed once is not computed again, and no number changes by that."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mor import MoRForCausalLM
from mor.engine import Engine, SamplingParams
from mor.engine.memory import pages_for
from mor.errors import MorError
from mor.ops import native
from tests.engine.oracle import Oracle, greedy, idle, run
from tests.strategies import KV_SHARING, make_model, random_ids, small_config

TEXT = random_ids(5, 60).tolist()
needs_kernels = pytest.mark.skipif(native.library() is None, reason=native.missing())


@pytest.fixture(scope="module")
def model() -> MoRForCausalLM:
    return make_model(small_config("threshold"), 1, torch.float64)


@pytest.fixture(scope="module")
def oracle(model: MoRForCausalLM) -> Oracle:
    return Oracle(model)


@cache
def oracle_of(router: str, kv_sharing: str) -> Oracle:
    return Oracle(make_model(small_config(router, kv_sharing), 3, torch.float64))


def engine_of(model: MoRForCausalLM, **knobs: Any) -> Engine:
    settings = {"page_size": 4, "max_model_len": 60, "prefill_chunk": 8}
    return Engine(model, **settings | knobs)


def cached(engine: Engine, prompt: list[int], new: int = 2, **fields: Any) -> int:
    """Tokens of a prompt that were cached when its request ran."""
    return engine.generate(prompt, greedy(new, **fields))[0].completions[0].cached_tokens


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ["threshold", "token_choice", "random"])
@settings(max_examples=2)
@given(data=st.data())
def test_answers_and_depths_are_those_of_the_request_alone(
    router: str, kv_sharing: str, data: st.DataObject
) -> None:
    oracle = oracle_of(router, kv_sharing)
    page_size, chunk = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    engine = engine_of(oracle.model, page_size=page_size, prefill_chunk=chunk, max_num_seqs=3)
    said = TEXT[:9]
    for turn in range(2):
        texts = [said + TEXT[20 : 20 + more] for more in (2, 5, 5)]
        outputs = engine.generate(texts, greedy(4))
        for output in outputs:
            oracle.check(output, 4)
            assert output.completions[0].cached_tokens >= turn * (9 // page_size * page_size)
        said = texts[1] + list(outputs[1].completions[0].token_ids)
        engine.check_integrity()
    assert engine.stats.reused_tokens > 0
    idle(engine)


@needs_kernels
@pytest.mark.parametrize(
    ("router", "fields"),
    [
        ("threshold", {}),
        ("expert_choice", {"kv_sharing": "recursive"}),
        ("token_choice", {"kv_sharing": "recursive_update"}),
        ("threshold", {"kv_sharing": "propagate"}),
        ("random", {}),
        ("fixed", {"sharing": "sequence", "num_recursion_layers": 2}),
    ],
)
def test_the_same_bits(router: str, fields: dict[str, Any]) -> None:
    model = make_model(small_config(router, head_dim=16, **fields))
    asked = greedy(5, logprobs=3)
    prompts = [TEXT[:cut] + TEXT[40 : 40 + more] for cut in (17, 32) for more in (1, 4, 9)]
    alone = engine_of(model, prefix_caching=False, max_num_seqs=1)
    shared = engine_of(model, page_size=3)
    for _ in range(2):
        for prompt, output in zip(prompts, shared.generate(prompts, asked), strict=True):
            own, done = alone.generate(prompt, asked)[0].completions[0], output.completions[0]
            assert (done.token_ids, done.depths) == (own.token_ids, own.depths)
            assert done.prompt_depths == own.prompt_depths
            assert done.logprobs == own.logprobs
    assert shared.stats.reused_tokens > 100
    assert alone.stats.reused_tokens == 0


def test_the_next_turn_of_a_chat_pays_for_the_new_turn_only(oracle: Oracle) -> None:
    """Work before the first token, counted in tokens that enter and in passes of the block."""
    engine, said = engine_of(oracle.model), TEXT[:30]
    work = []
    for turn in range(3):
        engine.reset_stats()
        (output,) = engine.generate(said, greedy(6))
        oracle.check(output, 6)
        work.append((engine.stats.entry_tokens - 5, engine.stats.ticks))
        answer = list(output.completions[0].token_ids)
        assert output.completions[0].cached_tokens == len(said) - work[-1][0]
        said = said + answer + TEXT[40 + turn : 43 + turn]
    # Cached are whole pages: of 39 tokens the 32 of 8 pages, the first answer's among them.
    assert [entered for entered, _ in work] == [30, 7, 4]
    assert work[1][1] < work[0][1]


def test_completions_of_one_prompt_read_it_once(oracle: Oracle) -> None:
    engine = engine_of(oracle.model, max_num_seqs=4)
    (output,) = engine.generate(TEXT[:29], greedy(3, n=4))
    oracle.check(output, 3)
    assert [done.cached_tokens for done in output.completions] == [0, 28, 28, 28]
    assert engine.stats.entry_tokens == 29 + 3 * 1 + 4 * 2
    idle(engine)


def test_one_that_is_waited_for_may_be_given_up(oracle: Oracle) -> None:
    engine = engine_of(oracle.model, prefill_chunk=4)
    first, second = (engine.add_request(TEXT[:29], greedy(3)) for _ in range(2))
    for _ in range(4):
        engine.step()
    waiting = engine.scheduler.running[1]
    assert waiting.wave is None
    engine.abort(first)
    oracle.check(run(engine)[second], 3)
    assert 0 < waiting.cached_tokens < 28
    idle(engine)


def test_what_makes_other_entries_is_told_apart(model: MoRForCausalLM, oracle: Oracle) -> None:
    engine = engine_of(model)
    assert cached(engine, TEXT[:20]) == 0
    assert cached(engine, TEXT[:20], max_depth=1) == 0
    assert cached(engine, TEXT[:20], boundaries=[0.0, 0.0, 0.0]) == 0
    assert cached(engine, TEXT[:20]) == 16
    for depth in (1, 3):
        (output,) = engine.generate(TEXT[:20], greedy(4, max_depth=depth))
        assert output.completions[0].cached_tokens == 16
        oracle.check(output, 4, depth)


def test_a_request_that_needs_logits_of_its_prompt_computes_it(oracle: Oracle) -> None:
    engine = engine_of(oracle.model)
    engine.generate(TEXT[:20], greedy(1))
    name = engine.add_request(TEXT[:20], greedy(2))
    engine.scheduler.waiting[0].needs_prompt_logits = True
    output = run(engine)[name]
    oracle.check(output, 2)
    assert output.completions[0].cached_tokens == 0


def test_off_keeps_nothing(model: MoRForCausalLM) -> None:
    engine = engine_of(model, prefix_caching=False)
    for _ in range(2):
        assert cached(engine, TEXT[:20]) == 0
    assert engine.metrics()["pages_kept"] == 0
    with pytest.raises(MorError, match="prefix_caching"):
        engine_of(model, prefix_caching=1)


def test_forgotten_texts_are_computed_again(model: MoRForCausalLM) -> None:
    engine = engine_of(model)
    engine.generate(TEXT[:20], greedy(1))
    assert engine.metrics()["pages_kept"] > 0
    engine.forget_prefixes()
    assert engine.metrics()["pages_kept"] == 0
    assert cached(engine, TEXT[:20]) == 0
    idle(engine)


def test_what_was_unused_longest_goes_first(model: MoRForCausalLM, oracle: Oracle) -> None:
    """Room for two texts: the one that was asked for again stays."""
    engine = engine_of(model, num_pages=pages_for(model.config, 40, 3, 4))
    texts = [random_ids(seed, 17).tolist() for seed in range(3)]
    for text, count in [(0, 0), (1, 0), (0, 16), (2, 0), (0, 16)]:
        assert cached(engine, texts[text], 1) == count
        engine.check_integrity()
    assert cached(engine, texts[1], 1) < 16
    engine.reset_stats()
    names = [engine.add_request(text, greedy(20)) for text in texts]  # more than there is room for
    done = run(engine)
    for name in names:
        oracle.check(done[name], 20)
    assert engine.stats.preemptions > 0
    idle(engine)


def test_requests_that_share_pages_are_admitted_by_what_they_add(model: MoRForCausalLM) -> None:
    """Four texts of 48 tokens in pages for 96: they have 44 tokens in common."""
    pages = pages_for(model.config, 96, 3, 4)
    engine = engine_of(model, num_pages=pages, max_num_seqs=4)
    engine.generate(TEXT[:44], greedy(1))
    for number in range(4):
        engine.add_request([*TEXT[:44], number, 1, 2, 3], greedy(1))
    most = 0
    while engine.unfinished:
        engine.step()
        engine.check_integrity()
        most = max(most, len(engine.scheduler.running))
    assert most == 4
    assert engine.stats.preemptions == 0


def test_drawn_tokens_do_not_change(model: MoRForCausalLM) -> None:
    asked = SamplingParams(max_tokens=8, temperature=1.2, seed=4)
    engine = engine_of(model)
    answers = [engine.generate(TEXT[:25], asked)[0].completions[0] for _ in range(3)]
    assert answers[0].token_ids == answers[1].token_ids == answers[2].token_ids
    assert [done.cached_tokens for done in answers] == [0, 24, 24]


def lose(engine: Engine) -> None:
    engine.store.pool.let_go(engine.store.prefixes.nodes()[0].pages()[:1])


def count_twice(engine: Engine) -> None:
    engine.store.pool.keep(engine.store.prefixes.nodes()[0].pages()[:1])


def turn_over(engine: Engine) -> None:
    engine.store.prefixes._order.move_to_end(engine.store.prefixes.nodes()[0])


@pytest.mark.parametrize(
    ("harm", "message"),
    [(lose, "pages"), (count_twice, "kept"), (turn_over, "would go before")],
)
def test_harm_to_what_is_kept_is_found(model: MoRForCausalLM, harm: Any, message: str) -> None:
    engine = engine_of(model)
    engine.generate(TEXT[:20], greedy(1))
    engine.check_integrity()
    harm(engine)
    with pytest.raises(MorError, match=message):
        engine.check_integrity()
