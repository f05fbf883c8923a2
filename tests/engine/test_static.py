"""Stages over static buffers: exact, free of waits, and padding changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mor.engine import Engine, SamplingParams
from mor.engine.device import FlashInferAttention
from mor.engine.stages import Stage
from mor.errors import MorError
from tests.engine.oracle import Oracle, greedy, idle, run
from tests.ops.paged_contracts import WrapperContract
from tests.strategies import make_model, random_ids, small_config
from tests.waits import WaitError, no_waits

SIZES: dict[str, Any] = {
    "page_size": 3, "max_model_len": 40, "max_num_seqs": 3, "max_residents": 5, "prefill_chunk": 4,
}  # fmt: skip
CASES = [
    ("threshold", "none"), ("threshold", "recursive"), ("threshold", "recursive_update"),
    ("threshold", "propagate"), ("expert_choice", "none"), ("token_choice", "recursive"),
    ("random", "none"), ("fixed", "none"),
]  # fmt: skip


def prompts(count: int) -> list[list[int]]:
    return [random_ids(i, 2 + 3 * i).tolist() for i in range(count)]


@pytest.mark.parametrize(("router", "kv_sharing"), CASES)
def test_whole_ticks_wait_for_nothing_but_their_reads_and_are_exact(
    router: str, kv_sharing: str
) -> None:
    """Tokens and depths are ``generate``'s, though a tick may read what the one before asked."""
    model = make_model(small_config(router, kv_sharing), 1, torch.float64)
    oracle = Oracle(model)
    engine = Engine(model, static_stages=True, **SIZES)
    for prompt in prompts(5):
        engine.add_request(prompt, greedy(6))
    found = {}
    with no_waits() as lint:
        for _ in range(200):
            if not engine.unfinished:
                break
            before = lint.reads
            found |= {out.request_id: out for out in engine.step() if out.finished}
            # Tokens before others enter, this tick, and the one before if that was not waited for.
            assert lint.reads - before <= 3
    assert len(found) == 5
    for output in found.values():
        oracle.check(output, 6)
    idle(engine)


def test_the_sampler_waits_for_nothing() -> None:
    """Draws, penalties, bias, unwanted words, log-probabilities: the same as read at once."""
    model = make_model(small_config("threshold"), 1, torch.float64)
    asked = [
        SamplingParams(max_tokens=6, seed=1, top_p=0.8, logprobs=3),
        SamplingParams(max_tokens=6, seed=2, top_k=5, presence_penalty=0.5, frequency_penalty=0.3),
        SamplingParams(max_tokens=6, seed=3, repetition_penalty=1.3, logit_bias={3: 2.0}),
        SamplingParams(max_tokens=6, temperature=0.0, logprobs=1, bad_words=[[4], [1, 2]]),
        SamplingParams(max_tokens=6, seed=4, min_tokens=3, stop_token_ids=[5, 6]),
    ]
    late = Engine(model, static_stages=True, **SIZES)
    for number, (prompt, params) in enumerate(zip(prompts(5), asked, strict=True)):
        late.add_request(prompt, params, str(number))
    with no_waits():
        outputs = run(late)
    for number, other in enumerate(Engine(model, **SIZES).generate(prompts(5), asked)):
        one, own = outputs[str(number)].completions[0], other.completions[0]
        assert one.token_ids == own.token_ids
        assert one.depths == own.depths
        for a, b in zip(one.logprobs or (), own.logprobs or (), strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-12)
            assert list(a.top) == list(b.top)


def test_draws_go_through_a_stage_and_are_those_of_the_plain_sampler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(small_config("threshold"), 1, torch.float64)
    asked = [
        SamplingParams(max_tokens=6, seed=1),
        SamplingParams(max_tokens=6, seed=2, temperature=0.5, top_k=5, min_p=0.1),
        SamplingParams(max_tokens=6, temperature=0.0),
        SamplingParams(max_tokens=6, seed=4, temperature=1.7, top_p=0.6),
        SamplingParams(max_tokens=3, seed=5, temperature=1e-6),
    ]
    plain = Engine(model, **SIZES).generate(prompts(5), asked)

    def refuse(*_: Any) -> None:
        raise AssertionError("the plain sampler was asked")

    monkeypatch.setattr("mor.engine.runner.choose", refuse)
    late = Engine(model, static_stages=True, **SIZES)
    for number, (prompt, params) in enumerate(zip(prompts(5), asked, strict=True)):
        late.add_request(prompt, params, str(number))
    with no_waits():
        outputs = run(late)
    for number, other in enumerate(plain):
        assert outputs[str(number)].completions[0].token_ids == other.completions[0].token_ids


