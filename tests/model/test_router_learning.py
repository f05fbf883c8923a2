"""What each loss moves, how the load is balanced, and in which precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mor import MoRForCausalLM
from mor.model.routers import (
    TokenChoiceRouter,
)
from mor.model.routers.base import Candidates, Scores
from tests.strategies import (
    KV_SHARING,
    ROUTED,
    ROUTERS,
    make_model,
    random_ids,
    small_config,
    train,
)

NEAR = {"atol": 1e-6, "rtol": 1e-6}
EVERYONE = Candidates(None, 12, 12)


# Losses and their gradients -----------------------------------------------------------------------


def gradients(model: MoRForCausalLM, loss: Tensor) -> dict[str, float]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {
        name: 0.0 if grad is None else float(grad.abs().max())
        for name, grad in zip(names, found, strict=True)
    }


def test_the_auxiliary_router_learns_alone() -> None:
    """Its loss moves it and nothing else; the language-model loss never moves it."""
    model = make_model(small_config("expert_choice", router_objective="aux_router"))
    out = train(model, random_ids(0, 2, 12))
    assert set(out.router_losses) == {"aux_router_loss"}
    moved = gradients(model, out.router_losses["aux_router_loss"])
    for name, size in moved.items():
        assert (size > 0) == name.startswith("model.router.auxiliary."), name
    moved = gradients(model, out.lm_loss)
    assert moved["model.router.auxiliary.weight"] == 0
    assert moved["model.router.net.weight"] > 0


def test_the_auxiliary_router_decides() -> None:
    model = make_model(small_config("expert_choice", router_objective="aux_router"))
    ids = random_ids(0, 2, 12)
    with torch.no_grad():
        before = [model(ids, routing=kind).depths for kind in ("causal", "topk")]
        model.model.router.auxiliary.weight.neg_()
        after = [model(ids, routing=kind).depths for kind in ("causal", "topk")]
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_the_auxiliary_loss_reaches_the_trunk() -> None:
    """As in the authors' code: the targets are constants, the logits are not."""
    model = make_model(small_config("expert_choice"))
    moved = gradients(model, train(model, random_ids(0, 2, 12)).router_losses["aux_loss"])
    assert moved["model.block.0.mlp.up_proj.weight"] > 0
    assert moved["model.embed_tokens.weight"] > 0
    assert moved["model.router.net.weight"] > 0


@pytest.mark.parametrize("router", ROUTED)
def test_routing_learns_through_the_gate(router: str) -> None:
    model = make_model(small_config(router))
    moved = gradients(model, train(model, random_ids(0, 2, 12)).lm_loss)
    assert (moved.get("model.router.net.weight", 0.0) > 0) == (router != "random")


def test_balancing_loss_is_one_at_balance_and_more_elsewhere() -> None:
    config = small_config("token_choice", router_alpha=1.0)
    router = TokenChoiceRouter(config).train()
    logits = torch.eye(3).repeat(4, 1)[None] * 5
    for rows, wanted in ((logits, 1.0), (logits[:, :1].expand(1, 12, 3), None)):
        scores = Scores(gate=rows[..., 0], logits=rows, choice=rows.argmax(-1))
        loss = float(router.losses(scores, None, 0, EVERYONE)["balancing_loss"])
        peak = float(rows[0, 0].softmax(-1).max())
        assert loss == pytest.approx(1.0 if wanted else 3 * peak, abs=1e-5)
        assert router.losses(scores, None, 1, EVERYONE) == {}


