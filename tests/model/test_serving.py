"""A serving view is the same network, and leaves the model it was made from as it was."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from mor.engine import Engine
from mor.errors import MorError
from mor.hf.load import serving_copy
from mor.model.layers import DecoderLayer
from mor.model.model import MoRModel
from mor.model.packed import PackedModel, serving_view
from mor.model.packed_layers import PackedDecoderLayer, PackedStage
from mor.ops import native
from tests.engine.oracle import Oracle, greedy
from tests.strategies import KV_SHARING, ROUTERS, make_model, random_ids, small_config

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.missing())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"share_norms": False, "use_qk_norm": True},
        {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
        {"intermediate_size": 176, "num_key_value_heads": 1, "head_dim": 32},
        {"relaxation": "gains"},
        {"relaxation": "gains", "share_norms": False, "mlp_bias": True},
    ],
)
@pytest.mark.parametrize("with_kv", [True, 0, 3])
def test_halves_of_a_layer(fields: dict[str, Any], with_kv: bool | int) -> None:
    model = make_model(small_config("threshold", **{"head_dim": 16} | fields)).model
    layer, view = model.block[0], serving_view(model).block[0]
    assert isinstance(view, PackedDecoderLayer)
    hidden, use = torch.randn(1, 11, 32), torch.randint(3, (1, 11))
    rope = model.rope(torch.randint(50, (1, 11)), torch.float32)
    with torch.no_grad():
        wanted = layer.enter(hidden, rope, use, with_kv)
        found = view.halves.enter(hidden, rope, use, with_kv)
        for one, other in zip(found, wanted, strict=True):
            assert (one is None) is (other is None)
            if one is not None and other is not None:
                assert_close(one, other, atol=1e-5, rtol=1e-5)
        mixed = torch.randn_like(wanted[0])
        assert_close(
            view.halves.leave(hidden, mixed, use), layer.leave(hidden, mixed, use),
            atol=2e-5, rtol=2e-5,
        )  # fmt: skip


def test_the_model_stays_as_it_was() -> None:
    model = make_model(small_config("threshold", head_dim=16)).model
    view = serving_view(model)
    assert isinstance(view.block, PackedStage)
    assert view.block.whole is not None
    assert type(model.block[0]) is DecoderLayer
    assert not hasattr(model, "packed_head")
    assert list(view.state_dict()) == list(model.state_dict())
    for name, parameter in model.named_parameters():
        assert view.get_parameter(name) is parameter


def test_a_packed_model_has_all_that_a_model_has() -> None:
    """What a model gets one day has to be handed on here too."""
    for fields in ({}, {"relaxation": "embeddings"}):
        model = make_model(small_config("threshold", head_dim=16, **fields)).model
        view = serving_view(model)
        public = {name for name in vars(model) if not name.startswith("_")}
        assert vars(view).keys() >= public
        assert [name for name, _ in view.named_children()] == [n for n, _ in model.named_children()]
        assert view.router is model.router
        assert view.config is model.config


@pytest.mark.parametrize("fields", [{"head_dim": 6}, {"relaxation": "lora", "head_dim": 16}])
def test_layers_that_the_kernels_do_not_know_stay_plain(fields: dict[str, Any]) -> None:
    view = serving_view(make_model(small_config("threshold", **fields)).model)
    assert not isinstance(view.block[0], PackedDecoderLayer)
    assert isinstance(view.block, PackedStage)
    assert view.block.whole is None


def test_other_dtypes_have_no_view() -> None:
    model = make_model(small_config("threshold", head_dim=16), dtype=torch.float64).model
    assert serving_view(model) is model


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ROUTERS)
def test_the_engine_on_kernels_equals_generate(router: str, kv_sharing: str) -> None:
    # By turns, so that every router and every mode meets both.
    turn = ROUTERS.index(router) + KV_SHARING.index(kv_sharing)
    relaxation = ("none", "gains")[turn % 2]
    model = make_model(small_config(router, kv_sharing, head_dim=16, relaxation=relaxation))
    oracle, engine = Oracle(model), Engine(model, page_size=3, max_model_len=64, prefill_chunk=5)
    prompts = [random_ids(i, 2 + 4 * i).tolist() for i in range(4)]
    for output in engine.generate(prompts, greedy()):
        oracle.check(output, 8)


@pytest.mark.parametrize("router", ROUTERS)
def test_batched_equals_alone_to_the_last_bit(router: str) -> None:
    """Not only tokens: the log-probabilities too, whatever is in the batch."""
    model = make_model(small_config(router, head_dim=16))
    prompts = [random_ids(i, 2 + 5 * i).tolist() for i in range(7)]
    asked = greedy(12, logprobs=3)
    together = Engine(model, max_num_seqs=5, prefill_chunk=6, min_gather=3).generate(prompts, asked)
    alone = Engine(model, max_num_seqs=1, prefill_chunk=64)
    for prompt, output in zip(prompts, together, strict=True):
        (single,) = alone.generate([prompt], asked)
        one, other = single.completions[0], output.completions[0]
        assert one.token_ids == other.token_ids
        assert one.depths == other.depths
        assert one.logprobs == other.logprobs


def packed_bytes(view: MoRModel) -> int:
    """Bytes of weights that a pass through the layers and the head of a view reads."""
    assert isinstance(view, PackedModel)
    assert view.packed_head is not None
    stacks = (view.prelude_layers, view.block, view.coda_layers)
    halves = [layer.halves for stack in stacks for layer in stack]
    linears = [linear for half in halves for linear in half.packed.linears]
    return sum(linear.nbytes for linear in (*linears, view.packed_head))


def test_halves_of_bytes_stay_near_and_take_no_gradients() -> None:
    model = make_model(small_config("threshold", head_dim=16)).model
    view = serving_view(model, "int8")
    layer, packed = model.block[0], view.block[0].halves
    hidden, rope = torch.randn(2, 9, 32), model.rope(torch.arange(9)[None], torch.float32)
    with torch.no_grad():
        wanted, found = layer.enter(hidden, rope, 0, True), packed.enter(hidden, rope, 0, True)
        for one, other in zip(found, wanted, strict=True):
            assert one is not None
            assert other is not None
            assert 0 < (one - other).norm() / other.norm() < 0.03
        mixed = torch.randn_like(wanted[0])
        one, other = packed.leave(hidden, mixed, 0), layer.leave(hidden, mixed, 0)
        assert (one - other).norm() / other.norm() < 0.03
    with pytest.raises(MorError, match="int8 weights take float32 on the CPU without gradients"):
        packed.fits(hidden)
    assert packed_bytes(view) < packed_bytes(serving_view(model)) / 2


@pytest.mark.parametrize("fields", [{}, {"relaxation": "lora"}, {"relaxation": "gains"}])
def test_the_engine_serves_bytes_as_the_served_copy_does(fields: dict[str, Any]) -> None:
    """Equal to generate on the same weights, prefill and decoding, alone and batched."""
    model = make_model(small_config("threshold", head_dim=16, **fields))
    served = serving_copy(model, "int8")
    engine = Engine(model, quantization="int8", page_size=3, max_model_len=64, prefill_chunk=5)
    oracle = Oracle(served)
    for output in engine.generate([random_ids(i, 2 + 3 * i).tolist() for i in range(6)], greedy()):
        oracle.check(output, 8)


def test_what_cannot_be_quantised_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(small_config("threshold", head_dim=16))
    with pytest.raises(MorError, match="quantization='int4' is not known; use 'int8', or none"):
        Engine(model, quantization="int4")  # type: ignore[arg-type]
    with pytest.raises(MorError, match="needs the CPU kernels and a float32 model"):
        Engine(model.double(), quantization="int8")
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "missing", lambda: "no C++ compiler found")
    with pytest.raises(MorError, match="compiler found"):
        Engine(model.float(), quantization="int8")


def test_prompts_of_many_chunks() -> None:
    model = make_model(small_config("threshold", head_dim=16))
    engine, oracle = Engine(model, max_model_len=240), Oracle(model)
    prompts = [random_ids(i, length).tolist() for i, length in enumerate((150, 64, 65, 200))]
    for output in engine.generate(prompts, greedy()):
        oracle.check(output, 8)


@pytest.mark.parametrize(
    "fields",
    [{}, {"relaxation": "lora"}, {"tie_word_embeddings": False}, {"hidden_size": 40}],
)
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_plain_weights_can_be_released(fields: dict[str, Any], quantization: Any) -> None:
    """Answers stay; what is left are the embedding, norms, router, and what relaxes sharing."""
    model, twin = (make_model(small_config("threshold", head_dim=16, **fields)) for _ in range(2))
    engine = Engine(
        model, quantization=quantization, max_model_len=64, release_weights=True, page_size=3
    )
    oracle = Oracle(serving_copy(twin, quantization))
    for output in engine.generate([random_ids(i, 2 + 3 * i).tolist() for i in range(3)], greedy()):
        oracle.check(output, 8)
    kept = {name for name, weight in model.named_parameters() if weight.numel()}
    released = {name for name, weight in model.named_parameters() if not weight.numel()}
    assert all("_proj.weight" in name or "lm_head" in name for name in released)
    assert not any(name.endswith("_proj.weight") for name in kept)
    if fields.get("tie_word_embeddings") is False:
        assert "model.lm_head.weight" in released
    view, attend = engine.runner.model, SimpleNamespace(needs_kv=lambda layer: True)
    hidden, rope = torch.randn(1, 2, model.config.hidden_size), model.model.rope
    with pytest.raises(MorError, match=f"{quantization or 'packed'} weights take float32"):
        view.block[0](hidden, rope(torch.arange(2)[None], torch.float32), attend, 0)


def test_a_given_model_is_left_alone() -> None:
    model = make_model(small_config("threshold", head_dim=16))
    Engine(model, max_model_len=64)
    assert all(weight.numel() for weight in model.parameters())
