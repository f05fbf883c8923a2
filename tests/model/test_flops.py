"""FLOPs against arithmetic by hand, against torch's own counter, and against the paper."""

from __future__ import annotations

import resource
import sys
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mor import MoRConfig, MoRForCausalLM, preset
from mor.model.flops import (
    active_fractions,
    batch_flops,
    count_parameters,
    example_flops,
    flops_per_token,
)
from tests.strategies import KV_SHARING, make_model, small_config

# Width 8, two heads of 4, one of keys and values, FFN 12, vocabulary 10, sequences of 6 tokens.
# One layer has 8*8 (q) + 8*8 (o) + 8*4 (k) + 8*4 (v) + 3 * 8*12 (gate, up, down) = 480 weights,
# 2 FLOPs each.
LINEAR = 2 * 480
KEYS_AND_VALUES = 2 * (8 * 4 + 8 * 4)
# A query meets 6 / 2 keys on average (the causal half); q.k and a.v take 2 * 8 FLOPs for each.
ATTENTION = 2 * 8 * 6 // 2 + 2 * 8 * 6 // 2
LAYER = LINEAR + ATTENTION
HEAD = 2 * 8 * 10


def config(**fields: Any) -> MoRConfig:
    return MoRConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=12,
        num_attention_heads=2,
        num_key_value_heads=1,
        **{"num_recursion_layers": 1} | fields,
    )


def forward(**fields: Any) -> float:
    return flops_per_token(config(**fields), seq_len=6).forward


def test_vanilla() -> None:
    # 1 + 2 + 1 layers.
    assert forward(num_recursion_layers=2) == 4 * LAYER + HEAD


def test_recursive_counts_every_pass() -> None:
    assert forward(num_recursions=3) == (1 + 3 + 1) * LAYER + HEAD
    # Three of four passes of a two-layer block.
    fields = {"num_recursions": 4, "num_recursion_layers": 2, "router_fixed_depth": 3}
    assert forward(**fields) == (1 + 3 * 2 + 1) * LAYER + HEAD


def test_expert_choice() -> None:
    # At depth 1 half of the tokens meet half of the keys: 960 / 2 + 96 / 4.
    block = LAYER + (LINEAR / 2 + ATTENTION / 4)
    # A linear router has 8 weights; depth 0 and depth 1 both score all tokens.
    router = 2 * 8 + 2 * 8
    found = flops_per_token(config(num_recursions=2, router="expert_choice"), 6)
    assert found.recurse == (LAYER, LINEAR / 2 + ATTENTION / 4)
    assert found.router == router
    assert found.forward == 2 * LAYER + block + HEAD + router


def test_expert_choice_scores_only_who_is_left() -> None:
    fields = {"num_recursions": 3, "router": "expert_choice", "router_capacities": [0.5, 0.25, 0.1]}
    found = flops_per_token(config(**fields), 6)
    assert found.router == 2 * 8 * (1 + 0.5 + 0.25)
    assert found.recurse[2] == pytest.approx(0.1 * LINEAR + 0.01 * ATTENTION)


@pytest.mark.parametrize("architecture", ["mlp", "wide_mlp"])
def test_mlp_router(architecture: str) -> None:
    # 8 -> 16 -> 1.
    fields = {"num_recursions": 2, "router": "threshold", "router_architecture": architecture}
    assert flops_per_token(config(**fields), 6).router == 2 * (2 * 8 * 16 + 2 * 16)


def test_auxiliary_router_counts_twice() -> None:
    fields = {"num_recursions": 2, "router": "expert_choice", "router_objective": "aux_router"}
    assert flops_per_token(config(**fields), 6).router == 2 * (2 * 8 + 2 * 8)


def test_token_choice_scores_once() -> None:
    found = flops_per_token(config(num_recursions=2, router="token_choice"), 6)
    assert found.router == 2 * 8 * 2  # 8 -> 2, once
    assert found.recurse == (LAYER, LINEAR / 2 + ATTENTION / 4)  # as many tokens end at each depth


@pytest.mark.parametrize("router", ["fixed", "random"])
def test_controls_have_no_router(router: str) -> None:
    assert flops_per_token(config(num_recursions=2, router=router), 6).router == 0


