"""Caps on depth, the update rules, and the small networks inside routers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mor import MoRConfig
from mor.model.routers import (
    BoundaryRouter,
    ExpertChoiceRouter,
    FixedRouter,
)
from mor.model.routers.net import RouterNet
from tests.strategies import (
    ROUTERS,
    SEEDS,
    configs,
    make_model,
    random_ids,
    small_config,
)

NEAR = {"atol": 1e-6, "rtol": 1e-6}


@pytest.mark.parametrize("cap", [1, 2, 3])
@pytest.mark.parametrize("routing", ["causal", "topk"])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_cap_only_cuts(router: str, routing: str, cap: int) -> None:
    model = make_model(small_config(router))
    ids = random_ids(0, 2, 15)
    with torch.no_grad():
        free = model(ids, routing=routing)
        cut = model(ids, routing=routing, max_depth=cap)
    assert torch.equal(cut.depths, free.depths.clamp(max=cap))
    if cap == 3:
        assert torch.equal(cut.logits, free.logits)


@pytest.mark.parametrize("cap", [0, 4, -1])
def test_a_cap_outside_the_recursions_is_refused(cap: int) -> None:
    model = make_model(small_config("fixed"))
    with pytest.raises(ValueError, match=rf"max_depth={cap} must lie in 1\.\.num_recursions=3"):
        model(random_ids(0, 1, 3), max_depth=cap)


def test_token_choice_leaves_by_its_gate_even_where_a_cap_cuts_it() -> None:
    """h0 + g block(h0): the cap moves the exit, not the weight of what comes out."""
    config = small_config("token_choice", num_prelude_layers=0, num_coda_layers=0, router_alpha=0.7)
    model = make_model(config)
    ids = random_ids(0, 1, 11)
    network = model.model
    with torch.no_grad():
        out = network(ids, max_depth=1)
        origin = network.embed(ids)
        chances = 0.7 * (origin @ network.router.net.weight[0].T).softmax(-1)
        gate = chances.gather(-1, (chances + network.router.bias).argmax(-1, keepdim=True))
        network.router = FixedRouter(config)
        block = network(ids, max_depth=1).hidden
    assert_close(out.hidden, origin + gate * block, **NEAR)


@given(configs(routers=("expert_choice", "threshold"), update_rule="residual"), SEEDS, st.data())
def test_residual_with_full_gates_is_the_plain_recursive_model(
    config: MoRConfig, seed: int, data: st.DataObject
) -> None:
    """g = 1 and every token at every depth: h + (block(h) - h)."""
    config.router_capacities = [1.0] * config.num_recursions
    model = make_model(config, seed, torch.float64)
    router = model.model.router
    assert isinstance(router, BoundaryRouter)
    router.gate = torch.ones_like  # type: ignore[method-assign]
    fields = config.to_dict() | {"router": "fixed", "router_activation": None}
    plain = make_model(MoRConfig(**fields), seed, torch.float64)
    weights = {k: v for k, v in model.state_dict().items() if ".router." not in k}
    plain.load_state_dict(weights)
    ids = random_ids(seed, 2, data.draw(st.integers(1, 12)))
    with torch.no_grad():
        for routing in ("causal", "topk"):
            routed = model(ids, routing=routing, use_cache=False)
            assert_close(routed.logits, plain(ids, use_cache=False).logits, **NEAR)


@pytest.mark.parametrize(
    ("rule", "formula"),
    [
        ("gated", lambda h, y, g: h + g * y),
        ("additive", lambda h, y, g: h + y),
        ("residual", lambda h, y, g: h + g * (y - h)),
    ],
)
def test_update_rules(rule: str, formula: Any) -> None:
    router = ExpertChoiceRouter(small_config("expert_choice", update_rule=rule))
    h, y, g = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.rand(2, 5)
    assert_close(router.combine(h, y, g), formula(h, y, g[..., None]))
    assert_close(router.combine(h, y, None), formula(h, y, 1.0))
    low = router.combine(h.bfloat16(), y.bfloat16(), g)
    assert low.dtype == torch.bfloat16


@given(
    st.sampled_from(["linear", "mlp", "wide_mlp"]),
    st.sampled_from([1.0, 0.3]),
    st.integers(1, 4),
    st.integers(1, 3),
    SEEDS,
)
def test_a_depth_for_each_token_equals_one_for_all(
    architecture: Any, temperature: float, sets: int, outputs: int, seed: int
) -> None:
    torch.manual_seed(seed)
    config = small_config(
        "threshold", router_architecture=architecture, router_temperature=temperature
    )
    net = RouterNet(config, sets, outputs)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(2, 6, 32)
    index = torch.randint(sets, (2, 6))
    mixed = net(hidden, index)
    assert mixed.shape == (2, 6, outputs)
    for depth in range(sets):
        assert_close(mixed[index == depth], net(hidden, depth)[index == depth])


def test_temperature_divides_what_the_router_reads() -> None:
    nets = []
    for temperature in (1.0, 4.0):
        torch.manual_seed(0)
        net = RouterNet(small_config("threshold", router_temperature=temperature), 1, 1)
        torch.nn.init.normal_(net.weight)
        nets.append(net)
    hidden = torch.randn(3, 32)
    assert_close(nets[1](hidden, 0), nets[0](hidden / 4, 0))
