"""Log-probabilities of prompts are those of the model's own forward, whoever is in the batch."""

from __future__ import annotations

import random

import pytest
import torch

from mor.engine import Engine, SamplingParams
from mor.engine.memory import pages_for
from mor.errors import MorError
from mor.hf.modeling import MoRForCausalLM
from tests.engine.oracle import idle
from tests.strategies import make_model, small_config

ROUTERS = ["threshold", "expert_choice", "token_choice", "fixed"]


def own_logs(model: MoRForCausalLM, ids: list[int]) -> torch.Tensor:
    """[T - 1, V] log-probabilities of what follows each token."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)


@pytest.mark.parametrize("router", ROUTERS)
def test_they_are_the_models_own(router: str) -> None:
    model = make_model(small_config(router), 3, torch.float64)
    engine = Engine(
        model, max_num_seqs=3, prefill_chunk=5, page_size=2, max_model_len=40,
        num_pages=pages_for(model.config, 42, 3, 2),
    )  # fmt: skip
    draw = random.Random(1)
    prompts = [[draw.randrange(61) for _ in range(n)] for n in (1, 2, 5, 6, 30, 17, 40, 9)]
    asked = [
        SamplingParams(
            max_tokens=0 if len(ids) in (1, 6, 40) else 10,
            temperature=0.0,
            ignore_eos=True,
            prompt_logprobs=None if len(ids) == 9 else len(ids) % 4,
        )
        for ids in prompts
    ]
    outputs = engine.generate(prompts, asked)
    for ids, params, output in zip(prompts, asked, outputs, strict=True):
        done = output.completions[0]
        assert done.finish_reason == "length"
        assert len(done.token_ids) == params.max_tokens
        assert len(done.prompt_depths) == len(ids)
        if params.prompt_logprobs is None:
            assert done.prompt_logprobs is None
            continue
        assert done.prompt_logprobs is not None
        first, *others = done.prompt_logprobs
        assert first is None
        assert [one.token for one in others if one] == ids[1:]
        for row, one in zip(own_logs(model, ids), others, strict=True):
            assert one is not None
            assert one.logprob == pytest.approx(row[one.token].item(), abs=1e-4)
            assert one.rank is not None
            assert abs(one.rank - 1 - int((row > row[one.token]).sum())) <= 1  # but for ties
            best = row.topk(params.prompt_logprobs).values.tolist()
            assert list(one.top.values()) == pytest.approx(best, abs=1e-4)
    idle(engine)


@pytest.mark.parametrize("router", ["threshold", "fixed"])
def test_what_lies_before_the_first_one_asked_for_comes_from_the_cache(router: str) -> None:
    model = make_model(small_config(router), 3, torch.float64)
    engine = Engine(model, max_num_seqs=4, prefill_chunk=5, page_size=2, max_model_len=40)
    shared = list(range(1, 21))
    prompts = [[*shared, 30, 31, 32], [*shared, 40, 41, 42], [*shared, 30, 31, 32], shared[:4]]
    starts = [20, 20, 1, 9]  # the last one asks for tokens that the prompt has not
    asked = [
        SamplingParams(max_tokens=0, prompt_logprobs=1, prompt_logprobs_start=start)
        for start in starts
    ]
    engine.generate(prompts[0], asked[0])
    outputs = engine.generate(prompts, asked)
    cached = [output.completions[0].cached_tokens for output in outputs]
    assert cached[0] == cached[1] == 18  # whole pages before the token that foretells place 20
    assert cached[2] == 0
    for ids, start, output in zip(prompts, starts, outputs, strict=True):
        told = output.completions[0].prompt_logprobs
        assert told is not None
        assert all(one is None for one in told[:start])
        wanted = own_logs(model, ids)
        for place in range(start, len(ids)):
            one = told[place]
            assert one is not None
            assert one.logprob == pytest.approx(wanted[place - 1, ids[place]].item(), abs=1e-6)
    idle(engine)
    with pytest.raises(MorError, match=r"prompt_logprobs_start=0 must be"):
        SamplingParams(prompt_logprobs=1, prompt_logprobs_start=0)


def test_a_prompt_that_is_read_again_says_the_same() -> None:
    model = make_model(small_config("fixed"), 3, torch.float64)
    pages = pages_for(model.config, 16, 3, 1)
    engine = Engine(model, page_size=1, num_pages=pages, max_model_len=20)
    prompts = [[i, 2, 3 + i] for i in range(4)]
    params = SamplingParams(max_tokens=10, prompt_logprobs=0, ignore_eos=True)
    outputs = engine.generate(prompts, params)
    assert engine.stats.preemptions > 0
    for ids, output in zip(prompts, outputs, strict=True):
        told = [one.logprob for one in output.completions[0].prompt_logprobs or () if one]
        assert told == pytest.approx(own_logs(model, ids)[range(2), ids[1:]].tolist())


def test_they_are_the_same_for_each_of_n_and_while_it_goes_on() -> None:
    model = make_model(small_config("threshold"), 3)
    engine = Engine(model, prefill_chunk=4, max_model_len=40)
    name = engine.add_request(
        list(range(1, 20)), SamplingParams(max_tokens=3, n=2, prompt_logprobs=1, ignore_eos=True)
    )
    told = []
    while engine.unfinished:
        told += [done.prompt_logprobs for output in engine.step() for done in output.completions]
    assert name
    whole = [one for one in told if one is not None and len(one) == 19]
    assert len(whole) == len(told) == 6
    first, *others = ([one.logprob for one in told if one] for told in whole)
    assert all(one == pytest.approx(first, abs=1e-5) for one in others)


def test_a_prompt_alone_fills_what_there_is() -> None:
    model = make_model(small_config("threshold"), 3)
    read_only = SamplingParams(max_tokens=0, prompt_logprobs=0)
    engine = Engine(model, max_model_len=12)
    (output,) = engine.generate([[1] * 12], read_only)
    assert len(output.completions[0].prompt_logprobs or ()) == 12
    with pytest.raises(MorError, match="prompt of 13 tokens"):
        engine.add_request([1] * 13, read_only)
    scarce = Engine(model, page_size=4, num_pages=12)
    assert scarce.max_model_len == 9
    (output,) = scarce.generate([[1] * 8], read_only)
    assert len(output.completions[0].prompt_logprobs or ()) == 8
    with pytest.raises(MorError, match="past the 9 that num_pages=12 hold"):
        scarce.add_request([1] * 9, read_only)


def test_no_tokens_need_prompt_logprobs() -> None:
    with pytest.raises(MorError, match="max_tokens=0 must be"):
        SamplingParams(max_tokens=0)
    with pytest.raises(MorError, match=r"prompt_logprobs=21 must be a whole number in 0\.\.20"):
        SamplingParams(prompt_logprobs=21)
