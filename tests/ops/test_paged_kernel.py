"""The kernel in Triton against the plain form, in Triton's interpreter.

Triton decides when it is imported whether it interprets, so these run only where the variable says
so from the start, in an environment that has Triton:

    TRITON_INTERPRET=1 pytest tests/ops/test_paged_kernel.py
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from mor.engine.entries import pack
from mor.ops.paged import Pages, plain_attention
from tests.ops.paged_contracts import rows_case

if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton, and TRITON_INTERPRET=1", allow_module_level=True)
# A row of one token beside a long one, a row without queries, one that begins its text.
PIECES = [(1, 0), (7, 2), (0, 5), (1, 40), (3, 0), (2, 9)]
TOLERANCE: dict[torch.dtype, float] = {
    torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2
}  # fmt: skip


@pytest.fixture(scope="module")
def kernel() -> Any:
    return import_module("mor.ops.paged.kernel")


def check(kernel: Any, case: Any) -> None:
    query, pages, rows = case
    tolerance = TOLERANCE[query.dtype]
    wanted = plain_attention(query, pages, rows)
    for same in (rows, rows.one_by_one()):
        found = kernel.triton_attention(query, pages, same)
        assert_close(found, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("group", range(1, 9))
def test_heads(kernel: Any, group: int) -> None:
    check(kernel, rows_case(group, PIECES, heads=(2 * group, 2)))


@pytest.mark.parametrize("page_size", [1, 2, 8, 16, 32, 64, 128])
def test_page_sizes(kernel: Any, page_size: int) -> None:
    check(kernel, rows_case(page_size, PIECES, page_size=page_size))


@pytest.mark.parametrize("width", [6, 16, 80])
def test_widths(kernel: Any, width: int) -> None:
    check(kernel, rows_case(width, [(1, 80), (5, 3)], width=width, spread=True))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("entries", [None, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_types(kernel: Any, dtype: torch.dtype, entries: torch.dtype | None) -> None:
    query, pages, rows = rows_case(1, PIECES[:4], width=16, dtype=dtype)
    if entries is not None:
        poison = pages.keys.isnan()
        (keys, one), (values, two) = (pack(x.nan_to_num(), entries) for x in pages[:2])
        for scales in (one, two):
            if scales is not None:
                scales[poison[..., 0]] = torch.nan
        pages = Pages(keys, values, one, two)
    check(kernel, (query, pages, rows))


def test_all_bytes_of_eight_bit_floats(kernel: Any) -> None:
    """Each of the 254 that are numbers, by rows that see one place only."""
    every = torch.arange(256, dtype=torch.uint8)
    every[[127, 255]] = 0  # what is no number
    values = every.view(16, 1, 1, 16).view(torch.float8_e4m3fn)
    query, pages, rows = rows_case(0, [(1, 0)] * 16, heads=(1, 1), width=16, page_size=1)
    scales = torch.ones(16, 1, 1)
    pages = Pages(torch.zeros_like(values), values, scales, scales)
    rows = rows._replace(table=torch.arange(16, dtype=torch.int32)[:, None])
    found = kernel.triton_attention(query, pages, rows)
    assert torch.equal(found[:, 0], values[:, 0, 0].float())


def test_queries_that_see_nothing_and_queries_of_no_row(kernel: Any) -> None:
    query, pages, rows = rows_case(2, PIECES)
    rows.used[[0, 4, 8]] = 0
    wanted = plain_attention(query, pages, rows)
    assert_close(kernel.triton_attention(query, pages, rows), wanted, atol=1e-5, rtol=1e-5)
    padded = torch.cat((query, query[:5]))
    more = rows._replace(used=torch.cat((rows.used, torch.zeros(5, dtype=torch.int32))))
    found = kernel.triton_attention(padded, pages, more)
    assert_close(found[: len(query)], wanted, atol=1e-5, rtol=1e-5)
    assert not found[len(query) :].any()


def test_batch_mates_move_no_bit(kernel: Any) -> None:
    query, pages, rows = rows_case(3, PIECES)
    together = kernel.triton_attention(query, pages, rows)
    begin, end = rows.offsets[3:5].tolist()
    alone = rows.one_by_one()
    own = alone._replace(table=alone.table[begin:end], used=alone.used[begin:end])
    found = kernel.triton_attention(query[begin:end], pages, own)
    assert torch.equal(found, together[begin:end])


def test_queries_with_strides(kernel: Any) -> None:
    query, pages, rows = rows_case(4, PIECES)
    turned = query.transpose(0, 1).contiguous().transpose(0, 1)
    check(kernel, (turned, pages, rows))
