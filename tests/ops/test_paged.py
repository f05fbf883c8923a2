"""Attention over pages: the plain form, and what we hand to the kernels of others."""

from __future__ import annotations

from inspect import signature

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mor.engine.entries import pack
from mor.errors import MorError
from mor.ops.paged import FlashInfer, Pages, missing_flash, plain_attention, varlen_attention
from mor.ops.paged.varlen import varlen_arguments
from tests.ops.paged_contracts import (
    WrapperContract,
    attend_row_by_row,
    rows_case,
    varlen_contract,
)

PIECES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=5).filter(
    lambda pieces: any(count for count, _ in pieces)
)
HEADS = st.sampled_from([(group * kv, kv) for group in range(1, 9) for kv in (1, 2)])
CASES = {
    "pieces": PIECES,
    "heads": HEADS,
    "page_size": st.sampled_from([1, 2, 3, 8]),
    "spread": st.booleans(),
    "seed": st.integers(0, 1000),
}
EMPTY = [(2, 3), (0, 5), (3, 0), (1, 6)]


@settings(max_examples=25)
@given(**CASES)
def test_the_plain_form(
    pieces: list[tuple[int, int]], heads: tuple[int, int], page_size: int, spread: bool, seed: int
) -> None:
    case = rows_case(seed, pieces, heads=heads, page_size=page_size, spread=spread)
    assert_close(plain_attention(*case), attend_row_by_row(*case))


@settings(max_examples=25)
@given(**CASES)
def test_what_varlen_attn_is_given(
    pieces: list[tuple[int, int]], heads: tuple[int, int], page_size: int, spread: bool, seed: int
) -> None:
    case = rows_case(seed, pieces, heads=heads, page_size=page_size, spread=spread)
    found = varlen_contract(**varlen_arguments(*case))
    assert_close(found, plain_attention(*case))


@settings(max_examples=25)
@given(**CASES)
def test_what_flashinfer_is_given(
    pieces: list[tuple[int, int]], heads: tuple[int, int], page_size: int, spread: bool, seed: int
) -> None:
    """Two layers with pages of their own under one plan, then the next batch of the same size."""
    query, pages, rows = rows_case(seed, pieces, heads=heads, page_size=page_size, spread=spread)
    counts = rows.offsets.diff().tolist() if rows.tail else None
    rows = rows if rows.tail else rows.one_by_one()
    form = flashinfer(rows.table.shape, heads, page_size)
    form.plan(rows.reach().tolist(), counts)
    mixed_pages = torch.randperm(len(pages.keys))
    other = Pages(pages.keys[mixed_pages], pages.values[mixed_pages])
    other_rows = rows._replace(table=mixed_pages.argsort().int()[rows.table.long()])
    wanted = plain_attention(query, pages, rows)
    assert_close(form(query, pages, rows), wanted)
    assert_close(form(query, other, other_rows), wanted)
    shorter = rows._replace(used=(rows.used - 1).clamp(min=0))
    form.plan(shorter.reach().tolist(), counts)
    assert form.wrapper.plans == 2
    assert_close(form(query, pages, shorter), plain_attention(query, pages, shorter))


def flashinfer(table: torch.Size, heads: tuple[int, int], page_size: int) -> FlashInfer:
    return FlashInfer(
        *table, heads=heads[0], kv_heads=heads[1], head_dim=6, page_size=page_size,
        dtype=torch.float32, device=torch.device("cpu"),
        workspace=torch.zeros(1, dtype=torch.uint8), make=WrapperContract,
    )  # fmt: skip


def test_flashinfer_without_a_plan_or_with_another_number_of_rows() -> None:
    query, pages, rows = rows_case(0, EMPTY)
    form = flashinfer(rows.table.shape, (4, 2), 4)
    with pytest.raises(MorError, match="call plan before each run"):
        form(query, pages, rows)
    with pytest.raises(MorError, match="lengths has 3 rows; this plan is for 4"):
        form.plan([1, 2, 3])


def test_queries_that_see_nothing_get_zeros() -> None:
    query, pages, rows = rows_case(1, EMPTY)
    rows.used[[0, 5]] = 0
    found = plain_attention(query, pages, rows)
    assert_close(found, attend_row_by_row(query, pages, rows))
    assert found[[0, 5]].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_bytes_with_scales(dtype: torch.dtype) -> None:
    query, pages, rows = rows_case(2, EMPTY)
    (keys, one), (values, two) = (pack(x.nan_to_num(), dtype) for x in pages[:2])
    packed = Pages(keys, values, one, two)
    assert_close(plain_attention(query, packed, rows), attend_row_by_row(query, packed, rows))


def test_names_of_arguments_are_those_of_the_installed_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    parameters = signature(varlen.varlen_attn)
    if "block_table" not in parameters.parameters:
        pytest.skip(f"varlen_attn of torch {torch.__version__} reads no pages")
    case = rows_case(3, EMPTY)
    parameters.bind(**varlen_arguments(*case))
    ours = set(signature(varlen_contract).parameters)
    assert ours <= set(parameters.parameters)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_contract)
    assert_close(varlen_attention(*case), plain_attention(*case))


def test_names_of_arguments_are_those_of_the_installed_flashinfer() -> None:
    wrapper = pytest.importorskip("flashinfer").BatchPrefillWithPagedKVCacheWrapper
    for name in ("__init__", "plan", "run"):
        ours = set(signature(getattr(WrapperContract, name)).parameters)
        assert ours <= set(signature(getattr(wrapper, name)).parameters), name


def test_which_gpus_read_pages_with_varlen_attn() -> None:
    assert "compute capability 9.x and 10.x only; this one has 8.6" in str(missing_flash((8, 6)))
    reason = missing_flash((9, 0))
    assert reason is None or "flash_attn_interface" in reason or "block_table" in reason
