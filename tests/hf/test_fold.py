"""Folding: the measured table in weights, full rank loses nothing, routers start open."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from mor import MoRConfig, MoRForCausalLM
from mor.hf.convert.llama import plain_depth
from mor.hf.fold.fold import factor_residual, fold
from mor.hf.fold.plan import Folding, layer_map, windows
from mor.model.relaxation import LINEAR_MAPS, LowRank
from tests.hf.folding import RICH, folded_quietly, only, stack_of, vanilla
from tests.strategies import random_ids, small_config, train

TABLE = Path(__file__).parents[1] / "golden" / "init_mapping.json"
ENTRIES: list[dict[str, Any]] = [
    entry for entry in json.loads(TABLE.read_text("utf-8")) if entry["base_depth_arg"] is None
]
# What the measurement reads off rounded means there: see tests/model/test_sharing.py.
ROUNDED = {(32, 3, "middle_sequence"), (34, 4, "middle_cycle")}


@pytest.mark.parametrize(
    "entry",
    ENTRIES,
    ids=lambda e: f"{e['source_layers']}-{e['num_recursion']}-{e['sharing']}-{e['init']}",
)
def test_weights_start_as_measured(entry: dict[str, Any]) -> None:
    """Each layer of the source is filled with its number; means of layers are means of numbers."""
    layers, recursions, sharing, init = (
        entry[name] for name in ("source_layers", "num_recursion", "sharing", "init")
    )
    tiny = {"hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 2}
    config = MoRConfig(vocab_size=3, router="fixed", **tiny, **plain_depth(layers))
    source = MoRForCausalLM(config)
    with torch.no_grad():
        for number, layer in enumerate(stack_of(source)):
            for parameter in layer.parameters():
                parameter.fill_(number)
    folding = Folding(recursions, sharing, init)
    folded = folded_quietly(source, folding)
    measured = entry["source_layer_of_each_unrolled_layer"]
    assert folded.config.num_hidden_layers == entry["layers_after"]
    assert folded.config.num_recursions == recursions
    groups = entry["shared_group_of_each_unrolled_layer"]
    for group, layer in enumerate(stack_of(folded)):
        sources = measured[groups.index(group)]
        if init == "random":  # drawn anew: the table shows the shape alone
            first = folded.config.num_prelude_layers
            private = group < first or group >= first + len(folded.model.block)
            if not private:
                sources = list(layer_map(source.config, folding)["shared_layers"][group - first])
        elif init == "average" and (layers, recursions, sharing) in ROUNDED:
            continue
        sources = sources if isinstance(sources, list) else [sources]
        mean = sum(sources) / len(sources)
        for name, parameter in layer.named_parameters():
            assert_close(parameter, torch.full_like(parameter, mean), msg=name)


FULL = [
    (2, "middle_cycle", "stepwise"),
    (3, "middle_cycle", "average"),
    (2, "middle_sequence", "lower"),
    (3, "middle_sequence", "random"),
    (2, "cycle", "upper"),
    (3, "cycle", "stepwise"),
    (2, "sequence", "average"),
]


@pytest.mark.parametrize("fields", [{}, RICH], ids=["llama", "rich"])
@pytest.mark.parametrize(("recursions", "sharing", "init"), FULL)
def test_full_rank_reproduces_the_source(
    recursions: int, sharing: Any, init: Any, fields: dict[str, Any]
) -> None:
    alpha = (None, 7.0)[(FULL.index((recursions, sharing, init)) + bool(fields)) % 2]  # by turns
    source = vanilla(8, **fields)
    folding = Folding(recursions, sharing, init, relaxation="lora", rank=None, alpha=alpha)
    folded = folded_quietly(source, folding)
    kept = layer_map(source.config, folding)["stack"]
    assert len(kept) == (6 if (recursions, sharing) == (3, "cycle") else 8)
    ids = random_ids(0, 2, 12)
    with torch.no_grad():
        expected = only(source, kept)(ids).logits
        bare = folded_quietly(source, Folding(recursions, sharing, init))(ids).logits
        assert_close(folded(ids).logits, expected, rtol=1e-3, atol=1e-3)
        assert (bare - expected).abs().max() > 0.1


def test_a_stack_that_does_not_divide_is_thinned_and_says_so() -> None:
    source = vanilla(9)
    folding = Folding(3, relaxation="lora", rank=None)
    with pytest.warns(UserWarning, match="thinned to 8 layers"):
        folded = fold(source, folding)
    assert layer_map(source.config, folding)["stack"] == [0, 1, 2, 3, 5, 6, 7, 8]
    ids = random_ids(0, 2, 12)
    with torch.no_grad():
        expected = only(source, [0, 1, 2, 3, 5, 6, 7, 8])(ids).logits
        assert_close(folded(ids).logits, expected, rtol=1e-3, atol=1e-3)


SMALL = {"num_prelude_layers": 1, "num_recursion_layers": 2, "num_coda_layers": 2}


@pytest.mark.parametrize(
    ("init", "recursions", "kept", "stack"),
    [
        ("lower", 3, [0, 1, 2, 8, 9], [0, 1, 2, 3, 4, 6, 7, 8, 9]),
        ("upper", 2, [0, 6, 7, 8, 9], [0, 2, 5, 6, 7, 8, 9]),
    ],
)
@pytest.mark.parametrize("norms", ["apart", "own"])
def test_quiet_uses_begin_as_the_source_without_their_layers(
    init: Any, recursions: int, kept: list[int], stack: list[int], norms: Any
) -> None:
    source, ids = vanilla(10), random_ids(0, 2, 9)
    folding = Folding(
        recursions, init=init, norms=norms, relaxation="gains", start_gain=0.0, **SMALL
    )
    folded = fold(source, folding)
    assert layer_map(source.config, folding)["stack"] == stack
    assert folded.config.num_hidden_layers == len(stack)
    with torch.no_grad():
        expected = only(source, kept)(ids).logits
        assert_close(folded(ids).logits, expected, rtol=1e-5, atol=1e-5)
        # Louder they do something, and at 1 are the plain fold.
        half = fold(source, replace(folding, start_gain=0.5))(ids).logits
        whole = fold(source, replace(folding, start_gain=1.0))(ids).logits
        plain = fold(source, replace(folding, start_gain=1.0, relaxation="none"))(ids).logits
    assert (half - expected).abs().max() > 0.1
    assert_close(whole, plain, rtol=0, atol=0)
    folded(ids).logits.square().mean().backward()
    for layer in folded.model.block:  # a gain of 0 has a gradient, so that it can open
        gain: Any = layer.get_submodule("mlp_gain").weight
        assert (gain.grad != 0).any(1).all()


def test_tokens_that_stop_early_see_the_source_without_the_layers() -> None:
    source, ids = vanilla(10), random_ids(0, 2, 9)
    folding = Folding(3, init="lower", router="threshold", capacities=(1.0, 0.5, 0.2), **SMALL)
    folded = fold(source, folding)
    router: Any = folded.model.router
    router.boundary[1:] = 1e4  # none goes on
    with torch.no_grad():
        out = folded(ids, use_cache=False)
        expected = only(source, [0, 1, 2, 8, 9])(ids).logits
    assert (out.depths == 1).all()
    assert_close(out.logits, expected, rtol=1e-3, atol=1e-3)


def test_one_recursion_leaves_out_layers_and_is_vanilla() -> None:
    source, ids = vanilla(10), random_ids(0, 2, 9)
    with torch.no_grad():
        for init, kept in (
            ("lower", [0, 1, 2, 8, 9]),
            ("upper", [0, 6, 7, 8, 9]),
            ("stepwise", [0, 1, 7, 8, 9]),
        ):
            cut = fold(source, Folding(1, init=init, **SMALL))  # type: ignore[arg-type]
            assert_close(cut(ids).logits, only(source, kept)(ids).logits, rtol=1e-5, atol=1e-5)
        assert fold(cut, Folding(3)).config.num_recursions == 3
        for before, folding in enumerate(windows(source.config, 4), 1):
            kept = [*range(before), *range(before + 4, 10)]
            expected = only(source, kept)(ids).logits
            assert_close(fold(source, folding)(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert before == 6


def test_more_rank_is_nearer_in_weights() -> None:
    source = vanilla(8)
    errors = []
    for rank in (1, 4, 16, None):
        folded = folded_quietly(source, Folding(2, "middle_cycle", relaxation="lora", rank=rank))
        total = 0.0
        for unrolled in range(6):
            layer: Any = folded.model.block[folded.config.shared_layer(unrolled)]
            own: Any = stack_of(source)[1 + unrolled]
            use = folded.config.repetition(unrolled)
            for name in LINEAR_MAPS["mlp"]:
                low = layer.mlp.low_rank[name.removesuffix("_proj")]
                made = getattr(layer.mlp, name).weight + low.scale * low.up[use] @ low.down[use]
                total += float((made - getattr(own.mlp, name).weight).detach().square().sum())
        errors.append(total)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1
    assert errors[-1] < 1e-6


@given(rank=st.integers(1, 9), alpha=st.sampled_from([None, 0.5, 20.0]), seed=st.integers(0, 99))
def test_a_residual_is_approximated_as_well_as_its_rank_allows(
    rank: int, alpha: float | None, seed: int
) -> None:
    """What is left is exactly the smaller singular values (Eckart and Young)."""
    torch.manual_seed(seed)
    config = small_config("fixed", relaxation="lora", relaxation_rank=rank, relaxation_alpha=alpha)
    residual = torch.randn(5, 8)
    low = LowRank(nn.Linear(8, 5, bias=False), 2, config)
    with torch.no_grad():
        factor_residual(residual, low, 1, 0.02)
        left = residual - low.scale * low.up[1] @ low.down[1]
        dropped = torch.linalg.svdvals(residual)[rank:]
        assert_close(left.square().sum(), dropped.square().sum(), rtol=1e-3, atol=1e-4)
        # Split evenly: both factors start at the same size.
        assert_close(low.up[1].norm(), low.down[1].norm(), rtol=1e-3, atol=1e-4)


def test_where_nothing_is_missing_low_rank_can_still_learn() -> None:
    """A use whose source is the shared layer itself: no product of two zeros."""
    folded = fold(vanilla(8), Folding(2, "middle_cycle", "lower", relaxation="lora", rank=2))
    folded.train()
    train(folded, random_ids(0, 2, 9)).loss.backward()
    layer: Any = folded.model.block[0]
    for low in layer.mlp.low_rank.values():
        assert low.up[0].abs().max() == 0
        assert low.down[0].abs().max() > 0
        assert low.up.grad[0].abs().max() > 0
        assert low.up[1].abs().max() > 0


@pytest.mark.parametrize("norms", ["shared", "apart", "own"])
def test_norms(norms: Any) -> None:
    source = vanilla(8, use_qk_norm=True)
    folded = fold(source, Folding(2, "middle_cycle", "upper", norms=norms))
    for unrolled in range(6):
        layer: Any = folded.model.block[folded.config.shared_layer(unrolled)]
        use = folded.config.repetition(unrolled)
        ruled: Any = stack_of(source)[4 + folded.config.shared_layer(unrolled)]
        own: Any = stack_of(source)[1 + unrolled]
        for name in ("input_layernorm", "self_attn.q_norm"):
            weight = layer.get_submodule(name).weight
            weight = weight if norms == "shared" else weight[use]
            assert_close(weight, (own if norms == "own" else ruled).get_submodule(name).weight)
    assert folded.config.share_norms == (norms == "shared")


@pytest.mark.parametrize("norms", ["shared", "own"])
def test_passes_added_to_the_whole_source(norms: Any) -> None:
    """Silent at first it is the source; without gains its middle runs again and again."""
    source = vanilla(6, **RICH)
    ids = random_ids(0, 2, 9)
    sides = {"num_prelude_layers": 2, "num_coda_layers": 1}
    folding = Folding(3, init="repeat", norms=norms, relaxation="gains", start_gain=0.0, **sides)
    made = fold(source, folding)
    assert (made.config.num_recursion_layers, made.config.num_hidden_layers) == (3, 12)
    where = layer_map(source.config, folding)
    assert where["stack"] == [0, 1, *[2, 3, 4] * 3, 5]
    assert where["shared_layers"] == [(2,), (3,), (4,)]
    with torch.no_grad():
        assert_close(made(ids).logits, source(ids).logits, rtol=1e-5, atol=1e-5)
        again = fold(source, replace(folding, start_gain=1.0))
        deeper = only(source, where["stack"])
        assert_close(again(ids).logits, deeper(ids).logits, rtol=1e-4, atol=1e-4)
