"""Guesses change no token: greedy and seeded ones are equal, others have the same distribution."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from mor.engine import Engine, SamplingParams
from mor.engine.draft import Draft
from mor.engine.memory import pages_for
from mor.engine.request import Request
from mor.engine.sampler import sample
from mor.engine.verify import Check, guess
from mor.errors import MorError
from tests.engine.oracle import Oracle, greedy, idle
from tests.engine.test_constraint import Word
from tests.engine.test_sampler import request
from tests.strategies import KV_SHARING, ROUTERS, VOCAB, make_model, random_ids, small_config

NEW = 9
PROMPTS = [random_ids(i, 2 + i).tolist() for i in range(4)]


def speculating(model: Any, guesses: int = 3, **knobs: Any) -> Engine:
    knobs = {"max_model_len": 40, "page_size": 4, "num_pages": 2000} | knobs
    return Engine(model, speculate=guesses, speculate_always=True, **knobs)


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ROUTERS)
def test_greedy_tokens_and_depths_are_those_without(router: str, kv_sharing: str) -> None:
    model = make_model(small_config(router, kv_sharing), 1, torch.float64)
    oracle = Oracle(model)
    odd = (ROUTERS.index(router) + KV_SHARING.index(kv_sharing)) % 2
    knobs = {"draft_depth": 2, "max_num_seqs": 2} if odd else {"page_size": 1, "prefill_chunk": 4}
    engine = speculating(model, **knobs)
    for output in engine.generate(PROMPTS[1:], greedy(NEW)):
        oracle.check(output, NEW)
    idle(engine)
    assert engine.stats.accepted_tokens > 0


class Letters:
    """One letter per token."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(ord("A") + i) for i in ids)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(small_config("threshold", "recursive_update"), 1, torch.float64)


ASKED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6, "top_k": 9, "n": 2},
    {"top_p": 0.8, "min_p": 0.02, "logprobs": 2},
    {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 1},
    {"temperature": 0.0, "logit_bias": {3: 4.0, 5: -9.0}, "prompt_logprobs": 1},
    {"temperature": 0.0, "max_depth": 2},
    {"temperature": 0.0, "max_depth": 1},
    {"temperature": 0.0, "boundaries": (0.0, 0.3, 0.1)},
    {"bad_words": [[3], [5, 6]], "min_tokens": 5, "stop_token_ids": list(range(0, VOCAB, 3))},
    {"temperature": 0.0, "min_tokens": 3, "stop_token_ids": list(range(0, VOCAB, 2))},
    {"temperature": 0.0, "stop": ["b", "Q", "RS", "s", "^"], "include_stop": True},
    {"max_tokens": 1},
    {"max_tokens": 2},
    {"grammar": Word((7, 8, 9, 10), VOCAB)},
]


def test_whatever_is_asked_the_answer_is_the_one_without(model: Any) -> None:
    """All together in one batch, twice, so that the second time finds cached texts."""
    asked = [SamplingParams(**{"max_tokens": 9, "seed": i} | own) for i, own in enumerate(ASKED)]
    prompts = [PROMPTS[i % 4] + PROMPTS[3] for i in range(len(asked))]
    plain = Engine(model, Letters(), max_model_len=40, page_size=4, num_pages=2000)
    guessing = speculating(model, tokenizer=Letters())
    for _ in range(2):
        pairs = zip(plain.generate(prompts, asked), guessing.generate(prompts, asked), strict=True)
        for one, other in pairs:
            assert one.prompt_token_ids == other.prompt_token_ids
            for own, guessed in zip(one.completions, other.completions, strict=True):
                same = ("token_ids", "text", "depths", "prompt_depths", "finish_reason")
                for name in (*same, "stop_reason", "cached_tokens"):
                    assert getattr(own, name) == getattr(guessed, name), name
                for before, after in zip(own.logprobs or (), guessed.logprobs or (), strict=True):
                    assert before.token == after.token
                    assert before.logprob == pytest.approx(after.logprob)
                    assert before.top == pytest.approx(after.top)
    assert guessing.stats.accepted_tokens > 40
    assert guessing.stats.new_depths == plain.stats.new_depths
    assert sum(guessing.stats.depths) > sum(plain.stats.depths)  # refused guesses
    idle(guessing)


def test_who_cannot_guess_goes_on_as_always(model: Any) -> None:
    """Grammars take nothing back; a cap at the draft's depth leaves nothing to check."""
    engine = speculating(model)
    for own in (greedy(4, grammar=Word((7, 8, 9, 10), VOCAB)), greedy(max_depth=1), greedy(2)):
        engine.generate(PROMPTS[0], own)
    assert engine.stats.drafts == 0
    engine.generate(PROMPTS[0], greedy(3))
    assert (engine.stats.drafts, engine.stats.draft_tokens) == (1, 1)


