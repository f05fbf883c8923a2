"""The kernels between products against their plain forms, in Triton's interpreter.

TRITON_INTERPRET=1 pytest tests/ops/test_fused.py
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mor.engine import Engine
from mor.engine.runner import Runner
from mor.model.fused_layers import FusedDecoderLayer, FusedNorm, fused_view, is_fusable
from mor.ops.norm import rms_norm
from mor.ops.rope import rotate
from tests.engine.oracle import Oracle, greedy, idle, run
from tests.strategies import make_model, random_ids, small_config

if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton, and TRITON_INTERPRET=1", allow_module_level=True)

TYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [1, 7, 64]


@pytest.fixture(scope="module")
def kernels() -> Any:
    return import_module("mor.ops.fused")


def close(found: Any, wanted: Any, dtype: torch.dtype) -> None:
    off = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert_close(found, wanted, rtol=off, atol=off)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("width", [16, 96, 130])
def test_norm(kernels: Any, dtype: torch.dtype, count: int, width: int) -> None:
    hidden, weight = torch.randn(count, width).to(dtype), torch.randn(width).to(dtype)
    close(kernels.fused_norm(hidden, weight, 1e-5), rms_norm(hidden, weight, 1e-5), dtype)
    strided = torch.randn(count, 2 * width).to(dtype)[:, ::2]
    close(kernels.fused_norm(strided, weight, 1e-5), rms_norm(strided, weight, 1e-5), dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize(
    ("queries", "keys", "width"), [(4, 2, 16), (3, 3, 6), (15, 5, 64), (4, 0, 8)]
)
def test_rotate(
    kernels: Any, dtype: torch.dtype, count: int, queries: int, keys: int, width: int
) -> None:
    """Values stand behind the keys and are left alone."""
    flat = torch.randn(count, (queries + 2 * keys) * width).to(dtype)
    angle = torch.randn(count, width // 2).repeat(1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    heads = flat.unflatten(1, (-1, width)).transpose(0, 1)[None]
    wanted = rotate(heads.float(), (cos[None].float(), sin[None].float()))[0].transpose(0, 1)
    query, key = kernels.fused_rotate(flat, cos, sin, queries, keys)
    close(query.float(), wanted[:, :queries], dtype)
    close(key.float(), wanted[:, queries : queries + keys], dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("width", [12, 1024, 1500])
def test_silu_mul(kernels: Any, dtype: torch.dtype, count: int, width: int) -> None:
    both = torch.randn(count, 2 * width).to(dtype)
    gate, up = both.chunk(2, 1)
    close(kernels.fused_silu_mul(both), F.silu(gate) * up, dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_write(kernels: Any, dtype: torch.dtype) -> None:
    """Columns of the slots of all layers, and values that are part of a wider row."""
    pool = torch.zeros(2, 40, 3, 6, dtype=dtype)
    slots = torch.randperm(40)[:14].view(7, 2)
    flat = torch.randn(7, 4 * 18).to(dtype)
    key, value = (flat[:, at : at + 18].unflatten(1, (3, 6)) for at in (18, 54))
    wanted = pool.clone()
    wanted[0, slots[:, 1]], wanted[1, slots[:, 1]] = key, value
    kernels.fused_write(pool[0], pool[1], slots[:, 1], key, value)
    assert torch.equal(pool, wanted)


@pytest.mark.parametrize("router", ["fixed", "threshold", "token_choice"])
@pytest.mark.parametrize("kv_sharing", ["none", "recursive", "recursive_update", "propagate"])
def test_an_engine_writes_the_same(router: str, kv_sharing: str) -> None:
    """Tokens and depths of a mixed batch are those of ``generate`` over plain layers."""
    model = make_model(small_config(router, kv_sharing), 1)
    engine = Engine(
        model, static_stages=True, page_size=3, max_model_len=40, max_num_seqs=3,
        max_residents=5, prefill_chunk=4, attention="plain",
    )  # fmt: skip
    layers = [*engine.runner.model.prelude_layers, *engine.runner.model.block]
    assert layers
    assert all(isinstance(layer, FusedDecoderLayer) for layer in layers)
    assert isinstance(engine.runner, Runner)
    oracle = Oracle(model)
    for number in range(4):
        engine.add_request(random_ids(number, 2 + 3 * number).tolist(), greedy(5))
    for output in run(engine).values():
        oracle.check(output, 5)
    idle(engine)


@pytest.mark.parametrize("with_kv", [True, False, 3])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_layer_projects_the_same(with_kv: bool | int, rows: int) -> None:
    model = make_model(small_config("fixed")).model
    layer, fused = model.block[0], fused_view(model).block[0]
    hidden = torch.randn(rows, 5, model.config.hidden_size)
    rope = model.rope(torch.arange(5).expand(rows, -1), hidden.dtype)
    with torch.no_grad():
        wanted = layer.enter(hidden, rope, 0, with_kv)
        found = fused._project(hidden.flatten(0, 1), rope, (rows, 5), with_kv)
    assert_close(found, wanted)


def test_the_rest_stays_plain() -> None:
    plain = make_model(small_config("fixed")).model
    view = fused_view(plain)
    assert view is not plain
    assert isinstance(view.norm, FusedNorm)
    assert view.embed_tokens is plain.embed_tokens
    for fields in ({"use_qk_norm": True}, {"share_norms": False}, {"relaxation": "gains"}):
        other = make_model(small_config("fixed", **fields)).model
        assert not is_fusable(other.block[0])
        assert type(fused_view(other).block[0]) is type(other.block[0])