def test_recursive_kv_sharing_skips_keys_and_values() -> None:
    # Depth 1: queries of half of the tokens, keys of all, no k and v of its own.
    fields = {"num_recursions": 2, "router": "expert_choice", "kv_sharing": "recursive"}
    later = (LINEAR - KEYS_AND_VALUES) / 2 + ATTENTION / 2
    assert flops_per_token(config(**fields), 6).recurse == (LAYER, later)
    # Where depth 0 itself takes only half of the tokens, there are half as many keys to meet.
    fields["router_capacities"] = [0.5, 0.25]
    later = (LINEAR - KEYS_AND_VALUES) / 4 + 0.25 * 0.5 * ATTENTION
    assert flops_per_token(config(**fields), 6).recurse == (LINEAR / 2 + ATTENTION / 4, later)


def test_update_kv_sharing_makes_them_again() -> None:
    fields = {"num_recursions": 2, "router": "expert_choice", "kv_sharing": "recursive_update"}
    later = LINEAR / 2 + ATTENTION / 2
    assert flops_per_token(config(**fields), 6).recurse == (LAYER, later)


def test_sequence_sharing() -> None:
    fields = {"num_recursions": 2, "num_recursion_layers": 2, "sharing": "middle_sequence"}
    assert forward(**fields) == 6 * LAYER + HEAD
    # Unrolled a a b b: the second use of each reads the keys of the first.
    found = flops_per_token(config(**fields, kv_sharing="recursive"), 6)
    assert found.recurse == (2 * LAYER - KEYS_AND_VALUES, 2 * LAYER - KEYS_AND_VALUES)


def test_backward_is_twice_forward() -> None:
    found = flops_per_token(config(num_recursions=2, router="expert_choice"), 6)
    assert found.training == 3 * found.forward


def test_active_share_is_what_is_given() -> None:
    found = flops_per_token(config(num_recursions=2, router="threshold"), 6, [1.0, 1.0])
    assert found.recurse == (LAYER, LAYER)
    assert active_fractions(config(num_recursions=2, router="threshold")) == [1.0, 0.5]


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ["fixed", "expert_choice", "random"])
def test_the_network_multiplies_as_much_as_is_counted(router: str, kv_sharing: str) -> None:
    """Every matrix product of a real forward pass; attention's own are no ``mm``."""
    network = small_config(router, kv_sharing, num_recursion_layers=2)
    model = make_model(network)
    ids = torch.zeros(2, 12, dtype=torch.long)  # 12, 8 and 4 of 12 tokens
    with FlopCounterMode(display=False) as counter:  # with gradients: kernels are no products
        model(ids, use_cache=False, routing="topk")
    products = {torch.ops.aten.mm, torch.ops.aten.addmm}
    counts = counter.get_flop_counts()["Global"]
    counted = sum(count for op, count in counts.items() if op in products)
    assert counted == pytest.approx(flops_per_token(network, seq_len=0).forward * ids.numel())


def media(modality: str, **fields: Any) -> MoRConfig:
    own = {
        "image": {"image_size": [4, 6], "patch_size": 2, "num_channels": 3},
        "audio": {"num_mel_bins": 5, "conv_kernel": [3, 5], "conv_stride": [2, 3]},
    }
    return config(modality=modality, num_labels=7, **own[modality] | fields)


def test_an_encoder_meets_all_tokens_and_answers_once() -> None:
    # Every query meets 6 keys, not 3; 7 classes once for 6 tokens; a patch is 12 numbers.
    found = flops_per_token(media("image"), 6)
    assert found.prelude == LINEAR + 2 * ATTENTION
    assert found.head == pytest.approx(2 * 8 * 7 / 6)
    assert found.embed == 2 * 12 * 8
    causal = flops_per_token(media("image", is_causal=True, head_type="regression"), 6)
    assert causal.prelude == LAYER
    assert causal.head == 2 * 8 * 12
    # A token takes 6 frames: three places of the first convolution, one of the second.
    assert flops_per_token(media("audio"), 6).embed == 3 * 2 * 3 * 5 * 8 + 2 * 5 * 8 * 8


def test_an_example_costs_what_its_tokens_ran() -> None:
    network = media("audio", num_recursions=2, router="threshold")
    depths = torch.tensor([[2, 1, 1, 2], [1, 2, 0, 0]])
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    found = example_flops(network, depths, real)
    # Of six tokens all run depth 0 and three depth 1; pairs are 16 + 4, then 4 + 1.
    pair = 2 * 2 * 8
    assert found.recurse[0] == pytest.approx(LINEAR + pair * 20 / 6)
    assert found.recurse[1] == pytest.approx(LINEAR / 2 + pair * 5 / 6)
    assert found.prelude == pytest.approx(LINEAR + pair * 20 / 6)
    assert found.head == pytest.approx(2 * 8 * 7 / 3)
    stored = example_flops(
        media("audio", num_recursions=2, router="threshold", kv_sharing="recursive_update"),
        depths,
        real,
    )
    assert stored.recurse[1] == pytest.approx(LINEAR / 2 + pair * (2 * 4 + 1 * 2) / 6)


