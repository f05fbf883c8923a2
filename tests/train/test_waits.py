"""A training step asks the device for nothing, where routers keep equally many tokens per row."""

from __future__ import annotations

import pytest
import torch

from tests.strategies import make_model, random_ids, small_config
from tests.waits import WaitError, no_waits


@pytest.mark.parametrize("router", ["fixed", "expert_choice", "random"])
def test_forward_backward_and_the_routers_step(
    router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It looks at ids on the CPU alone, where that costs nothing.
    monkeypatch.setattr("mor.hf.network.check_ids", lambda *_: None)
    model = make_model(small_config(router), 1, torch.float32).train()
    ids = random_ids(0, 2, 24)
    with no_waits() as lint:
        model.model.router.begin_step(0)
        model(ids, labels=ids).loss.backward()
        model.model.router.finish_step()
    assert lint.reads == 0
    assert model.model.block[0].self_attn.q_proj.weight.grad is not None


@pytest.mark.parametrize("router", ["threshold", "token_choice"])
def test_routers_that_keep_unequal_numbers_ask_for_them(
    router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many tokens run a depth, once per depth. Their own step asks for nothing."""
    monkeypatch.setattr("mor.hf.network.check_ids", lambda *_: None)
    model = make_model(small_config(router), 1, torch.float32).train()
    ids = random_ids(0, 2, 24)
    with pytest.raises(WaitError), no_waits():
        model(ids, labels=ids)
    model(ids, labels=ids).loss.backward()
    with no_waits():
        model.model.router.finish_step()
