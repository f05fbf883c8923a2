"""Folding: the measured table in weights, full rank loses nothing, routers start open."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from mor import MoRConfig, MorError, MoRForCausalLM
from mor.hf.convert.llama import plain_depth
from mor.hf.fold.fold import factor_residual, fold, fold_folder
from mor.hf.fold.plan import Folding, layer_map, windows
from mor.hf.load import load_model, load_tokenizer
from mor.model.relaxation import LINEAR_MAPS, LowRank
from tests.hf.test_convert_llama import word_tokenizer
from tests.strategies import make_model, random_ids, small_config, train

TABLE = Path(__file__).parents[1] / "golden" / "init_mapping.json"
ENTRIES: list[dict[str, Any]] = [
    entry for entry in json.loads(TABLE.read_text("utf-8")) if entry["base_depth_arg"] is None
]
# What the measurement reads off rounded means there: see tests/model/test_sharing.py.
ROUNDED = {(32, 3, "middle_sequence"), (34, 4, "middle_cycle")}
RICH = {"attention_bias": True, "mlp_bias": True, "use_qk_norm": True}


def vanilla(layers: int = 8, **fields: Any) -> MoRForCausalLM:
    """A random vanilla model in which biases and norms do something."""
    config = small_config("fixed", **plain_depth(layers) | fields)
    model = make_model(config, 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    return model


def folded_quietly(model: MoRForCausalLM, folding: Folding) -> MoRForCausalLM:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return fold(model, folding)


def stack_of(model: MoRForCausalLM) -> list[nn.Module]:
    inner = model.model
    return [*inner.prelude_layers, *inner.block, *inner.coda_layers]


def only(model: MoRForCausalLM, kept: list[int]) -> MoRForCausalLM:
    """The vanilla model of the layers ``kept``."""
    fields = model.config.to_dict() | plain_depth(len(kept))
    fields.pop("num_hidden_layers", None)
    cut = MoRForCausalLM(MoRConfig(**fields)).eval()
    cut.load_state_dict(model.state_dict(), strict=False)
    for ours, layer in zip(stack_of(cut), kept, strict=True):
        ours.load_state_dict(stack_of(model)[layer].state_dict())
    return cut


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


@pytest.mark.parametrize("alpha", [None, 7.0])
@pytest.mark.parametrize("fields", [{}, RICH], ids=["llama", "rich"])
@pytest.mark.parametrize(("recursions", "sharing", "init"), FULL)
def test_full_rank_reproduces_the_source(
    recursions: int, sharing: Any, init: Any, fields: dict[str, Any], alpha: float | None
) -> None:
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


ROUTED = [
    (router, kv_sharing)
    for router in ("threshold", "expert_choice", "token_choice")
    for kv_sharing in ("none", "recursive", "recursive_update")
]


@pytest.mark.parametrize(("router", "kv_sharing"), ROUTED)
@pytest.mark.parametrize("training", [False, True])
def test_a_router_starts_as_the_folded_model(router: Any, kv_sharing: Any, training: bool) -> None:
    """At every spread of router weights, logits are as near as gates are to 1."""
    source, ids = vanilla(8), random_ids(0, 3, 12)
    plain = fold(source, Folding(3, kv_sharing=kv_sharing)).train(training)
    with torch.no_grad():
        expected = plain(ids, use_cache=False).logits
    nearness = []
    for std in (0.0, 1e-5, 1e-3):
        folding = Folding(3, kv_sharing=kv_sharing, router=router, router_std=std)
        routed = fold(source, folding).train(training)
        assert routed.config.update_rule == "residual"
        with torch.no_grad():
            out = routed(ids, use_cache=False, output_router_traces=True)
        assert (out.depths == 3).all()
        gates = torch.cat([trace.scores.gate.flatten() for trace in out.traces])
        nearness.append(float((gates - 1).abs().max()))
        assert (out.logits - expected).abs().max() < 1e-4 + 20 * nearness[-1]
    assert nearness[0] < 1e-6 < nearness[1] < 1e-3 < nearness[2] < 0.1


@pytest.mark.parametrize("router", ["threshold", "expert_choice"])
def test_capacity_falls_from_full_depth_as_training_goes_on(router: Any) -> None:
    routed = fold(vanilla(8), Folding(3, router=router, capacity_warmup_steps=10)).train()
    ids, means = random_ids(0, 4, 24), []
    for step in (0, 3, 6, 10):
        routed.model.router.begin_step(step)
        with torch.no_grad():
            means.append(float(routed(ids).depths.float().mean()))
    assert means[0] == 3
    assert means == sorted(means, reverse=True)
    assert means[-1] == pytest.approx(2, abs=0.05)
    # What training saw becomes the rule of decoding.
    routed.model.router.finish_step()
    assert (routed.model.router.boundary[1:] > -100).all()


def test_gates_stay_bounded_whatever_a_router_learns() -> None:
    routed = fold(vanilla(8), Folding(3, router="threshold"))
    router: Any = routed.model.router
    low, middle, high = router.gate(torch.tensor([-50.0, 0.0, 50.0]))
    assert low < 1e-6
    assert middle == pytest.approx(1, abs=1e-6)
    assert high == pytest.approx(1.1353, abs=1e-3)


def test_relaxations_without_rank_start_as_the_bare_fold() -> None:
    source, ids = vanilla(8), random_ids(0, 2, 9)
    with torch.no_grad():
        bare = fold(source, Folding(3))(ids).logits
        for relaxation in ("gains", "embeddings"):
            folded = fold(source, Folding(3, relaxation=relaxation))  # type: ignore[arg-type]
            assert_close(folded(ids).logits, bare, rtol=0, atol=0)


def test_the_source_stays_as_it_was_and_the_seed_decides() -> None:
    source = vanilla(8)
    before = {name: t.clone() for name, t in source.state_dict().items()}
    folding = Folding(3, init="random", router="threshold", relaxation="lora", rank=2, seed=5)
    one, two = (fold(source, folding).state_dict() for _ in range(2))
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, before[name])
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def save_vanilla(folder: Path, layers: int = 8, words: int = 61, **fields: Any) -> Path:
    model = vanilla(layers, **fields)
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    word_tokenizer(words).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def test_a_folder_in_its_dtype_with_what_belongs_to_it(tmp_path: Path) -> None:
    source = save_vanilla(tmp_path / "in")
    folding = Folding(3, router="threshold", relaxation="lora", rank=4)
    out = fold_folder(source, tmp_path / "out", folding)
    weights = load_model(out, torch.bfloat16)
    assert weights.dtype == torch.bfloat16
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_tokenizer(out).get_vocab() == load_tokenizer(source).get_vocab()
    notes = json.loads((out / "fold.json").read_text())
    assert (notes["num_recursions"], notes["rank"], notes["shared_layers"]) == (3, 4, [[1], [6]])
    ids = random_ids(0, 1, 9)
    with torch.no_grad():
        assert_close(load_model(out)(ids).logits, load_model(out)(ids).logits)


@pytest.mark.parametrize(
    ("fields", "folding", "words"),
    [
        ({}, {"num_recursions": 1}, "num_recursions=1 folds nothing"),
        ({}, {"num_recursions": 7}, "leaves 6 layers to share; num_recursions=7 needs at least 9"),
        ({"layers": 2}, {"num_recursions": 2}, "needs at least 4 layers"),
        (
            {},
            {"num_recursions": 2, "num_recursion_layers": 4},
            "num_recursion_layers=4 does not fit",
        ),
        (
            {},
            {"num_recursions": 1, "num_recursion_layers": 4, "relaxation": "gains"},
            "relaxation='gains' needs layers that are used twice",
        ),
        ({}, {"num_recursions": 2, "start_gain": 0.5}, "but relaxation='none'"),
        (
            {},
            {"num_recursions": 2, "relaxation": "gains", "start_gain": -1.0},
            r"start_gain=-1.0 must be 0 or more",
        ),
        (
            {},
            {"num_recursions": 3, "init": "average", "relaxation": "gains", "start_gain": 0.0},
            "init='average' .* leaves them no place",
        ),
        (
            {},
            {
                "num_recursions": 2,
                "init": "upper",
                "sharing": "middle_sequence",
                "relaxation": "gains",
                "start_gain": 0.0,
            },
            "sharing='middle_sequence' leaves them no place",
        ),
        ({}, {"num_recursions": 2, "router": "random"}, "router='random' weighs"),
        ({}, {"num_recursions": 2, "sharing": "spiral"}, "sharing='spiral'"),
        ({}, {"num_recursions": 2, "init": "best"}, "initialization='best'"),
        (
            {},
            {"num_recursions": 2, "sharing": "sequence", "router": "threshold"},
            "router='threshold' needs the block",
        ),
        ({}, {"num_recursions": 2, "router": "threshold", "capacities": (1.0,)}, "has 1 entries"),
        ({}, {"num_recursions": 2, "relaxation": "lora", "rank": 0}, "relaxation_rank=0"),
        ({"words": 62}, {"num_recursions": 2}, "token 'w61' has id 61, but vocab_size=61"),
        (
            {"num_recursions": 2, "num_recursion_layers": 3},
            {"num_recursions": 2},
            "num_recursions=2: the source is folded already",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(
    fields: dict[str, Any], folding: dict[str, Any], words: str, tmp_path: Path
) -> None:
    save_vanilla(tmp_path / "in", **fields)
    with pytest.raises(MorError, match=words) as caught:
        fold_folder(tmp_path / "in", tmp_path / "out", Folding(**folding))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_folder_that_is_missing_or_there_already(tmp_path: Path) -> None:
    with pytest.raises(MorError, match="does not exist"):
        fold_folder(tmp_path / "in", tmp_path / "out", Folding(2))
    save_vanilla(tmp_path / "in")
    with pytest.raises(MorError, match="is a folder that is not empty"):
        fold_folder(tmp_path / "in", tmp_path / "in", Folding(2))