def test_loss_free_bias_follows_the_load_and_never_enters_the_gate() -> None:
    config = small_config("token_choice", router_balancing="loss_free", router_alpha=1.0)
    model = make_model(config)
    router = model.model.router
    assert isinstance(router, TokenChoiceRouter)
    router.bias.zero_()
    ids = random_ids(0, 2, 12)
    with torch.no_grad():
        for _ in range(2):  # micro-batches add up
            depths = train(model, ids).depths
        assert train(model, ids).router_losses is None
        counts = torch.stack([(depths == d).sum() for d in (1, 2, 3)]).float()
        assert [load.tolist() for _, load in router.noted] == [counts.tolist()] * 3
        router.finish_step()
        assert_close(router.bias, 0.001 * torch.sign(counts.mean() - counts))
        assert not router.noted
        hidden = torch.randn(2, 5, 32)
        gates = []
        for bias in (0.0, 2.0):
            router.bias.copy_(torch.tensor([0.0, 0.0, bias]))
            started = router.start(hidden, 3)
            assert started is not None
            assert started.choice is not None
            chances = started.logits.softmax(-1)
            assert torch.equal(started.choice, (chances + router.bias).argmax(-1))
            picked = chances.gather(-1, started.choice[..., None]).squeeze(-1)
            assert_close(started.gate, picked)
            gates.append(started.gate)
        assert (started.choice == 2).all()
        assert (gates[0] - gates[1]).abs().max() > 0


def test_the_load_counts_each_real_token_once() -> None:
    model = make_model(small_config("token_choice"))
    ids = random_ids(0, 3, 9)
    mask = torch.arange(9) < torch.tensor([9, 4, 1])[:, None]
    with torch.no_grad():
        depths = model.train()(ids, attention_mask=mask).depths
        depths2 = model(ids[:1]).depths
    every = torch.cat((depths[mask], depths2[0]))
    load = sum(load for _, load in model.model.router.noted)
    assert load.tolist() == [int((every == d).sum()) for d in (1, 2, 3)]


# Precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ROUTED)
def test_routers_keep_float32_when_the_model_is_narrowed(router: str) -> None:
    model = make_model(small_config(router))
    state = {k: v.clone() for k, v in model.model.router.state_dict().items()}
    for narrow in (model.bfloat16, model.half, lambda: model.to(torch.bfloat16)):
        narrow()
        assert model.model.block[0].mlp.up_proj.weight.dtype != torch.float32
        for name, value in model.model.router.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, state[name])
    model.bfloat16()
    with torch.no_grad():
        out = model(random_ids(0, 2, 12), output_router_traces=True)
    assert out.logits.dtype == torch.bfloat16
    assert out.traces[0].scores.gate.dtype == torch.float32
    assert {v.dtype for v in model.double().model.router.state_dict().values()} <= {torch.float64}


def test_parts_and_gradients_stay_wide_too() -> None:
    model = make_model(small_config("threshold"))
    router, net = model.model.router, model.model.router.net
    train(model, random_ids(0, 2, 12)).loss.backward()
    wanted = net.weight.detach().clone(), net.weight.grad.clone(), router.boundary.clone()
    parameter = net.weight
    for narrow in (lambda: model.type(torch.float16), model.model.half, router.bfloat16):
        narrow()
        assert net.weight is parameter  # or an optimizer would hold another
        for mine, other in zip((net.weight, net.weight.grad, router.boundary), wanted, strict=True):
            assert torch.equal(mine, other)
            assert mine.dtype == torch.float32
    assert model.model.block[0].mlp.up_proj.weight.grad.dtype == torch.float16


def test_a_wrapper_that_narrows_leaves_scores_and_constants_in_float32() -> None:
    """Its ``to`` asks no model below it: the router's numbers are rounded, no more than that."""
    model = make_model(small_config("threshold"))
    torch.nn.Sequential(model).to(torch.bfloat16)
    with torch.no_grad():
        out = model(random_ids(0, 2, 12), output_router_traces=True)
    assert out.logits.isfinite().all()
    assert out.traces[0].scores.gate.dtype == torch.float32
    router = model.model.router
    router.boundary_steps.fill_(256)
    router.begin_step(0)
    router.boundary_steps += 1  # 257 is no number of bfloat16
    assert router.boundary_steps.tolist() == [257] * 3


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ROUTERS)
def test_mixed_precision_training_keeps_scores_in_float32(router: str, kv_sharing: str) -> None:
    model = make_model(small_config(router, kv_sharing))
    ids = random_ids(0, 2, 12)
    plain = train(model, ids, output_router_traces=True)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = train(model, ids, output_router_traces=True)
    out.loss.backward()
    assert_close(out.loss, plain.loss, atol=0.3, rtol=0.1)
    for trace in out.traces:
        if trace.scores.logits is not None:
            assert trace.scores.logits.dtype == torch.float32
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()
