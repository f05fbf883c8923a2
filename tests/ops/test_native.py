"""The kernels equal the plain forms, and a row's result does not hang on the rows beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mor.ops import native
from mor.ops.native import PackedLinear, Ragged, Workspace, build, paged_attention
from mor.ops.norm import rms_norm
from tests.ops.kernels import _threads, needs_kernels


@needs_kernels
@given(
    rows=st.integers(1, 40),
    inputs=st.integers(1, 70),
    outputs=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    bias=st.booleans(),
    threads=st.integers(1, 3),
)
def test_a_packed_product_is_the_linear_map(
    rows: int, inputs: int, outputs: list[int], bias: bool, threads: int
) -> None:
    weights = [torch.randn(n, inputs) for n in outputs]
    biases = [torch.randn(n) if bias else None for n in outputs]
    packed, work = PackedLinear(weights, biases), Workspace()
    x = torch.randn(rows, inputs)
    with _threads(threads):
        found = packed(x, work)
        alone = torch.cat([packed(row[None], work) for row in x])
    wanted = [
        F.linear(x.double(), w.double(), None if b is None else b.double())
        for w, b in zip(weights, biases, strict=True)
    ]
    assert_close(found, torch.cat(wanted, -1).float(), atol=1e-4, rtol=1e-4)
    assert torch.equal(found, alone)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 7, 33, 400])
def test_a_norm_before_the_product(rows: int) -> None:
    """400 rows of this width do not meet a panel at once."""
    weight, norm = torch.randn(50, 1024) / 32, torch.randn(1024)
    packed, x = PackedLinear([weight], [None]), torch.randn(rows, 1024)
    found = packed.after_norm(x, norm, 1e-5, Workspace())
    wanted = F.linear(rms_norm(x.double(), norm.double(), 1e-5), weight.double())
    assert_close(found, wanted.float(), atol=1e-4, rtol=1e-4)
    assert torch.equal(found[:1], packed.after_norm(x[:1], norm, 1e-5, Workspace()))


@needs_kernels
@given(
    pieces=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 40)), min_size=1, max_size=6),
    page_size=st.sampled_from([1, 3, 16, 24]),
    heads=st.sampled_from([(2, 2), (6, 2), (5, 1)]),
    head_dim=st.sampled_from(native.HEAD_DIMS),
    threads=st.integers(1, 2),
)
def test_paged_attention(
    pieces: list[tuple[int, int]],
    page_size: int,
    heads: tuple[int, int],
    head_dim: int,
    threads: int,
) -> None:
    """Pages are scattered; what nobody owns is not a number; the new entries are written first."""
    queries, keys_of, rows = [], heads[1], len(pieces)
    columns = -(-60 // page_size)
    table = torch.randperm(rows * 2 * columns).view(rows, 2, columns)
    keys = torch.full((table.numel() * page_size, keys_of, head_dim), torch.nan)
    values = torch.full_like(keys, torch.nan)
    slots, new_keys, new_values, wanted = [], [], [], []
    for row, (count, before) in enumerate(pieces):
        own = torch.randn(2, before + count, keys_of, head_dim)
        place = torch.arange(before + count)
        at = table[row, 1, place // page_size] * page_size + place % page_size
        keys[at[:before]], values[at[:before]] = own[:, :before]
        new_keys.append(own[0, before:])
        new_values.append(own[1, before:])
        queries.append(torch.randn(count, heads[0], head_dim))
        slots.append(place[before:])
        visible = torch.arange(before + count) <= place[before:, None]
        one = (t.transpose(0, 1)[None].double() for t in (queries[-1], *own))
        mixed = F.scaled_dot_product_attention(*one, attn_mask=visible, enable_gqa=True)
        wanted.append(mixed[0].transpose(0, 1).float())
    counts = torch.tensor([count for count, _ in pieces])
    each = torch.arange(rows)
    together = torch.cat(slots)
    batch = Ragged(
        keys, values, table, page_size, each.repeat_interleave(counts), together, together, each,
        counts,
    )  # fmt: skip
    both = torch.stack((torch.cat(new_keys), torch.cat(new_values)), 1)  # as a layer leaves them
    with _threads(threads):
        found = paged_attention(torch.cat(queries), both[:, 0], both[:, 1], batch, 1)
    assert_close(found, torch.cat(wanted), atol=2e-5, rtol=2e-5)
    # Each query alone, in a call of its own, to the last bit.
    token = 0
    for row, (count, _) in enumerate(pieces):
        for i in range(count):
            place = slots[row][i : i + 1]
            own_row, one = torch.tensor([row]), torch.ones(1, dtype=torch.long)
            alone = Ragged(keys, values, table, page_size, own_row, place, place, own_row, one)
            query = torch.cat(queries)[token : token + 1]
            assert torch.equal(paged_attention(query, None, None, alone, 1)[0], found[token])
            token += 1


@needs_kernels
def test_memory_does_not_hang_on_defaults() -> None:
    """Kernels write floats to the host, whatever PyTorch makes: 2 bytes, or no memory at all."""
    weight, bias, x = torch.randn(9, 32), torch.randn(9), torch.randn(3, 32)
    wanted = PackedLinear([weight], [bias])(x, Workspace())
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        work = Workspace()
        work.room("part", 5)
        assert work._parts["part"].nbytes == 5 * 4
        assert work._parts["part"].device.type == "cpu"
        packed = PackedLinear([weight], [bias])
        assert packed.weight is not None
        assert packed.weight.dtype == torch.float32
        assert torch.equal(packed(x, work), wanted)
        assert native.Pieces([(0, 1, 0, 1)]).table.device.type == "cpu"
        assert native.argmax(x).device.type == "cpu"


@needs_kernels
def test_weights_of_another_type_are_made_floats() -> None:
    weight, norm, x = torch.randn(9, 32).bfloat16(), torch.rand(32).bfloat16(), torch.randn(3, 32)
    one, two = (PackedLinear([w], [w[:, 0]]) for w in (weight, weight.float()))
    assert torch.equal(one(x, Workspace()), two(x, Workspace()))
    found = one.after_norm(x, norm, 1e-5, Workspace())
    assert torch.equal(found, two.after_norm(x, norm.float(), 1e-5, Workspace()))


@needs_kernels
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_bytes_hide_nothing(wrong: float) -> None:
    """What is no number, or none that ends, does not come out as one: in products and entries."""
    weight, x = torch.randn(5, 64), torch.randn(3, 64)
    weight[1, 7] = x[2, 9] = wrong
    found = PackedLinear([weight], [None], int8=True)(x, Workspace())
    assert found.isfinite().equal(
        (torch.arange(5) != 1).expand(3, 5) & (torch.arange(3) != 2)[:, None]
    )
    own = torch.randn(2, 3, 1, 16)
    own[0, 1, 0, 4] = own[1, 2, 0, 4] = wrong
    kept, scales = torch.zeros(2, 16, 1, 16, dtype=torch.int8), torch.zeros(2, 16, 1)
    places, one = torch.arange(3), torch.zeros(1, dtype=torch.long)
    batch = Ragged(
        kept[0], kept[1], torch.zeros(1, 1, 1, dtype=torch.long), 16, places * 0, places, places,
        one, one + 3, (scales[0], scales[1]),
    )  # fmt: skip
    paged_attention(torch.randn(3, 1, 16), own[0], own[1], batch, 0)
    read = kept[:, :3].float() * scales[:, :3, :, None]
    assert read.isfinite().all(-1).equal(own.isfinite().all(-1))


@needs_kernels
@given(x=st.lists(st.sampled_from([0.0, 1.0, -2.0, 3.0, 3.0]), min_size=1, max_size=40))
def test_argmax_takes_the_first_of_equals(x: list[float]) -> None:
    rows = torch.tensor([x, x[::-1]])
    assert native.argmax(rows).tolist() == [r.index(max(r)) for r in rows.tolist()]


def test_gradients_and_other_dtypes_are_not_for_the_kernels() -> None:
    x = torch.randn(2, 4)
    assert not native.fits(x)
    with torch.no_grad():
        assert native.fits(x) is (native.library() is not None)
        assert not native.fits(x.double())
        assert not native.fits(x, x.bfloat16())


def _loaded(cache: Path, **environment: str) -> tuple[str, str]:
    """What a fresh process says about the kernels, and its warnings."""
    # `import mor` loads no model after the command's own module; the kernels need none.
    script = "import mor_command; from mor.ops import native; "
    script += "print(native.library() is not None, native.missing())"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True,
        env=os.environ | {"XDG_CACHE_HOME": str(cache)} | environment,
    )  # fmt: skip
    return done.stdout.strip(), done.stderr


@pytest.mark.slow
def test_they_can_be_turned_off_and_do_without_a_compiler(tmp_path: Path) -> None:
    assert _loaded(tmp_path, MOR_NATIVE="0") == ("False MOR_NATIVE=0 turns them off", "")
    told, _ = _loaded(tmp_path, PATH="/nowhere", CXX="")
    assert told.startswith("False no C++ compiler found")
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'no such flag' >&2; exit 1\n")
    broken.chmod(0o755)
    told, warned = _loaded(tmp_path, CXX=str(broken))
    assert "could not build them: no such flag" in told
    assert "RuntimeWarning" in warned
    assert not list(tmp_path.rglob("*.so"))


def test_a_cache_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing, read-only, another user's, or no home: then it is for this process alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    usual = tmp_path / "new" / "mor" / "native" / "a.so"
    assert build._place("a.so") == usual

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    def homeless(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for what, name, wrong in ((tempfile, "TemporaryFile", refuse), (Path, "is_file", refuse)):
        with monkeypatch.context() as patch:
            patch.setattr(what, name, wrong)
            assert build._place("a.so").parent.parent == tmp_path
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert build._place("a.so").parent.name.startswith("mor-native-")


@pytest.mark.slow
@needs_kernels
def test_they_are_built_once(tmp_path: Path) -> None:
    quick = tmp_path / "quick"  # how good the code is does not matter here
    quick.write_text(f'#!/bin/sh\nexec {build._compiler()} "$@" -O0\n')
    quick.chmod(0o755)
    assert _loaded(tmp_path, CXX=str(quick))[0] == "True"
    (made,) = tmp_path.rglob("*.so")
    before = made.stat().st_mtime_ns
    assert _loaded(tmp_path, CXX=str(quick))[0] == "True"
    assert [p.stat().st_mtime_ns for p in tmp_path.rglob("*.so")] == [before]


@needs_kernels
@pytest.mark.parametrize("int8", [False, True])
def test_no_rows(int8: bool) -> None:
    packed = PackedLinear([torch.randn(7, 20)], [torch.randn(7)], int8=int8)
    assert packed(torch.empty(0, 20), Workspace()).shape == (0, 7)
