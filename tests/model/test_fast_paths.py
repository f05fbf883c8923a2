"""Loss without logits, layers through the compiler: the same numbers as the plain network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from mor import MoRForCausalLM
from tests.strategies import KV_SHARING, ROUTERS, make_model, random_ids, small_config, train


def loss_and_grads(model: MoRForCausalLM, ids: Tensor, **how: object) -> tuple[Tensor, dict]:
    torch.manual_seed(0)  # the random router draws
    model.model.router.finish_step()
    model.zero_grad()
    out = train(model, ids, **how)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.loss.detach(), {name: grad.clone() for name, grad in grads.items()}


def same(one: tuple[Tensor, dict], two: tuple[Tensor, dict], near: float = 1e-5) -> None:
    assert_close(one[0], two[0], atol=near, rtol=near)
    assert one[1].keys() == two[1].keys()
    for name, grad in one[1].items():
        assert_close(grad, two[1][name], atol=near, rtol=10 * near, msg=name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("router", ["fixed", "expert_choice"])
def test_the_loss_alone_is_the_loss_of_the_logits(router: str, tied: bool) -> None:
    model = make_model(small_config(router, tie_word_embeddings=tied), 1)
    ids = random_ids(1, 3, 13)
    same(loss_and_grads(model, ids, return_logits=False), loss_and_grads(model, ids))
    out = model(ids, labels=ids, return_logits=False)
    assert out.logits is None
    assert model(ids, return_logits=False).logits is not None  # nothing else was asked for


def test_a_head_that_something_sits_on_is_called() -> None:
    """An adapter's wrapper is a module of its own; its forward must count."""

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: Tensor) -> Tensor:
            return self.inner(hidden) * 2

    model = make_model(small_config("fixed", tie_word_embeddings=False), 1)
    ids = random_ids(1, 2, 9)
    before = model(ids, labels=ids, return_logits=False).loss
    model.model.lm_head = Doubled(model.model.lm_head)  # type: ignore[assignment]
    after = model(ids, labels=ids, return_logits=False).loss
    assert_close(after, model(ids, labels=ids).loss)
    assert (after - before).abs() > 1e-3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own, about itself
def test_compiled_layers_equal_plain_ones() -> None:
    """One compilation serves all routers, KV modes, depths and lengths."""
    for router in ROUTERS:
        for kv_sharing in KV_SHARING if router in ("expert_choice", "threshold") else ("none",):
            model = make_model(small_config(router, kv_sharing, share_norms=False), 2)
            for width in (14, 9):
                ids = random_ids(2, 3, width)
                plain = loss_and_grads(model, ids)
                model.model.use_compiled_layers()
                compiled = loss_and_grads(model, ids)
                model.model.use_compiled_layers(False)
                same(plain, compiled, near=1e-4)
