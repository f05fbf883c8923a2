"""Packing: every active token once, in order, at the front; and back where it came from."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from mor.ops.compaction import Packing, pack, pack_flat, pack_indices


@st.composite
def masks(draw: st.DrawFn, shape: tuple[int, int] | None = None) -> Tensor:
    """bool [B, N], some of whose rows are empty."""
    shape = shape or draw(st.tuples(st.integers(1, 4), st.integers(1, 17)))
    mask = torch.from_numpy(draw(arrays.arrays(bool, shape)))
    empty = draw(st.lists(st.booleans(), min_size=shape[0], max_size=shape[0]))
    return mask & ~torch.tensor(empty)[:, None]


def tokens_like(active: Tensor) -> Tensor:
    """A number of its own for every token, [B, N, 2]."""
    batch, width = active.shape
    return torch.arange(2.0 * batch * width).view(batch, width, 2)


def real_places(packing: Packing) -> list[list[int]]:
    """Flat indices of the active places, row by row."""
    lengths = packing.lengths
    if lengths is None:
        return packing.flat.tolist()
    return [row[:n] for row, n in zip(packing.flat.tolist(), lengths.tolist(), strict=True)]


def check(packing: Packing, active: Tensor) -> None:
    batch, width = active.shape
    flat = packing.flat
    assert flat.unique().numel() == flat.numel()  # no token twice, spare places included
    rows = range(batch) if packing.rows is None else packing.rows.tolist()
    assert len(rows) == flat.shape[0]
    for row, places, real in zip(rows, flat.tolist(), real_places(packing), strict=True):
        assert all(place // width == row for place in places)  # spare ones are the row's own
        assert [p - row * width for p in real] == active[row].nonzero().flatten().tolist()
    assert flat.shape[1] == int(active.sum(1).max())  # no wider than it must be
    tokens = tokens_like(active)
    gathered = packing.gather(tokens)
    assert torch.equal(gathered, tokens.flatten(0, 1)[flat])
    assert torch.equal(packing.scatter(tokens, gathered), tokens)
    written = packing.scatter(tokens, torch.full_like(gathered, -1.0))
    assert torch.equal(written[active], torch.full_like(tokens[active], -1.0))
    assert torch.equal(written[~active], tokens[~active])  # also where a spare place pointed


@given(masks())
def test_pack_brings_active_tokens_to_the_front(active: Tensor) -> None:
    packing = pack(active)
    if packing is None:
        assert not active.any()
        return
    check(packing, active)
    dropped = ~active.any(1)
    if packing.rows is None:
        assert not dropped.any()
    else:
        assert packing.rows.tolist() == (~dropped).nonzero().flatten().tolist()
        assert dropped.any()
    if packing.lengths is None:
        assert packing.valid is None
    else:
        assert packing.valid is not None
        assert packing.valid.sum(1).tolist() == packing.lengths.tolist()
        # Or else they would not be needed.
        assert len(set(packing.lengths.tolist())) > 1 or packing.rows is not None


@given(st.integers(1, 4), st.integers(1, 17), st.data())
def test_pack_indices_is_pack_of_equal_rows(batch: int, width: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, width))
    chosen = [sorted(data.draw(st.permutations(range(width)))[:kept]) for _ in range(batch)]
    index = torch.tensor(chosen)
    active = torch.zeros(batch, width, dtype=torch.bool).scatter(1, index, True)
    by_index, by_mask = pack_indices(index, width), pack(active)
    assert by_mask is not None
    check(by_index, active)
    assert torch.equal(by_index.flat, by_mask.flat)


@given(masks(), st.data())
def test_then_is_the_packing_of_a_packing(active: Tensor, data: st.DataObject) -> None:
    """Depth after depth, seen from the batch; three deep, so that it chains."""
    packing = pack(active)
    for _ in range(2):
        if packing is None:
            return
        going = data.draw(masks(tuple(packing.flat.shape)))
        going = going if packing.valid is None else going & packing.valid
        inner = pack(going)
        left = packing.scatter(torch.zeros_like(active), going)
        if inner is None:
            assert not left.any()
            return
        tokens = tokens_like(active)
        chained = packing.then(inner)
        assert torch.equal(chained.gather(tokens), inner.gather(packing.gather(tokens)))
        check(chained, left)
        packing, active = chained, left


@given(masks())
def test_gradients_reach_active_tokens_only(active: Tensor) -> None:
    """What spare places hold never matters, and nobody is counted twice."""
    packing = pack(active)
    if packing is None:
        return
    stream = tokens_like(active).double().requires_grad_()
    packed = packing.gather(stream)
    written = packing.scatter(stream, packed * 3)
    written.sum().backward()
    wanted = torch.where(active, 3.0, 1.0).double()
    assert stream.grad is not None
    assert torch.equal(stream.grad[..., 0], wanted)
    if packing.valid is not None:
        poison = torch.where(packing.valid[..., None], packed, torch.nan)
        assert packing.scatter(stream, poison).isfinite().all()


@given(masks(), st.data())
def test_end_to_end_holds_the_active_tokens_row_by_row(active: Tensor, data: st.DataObject) -> None:
    """No padding, no spare places; three deep, and every token still knows its row."""
    packing = pack_flat(active)
    tokens = tokens_like(active)
    for _ in range(3):
        if packing is None:
            assert not active.any()
            return
        assert packing.flat[0].tolist() == active.flatten().nonzero().flatten().tolist()
        assert packing.row_of is not None
        assert packing.row_of.tolist() == active.nonzero()[:, 0].tolist()
        assert packing.valid is None
        written = packing.scatter(tokens, torch.full_like(packing.gather(tokens), -1.0))
        assert torch.equal(written[active], torch.full_like(tokens[active], -1.0))
        assert torch.equal(written[~active], tokens[~active])
        going = data.draw(masks((1, packing.flat.shape[1])))
        inner = pack_flat(going)
        active = packing.scatter(torch.zeros_like(active), going)
        packing = None if inner is None else packing.then(inner)
