"""Sampling: the distribution of Transformers, draws of one's own, penalties, log-probabilities."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mor import MoRForCausalLM
from mor.engine import Engine, SamplingParams
from mor.engine.request import Request
from mor.engine.sampler import sample
from tests.engine.oracle import Oracle, greedy, idle, run
from tests.strategies import make_model, random_ids, small_config

VOCABULARY = 23


class Dial(random.Random):
    """Random numbers that are told."""

    def __init__(self, values: list[float]) -> None:
        super().__init__(0)
        self.values = iter(values)

    def random(self) -> float:
        return next(self.values)


def request(params: SamplingParams, prompt: Any = (1,), new: Any = (), seed: int = 0) -> Request:
    made = Request(
        group="r", index=0, prompt=tuple(prompt), params=params, max_new=99, limit=3,
        stop_ids=frozenset(), draw=random.Random(seed), text=None, arrival=0.0,
    )  # fmt: skip
    made.tokens += new
    return made


def distribution(logits: Tensor, params: SamplingParams, prompt: Any, new: Any) -> Tensor:
    """Shares of the tokens over an even grid of draws."""
    count, rows = 4000, 250
    dial = request(params, prompt, new)
    dial.draw = Dial([(i + 0.5) / count for i in range(count)])
    tokens: list[int] = []
    for _ in range(count // rows):
        tokens += sample(logits.expand(rows, -1), [dial] * rows)[0]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)).double() / count


def transformers_chances(logits: Tensor, params: SamplingParams, ids: list[int]) -> Tensor:
    steps: list[Any] = []
    if params.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    done = LogitsProcessorList(steps)(torch.tensor([ids]), logits.clone()[None])
    return done[0].softmax(-1)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 5},
        {"top_p": 0.7},
        {"top_k": 1},
        {"top_k": 99},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.8, "min_p": 0.1},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6, "top_k": 4, "top_p": 0.9},
    ],
)
def test_the_distribution_is_that_of_transformers(fields: dict[str, Any]) -> None:
    torch.manual_seed(len(str(fields)))
    logits = 2 * torch.randn(VOCABULARY, dtype=torch.float64)
    params = SamplingParams(**fields)
    prompt, new = (3, 5, 5), (7, 3)
    wanted = transformers_chances(logits, params, [*prompt, *new])
    found = distribution(logits, params, prompt, new)
    assert set(found.nonzero().flatten().tolist()) <= set(wanted.nonzero().flatten().tolist())
    assert_close(found, wanted, atol=6e-4, rtol=0.0)


@given(
    st.lists(st.integers(0, 8), min_size=2, max_size=6),
    st.integers(0, 2**20),
)
def test_batch_mates_change_no_draw(kinds: list[int], seed: int) -> None:
    fields: list[dict[str, Any]] = [
        {"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3},
        {"temperature": 1e-300}, {"logit_bias": {2: 5.0}}, {"repetition_penalty": 1.5},
        {"frequency_penalty": 1.0, "presence_penalty": -1.0, "logprobs": 2},
    ]  # fmt: skip
    torch.manual_seed(seed)
    logits = torch.randn(len(kinds), VOCABULARY)
    made = [
        [
            request(SamplingParams(**fields[k]), (1, 2), (2, 4), seed + i)
            for i, k in enumerate(kinds)
        ]
        for _ in range(2)
    ]
    together, told = sample(logits, made[0])
    for row, own in enumerate(made[1]):
        token, alone = sample(logits[row : row + 1], [own])
        assert token == [together[row]]
        assert alone == [told[row]]


def test_greedy_is_the_first_largest_logit() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [-9.0, -8.0, -8.5, -8.0]])
    params = SamplingParams(temperature=0)
    tokens, _ = sample(logits, [request(params), request(params)])
    assert tokens == [1, 1]


def test_a_temperature_near_zero_is_greedy_and_finite() -> None:
    logits = torch.randn(4, VOCABULARY)
    requests = [request(SamplingParams(temperature=1e-300), seed=i) for i in range(4)]
    assert sample(logits, requests)[0] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("fields", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.9}])
def test_the_ends_of_the_draw_give_tokens_that_may_come(
    uniform: float, fields: dict[str, Any]
) -> None:
    logits = torch.tensor([-torch.inf, 1.0, 2.0, -torch.inf, 0.5, -torch.inf])
    own = request(SamplingParams(**fields))
    own.draw = Dial([uniform])
    (token,), _ = sample(logits[None], [own])
    assert token in (1, 2, 4)


def test_presence_and_frequency_count_the_output_alone() -> None:
    logits = torch.zeros(1, 8)
    params = SamplingParams(
        temperature=0, presence_penalty=0.5, frequency_penalty=0.25, logprobs=8,
        logit_bias={1: 0.9, 2: 1.2, 3: 1.3, 0: 0.1},
    )  # fmt: skip
    # 0: 0.1, in the prompt only; 1: 0.9 - 0.75 once; 2: 1.2 - 1.0 twice; 3: 1.3 - 1.25 thrice.
    new = (1, 2, 2, 3, 3, 3)
    assert sample(logits, [request(params, (0, 0, 0), new)])[0] == [2]
    assert sample(logits, [request(params, (0, 0, 0), ())])[0] == [3]
    # What is told is the model's own.
    _, (told,) = sample(logits, [request(params, (0,), new)])
    assert told.logprob == pytest.approx(torch.tensor(1 / 8).log().item())


def test_logprobs_are_the_models() -> None:
    model = make_model(small_config("threshold"), 1, torch.float64)
    engine = Engine(model, max_model_len=40)
    params = SamplingParams(
        max_tokens=6, temperature=2.0, top_k=5, logprobs=3, seed=4, repetition_penalty=1.3
    )
    (output,) = engine.generate([[1, 2, 3]], params)
    done = output.completions[0]
    assert done.logprobs is not None
    with torch.no_grad():
        ids = torch.tensor([[1, 2, 3, *done.token_ids]])
        logs = model(ids, use_cache=False).logits[0].log_softmax(-1)
    for place, told in enumerate(done.logprobs):
        own = logs[2 + place]
        assert told.token == done.token_ids[place]
        assert told.logprob == pytest.approx(float(own[told.token]), abs=1e-9)
        best = own.topk(3)
        assert list(told.top) == best.indices.tolist()
        assert list(told.top.values()) == pytest.approx(best.values.tolist(), abs=1e-9)
    assert engine.generate([[1]], greedy(2))[0].completions[0].logprobs is None


def draws(engine: Engine, params: list[SamplingParams]) -> list[tuple[int, ...]]:
    every = [random_ids(i, 4).tolist() for i in range(len(params))]
    outputs = engine.generate(every, params)
    return [c.token_ids for output in outputs for c in output.completions]


def drawing_model() -> MoRForCausalLM:
    return make_model(small_config("threshold", initializer_range=0.1), 2, torch.float64)


def test_a_seed_decides_whoever_is_in_the_batch() -> None:
    model = drawing_model()
    params = [SamplingParams(max_tokens=12, seed=7 + i, temperature=1.3) for i in range(4)]
    wide = draws(Engine(model, max_model_len=40, max_num_seqs=4), params)
    narrow = draws(Engine(model, max_model_len=40, max_num_seqs=1, prefill_chunk=2), params)
    # 5 layers of 3 recursions at worst, pages of 2: two of them do not fit together.
    scarce = Engine(model, max_model_len=40, page_size=2, num_pages=50)
    assert draws(scarce, params) == wide == narrow
    assert scarce.stats.preemptions > 0
    assert len(set(wide)) == 4
    other = [SamplingParams(max_tokens=12, seed=70 + i, temperature=1.3) for i in range(4)]
    assert draws(Engine(model, max_model_len=40), other) != wide


def test_without_a_seed_every_run_is_another() -> None:
    model = drawing_model()
    params = [SamplingParams(max_tokens=12, temperature=1.5)]
    found = {tuple(draws(Engine(model, max_model_len=40), params)) for _ in range(4)}
    assert len(found) > 1


def test_n_completions_are_n_seeds() -> None:
    engine = Engine(drawing_model(), max_model_len=40)
    (output,) = engine.generate(
        [[1, 2, 3]], SamplingParams(max_tokens=10, temperature=1.4, seed=5, n=3)
    )
    assert [c.index for c in output.completions] == [0, 1, 2]
    assert len({c.token_ids for c in output.completions}) == 3
    for completion in output.completions:
        alone = SamplingParams(max_tokens=10, temperature=1.4, seed=5 + completion.index)
        (single,) = engine.generate([[1, 2, 3]], alone)
        assert single.completions[0].token_ids == completion.token_ids
    idle(engine)


def test_a_bias_forbids_and_forces() -> None:
    model = drawing_model()
    wanted = Oracle(model).tokens((1, 2, 3), 6)
    engine = Engine(model, max_model_len=40)
    (forced,) = engine.generate([[1, 2, 3]], greedy(4, logit_bias={9: 100.0}))
    assert forced.completions[0].token_ids == (9, 9, 9, 9)
    (without,) = engine.generate([[1, 2, 3]], greedy(6, logit_bias={wanted[0]: -100.0}))
    assert wanted[0] not in without.completions[0].token_ids


def test_greedy_with_a_repetition_penalty_is_that_of_generate() -> None:
    model = drawing_model()
    ids = torch.tensor([[1, 2, 3, 4]])
    wanted = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=15, do_sample=False,
        pad_token_id=0, repetition_penalty=1.6,
    )  # fmt: skip
    engine = Engine(model, max_model_len=40)
    engine.add_request(ids[0].tolist(), greedy(15, repetition_penalty=1.6), "penalised")
    done = run(engine)["penalised"].completions[0]
    assert list(done.token_ids) == wanted[0, 4:].tolist()
    assert list(done.token_ids) != Oracle(model).tokens((1, 2, 3, 4), 15)


def test_stop_ids_end_a_completion() -> None:
    model = drawing_model()
    wanted = Oracle(model).tokens((1, 2, 3), 8)
    stop = wanted[4]
    engine = Engine(model, max_model_len=40)
    (output,) = engine.generate([[1, 2, 3]], greedy(8, stop_token_ids=[stop], ignore_eos=True))
    done = output.completions[0]
    assert list(done.token_ids) == wanted[: wanted.index(stop) + 1]
    assert (done.finish_reason, done.stop_reason) == ("stop", stop)
