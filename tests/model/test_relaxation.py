"""What differs between uses of a shared layer: without effect at first, everywhere the same."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from mor import MoRConfig, MoRForCausalLM
from mor.config import ConfigError
from mor.hf.load import load_model
from mor.model.attend.among import CausalAttend
from mor.model.flops import count_parameters, flops_per_token
from mor.model.layers import DecoderLayer
from mor.model.relaxation import LowRank, Relaxation
from tests.model.test_checkpointing import switch
from tests.strategies import KV_SHARING, ROUTED, VOCAB, make_model, random_ids, small_config, train

KINDS = ("lora", "gains", "embeddings")
LORA = {"relaxation": "lora", "relaxation_rank": 3}


def relaxed(config: MoRConfig, seed: int = 0) -> MoRForCausalLM:
    """A model whose uses really differ."""
    return make_model(config, seed).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_model_starts_as_the_one_that_is_not_relaxed(kind: str) -> None:
    plain = make_model(small_config("fixed", num_recursion_layers=2))
    model = MoRForCausalLM(small_config("fixed", num_recursion_layers=2, relaxation=kind)).eval()
    added = set(model.state_dict()) - set(plain.state_dict())
    assert added
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert (set(missing), unexpected) == (added, [])
    ids = random_ids(0, 2, 9)
    assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=0)
    different = relaxed(model.config)
    different.load_state_dict(plain.state_dict(), strict=False)
    assert (different(ids).logits - plain(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_each_use_has_its_own_and_learns(kind: str) -> None:
    model = relaxed(small_config("fixed", relaxation=kind))
    train(model, random_ids(0, 2, 9)).loss.backward()
    for module in model.modules():
        if isinstance(module, Relaxation):
            for name, parameter in module.named_parameters():
                assert parameter.grad is not None
                assert len(parameter.grad) == 3
                assert (parameter.grad.flatten(1).abs().amax(1) > 0).all(), name


@pytest.mark.parametrize("fields", [LORA, {"relaxation": "gains"}])
def test_tokens_of_different_uses_share_a_batch(fields: dict[str, Any]) -> None:
    """``use`` per token gives each token what ``use`` for all of them would."""
    config = small_config(
        "fixed", share_norms=False, use_qk_norm=True, attention_bias=True, **fields
    )
    model = relaxed(config)
    layer: Any = model.model.block[0]
    hidden, uses = torch.randn(2, 7, 32), torch.randint(3, (2, 7))
    rope = model.model.rope(torch.arange(7).expand(2, -1), torch.float32)
    mixed = layer.enter(hidden, rope, uses, True)
    left = layer.leave(hidden, mixed[0], uses)
    assert len({int(u) for u in uses.flatten()}) == 3
    for use in range(3):
        here = uses == use
        for one, all_alike in zip(mixed, layer.enter(hidden, rope, use, True), strict=True):
            assert_close(one.transpose(1, 2)[here], all_alike.transpose(1, 2)[here])
        assert_close(left[here], layer.leave(hidden, mixed[0], use)[here])


def test_depths_of_different_tokens_share_a_batch() -> None:
    embedding = relaxed(small_config("fixed", relaxation="embeddings")).model.depth_embedding
    assert embedding is not None
    depths = torch.tensor([[0, 2, 1]])
    hidden = torch.randn(1, 3, 32)
    assert_close(embedding(hidden, depths)[0, 1], embedding(hidden, 2)[0, 1])


def test_a_private_layer_has_none() -> None:
    layer = DecoderLayer(small_config("fixed", **LORA))
    assert not [m for m in layer.modules() if isinstance(m, Relaxation)]
    rope = (torch.ones(1, 3, 8), torch.zeros(1, 3, 8))
    layer(torch.randn(1, 3, 32), rope, CausalAttend(), 0)


def test_low_rank_is_a_product_times_its_scale() -> None:
    config = small_config("fixed", relaxation="lora", relaxation_rank=4, relaxation_alpha=10.0)
    low = LowRank(nn.Linear(6, 5), 2, config)
    with torch.no_grad():
        low.up.normal_()
        assert low.bias is not None
        low.bias.normal_()
    hidden = torch.randn(1, 3, 6)
    expected = 2.5 * hidden @ (low.up[1] @ low.down[1]).T + low.bias[1]
    assert_close(low(hidden, 1), expected)


# The kinds go round, so that every two of router, mode and kind meet.
CASES = [
    (router, kv, KINDS[(i + j) % len(KINDS)])
    for i, router in enumerate(ROUTED)
    for j, kv in enumerate(KV_SHARING)
]
CASES += [("fixed", "none", kind) for kind in KINDS]


@pytest.mark.parametrize(("router", "kv_sharing", "kind"), CASES)
def test_decoding_through_the_cache_is_the_full_forward(
    router: str, kv_sharing: str, kind: str
) -> None:
    model = relaxed(small_config(router, kv_sharing, relaxation=kind, share_norms=False)).double()
    ids = random_ids(3, 2, 10)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        out = model(ids[:, :6], use_cache=True)
        seen = [out.logits]
        for step in range(6, 10):
            out = model(ids[:, step : step + 1], past_key_values=out.past_key_values)
            seen.append(out.logits)
    assert_close(torch.cat(seen, 1), full, rtol=1e-6, atol=1e-6)


def gradients(model: MoRForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model.zero_grad()
    train(model, ids).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_sharing", KV_SHARING)
def test_gradient_checkpointing_changes_nothing(kind: str, kv_sharing: str) -> None:
    model = relaxed(small_config("expert_choice", kv_sharing, relaxation=kind))
    ids = random_ids(1, 2, 11)
    plain = gradients(model, ids)
    switch(model, True)
    again = gradients(model, ids)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert_close(again[name], gradient, msg=name)


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("HYPOTHESIS_PROFILE") != "deep",
    reason="half a minute of compiling: HYPOTHESIS_PROFILE=deep; test_fast_paths compiles always",
)
@pytest.mark.filterwarnings("ignore")  # the compiler's own, about itself
def test_compiled_layers_equal_plain_ones() -> None:
    fields = {"share_norms": False, "use_qk_norm": True, "attention_bias": True, **LORA}
    model = relaxed(small_config("fixed", sharing="cycle", num_recursions=2, **fields))
    ids = random_ids(2, 3, 14)
    plain = gradients(model, ids)
    model.model.use_compiled_layers()
    for name, gradient in gradients(model, ids).items():
        assert_close(gradient, plain[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model = relaxed(small_config("threshold", relaxation=kind, attention_bias=True))
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    ids = random_ids(0, 2, 9)
    assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert again.config.relaxation == kind


def test_parameters_by_hand() -> None:
    # Width 32, FFN 48, 4 heads of 8, 2 of keys; 3 uses; rank 40 comes to 16 and 32.
    plain, _ = count_parameters(small_config("fixed"))
    found, _ = count_parameters(small_config("fixed", relaxation="lora", relaxation_rank=40))
    narrow, wide = 16 * (32 + 16), 32 * (32 + 32)
    assert found - plain == 3 * (2 * wide + 2 * narrow + 3 * 32 * (32 + 48))
    gains, _ = count_parameters(small_config("fixed", relaxation="gains"))
    assert gains - plain == 2 * 3 * 32
    embeddings, _ = count_parameters(small_config("fixed", relaxation="embeddings"))
    assert embeddings - plain == 3 * 32


@pytest.mark.parametrize("rank", [3, 40])
@pytest.mark.parametrize("kv_sharing", ["none", "recursive"])
def test_flops_are_those_that_torch_counts(kv_sharing: str, rank: int) -> None:
    """The difference that relaxation makes; attention is the same on both sides."""
    counted, planned = [], []
    for relaxation in ("none", "lora"):
        config = small_config(
            "fixed", kv_sharing, relaxation=relaxation, relaxation_rank=rank, num_recursion_layers=2
        )
        model = make_model(config)
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            model(torch.randint(VOCAB, (1, 12)), use_cache=False)
        counted.append(counter.get_total_flops())
        planned.append(12 * flops_per_token(config, 12).forward)
    assert counted[1] > counted[0]
    assert planned[1] - planned[0] == counted[1] - counted[0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"relaxation": "prompts"}, "relaxation='prompts'.*lora"),
        ({"relaxation": "lora", "relaxation_rank": 0}, "relaxation_rank=0"),
        ({"relaxation": "lora", "relaxation_alpha": 0.0}, "relaxation_alpha=0.0"),
        ({"relaxation": "gains", "num_recursions": 1}, "num_recursions of at least 2, not 1"),
        ({"mlp_bias": 1}, "mlp_bias=1 must be true or false"),
        ({"router_gate_bias": "2"}, "router_gate_bias='2' must be a number"),
        (
            {"router": "token_choice", "router_gate_bias": 2.0},
            "router_gate_bias=2.0 does nothing",
        ),
    ],
)
def test_what_does_not_fit_is_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        small_config(**{"router": "fixed"} | fields)
