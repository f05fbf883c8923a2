"""A depth per token says the same as each depth on its own: what the engine's ticks rest on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mor import MoRConfig
from mor.model.routers import as_mask
from tests.strategies import KV_SHARING, ROUTERS, SEEDS, configs, make_model, small_config

EXACT = {"atol": 0.0, "rtol": 0.0}
CLOSE = {"atol": 1e-12, "rtol": 1e-12}
CYCLES = {"sharing": "middle_cycle"}


def tokens(config: MoRConfig, seed: int, count: int, dtype: torch.dtype) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(1, count, config.hidden_size, generator=draw, dtype=dtype),
        "output": torch.randn(1, count, config.hidden_size, generator=draw, dtype=dtype),
        "origin": torch.randn(1, count, config.hidden_size, generator=draw, dtype=dtype),
        "positions": torch.randint(0, 500, (1, count), generator=draw),
        "depth": torch.randint(0, config.num_recursions, (1, count), generator=draw),
        "limit": torch.randint(1, config.num_recursions + 1, (1, count), generator=draw),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(config=configs(**CYCLES), seed=SEEDS, count=st.integers(1, 12))
def test_a_router_answers_each_token_as_it_answers_each_depth(
    dtype: torch.dtype, config: MoRConfig, seed: int, count: int
) -> None:
    router = make_model(config, seed, dtype).model.router
    t = tokens(config, seed, count, dtype)
    with torch.no_grad():
        started = router.start(t["hidden"], t["limit"])
        scores = router.score(t["hidden"], t["depth"], t["positions"], started)
        active = as_mask(router.decide(scores, t["depth"]), t["positions"].double(), None)
        updated = router.update(t["hidden"], t["output"], t["origin"], scores, t["depth"])
        for place in range(count):
            own: dict[str, Any] = {name: value[:, place : place + 1] for name, value in t.items()}
            depth = int(own["depth"])
            alone = router.start(own["hidden"], int(own["limit"]))
            said = router.score(own["hidden"], depth, own["positions"], alone)
            for name in ("gate", "logits", "decision", "choice"):
                one, many = getattr(said, name), getattr(scores, name)
                assert (one is None) == (many is None)
                if one is not None:
                    # A product of one row and of many may round differently; nothing else may.
                    wide = CLOSE if dtype == torch.float64 else {"atol": 1e-5, "rtol": 1e-5}
                    assert_close(many[:, place : place + 1], one, **wide)
            # From the same scores, decisions and updates are equal to the last bit.
            taken = scores.map(lambda values, at=place: values[:, at : at + 1])
            answer = as_mask(router.decide(taken, depth), own["positions"].double(), None)
            assert bool(active[0, place]) == bool(answer)
            new = router.update(own["hidden"], own["output"], own["origin"], taken, depth)
            assert_close(updated[:, place : place + 1], new, **EXACT)


class OwnValue:
    """Attention of a token over itself alone, where ``with_kv`` tokens have keys and values."""

    def __init__(self, with_kv: bool | int) -> None:
        self.with_kv = with_kv

    def needs_kv(self, layer: int) -> bool | int:
        return self.with_kv

    def __call__(
        self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> Tensor:
        mixed = query * 0.5
        if value is not None:
            groups = query.shape[1] // value.shape[1]
            mixed[:, :, : value.shape[2]] += value.repeat_interleave(groups, 1)
        return mixed


@given(configs(**CYCLES), SEEDS, st.integers(1, 12))
def test_the_block_runs_each_token_at_its_own_depth(
    config: MoRConfig, seed: int, count: int
) -> None:
    model = make_model(config, seed, torch.float64).model
    t = tokens(config, seed, count, torch.float64)
    rope = model.rope(t["positions"], torch.float64)
    with torch.no_grad():
        carried, origin = model.widen(t["hidden"]), model.widen(t["origin"])
        mixed = model.recurse(carried, t["depth"], rope, OwnValue(True), origin)
        for depth in range(config.num_recursions):
            alone = model.recurse(carried, depth, rope, OwnValue(True), origin)
            at = t["depth"] == depth
            assert_close(mixed[at], alone[at], **CLOSE)


def test_norms_kept_apart_do_differ() -> None:
    """Otherwise the test above could not fail for them."""
    config = small_config("fixed", share_norms=False)
    model = make_model(config, 0, torch.float64).model
    t = tokens(config, 0, 5, torch.float64)
    rope = model.rope(t["positions"], torch.float64)
    with torch.no_grad():
        first, last = (model.recurse(t["hidden"], d, rope, OwnValue(True)) for d in (0, 2))
    assert float((first - last).abs().max()) > 1e-3


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_keys_and_values_of_the_first_tokens_only(count: int) -> None:
    config = small_config("fixed")
    model = make_model(config, 0, torch.float64).model
    t = tokens(config, 0, 5, torch.float64)
    rope = model.rope(t["positions"], torch.float64)
    layer = model.block[0]
    with torch.no_grad():
        _, keys, values = layer.enter(t["hidden"], rope, 0, True)
        query, some, few = layer.enter(t["hidden"], rope, 0, count)
    assert query.shape[2] == 5
    if count == 0:
        assert some is None
        assert few is None
    else:
        assert_close(some, keys[:, :, :count], **CLOSE)
        assert_close(few, values[:, :, :count], **CLOSE)


@pytest.mark.parametrize("kv_sharing", KV_SHARING[:2])
def test_a_depth_per_token_is_refused_where_layers_repeat_in_a_row(kv_sharing: str) -> None:
    config = small_config("fixed", kv_sharing, sharing="middle_sequence")
    model = make_model(config).model
    t = tokens(config, 0, 3, torch.float32)
    with pytest.raises(ValueError, match="sharing='middle_sequence' repeats single layers"):
        model.recurse(
            t["hidden"], t["depth"], model.rope(t["positions"], torch.float32), OwnValue(True)
        )


def test_every_router_is_met() -> None:
    assert set(ROUTERS) == {"fixed", "random", "expert_choice", "token_choice", "threshold"}
