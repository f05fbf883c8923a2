"""On the CPU's kernels a request's numbers are the same bits, whatever shares its batch.

PyTorch's own functions would not do: they take the last few numbers of a tensor in another way
than those before, so that a token's sigmoid hangs on how many tokens are beside it. Batches of a
few rows are too small to show that.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mor import MoRConfig
from mor.engine import Completion, Engine, SamplingParams
from mor.ops import native
from tests.engine.oracle import greedy
from tests.strategies import KV_SHARING, ROUTERS, make_model, random_ids, small_config

needs_kernels = pytest.mark.skipif(native.library() is None, reason=native.missing())

REQUESTS = 26
PROMPTS = [random_ids(i, 1 + 7 * i % 43).tolist() for i in range(REQUESTS)]
ALONE = range(0, REQUESTS, 4)
"""Those that are also run alone; each of the others is in three different batches."""

BATCHES: list[dict[str, Any]] = [
    {"max_num_seqs": REQUESTS, "max_residents": REQUESTS},
    {"max_num_seqs": 13, "prefill_chunk": 6, "min_gather": 3, "page_size": 3},
    {
        "max_num_seqs": 7,
        "prefill_chunk": 17,
        "min_gather": 1,
        "speculate": 3,
        "speculate_always": True,
    },
]


def check(
    config: MoRConfig,
    asked: list[SamplingParams] | None = None,
    quantization: Any = None,
    threads: int = 1,
    kv_cache_dtype: Any = "auto",
) -> None:
    """All of a request's numbers, in batches of many shapes, and alone on one thread."""
    model = make_model(config)
    asked = asked or [greedy(5, logprobs=3)] * REQUESTS

    def run(which: range, **knobs: Any) -> list[Completion]:
        options = {"quantization": quantization, "kv_cache_dtype": kv_cache_dtype}
        if config.interleaved:  # no depth can be left out
            knobs["speculate"] = 0
        engine = Engine(model, max_model_len=64, **options, **knobs)
        outputs = engine.generate([PROMPTS[i] for i in which], [asked[i] for i in which])
        return [output.completions[0] for output in outputs]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        first, *others = (run(range(REQUESTS), **knobs) for knobs in BATCHES)
    finally:
        torch.set_num_threads(before)
    alone = [run(range(i, i + 1), max_num_seqs=1)[0] for i in ALONE]
    pairs = [*zip(first, others[0], strict=True), *zip(first, others[1], strict=True)]
    pairs += [(first[i], own) for i, own in zip(ALONE, alone, strict=True)]
    for one, other in pairs:
        assert one.token_ids == other.token_ids
        assert one.depths == other.depths
        assert one.logprobs == other.logprobs


@needs_kernels
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("router", ROUTERS)
def test_every_router(router: str, quantization: str | None) -> None:
    check(small_config(router, head_dim=16), quantization=quantization)


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize(
    ("router", "fields"),
    [
        ("expert_choice", {"router_activation": "tanh"}),
        ("expert_choice", {"router_architecture": "mlp", "router_objective": "aux_router"}),
        ("threshold", {"router_architecture": "wide_mlp"}),
        ("threshold", {"update_rule": "residual", "router_temperature": 0.7}),
        ("threshold", {"router_gate_bias": 0.3}),
        ("token_choice", {"router_activation": "sigmoid"}),
        ("token_choice", {"router_activation": "softmax", "router_architecture": "mlp"}),
        ("threshold", {"hidden_size": 40, "intermediate_size": 72}),
        ("threshold", {"relaxation": "embeddings"}),
        ("expert_choice", {"relaxation": "gains", "use_qk_norm": True, "share_norms": False}),
    ],
)
def test_gates_routers_and_layers(router: str, fields: dict[str, Any]) -> None:
    check(small_config(router, **{"head_dim": 16} | fields))


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_low_rank_maps(quantization: str | None) -> None:
    fields: dict[str, Any] = {"relaxation": "lora", "relaxation_alpha": 2.0, "mlp_bias": True}
    check(small_config("threshold", head_dim=16, **fields), quantization=quantization)


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("router", ["threshold", "token_choice"])
@pytest.mark.parametrize("kv_sharing", [kind for kind in KV_SHARING if kind != "none"])
def test_shared_keys_and_values(kv_sharing: str, router: str) -> None:
    check(small_config(router, kv_sharing, head_dim=16))


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("sharing", ["sequence", "middle_sequence"])
def test_layers_repeated_one_by_one(sharing: str) -> None:
    check(small_config("fixed", head_dim=16, sharing=sharing, num_recursion_layers=2))


@needs_kernels
@pytest.mark.parametrize("kv_cache_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("kv_sharing", ["none", "recursive_update", "propagate"])
def test_smaller_entries(kv_sharing: str, kv_cache_dtype: str) -> None:
    check(small_config("threshold", kv_sharing, head_dim=16), kv_cache_dtype=kv_cache_dtype)


@needs_kernels
def test_drawn_tokens() -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"top_p": 0.8},
        {"top_k": 5, "min_p": 0.05},
        {"repetition_penalty": 1.3, "top_p": 0.95},
    ]
    asked = [
        SamplingParams(max_tokens=5, temperature=0.5 + i / 40, seed=i, logprobs=2, **kinds[i % 4])
        for i in range(REQUESTS)
    ]
    check(small_config("threshold", head_dim=16), asked)


@needs_kernels
def test_any_number_of_threads() -> None:
    check(small_config("expert_choice", head_dim=16, router_architecture="mlp"), threads=2)


@pytest.mark.parametrize("router", ROUTERS)
def test_without_kernels_what_moves_is_rounding(
    router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain forms promise no bits: in float64 a batch moves a log-probability by rounding."""
    monkeypatch.setattr(native, "library", lambda: None)
    model = make_model(small_config(router, head_dim=16), dtype=torch.float64)
    asked = greedy(4, logprobs=1)
    together = Engine(model, max_num_seqs=20, max_model_len=64).generate(PROMPTS[:20], asked)
    alone = Engine(model, max_num_seqs=1, max_model_len=64, prefill_chunk=9)
    for prompt, output in zip(PROMPTS[:20:3], together[::3], strict=True):
        one = alone.generate([prompt], asked)[0].completions[0]
        other = output.completions[0]
        assert (one.token_ids, one.depths) == (other.token_ids, other.depths)
        assert one.logprobs is not None
        assert other.logprobs is not None
        for own, their in zip(one.logprobs, other.logprobs, strict=True):
            assert own.logprob == pytest.approx(their.logprob, abs=1e-9)
