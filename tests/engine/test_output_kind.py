"""All so far, what is new, or the end alone: the same answer, however it is told."""

from __future__ import annotations

from typing import Any

import pytest

from mor.engine import Completion, Engine
from mor.errors import MorError
from tests.engine.oracle import greedy, idle
from tests.engine.test_text import tokenizer
from tests.strategies import make_model, random_ids, small_config

SIZES: dict[str, Any] = {"max_num_seqs": 3, "max_residents": 4, "prefill_chunk": 4}


@pytest.fixture(scope="module")
def engine() -> Engine:
    model = make_model(small_config("threshold", vocab_size=len(tokenizer())), 1)
    return Engine(model, tokenizer(), max_model_len=40, **SIZES)


def told(engine: Engine, kind: str, n: int = 1, **fields: Any) -> list[list[Completion]]:
    """What is told of each completion of a few requests beside each other, in order."""
    for place in range(3):
        asked = greedy(7 + place, output_kind=kind, n=n, **fields)
        engine.add_request(random_ids(place, 3 + 4 * place).tolist(), asked, str(place))
    found: dict[tuple[str, int], list[Completion]] = {}
    while engine.unfinished:
        for output in engine.step():
            for done in output.completions:
                found.setdefault((output.request_id, done.index), []).append(done)
    idle(engine)
    return [found[key] for key in sorted(found)]


def join(pieces: list[Completion]) -> tuple[Any, ...]:
    """The whole answer."""
    assert pieces[-1].finish_reason is not None
    return (
        tuple(token for piece in pieces for token in piece.token_ids),
        "".join(piece.text or "" for piece in pieces),
        tuple(depth for piece in pieces for depth in piece.depths),
        tuple(one for piece in pieces for one in piece.logprobs or ()),
        pieces[-1].finish_reason,
        pieces[-1].prompt_depths,
    )


@pytest.mark.parametrize("n", [1, 2])
def test_pieces_make_up_the_answer(engine: Engine, n: int) -> None:
    fields = {"temperature": 1.0, "seed": 3, "logprobs": 2} if n > 1 else {"logprobs": 0}
    whole = told(engine, "cumulative", n, **fields)
    pieces = told(engine, "delta", n, **fields)
    ends = told(engine, "final_only", n, **fields)
    assert len(whole) == len(pieces) == len(ends) == 3 * n
    for every, new, end in zip(whole, pieces, ends, strict=True):
        assert join(new) == join(every[-1:]) == join(end[-1:])
        assert every[-1].token_ids[: len(every[0].token_ids)] == every[0].token_ids
        assert sum(bool(one.token_ids) for one in new) == len(every[-1].token_ids)
        # A group is told where one of its completions ends, and not before.
        assert len(end) <= n
        assert end[-1].timings.total is not None


def test_one_that_is_given_up_tells_the_rest(engine: Engine) -> None:
    engine.add_request([1, 2, 3], greedy(9, output_kind="delta"), "given up")
    tokens: list[int] = []
    while len(tokens) < 3:
        for output in engine.step():
            tokens += output.completions[0].token_ids
    last = engine.abort("given up")
    assert last is not None
    assert last.completions[0].finish_reason == "abort"
    assert last.completions[0].token_ids == ()
    idle(engine)
    assert engine.step() == []


def test_generate_gives_whole_answers(engine: Engine) -> None:
    wanted = engine.generate([[1, 2, 3]], greedy(6))[0].completions[0]
    for kind in ("delta", "final_only"):
        found = engine.generate([[1, 2, 3]], greedy(6, output_kind=kind))[0].completions[0]
        assert (found.token_ids, found.text) == (wanted.token_ids, wanted.text)


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(MorError, match=r"output_kind='all'.*cumulative"):
        greedy(3, output_kind="all")