STEP = 1024 * 2048


def paper(family: str, recursions: int | None, **fields: Any) -> float:
    shape = preset("360m", family, recursions, **fields)
    return flops_per_token(shape, 2048, convention="paper").training * STEP


def test_the_papers_budget() -> None:
    # 32 layers; q and o 960 x 960, k and v counted as wide, FFN 960 x 2560 three times; forward
    # only, no head: 2 * (4 * 960**2 + 3 * 960 * 2560) + 2 * 960 * 2048 per token and layer.
    by_hand = 32 * (2 * (4 * 960**2 + 3 * 960 * 2560) + 2 * 960 * 2048) * STEP
    assert paper("vanilla", None) == by_hand
    assert 9438 * by_hand == pytest.approx(16.5e18, rel=1e-4)


@pytest.mark.parametrize(
    ("family", "recursions", "fields", "published"),
    [
        ("recursive", 2, {}, 9438),
        ("recursive", 3, {}, 9438),
        ("recursive", 4, {}, 8883),
        ("mor", 2, {}, 12619),
        ("mor", 3, {}, 14161),
        ("mor", 3, {"router": "token_choice"}, 14161),
        ("mor", 4, {}, 14216),
        ("mor", 3, {"kv_sharing": "recursive"}, 14672),
    ],
)
def test_the_papers_step_counts(
    family: str, recursions: int, fields: dict[str, Any], published: int
) -> None:
    steps = 16.5e18 / paper(family, recursions, **fields)
    assert steps == pytest.approx(published, abs=1.5)


@pytest.mark.parametrize("tied", [True, False])
def test_count_parameters(tied: bool) -> None:
    network = config(num_recursions=2, router="expert_choice", tie_word_embeddings=tied)
    real = MoRForCausalLM(network)
    total, inner = count_parameters(network)
    assert total == sum(p.numel() for p in real.parameters())
    # Three layers of 480 weights and two norms of 8, a final norm, a router of 8 for each depth.
    assert inner == 3 * (480 + 2 * 8) + 8 + 2 * 8
    assert total == inner + (1 if tied else 2) * 10 * 8


def peak_memory_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_count_parameters_takes_no_memory() -> None:
    before = peak_memory_bytes()
    total, _ = count_parameters(preset("1.7b", "vanilla"))
    assert total > 1.6e9  # 6.8 GB in float32
    assert peak_memory_bytes() - before < 200 * 2**20


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
def test_a_batch_routed_as_planned_costs_what_was_planned(kv_sharing: str) -> None:
    """Every third token deep, every second of those deeper; and rows that differ cost more."""
    config = MoRConfig(
        num_recursions=3,
        router="threshold",
        kv_sharing=kv_sharing,
        router_capacities=[1.0, 0.5, 0.25],
    )
    depths = torch.tensor([1, 2, 1, 3] * 16).expand(4, -1)
    planned = flops_per_token(config, 64, [1.0, 0.5, 0.25])
    routed = batch_flops(config, depths)
    assert routed.router == planned.router
    for found, wanted in zip(routed.recurse, planned.recurse, strict=True):
        assert found == pytest.approx(wanted, rel=2e-3)
    assert routed.recurse[0] == pytest.approx(planned.recurse[0], rel=1e-12)
    uneven = torch.cat((torch.full((2, 64), 3), torch.full((2, 64), 1)))
    spread = torch.tensor([1, 3] * 32).expand(4, -1)
    one, other = batch_flops(config, uneven), batch_flops(config, spread)
    if kv_sharing == "none":  # n^2 of each row
        assert one.recurse[1] > other.recurse[1] * 1.001
    else:
        assert one.recurse[1] == pytest.approx(other.recurse[1], rel=1e-2)


def test_documents_that_are_blind_to_each_other_cost_less() -> None:
    """Two documents of 32 in a row of 64 are rows of 32."""
    config = MoRConfig(num_recursions=2, router="threshold")
    depths = torch.tensor([1, 2] * 32).expand(3, -1)
    halves = torch.arange(64).expand(3, -1) // 32
    packed = batch_flops(config, depths, halves)
    alone = batch_flops(config, depths.reshape(6, 32))
    assert packed.forward == pytest.approx(alone.forward, rel=1e-12)
    assert packed.forward < batch_flops(config, depths).forward
