"""Every form of paged attention is plain attention over the row's own tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mor.engine import Engine
from mor.engine.attend import PagedAttention, padded_attention, row_attention
from mor.engine.device import DeviceAttention, FlashInferAttention
from mor.engine.pages import PagePool, PageTables
from mor.engine.view import KVView, PieceColumns, TokenColumns
from mor.hf.modeling import MoRForCausalLM
from mor.ops.paged import plain_attention
from mor.ops.paged.varlen import varlen_arguments
from tests.engine.oracle import Oracle, greedy
from tests.ops.paged_contracts import WrapperContract, varlen_contract
from tests.strategies import KV_SHARING, make_model, random_ids, small_config

# The last two stand for kernels of others: what is handed to them, worked out as they document it.
FORMS = [
    padded_attention,
    row_attention,
    DeviceAttention("plain", plain_attention),
    DeviceAttention("varlen", lambda *case: varlen_contract(**varlen_arguments(*case))),
]


def flashinfer(model: MoRForCausalLM) -> PagedAttention:
    return FlashInferAttention(
        model.config, model.dtype, model.device, make=WrapperContract, workspace=1
    )


@pytest.mark.parametrize("form", FORMS)
@given(
    pieces=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9)), min_size=1, max_size=5),
    page_size=st.integers(1, 4),
    heads=st.sampled_from([(2, 2), (4, 2), (4, 1)]),
    seed=st.integers(0, 1000),
)
def test_each_query_sees_its_row_up_to_its_own_place(
    form: PagedAttention,
    pieces: list[tuple[int, int]],
    page_size: int,
    heads: tuple[int, int],
    seed: int,
) -> None:
    """Pages are scattered, and what nobody owns is not a number."""
    torch.manual_seed(seed)
    pool = PagePool(300, page_size, heads[1], 6, torch.float64, torch.device("cpu"))
    for store in (pool.keys, pool.values):
        store.fill_(torch.nan)
    table = PageTables(pool, len(pieces) + 1, 2, 20)
    for grown in range(0, 14, 3):  # rows grow in turns, so that their pages are interleaved
        for row, (count, before) in enumerate(pieces):
            if before + count > grown:
                table.extend(row, min(before + count, grown + 3))
    layer = 1
    wanted, queries, slots = [], [], []
    for row, (count, before) in enumerate(pieces):
        length = before + count
        keys, values = torch.randn(2, length, heads[1], 6, dtype=torch.float64)
        own = table.slots(torch.full((length,), row), torch.arange(length))[:, layer]
        pool.keys[own], pool.values[own] = keys, values
        query = torch.randn(count, heads[0], 6, dtype=torch.float64)
        queries.append(query)
        # Ascending places, not always the last ones: later depths under sharing.
        places = torch.randperm(length)[:count].sort().values
        slots.append(places)
        for one, place in zip(query, places, strict=True):
            seen = [t[: place + 1].transpose(0, 1)[None] for t in (keys, values)]
            mixed = F.scaled_dot_product_attention(one[None, :, None], *seen, enable_gqa=True)
            wanted.append(mixed[0, :, 0])
    rows, lengths = torch.arange(len(pieces)), torch.tensor([sum(piece) for piece in pieces])
    counts, slot = tuple(count for count, _ in pieces), torch.cat(slots)
    own_row, other = rows.repeat_interleave(torch.tensor(counts)), torch.zeros_like(slot)
    tokens = TokenColumns(
        position=other, depth=other, limit=other, slot=slot, written=slot, lane=other,
        own_row=own_row,
    )  # fmt: skip
    columns = PieceColumns(rows, lengths, rows, lengths, torch.tensor(counts))
    view = KVView(table, (tokens, columns), counts, writes=0)
    assert_close(
        form(torch.cat(queries), None, None, view, layer),
        torch.stack(wanted),
        atol=1e-12,
        rtol=1e-12,
    )


@cache
def oracle_of(kv_sharing: str) -> Oracle:
    """One for all forms, so that its answers are computed once."""
    return Oracle(make_model(small_config("threshold", kv_sharing), 1, torch.float64))


@pytest.mark.parametrize("form", [*FORMS, flashinfer])
@pytest.mark.parametrize("kv_sharing", KV_SHARING)
def test_garbage_in_free_pages_reaches_nobody(form: Any, kv_sharing: str) -> None:
    oracle = oracle_of(kv_sharing)
    model = oracle.model
    form = form(model) if form is flashinfer else form
    engine = Engine(model, page_size=3, max_model_len=40, num_pages=400, attention=form)
    pool = engine.store.pool
    for store in (pool.keys, pool.values):
        store.fill_(torch.nan)
    for output in engine.generate([random_ids(i, 2 + 3 * i).tolist() for i in range(4)], greedy()):
        oracle.check(output, 8)