def test_requests_give_way_and_are_given_up_while_answers_are_on_their_way() -> None:
    model = make_model(small_config("threshold"), 1, torch.float64)
    oracle = Oracle(model)
    engine = Engine(model, static_stages=True, num_pages=40, **SIZES | {"max_model_len": 24})
    for number, prompt in enumerate(prompts(6)):
        engine.add_request(prompt[:10], greedy(8), str(number))
    done = {}
    for step in range(300):
        if not engine.unfinished:
            break
        if step in (3, 4):
            engine.abort(str(step))
        done |= {out.request_id: out for out in engine.step() if out.finished}
        engine.check_integrity()
    assert engine.stats.preemptions
    assert set(done) == {"0", "1", "2", "5"}
    for output in done.values():
        oracle.check(output, 8)
    idle(engine)


def test_a_replay_over_other_numbers_is_a_fresh_call_and_padding_changes_nothing() -> None:
    kept = torch.zeros(9, dtype=torch.float64)

    def function(columns: Tensor) -> Tensor:
        place, number = columns
        kept.index_add_(0, place, number.double())
        return kept.index_select(0, place) * 2

    stage = Stage(function, [8, 0], 6, torch.device("cpu"))
    wanted = torch.zeros(8, dtype=torch.float64)
    for places in ([0, 3, 5], [1, 2], [7], [0, 1, 2, 3, 4, 5], [6, 5, 3]):
        numbers = [place + 1 for place in places]
        found = stage([places, numbers])
        wanted.index_add_(0, torch.tensor(places), torch.tensor(numbers).double())
        assert torch.equal(found, wanted[places] * 2)
        assert torch.equal(kept[:8], wanted)
    assert stage.size(3) == 4
    assert stage.size(5) == 6


def test_what_it_gives_is_written_over_as_a_graph_would() -> None:
    stage = Stage(lambda columns: columns[0] + 1, [0], 4, torch.device("cpu"))
    first = stage([[1, 2, 3]])
    stage([[4, 5, 6]])
    assert first.tolist() == [5, 6, 7]


def test_padded_places_touch_no_page_and_no_lane_but_the_spare_ones() -> None:
    """Three tokens in a stage of four: what is free holds what it held."""
    model = make_model(small_config("threshold", "recursive_update"), 1, torch.float64)
    engine = Engine(model, static_stages=True, num_pages=100, **SIZES)
    pool, size = engine.store.pool, SIZES["page_size"]
    for store in (pool.keys, pool.values):
        store[: 100 * size].fill_(torch.nan)
    engine.lanes.hidden[:-1].fill_(torch.nan)
    engine.add_request(prompts(1)[0] + [1], greedy(2))  # a chunk of three tokens
    engine.step()
    taken = set(range(100)) - set(pool.free_pages())
    free = [page for page in range(100) if page not in taken]
    assert free
    assert pool.keys.unflatten(0, (-1, size))[free].isnan().all()
    assert int((~engine.lanes.hidden[:-1].isnan()).any(1).sum()) == 3


@pytest.mark.parametrize("kv_sharing", ["none", "recursive_update", "propagate"])
def test_flashinfer_is_told_lengths_before_each_replay_and_by_the_host(kv_sharing: str) -> None:
    """Its wrapper asks for what it was given; it may, as it runs on the host."""
    model = make_model(small_config("threshold", kv_sharing), 1, torch.float64)
    lints: list[Any] = []

    class Wrapper(WrapperContract):
        def plan(self, **given: Any) -> None:
            self._lifted(super().plan, **given)

        def run(self, *given: Any) -> Tensor:
            return self._lifted(super().run, *given)

        def _lifted(self, method: Any, *given: Any, **named: Any) -> Any:
            for lint in lints:
                lint.lifted = True
            try:
                return method(*given, **named)
            finally:
                for lint in lints:
                    lint.lifted = False

    form = FlashInferAttention(
        model.config, torch.float64, torch.device("cpu"), make=Wrapper, workspace=1
    )
    oracle, engine = Oracle(model), Engine(model, static_stages=True, attention=form, **SIZES)
    assert engine.attention == "flashinfer"
    for prompt in prompts(4):
        engine.add_request(prompt, greedy(6))
    with no_waits() as lint:
        lints.append(lint)
        outputs = run(engine)
    assert len(outputs) == 4
    for output in outputs.values():
        oracle.check(output, 6)
    idle(engine)


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.tolist(),
        lambda t: t.numpy(),
        lambda t: t[0].item(),
        lambda t: bool(t[0] > 0),
        lambda t: t.nonzero(),
        lambda t: t[t > 1],
        lambda t: t.unique(),
        lambda t: t.masked_select(t > 1),
        lambda t: t.to("meta"),
        lambda t: t.repeat_interleave(t.long()),
    ],
)
def test_the_lint_catches_a_wait(wait: Any) -> None:
    numbers = torch.arange(3.0)
    with pytest.raises(WaitError), no_waits():
        wait(numbers)


def test_a_form_that_asks_for_lengths_is_refused() -> None:
    model = make_model(small_config("threshold"), 1, torch.float64)
    with pytest.raises(MorError, match="attention='rows'"):
        Engine(model, static_stages=True, attention="rows", **SIZES)
