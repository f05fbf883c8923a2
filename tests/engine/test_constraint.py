"""What may not come next: grammars from outside, words that are not wanted, ends that are early."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mor.engine import Engine, SamplingParams
from mor.engine.constraint import Constraint, Grammar, allowed_tokens, restrict
from mor.engine.request import Request
from mor.engine.sampler import sample
from mor.errors import MorError
from tests.engine.oracle import greedy
from tests.engine.test_sampler import VOCABULARY, drawing_model, request


class Word:
    """One sequence of ids and nothing else."""

    def __init__(self, ids: tuple[int, ...], size: int = VOCABULARY, fails_at: int = -1) -> None:
        self.ids, self.size, self.at, self.fails_at = ids, size, 0, fails_at
        self.wrong = False

    def begin(self) -> Word:
        return Word(self.ids, self.size, self.fails_at)

    def allowed(self) -> Any:
        mask = np.zeros(self.size, dtype=bool)
        if not self.finished:
            mask[self.ids[self.at]] = True
        return mask

    def take(self, token: int) -> None:
        self.wrong |= self.finished or token != self.ids[self.at]
        self.at += 1

    @property
    def finished(self) -> bool:
        return self.at >= len(self.ids)

    @property
    def failed(self) -> bool:
        return self.wrong or self.at == self.fails_at


def made(params: SamplingParams, new: Any = (), stops: Any = ()) -> Request:
    asked = request(params, new=new)
    asked.stop_ids = frozenset(stops)
    asked.constraint = None if params.grammar is None else params.grammar.begin()
    return asked


def test_protocols() -> None:
    assert isinstance(Word((1,)), Grammar)
    assert isinstance(Word((1,)).begin(), Constraint)


@given(seed=st.integers(0, 999), rows=st.lists(st.booleans(), min_size=1, max_size=5))
def test_other_rows_keep_their_bits(seed: int, rows: list[bool]) -> None:
    scores = torch.randn(len(rows), VOCABULARY, generator=torch.manual_seed(seed))
    plain = SamplingParams(temperature=0.0)
    params = SamplingParams(temperature=0.0, grammar=Word((7,)))
    asked = [made(params if bound else plain) for bound in rows]
    out = restrict(scores, asked)
    for row, bound in enumerate(rows):
        if bound:
            assert out[row].isfinite().nonzero().flatten().tolist() == [7]
        else:
            assert torch.equal(out[row], scores[row])
    tokens, _ = sample(scores, asked)
    free = scores.argmax(-1).tolist()
    assert tokens == [7 if bound else free[row] for row, bound in enumerate(rows)]


def test_a_bias_cannot_leave_a_grammar_and_logprobs_are_the_models() -> None:
    logits = torch.zeros(1, VOCABULARY)
    params = SamplingParams(grammar=Word((7,)), logit_bias={3: 100.0}, logprobs=1, seed=0)
    tokens, likely = sample(logits, [made(params)])
    assert tokens == [7]
    assert likely[0].logprob == pytest.approx(-np.log(VOCABULARY))


@pytest.mark.parametrize(
    ("params", "new", "refused"),
    [
        ({"bad_words": [[5]]}, (), {5}),
        ({"bad_words": [[5, 6]]}, (), set()),
        ({"bad_words": [[5, 6]]}, (5,), {6}),
        ({"bad_words": [[1, 6]]}, (), set()),  # the prompt's 1 is not part of the output
        ({"bad_words": [[5, 5, 6], [5, 7]]}, (5, 5), {6, 7}),
        ({"min_tokens": 2}, (4,), {0, 9}),
        ({"min_tokens": 2}, (4, 4), set()),
        ({"min_tokens": 2, "bad_words": [[4]]}, (4,), {0, 4, 9}),
    ],
)
def test_what_may_not_come_next(params: dict[str, Any], new: Any, refused: set[int]) -> None:
    asked = made(SamplingParams(**params), new, stops=(0, 9))
    allowed = allowed_tokens(asked, VOCABULARY)
    assert set(np.flatnonzero(~allowed)) == refused


def test_a_grammar_goes_first() -> None:
    params = SamplingParams(grammar=Word((5,)), bad_words=[[5]], min_tokens=3)
    assert np.flatnonzero(allowed_tokens(made(params), VOCABULARY)).tolist() == [5]
    everything = [[token] for token in range(VOCABULARY)]
    assert allowed_tokens(made(SamplingParams(bad_words=everything)), VOCABULARY).all()


@pytest.mark.parametrize("size", [9, VOCABULARY + 10])
def test_masks_shorter_and_longer_than_the_vocabulary(size: int) -> None:
    params = SamplingParams(grammar=Word((5,), size))
    assert np.flatnonzero(allowed_tokens(made(params), VOCABULARY)).tolist() == [5]


def test_an_engine_ends_with_the_grammar() -> None:
    engine = Engine(drawing_model(), max_model_len=40)
    ids = (5, 6, 7)
    outputs = engine.generate(
        [[1, 2, 3]] * 4,
        [
            greedy(9, grammar=Word(ids)),
            greedy(9),
            greedy(2, grammar=Word(ids)),
            greedy(9, grammar=Word(ids, fails_at=2)),
        ],
    )
    found = [(o.completions[0].token_ids, o.completions[0].finish_reason) for o in outputs]
    (alone,) = engine.generate([[1, 2, 3]], greedy(9))
    assert found == [
        (ids, "stop"),
        (alone.completions[0].token_ids, alone.completions[0].finish_reason),
        (ids[:2], "length"),
        (ids[:2], "error"),
    ]
    engine.check_integrity()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"min_tokens": -1}, "min_tokens=-1"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 must be at most max_tokens=4"),
        ({"bad_words": "ab"}, "bad_words='ab' must be a list of lists"),
        ({"bad_words": [[]]}, "bad_words holds an empty list"),
        ({"bad_words": [["a"]]}, "bad_words: token id"),
        ({"grammar": "root"}, "grammar='root' must have a method begin"),
        ({"include_stop": 1}, "include_stop=1"),
        ({"skip_special_tokens": "no"}, "skip_special_tokens='no'"),
    ],
)
def test_wrong_fields(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(MorError, match=told):
        SamplingParams(**fields)
    with pytest.raises(MorError, match="bad_words names token id 99"):
        SamplingParams(bad_words=[[1, 99]]).check_vocabulary(VOCABULARY)
