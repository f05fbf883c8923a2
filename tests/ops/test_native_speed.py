"""Kernels are in the same league as PyTorch's products, on whatever processor the tests run.

No figure of speed: a guard. With vectors wider than registers, GCC once kept all sums in memory,
results stayed right, and AVX2 ran at a tenth of its speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from mor.ops import native
from mor.ops.native import FlashAttention, PackedLinear, Workspace
from tests.ops.kernels import _threads, needs_kernels

ROWS, INPUTS, OUTPUTS = 48, 576, 1536


def least(run: Callable[[], object], times: int = 30) -> float:
    """Seconds of this thread's own processor time, of the fastest run."""
    found = []
    for _ in range(times):
        began = time.thread_time()
        run()
        found.append(time.thread_time() - began)
    return min(found)


@needs_kernels
@pytest.mark.parametrize("kind", ["floats", "halves", "int8"])
def test_products_are_not_several_times_slower_than_pytorchs(kind: str) -> None:
    weight, x, work = torch.randn(OUTPUTS, INPUTS), torch.randn(ROWS, INPUTS), Workspace()
    if kind == "halves":
        weight = weight.bfloat16().float()
    packed = PackedLinear([weight], [None], int8=kind == "int8")
    with _threads(1), torch.no_grad():
        assert least(lambda: packed(x, work)) < 3 * least(lambda: F.linear(x, weight))


@needs_kernels
def test_attention_in_training_is_not_several_times_slower_than_pytorchs() -> None:
    length, heads, width = 256, 4, 64
    query, key, value = (torch.randn(length, heads, width) for _ in range(3))
    pieces = native.Pieces.of_rows(1, length, length)
    rows = [t.transpose(0, 1)[None].contiguous() for t in (query, key, value)]
    with _threads(1), torch.no_grad():
        ours = least(lambda: FlashAttention.apply(query, key, value, pieces))
        theirs = least(lambda: F.scaled_dot_product_attention(*rows, is_causal=True))
    assert ours < 3 * theirs
