"""A training step asks the device for nothing, whatever the router, but for one planned read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mor import MoRForCausalLM
from mor.config import MoRConfig
from mor.model import model as network
from mor.model.attend.rows import RowKV
from mor.model.layout import Layout
from mor.ops import planned
from mor.ops.segments import Segments
from tests.strategies import make_model, random_ids, small_config
from tests.waits import WaitError, no_waits

SHARING = ["none", "recursive", "recursive_update", "propagate"]
UNEQUAL = [(router, kv) for router in ("threshold", "token_choice") for kv in SHARING]
EQUAL = [(router, kv) for router in ("fixed", "expert_choice", "random") for kv in SHARING]


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if questions cost something here."""
    monkeypatch.setattr(planned, "may_ask", lambda device: False)
    # It looks at ids on the CPU alone, where that costs nothing.
    monkeypatch.setattr("mor.hf.network.check_ids", lambda *_: None)


def learn(model: MoRForCausalLM, ids: Tensor) -> Tensor:
    """One step; the loss."""
    model.model.router.begin_step(0)
    loss = model(ids, labels=ids).loss
    loss.backward()
    model.model.router.finish_step()
    return loss.detach()


@pytest.mark.parametrize(("router", "kv_sharing"), EQUAL + UNEQUAL)
def test_forward_backward_and_the_routers_step(
    router: str, kv_sharing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_a_gpu(monkeypatch)
    model = make_model(small_config(router, kv_sharing), 1, torch.float32).train()
    with no_waits() as lint:
        learn(model, random_ids(0, 2, 24))
    assert lint.reads == (router == "token_choice")
    assert model.model.block[0].self_attn.q_proj.weight.grad is not None


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize(("router", "kv_sharing"), UNEQUAL)
def test_numbers_are_those_of_asking(
    router: str, kv_sharing: str, even: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``even``: all scores are equal, so that fewer tokens go on than places are kept."""
    more = {"router_capacities": [0.75, 0.5, 0.25]} if router == "threshold" else {}
    config = small_config(router, kv_sharing, router_z_loss_coef=1e-2, **more)
    found = []
    for asking in (True, False):
        model = make_model(config, 1, torch.float64).train()
        if even:
            model.model.router.net.weight.data.zero_()
        if not asking:
            as_on_a_gpu(monkeypatch)
        loss = learn(model, random_ids(0, 3, 17))
        grads = {n: p.grad for n, p in model.named_parameters()}
        found.append((loss, grads, dict(model.named_buffers())))
    (loss, grads, kept), (own_loss, own_grads, own_kept) = found
    torch.testing.assert_close(own_loss, loss, rtol=1e-12, atol=1e-12)
    for name, grad in grads.items():
        own = own_grads[name]
        if grad is None or own is None:  # no token ran: nothing, or zeros
            assert grad is None or not grad.any(), name
            assert own is None or not own.any(), name
        else:
            torch.testing.assert_close(own, grad, rtol=1e-9, atol=1e-11, msg=name)
    for name, value in kept.items():
        torch.testing.assert_close(own_kept[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("apart", ["documents", "padding", "both"])
@pytest.mark.parametrize(("router", "kv_sharing"), EQUAL + UNEQUAL)
def test_documents_and_padding_are_asked_about_at_the_door_alone(
    router: str, kv_sharing: str, apart: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = random_ids(0, 2, 24)
    given, labels = {"document_ids": torch.tensor([[0] * 5 + [1] * 11 + [2] * 8, [0] * 24])}, ids
    if apart == "padding":
        mask = torch.ones_like(ids)
        mask[0, 17:] = mask[1, :3] = 0
        given, labels = {"attention_mask": mask}, ids.masked_fill(mask == 0, -100)

    if apart == "both":  # documents of one token, and a row of nothing
        ids = random_ids(0, 3, 24)
        mask = torch.ones_like(ids)
        mask[0, 5:7] = mask[1, :] = 0
        documents = torch.tensor([[0] * 4 + [1] + [2] * 19, [0] * 24, [0, 1, 2, 2] + [3] * 20])
        given = {"attention_mask": mask, "document_ids": documents}
        labels = ids.masked_fill(mask == 0, -100)

    config = small_config(router, kv_sharing)
    models = [make_model(config, 1, torch.float64).train() for _ in range(2)]

    def step(model: MoRForCausalLM) -> tuple[Tensor, list[Tensor]]:
        model.model.router.begin_step(0)
        loss = model(ids, labels=labels, **given).loss
        loss.backward()
        model.model.router.finish_step()
        return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]

    wanted, wanted_grads = step(models[0])
    as_on_a_gpu(monkeypatch)
    with no_waits() as lint:

        def lay(*args: Any, **more: Any) -> Layout | None:
            """The door: also what kernels are told of its runs, once for all layers."""
            lint.lifted = True
            found = Layout.of(*args, **more)
            assert found is not None
            assert isinstance(found.kv, RowKV)
            known = found.kv.everybody.segments
            assert isinstance(known, Segments)
            _ = known.groups, known.pieces, known.offsets
            lint.lifted = False
            return found

        monkeypatch.setattr(network, "Layout", SimpleNamespace(of=lay))
        loss, grads = step(models[1])
    assert lint.reads == (router == "token_choice")
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    for own, grad in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(own, grad, rtol=1e-9, atol=1e-11)


def test_on_the_cpu_sizes_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mor.hf.network.check_ids", lambda *_: None)
    config: MoRConfig = small_config("threshold")
    model = make_model(config, 1, torch.float32).train()
    with pytest.raises(WaitError), no_waits():
        learn(model, random_ids(0, 2, 24))