def test_guesses_make_nobody_give_way(model: Any) -> None:
    """With pages for two requests and no guess, nothing is guessed until one of them is over."""
    config = model.config
    engine = speculating(model, num_pages=2 * pages_for(config, 12, 3, 4), prefix_caching=False)
    engine.generate([PROMPTS[3], PROMPTS[2]], greedy(7))
    assert engine.stats.preemptions == 0
    assert engine.stats.drafts > 0


# Drawn without a seed -------------------------------------------------------------------------

TINY = 4


def say(table: Tensor, tokens: list[int]) -> Tensor:
    """[1, V] logits after the last token but the ones before it count too."""
    return table[tokens[-1], tokens[-2]][None]


def speculate_once(params: SamplingParams, full: Tensor, low: Tensor, draw: Any) -> Request:
    """At least two tokens after a prompt, by guesses from one table checked by another."""
    asked = request(params, prompt=(1, 2))
    asked.draw = draw
    while asked.made < 2:
        draft = asked.draft = Draft(2, 1, ())
        while not draft.complete:
            guess(asked, say(low, asked.tokens + draft.tokens))
        every = asked.tokens + draft.tokens
        rows = [say(full, every[: len(every) - 2 + place]) for place in range(3)]
        check = Check(asked, draft, torch.cat(rows))
        for place in range(3):
            token, _ = check.token(place)
            asked.tokens.append(token)
            if place == 2 or token != draft.tokens[place]:
                break
    return asked


@pytest.mark.parametrize(
    ("fields", "trials"),
    [({}, 800), ({"temperature": 0.7, "top_k": 3, "frequency_penalty": 0.8}, 300)],
)
def test_two_tokens_have_the_distribution_of_the_full_model(
    fields: dict[str, Any], trials: int
) -> None:
    params, tables = SamplingParams(**fields), torch.Generator().manual_seed(5)
    full, low = torch.randn(2, TINY, TINY, TINY, generator=tables, dtype=torch.float64)
    low = 0.5 * (low + full)
    draw = random.Random(3)
    made = Counter(
        tuple(speculate_once(params, full, low, draw).new_tokens[:2]) for _ in range(trials)
    )
    grid = [(i + 0.5) / 100 for i in range(100)]
    chances = {}
    for first, one in Counter(ask(params, full, (), u) for u in grid).items():
        for second, two in Counter(ask(params, full, (first,), u) for u in grid).items():
            chances[first, second] = one * two / 100**2
    assert set(made) <= set(chances)
    wrong = sum((made[k] - trials * p) ** 2 / (trials * p) for k, p in chances.items())
    # Chi-square: mean n, variance 2 n; four deviations, and it is always the same draw.
    assert wrong < len(chances) + 4 * (2 * len(chances)) ** 0.5
    guessed = Counter(ask(params, low, (), u) for u in grid)
    firsts = Counter(first for first, _ in made.elements())
    gap = sum(abs(firsts[t] / trials - guessed[t] / 100) for t in range(TINY))
    assert gap > 0.1  # the guesses alone would be found out


def ask(params: SamplingParams, full: Tensor, new: tuple[int, ...], uniform: float) -> int:
    """The token at one random number."""

    class Told(random.Random):
        def random(self) -> float:
            return uniform

    asked = request(params, prompt=(1, 2), new=new)
    asked.draw = Told()
    return sample(say(full, asked.tokens), [asked])[0][0]


def test_draws_without_a_seed_run_through_the_engine(model: Any) -> None:
    engine = speculating(model)
    outputs = engine.generate(PROMPTS * 3, SamplingParams(max_tokens=9, logprobs=1))
    for output in outputs:
        (done,) = output.completions
        ids = [*output.prompt_token_ids, *done.token_ids]
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False, routing="causal").logits[0]
        logs = logits[len(output.prompt_token_ids) - 1 : -1].log_softmax(-1)
        wanted = logs.gather(1, torch.tensor(done.token_ids)[:, None])[:, 0].tolist()
        assert [one.logprob for one in done.logprobs or ()] == pytest.approx(wanted)
    assert engine.stats.draft_tokens > engine.stats.accepted_tokens > 0
    idle(engine)


def test_what_cannot_be_asked(model: Any) -> None:
    def refused(why: str, other: Any = model, **knobs: Any) -> None:
        with pytest.raises(MorError, match=why):
            Engine(other, max_model_len=40, **knobs)

    refused("speculate=-1", speculate=-1)
    refused("draft_depth=0", speculate=2, draft_depth=0)
    refused("draft_depth=3 must be less than the 3 recursions", speculate=2, draft_depth=3)
    refused("draft_depth=1 must be less than the 1 recursions", speculate=2, max_depth=1)
    refused("speculate=4 must be less than prefill_chunk=4", speculate=4, prefill_chunk=4)
    refused("static_stages=False", speculate=2, static_stages=True)
    whole = make_model(small_config("fixed", sharing="sequence", num_recursion_layers=2))
    refused("sharing='sequence' runs all of them", whole, speculate=2)
