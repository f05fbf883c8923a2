"""What the options of depth must not break, for each of them by name.

Property tests draw them too; here each is met for certain, alone and all together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from mor import MoRConfig, MoRForCausalLM
from mor.engine import Engine
from mor.errors import ConfigError
from mor.hf.load import serving_copy
from mor.model import DepthCache
from mor.model.flops import flops_per_token
from mor.ops import native
from tests.engine.oracle import Oracle, greedy
from tests.model.test_cache import decode, full
from tests.model.test_causality import check_prefix
from tests.model.test_checkpointing import check as check_checkpointing
from tests.model.test_recursion import compare
from tests.strategies import KV_SHARING, make_model, random_ids, small_config

SEAMS: dict[str, dict[str, Any]] = {
    "inject": {"recursion_seam": "norm_inject"},
    "inject one number": {"recursion_seam": "norm_inject", "recursion_seam_weight": "scalar"},
    "scalars": {"recursion_scalars": True},
    "inverse": {"recursion_scale": "inverse"},
    "streams": {"recursion_streams": 2},
}
OPTIONS: dict[str, dict[str, Any]] = {
    **SEAMS,
    "last": {"update_rule": "last"},
    "init bias": {"router_init_bias": 1.0},
    "two-layer router": {"router_architecture": "mlp"},
    "all": {
        "recursion_seam": "norm_inject",
        "recursion_scalars": True,
        "recursion_scale": "inverse",
        "recursion_streams": 3,
        "update_rule": "last",
        "router_architecture": "mlp",
        "router_init_bias": 0.5,
    },
}
MASKS = [[True] * 9, [False, True, True, False, True, True, True, False, True]]
ROUTERS = ("fixed", "threshold", "token_choice")
each_option = pytest.mark.parametrize("option", OPTIONS)
# Every option with every KV mode; routers go round, so that each meets every option and every mode.
each_case = pytest.mark.parametrize(
    ("option", "kv_sharing", "router"),
    [
        (option, mode, ROUTERS[(row + column) % 3])
        for row, option in enumerate(OPTIONS)
        for column, mode in enumerate(KV_SHARING)
    ],
)


def config_of(option: str, router: str = "threshold", kv: str = "none", **more: Any) -> MoRConfig:
    return small_config(router, kv, **OPTIONS[option] | more)


@each_case
def test_it_is_what_the_plain_form_says(option: str, kv_sharing: str, router: str) -> None:
    """Logits, depths, losses and gradients, with padding, under both routing rules."""
    for causal in (True, False):
        model = make_model(config_of(option, router, kv_sharing), 0, torch.float64)
        compare(model, [9, 6], MASKS, 3, causal)


@each_case
def test_it_is_causal_and_a_cache_changes_nothing(
    option: str, kv_sharing: str, router: str
) -> None:
    model = make_model(config_of(option, router, kv_sharing), 0, torch.float64)
    check_prefix(model, 0, 12, 7, routing="causal")
    ids, mask = random_ids(4, 2, 12), torch.ones(2, 12, dtype=torch.long)
    logits, depths = decode(model, DepthCache(model.config), ids, mask, [4, 5, 6, 11])
    wanted_logits, wanted_depths = full(model, ids, mask)
    assert torch.equal(depths, wanted_depths)
    assert_close(logits, wanted_logits, atol=1e-7, rtol=1e-7)


@each_option
def test_checkpointing_changes_nothing(option: str) -> None:
    check_checkpointing(config_of(option), 0)


@each_case
def test_the_engine_is_generate(option: str, kv_sharing: str, router: str) -> None:
    model = make_model(config_of(option, router, kv_sharing, head_dim=16))
    oracle, engine = Oracle(model), Engine(model, page_size=3, max_model_len=64, prefill_chunk=5)
    for output in engine.generate([random_ids(i, 2 + 3 * i).tolist() for i in range(4)], greedy()):
        oracle.check(output, 8)


@pytest.mark.skipif(native.library() is None, reason=native.missing())
@each_option
def test_the_engine_serves_bytes(option: str) -> None:
    model = make_model(config_of(option, head_dim=16))
    oracle = Oracle(serving_copy(model, "int8"))
    engine = Engine(model, quantization="int8", page_size=3, max_model_len=64, prefill_chunk=5)
    for output in engine.generate([random_ids(i, 2 + 3 * i).tolist() for i in range(4)], greedy()):
        oracle.check(output, 8)


@pytest.mark.skipif(native.library() is None, reason=native.missing())
@each_option
def test_a_request_has_the_same_bits_in_every_batch(option: str) -> None:
    model = make_model(config_of(option, head_dim=16))
    prompts = [random_ids(i, 1 + 7 * i % 23).tolist() for i in range(19)]
    asked = greedy(5, logprobs=3)
    together = Engine(model, max_num_seqs=19, prefill_chunk=6).generate(prompts, asked)
    alone = Engine(model, max_num_seqs=1)
    for prompt, output in zip(prompts, together, strict=True):
        (single,) = alone.generate([prompt], asked)
        one, other = single.completions[0], output.completions[0]
        assert one.token_ids == other.token_ids
        assert one.depths == other.depths
        assert one.logprobs == other.logprobs


@each_option
def test_it_is_saved_and_loaded(option: str, tmp_path: Path) -> None:
    model = make_model(config_of(option))
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = random_ids(0, 2, 9)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize("option", ["scalars", "streams"])
def test_it_starts_without_effect(option: str) -> None:
    torch.manual_seed(0)
    model = MoRForCausalLM(config_of(option, "fixed")).double().eval()
    plain = MoRForCausalLM(small_config("fixed")).double().eval()
    state = model.state_dict()
    plain.load_state_dict({name: t for name, t in state.items() if ".seam." not in name})
    ids = random_ids(0, 2, 9)
    with torch.no_grad():
        assert_close(model(ids).logits, plain(ids).logits, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("router", ["expert_choice", "threshold", "token_choice"])
@pytest.mark.parametrize("architecture", ["linear", "mlp"])
def test_a_router_with_a_bias_starts_deep(router: str, architecture: str) -> None:
    """Before any training; without it about half of the tokens leave at each depth."""
    ids, depths = random_ids(0, 8, 32), {}
    for bias in (None, 0.0, 3.0):
        torch.manual_seed(0)
        fields = {"router_architecture": architecture, "router_init_bias": bias}
        model = MoRForCausalLM(small_config(router, initializer_range=0.1, **fields)).eval()
        with torch.no_grad():
            depths[bias] = model(ids, use_cache=False).depths
    assert float(depths[3.0].float().mean()) > 2.95
    assert float(depths[None].float().mean()) < 2.6
    assert torch.equal(depths[None], depths[0.0])  # a bias of 0 is none


@pytest.mark.parametrize("router", ["expert_choice", "threshold", "token_choice"])
def test_the_bias_learns(router: str) -> None:
    model = make_model(small_config(router, router_init_bias=1.0)).train()
    ids = random_ids(0, 2, 12)
    model(ids, labels=ids).loss.backward()
    grad = model.model.router.net.bias.grad
    assert grad is not None
    assert (grad != 0).any()


@pytest.mark.parametrize("option", SEAMS)
def test_the_seam_has_a_part_in_what_comes_out(option: str) -> None:
    """Otherwise the tests above could not fail for it; and every weight of it learns."""
    model = make_model(config_of(option, "fixed"), dtype=torch.float64)
    plain = make_model(small_config("fixed"), dtype=torch.float64)
    state = model.state_dict()
    plain.load_state_dict({name: t for name, t in state.items() if ".seam." not in name})
    ids = random_ids(0, 2, 9)
    with torch.no_grad():
        assert (model(ids).logits - plain(ids).logits).abs().max() > 1e-3
    model(ids, labels=ids).loss.backward()
    assert model.model.seam is not None
    for name, parameter in model.model.seam.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-9, name


@pytest.mark.parametrize("option", OPTIONS)
def test_it_costs_what_it_says(option: str) -> None:
    """Mixing streams: n for what enters, n^2 for the mixture, n for what is added, per channel."""
    config = config_of(option)
    plain = MoRConfig(**config.to_dict() | {"recursion_streams": 1})
    n, width = config.recursion_streams, config.hidden_size
    more = flops_per_token(config, 64).forward - flops_per_token(plain, 64).forward
    mixing = 2 * width * (n * n + 2 * n) if n > 1 else 0
    assert more == pytest.approx(mixing * sum(config.router_capacities), abs=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recursion_seam": "norm"}, "recursion_seam='norm' is not known"),
        ({"recursion_seam_weight": "token"}, "recursion_seam_weight='token' is not known"),
        ({"router_init_bias": "deep", "router": "threshold"}, "router_init_bias='deep' must be"),
        ({"recursion_streams": 0}, "recursion_streams=0 must be"),
        ({"recursion_scalars": 1}, "recursion_scalars=1 must be true or false"),
        (
            {"recursion_streams": 2, "sharing": "middle_sequence"},
            "recursion_streams=2 stands between passes of the whole block",
        ),
        (
            {"recursion_seam": "norm_inject", "num_recursions": 1},
            "recursion_seam='norm_inject' stands between recursions and needs num_recursions",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        MoRConfig(**{"num_recursions": 3} | fields)
