"""Every wrong field is refused with its name, its value and what would be right."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mor.engine import Engine, SamplingParams
from mor.errors import MorError
from tests.engine.oracle import greedy, idle
from tests.strategies import make_model, small_config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_tokens", 0, "max_tokens=0 must be a whole number of at least 1"),
        ("max_tokens", 2.5, "max_tokens=2.5 must be a whole number"),
        ("max_tokens", True, "max_tokens=True must be a whole number"),
        ("temperature", -0.1, "temperature=-0.1 must be a number of at least 0"),
        ("temperature", math.nan, "temperature=nan must be a number"),
        ("temperature", math.inf, "temperature=inf must be a number"),
        ("temperature", "hot", "temperature='hot' must be a number"),
        ("top_k", -1, "top_k=-1 must be a whole number of at least 0"),
        ("top_p", 0.0, "top_p=0.0 must be a number above 0 and at most 1"),
        ("top_p", 1.1, "top_p=1.1 must be a number above 0 and at most 1"),
        ("min_p", 1.5, "min_p=1.5 must be a number of at least 0 and at most 1"),
        ("repetition_penalty", 0, "repetition_penalty=0 must be a number above 0"),
        ("presence_penalty", 3, "presence_penalty=3 must be a number of at least -2 and at most 2"),
        ("frequency_penalty", None, "frequency_penalty=None must be a number"),
        ("logit_bias", [1], "logit_bias=\\[1\\] must map token ids to numbers"),
        ("logit_bias", {"a": 1.0}, "logit_bias: token id='a' must be a whole number"),
        ("logit_bias", {3: math.nan}, "logit_bias\\[3\\]=nan must be a number"),
        ("seed", -1, "seed=-1 must be a whole number of at least 0"),
        ("stop", "", "stop='' must be a text or a list of texts, none of them empty"),
        ("stop", ["a", 1], "stop=\\['a', 1\\] must be a text"),
        ("stop_token_ids", [-1], "stop_token_ids: token id=-1 must be a whole number"),
        ("stop_token_ids", "ab", "stop_token_ids='ab' must be a list of token ids"),
        ("ignore_eos", 1, "ignore_eos=1 must be true or false"),
        ("logprobs", 21, "logprobs=21 must be a whole number in 0..20"),
        ("n", 0, "n=0 must be a whole number of at least 1"),
        ("max_depth", 0, "max_depth=0 must be a whole number of at least 1"),
    ],
)
def test_a_wrong_field_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(MorError, match=message):
        SamplingParams(**{field: value})


def test_one_stop_or_several() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[3]).stop_token_ids == (3,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs=0 must be a whole number of at least 1"),
        ({"max_residents": -2}, "max_residents=-2 must be"),
        ({"min_gather": 0}, "min_gather=0 must be"),
        ({"prefill_chunk": 1.5}, "prefill_chunk=1.5 must be"),
        ({"page_size": 0}, "page_size=0 must be"),
        ({"num_pages": 0}, "num_pages=0 must be"),
        ({"max_model_len": 4096}, "max_model_len=4096 must be a whole number in 1..2048"),
        ({"max_model_len": 0}, "max_model_len=0 must be a whole number in 1..2048"),
        ({"max_depth": 4}, "max_depth=4 must be a whole number in 1..3"),
        ({"max_depth": 0}, "max_depth=0 must be a whole number in 1..3"),
        ({"memory_fraction": 1.5}, "memory_fraction=1.5 must lie between 0 and 1"),
        ({"memory_fraction": 1e-12}, "too few for one token; free some memory or set num_pages"),
        ({"policy": "best"}, "policy='best' is not known; use one of: refill, no_refill"),
    ],
)
def test_a_wrong_argument_of_the_engine_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MorError, match=message):
        Engine(make_model(small_config("threshold")), **options)


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(MorError, match=r"in training mode; call model\.eval\(\)"):
        Engine(make_model(small_config("threshold")).train())


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "prompt is empty; give at least one token"),
        ("text", {}, "prompt is a text, but the engine has no tokenizer"),
        ([1, 61], {}, "prompt holds token id 61; vocab_size=61 allows 0..60"),
        ([-1], {}, "prompt holds token id -1"),
        ([1.0], {}, "prompt holds 1.0; it must be a text or a list of token ids"),
        ([1] * 20, {}, "prompt of 20 tokens and max_tokens=None are past max_model_len=20"),
        ([1] * 10, {"max_tokens": 11}, "prompt of 10 tokens and max_tokens=11 are past"),
        ([1], {"stop": "x"}, "stop=\\('x',\\) needs a tokenizer; use stop_token_ids"),
        ([1], {"stop_token_ids": [61]}, "stop_token_ids names token id 61; vocab_size=61"),
        ([1], {"logit_bias": {99: 1.0}}, "logit_bias names token id 99; vocab_size=61"),
        ([1], {"max_depth": 4}, "max_depth=4 must be a whole number in 1..3"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_at_once(
    prompt: Any, params: dict[str, Any], message: str
) -> None:
    engine = Engine(make_model(small_config("threshold")), max_model_len=20)
    with pytest.raises(MorError, match=message):
        engine.add_request(prompt, SamplingParams(**params))
    with pytest.raises(MorError, match=message):  # one that is well does not stay behind
        engine.generate([[1], prompt], SamplingParams(**params))
    idle(engine)


def test_a_request_that_can_never_fit_into_the_pool_is_refused() -> None:
    """5 layers at worst, pages of 4 tokens: 12 pages hold 8 tokens, and the 9th is never cached."""
    engine = Engine(make_model(small_config("threshold")), page_size=4, num_pages=12)
    with pytest.raises(MorError, match="past the 9 that num_pages=12 hold; shorten one of them"):
        engine.add_request([1] * 5, greedy(5))
    (output,) = engine.generate([[1] * 5], greedy(4))
    assert len(output.completions[0].token_ids) == 4
    (output,) = engine.generate([[1] * 5], SamplingParams(temperature=0))  # as many as fit
    assert len(output.completions[0].token_ids) == 4
    assert output.completions[0].finish_reason == "length"


def test_the_longest_request_fills_the_model() -> None:
    engine = Engine(make_model(small_config("threshold"), dtype=torch.float64), max_model_len=20)
    (output,) = engine.generate([[1] * 5], SamplingParams(temperature=0))
    assert len(output.completions[0].token_ids) == 15


def test_a_name_in_use_is_refused() -> None:
    engine = Engine(make_model(small_config("threshold")), max_model_len=20)
    assert engine.add_request([1], greedy(2), "mine") == "mine"
    with pytest.raises(MorError, match="request_id='mine' is in use"):
        engine.add_request([1], greedy(2), "mine")
    engine.abort("mine")
    engine.add_request([1], greedy(2), "mine")
    with pytest.raises(MorError, match="1 requests of add_request are under way"):
        engine.generate([[1]])
    engine.abort("mine")
    with pytest.raises(MorError, match="params has 1 entries for 2 prompts"):
        engine.generate([[1], [2]], [greedy(2)])
    assert engine.generate([]) == []


def test_one_request_cannot_cap_layers_that_repeat_in_a_row() -> None:
    engine = Engine(make_model(small_config("fixed", sharing="sequence")), max_model_len=20)
    with pytest.raises(MorError, match="max_depth=2 cannot be asked for by one request"):
        engine.add_request([1], greedy(2, max_depth=2))
    engine.generate([[1]], greedy(2, max_depth=3))
