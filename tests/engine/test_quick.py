"""A stage in one call gives the bits of the runner's own steps."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mor import MoRForCausalLM
from mor.engine import Engine, SamplingParams
from mor.engine import runner as runners
from mor.engine.quick import QuickStages
from mor.ops import native
from tests.engine.oracle import greedy
from tests.strategies import configs, make_model, random_ids, small_config

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.missing())


def write(model: MoRForCausalLM, whole: bool, **options: Any) -> tuple[list[Any], set[str]]:
    """Seven requests of 1 to 40 tokens at once; which stages ran in one call."""
    prompts = [random_ids(i, 1 + 13 * i % 40).tolist() for i in range(7)]
    asked: list[SamplingParams] = [greedy(7, logprobs=2)] * 7
    seen: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        if not whole:
            patch.setattr(runners, "make_quick_stages", lambda *_: QuickStages())
        engine = Engine(model, max_num_seqs=4, max_model_len=64, **options)
        made = native.LanePass.__call__

        def note(self: native.LanePass, *how: Any) -> Any:
            stages = engine.runner.quick
            seen.add(next(n for n in stages._fields if getattr(stages, n) is self))
            return made(self, *how)

        told_of = native.LanePass.write_entries

        def note_entries(self: native.LanePass, *how: Any) -> None:
            seen.add("entries")
            told_of(self, *how)

        patch.setattr(native.LanePass, "__call__", note)
        patch.setattr(native.LanePass, "write_entries", note_entries)
        found = engine.generate(prompts, asked)
    told = [
        (o.token_ids, o.depths, o.prompt_depths, o.logprobs) for f in found for o in f.completions
    ]
    return told, seen


@settings(max_examples=25)
@given(
    config=configs(routers=("fixed", "threshold", "expert_choice"), head_dim=16),
    seed=st.integers(0, 9),
    options=st.fixed_dictionaries(
        {
            "quantization": st.sampled_from([None, "int8"]),
            "page_size": st.sampled_from([1, 5, 16]),
            "kv_cache_dtype": st.sampled_from(["auto", "int8"]),
            "prefill_chunk": st.sampled_from([3, 64]),
        }
    ),
)
def test_the_same_bits(config: Any, seed: int, options: dict[str, Any]) -> None:
    model = make_model(config, seed)
    one, _ = write(model, True, **options)
    other, seen = write(model, False, **options)
    assert one == other
    assert not seen


@pytest.mark.parametrize("update_rule", ["gated", "additive", "residual", "last"])
@pytest.mark.parametrize("router", ["fixed", "threshold", "expert_choice"])
def test_what_it_is_for(router: str, update_rule: str) -> None:
    """Nothing falls back to single steps without being seen."""
    rule = {} if router == "fixed" else {"update_rule": update_rule}
    model = make_model(small_config(router, head_dim=16, **rule))
    one, seen = write(model, True)
    assert seen == {"start", "run", "finish"}
    assert one == write(model, False)[0]


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("fields", [{}, {"share_norms": False, "num_recursion_layers": 2}])
def test_how_tokens_ended(fields: dict[str, Any], quantization: str | None) -> None:
    config = small_config("threshold", "propagate", head_dim=16, **fields)
    model = make_model(config)
    one, seen = write(model, True, quantization=quantization)
    assert seen == {"start", "run", "finish", "entries"}
    assert one == write(model, False, quantization=quantization)[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"router": "token_choice"},
        {"router": "random"},
        {"router_architecture": "mlp"},
        {"recursion_streams": 2},
        {"recursion_seam": "norm_inject"},
    ],
)
def test_what_it_does_not_know(fields: dict[str, Any]) -> None:
    model = make_model(small_config(**({"router": "threshold", "head_dim": 16} | fields)))
    assert write(model, True)[1] <= {"finish"}


class Louder(nn.Embedding):
    """As an adapter on the embedding: more than its rows."""

    def forward(self, ids: Tensor) -> Tensor:
        return 2 * super().forward(ids)


def test_an_adapter_on_the_embedding_is_heard() -> None:
    model = make_model(small_config("threshold", head_dim=16, tie_word_embeddings=False))
    plain = write(model, True)[0]
    model.model.embed_tokens.__class__ = Louder
    louder, seen = write(model, True)
    assert seen == {"run", "finish"}
    assert louder != plain
    assert louder == write(model, False)[0]


def test_boundaries_of_a_request_are_heard() -> None:
    """They go through the router's own rule, step by step."""
    model = make_model(small_config("threshold", head_dim=16))
    engine = Engine(model, max_num_seqs=4, max_model_len=64)
    prompt = random_ids(3, 9).tolist()
    deep, flat = (
        engine.generate(prompt, greedy(6, boundaries=(-1e9, bound, bound)))[0].completions[0].depths
        for bound in (-1e9, 1e9)
    )
    assert set(deep) == {3}
    assert set(flat) == {1}
