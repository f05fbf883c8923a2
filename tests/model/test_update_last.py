"""``update_rule="last"``: the block's output itself, and a gradient for the router all the same."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from mor import MoRConfig, MoRForCausalLM
from tests.strategies import KV_SHARING, ROUTED, make_model, random_ids, small_config

FULL = [1.0, 1.0, 1.0]
SELECTING = tuple(router for router in ROUTED if router != "token_choice")


def plain_recursive(model: MoRForCausalLM) -> MoRForCausalLM:
    """The same weights without a router: every token runs every depth."""
    fields = model.config.to_dict() | {"router": "fixed", "router_activation": None}
    plain = MoRForCausalLM(MoRConfig(**fields)).to(model.dtype)
    weights = {k: v for k, v in model.state_dict().items() if ".router." not in k}
    plain.load_state_dict(weights)
    return plain


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", SELECTING)
@pytest.mark.parametrize("training", [False, True])
def test_full_capacities_are_the_plain_recursive_model(
    router: str, kv_sharing: str, training: bool
) -> None:
    """To the last bit: logits, and every gradient of what both models have."""
    fields = {"update_rule": "last", "router_capacities": FULL, "router_objective": "none"}
    routed = make_model(small_config(router, kv_sharing, **fields)).train(training)
    plain = plain_recursive(routed).train(training)
    ids = random_ids(0, 2, 13)
    grads = []
    for model in (routed, plain):
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        named = dict(model.named_parameters())
        grads.append({name: p.grad for name, p in named.items() if ".router." not in name})
    with torch.no_grad():
        one, other = (model(ids, use_cache=False) for model in (routed, plain))
    assert_close(one.logits, other.logits, rtol=0, atol=0)
    assert (one.depths == 3).all()
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert grad is not None
        assert_close(grad, grads[1][name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("router", ["expert_choice", "threshold", "token_choice"])
def test_the_router_learns_and_scales_nothing(router: str) -> None:
    model = make_model(small_config(router, update_rule="last", router_objective="none")).train()
    ids = random_ids(1, 2, 12)
    model(ids, labels=ids).lm_loss.backward()
    grad = model.model.router.net.weight.grad
    assert grad is not None
    assert float(grad.abs().max()) > 0
    model.eval()
    outputs = []
    with torch.no_grad():
        for alpha in (0.1, 1.0):  # a gate's size: it must not be seen
            model.config.router_alpha = alpha
            outputs.append(model(ids, use_cache=False).logits)
    assert_close(outputs[0], outputs[1], rtol=0, atol=0)


def test_the_gates_gradient_is_what_the_pass_changes() -> None:
    """d loss / d g is the loss's gradient at the new stream, times what the pass changed."""
    router = make_model(small_config("threshold", update_rule="last")).model.router
    base, output, slope = torch.randn(3, 1, 5, 32).unbind()
    gate = torch.rand(1, 5, requires_grad=True)
    output.requires_grad_()
    new = router.combine(base, output, gate)
    assert torch.equal(new, output)
    by_gate, by_output = torch.autograd.grad((new * slope).sum(), (gate, output))
    assert_close(by_gate, ((output - base) * slope).sum(-1).detach())
    assert torch.equal(by_output, slope)
    with torch.no_grad():
        assert router.combine(base, output, gate) is output
