"""Gradient checkpointing changes memory, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from torch.testing import assert_close

from mor import MoRConfig, MoRForCausalLM
from mor.model.routers import TokenChoiceRouter
from tests.strategies import (
    KV_SHARING,
    ROUTERS,
    SEEDS,
    configs,
    distinct_rows,
    make_model,
    pad_rows,
    small_config,
)

NEAR = {"atol": 1e-6, "rtol": 1e-6}
MASKS = [[True] * 11, [False] * 4 + [True] * 7]


def switch(model: MoRForCausalLM, on: bool) -> None:
    """By Transformers' own method, which has changed its name."""
    does = "enable" if on else "disable"
    new, old = f"activation_checkpointing_{does}", f"gradient_checkpointing_{does}"
    getattr(model, new if hasattr(model, new) else old)()


def train_step(model: MoRForCausalLM, seed: int) -> tuple[torch.Tensor, int]:
    """Loss with gradients left in the model, and how often a layer of the block was run."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    norms = [layer.post_attention_layernorm for layer in model.model.block]
    handles = [norm.register_forward_hook(count) for norm in norms]
    ids, mask = pad_rows(distinct_rows(seed, [11, 7]), MASKS, seed)
    torch.manual_seed(seed)  # the random router draws
    model.train()
    out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    out.loss.backward()
    for handle in handles:
        handle.remove()
    return out.loss.detach(), calls


def check(config: MoRConfig, seed: int) -> None:
    plain = make_model(config, seed, torch.float64)
    saving = copy.deepcopy(plain)
    switch(saving, True)
    loss, calls = train_step(plain, seed)
    saved_loss, saved_calls = train_step(saving, seed)
    assert saved_calls == 2 * calls  # it was really done: each layer ran again
    assert_close(saved_loss, loss, **NEAR)
    grads = dict(saving.named_parameters())
    for name, parameter in plain.named_parameters():
        grad = grads[name].grad
        assert (grad is None) == (parameter.grad is None), name
        if grad is not None:
            assert_close(grad, parameter.grad, **NEAR)
    one, two = plain.model.router, saving.model.router
    assert [depth for depth, _ in one.noted] == [depth for depth, _ in two.noted]
    if isinstance(one, TokenChoiceRouter):
        ((_, load),), ((_, own),) = one.noted, two.noted
        assert torch.equal(load, own)
        assert load.sum() == 18  # every real token, once
    one.finish_step()
    two.finish_step()
    for (name, a), (_, b) in zip(one.named_buffers(), two.named_buffers(), strict=True):
        assert_close(a, b, **NEAR, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ROUTERS)
def test_same_loss_and_gradients_for_every_router_and_kv_mode(router: str, kv_sharing: str) -> None:
    check(small_config(router, kv_sharing, num_recursion_layers=2), 1)


@pytest.mark.parametrize("kv_sharing", ["none", "recursive"])
def test_layer_by_layer_sharing_too(kv_sharing: str) -> None:
    fields = {"sharing": "middle_sequence", "num_recursion_layers": 2}
    check(small_config("fixed", kv_sharing, **fields), 1)


@given(configs(), SEEDS)
def test_same_loss_and_gradients(config: MoRConfig, seed: int) -> None:
    check(config, seed)


def test_it_can_be_turned_off_again() -> None:
    model = make_model(small_config("expert_choice"))
    calls = []
    for on in (True, False, True):
        switch(model, on)
        calls.append(train_step(model, 0)[1])
    assert calls == [6, 3, 6]
