"""The kernels as functions of tensors: float32, on the CPU, without gradients.

A row's result is the same to the last bit whatever rows are beside it, and however many.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_void_p, pointer
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from mor.ops.native.build import library

HEAD_DIMS = (16, 32, 64, 80, 96, 128)
"""Head widths that attention is compiled for."""

GROUP = 64
"""Inputs that share a scale where they are bytes."""


class _Linear(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        *((name, c_void_p) for name in ("weight8", "scale", "start")),
    ]


class _Layer(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        *((name, _Linear) for name in ("query", "key_value", "out", "gate_up", "down")),
        *((name, c_void_p) for name in ("input_norm", "post_norm", "query_norm", "key_norm")),
        *((name, c_int64) for name in ("norms", "width", "heads", "kv_heads", "head_dim", "inner")),
        ("eps", c_float),
    ]


class _Pages(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        *((name, c_void_p) for name in ("keys", "values", "table")),
        *((n, c_int64) for n in ("page_size", "kv_heads", "head_dim", "layers", "columns")),
    ]


class _Ragged(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        ("pages", _Pages),
        *((name, c_void_p) for name in ("own_rows", "written", "slots", "rows", "counts")),
        ("pieces", c_int64),
    ]


@cache
def _kernels() -> Any:
    found = library()
    assert found is not None
    at: Any = c_void_p
    number: Any = c_int64
    found.mor_shape.argtypes = [POINTER(number)] * 2
    found.mor_pack.argtypes = [at, number, number, at]
    found.mor_pack8.argtypes = [at, number, number, at, at, at]
    found.mor_linear.argtypes = [at, at, number, at, at, c_int]
    found.mor_head.argtypes = [at, at, c_float, at, number, at, at, c_int]
    found.mor_enter.argtypes = [at] * 5 + [number] * 2 + [at] * 3 + [c_int]
    found.mor_leave.argtypes = [at] * 4 + [number] + [at] * 4 + [c_int]
    found.mor_attend.argtypes = [at, number, number] + [at] * 3 + [number] * 2 + [at, c_int]
    found.mor_stack.argtypes = (
        [at, number, at, number] + [at] * 4 + [number] * 2 + [at] * 6 + [c_int]
    )
    found.mor_own_linear.argtypes = [at, number, number, at, number, at, at]
    found.mor_argmax.argtypes = [at, number, number, at, c_int]
    return found


@cache
def _shape() -> tuple[int, int]:
    """Columns of a panel, rows of a tile."""
    panel, tile = c_int64(), c_int64()
    _kernels().mor_shape(byref(panel), byref(tile))
    return panel.value, tile.value


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels can work on these: float32 on the CPU, and no gradient is wanted."""
    if library() is None or torch.is_grad_enabled():
        return False
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Workspace:
    """Room for what stands between the steps of a kernel; grows to what was asked for most."""

    def __init__(self) -> None:
        self._parts: dict[str, Tensor] = {}

    def room(self, name: str, size: int) -> int:
        """Address of at least ``size`` floats."""
        part = self._parts.get(name)
        if part is None or part.numel() < size:
            part = self._parts[name] = torch.empty(size)
        return part.data_ptr()

    def rows(self, name: str, count: int, width: int) -> int:
        """Address of room for ``count`` rows in tiles, and behind them for the same as bytes."""
        tile = _shape()[1]
        return self.room(name, -(-count // tile) * tile * (width + (width + GROUP) // 2))


class PackedLinear:
    """``x @ weight.T + bias``, the weights laid out for products with a few rows.

    Args:
        weights: [n, k] each, one below the other. With ``paired``, two of equal shape whose panels
            alternate.
        biases: one per weight, or none at all.
        int8: keep weights as bytes with a scale per output, and make the inputs bytes with a scale
            per row and 64 inputs.
    """

    def __init__(
        self,
        weights: list[Tensor],
        biases: list[Tensor | None],
        *,
        paired: bool = False,
        int8: bool = False,
    ) -> None:
        panel = _shape()[0]
        weight = torch.cat([w.detach() for w in weights])
        told = [b for b in biases if b is not None]
        bias = None
        if told:
            bias = torch.cat(
                [w.new_zeros(len(w)) if b is None else b.detach()
                 for w, b in zip(weights, biases, strict=True)]
            )  # fmt: skip
        if paired:
            weight = _alternate(weight, panel)
            bias = None if bias is None else _alternate(bias, panel)
        self.n, self.k = weight.shape
        count = -(-self.n // panel)
        weight = weight.contiguous()
        self.weight: Tensor | None = None
        self.bytes: tuple[Tensor, Tensor, Tensor] | None = None
        if int8:
            groups = -(-self.k // GROUP)
            self.bytes = (
                torch.empty(count * panel * groups * GROUP, dtype=torch.int8),
                torch.empty(count * panel),
                torch.empty(count * panel * groups, dtype=torch.int32),
            )
            _kernels().mor_pack8(_at(weight), self.n, self.k, *map(_at, self.bytes))
        else:
            self.weight = torch.empty(count * panel * self.k)
            _kernels().mor_pack(_at(weight), self.n, self.k, _at(self.weight))
        self.bias = None
        if bias is not None:
            self.bias = torch.nn.functional.pad(bias, (0, count * panel - self.n)).contiguous()
        of_bytes = self.bytes or (None, None, None)
        self.told = _Linear(
            _at(self.weight), _at(self.bias), self.n, self.k, *(_at(part) for part in of_bytes)
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the packed weights take."""
        parts = [t for t in (self.weight, self.bias, *(self.bytes or ())) if t is not None]
        return sum(part.nbytes for part in parts)

    def __call__(self, x: Tensor, work: Workspace) -> Tensor:
        """[M, k] -> [M, n]."""
        x = x.contiguous()
        out = x.new_empty(len(x), self.n)
        rows = work.rows("rows", len(x), self.k)
        threads = torch.get_num_threads()
        _kernels().mor_linear(byref(self.told), _at(x), len(x), _at(out), rows, threads)
        return out

    def after_norm(self, x: Tensor, norm: Tensor, eps: float, work: Workspace) -> Tensor:
        """[M, k] -> [M, n], normalised (RMSNorm) first."""
        x = x.contiguous()
        out = x.new_empty(len(x), self.n)
        rows, threads = work.rows("rows", len(x), self.k), torch.get_num_threads()
        _kernels().mor_head(
            byref(self.told), _at(norm), eps, _at(x), len(x), _at(out), rows, threads
        )
        return out


def _alternate(both: Tensor, panel: int) -> Tensor:
    """The two halves of ``both``, padded to whole panels, a panel of each in turn."""
    first, second = both.chunk(2)
    missing = -len(first) % panel
    pad = (0, missing) if both.dim() == 1 else (0, 0, 0, missing)
    parts = [
        torch.nn.functional.pad(half, pad).unflatten(0, (-1, panel)) for half in (first, second)
    ]
    return torch.stack(parts, dim=1).flatten(0, 2)


class PackedLayer:
    """A decoder layer's two halves in one call each.

    Args:
        query, key_value, out, gate_up, down: its products.
        input_norm, post_norm, query_norm, key_norm: weights [D] or [uses, D]; the last two may be
            missing.
        heads, kv_heads, head_dim, eps: as in the configuration.
    """

    def __init__(
        self,
        query: PackedLinear,
        key_value: PackedLinear,
        out: PackedLinear,
        gate_up: PackedLinear,
        down: PackedLinear,
        norms: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        heads: int,
        kv_heads: int,
        head_dim: int,
        eps: float,
    ) -> None:
        self.linears = (query, key_value, out, gate_up, down)
        self.norms = tuple(None if n is None else n.detach().contiguous() for n in norms)
        self.width, self.inner = query.k, down.k
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        uses = 1 if norms[0].dim() == 1 else len(norms[0])
        self.told = _Layer(
            *(linear.told for linear in self.linears), *(_at(n) for n in self.norms),
            uses, self.width, heads, kv_heads, head_dim, self.inner, eps,
        )  # fmt: skip
        self.uses = uses

    def uses_of(self, use: int | Tensor, count: int) -> Tensor | None:
        """[M] uses; None where they make no difference."""
        if self.uses == 1:
            return None
        if isinstance(use, int):
            return torch.full((count,), use)
        return use.flatten().contiguous()

    def enter(
        self, x: Tensor, cos: Tensor, sin: Tensor, use: int | Tensor, with_kv: int, work: Workspace
    ) -> tuple[Tensor, Tensor]:
        """What comes before attention.

        Args:
            x: [M, D] stream. cos, sin: [M, head_dim].
            use: which use of the layer, one or [M].
            with_kv: the first so many tokens have keys and values.

        Returns:
            Query [M, H, d]; key and value [with_kv, 2, Hkv, d].
        """
        count = len(x)
        query = x.new_empty(count, self.heads, self.head_dim)
        key_value = x.new_empty(with_kv, 2, self.kv_heads, self.head_dim)
        uses = self.uses_of(use, count)
        _kernels().mor_enter(
            byref(self.told), _at(x), _at(cos), _at(sin), _at(uses), count, with_kv, _at(query),
            _at(key_value), work.rows("rows", count, self.width), torch.get_num_threads(),
        )  # fmt: skip
        return query, key_value

    def leave(self, x: Tensor, mixed: Tensor, use: int | Tensor, work: Workspace) -> Tensor:
        """What comes after: x [M, D] and mixed [M, H, d] -> [M, D]."""
        count, threads = len(x), torch.get_num_threads()
        out = torch.empty_like(x)
        uses = self.uses_of(use, count)
        rows = work.rows("rows", count, max(self.width, self.heads * self.head_dim))
        inner = work.rows("inner", count, self.inner)
        kept = work.rows("kept", count, threads * _shape()[0])
        _kernels().mor_leave(
            byref(self.told), _at(x), _at(mixed), _at(uses), count, _at(out), rows, inner, kept,
            threads,
        )  # fmt: skip
        return out


class Ragged:
    """Tokens of a batch, laid end to end in pieces, each over one row of a page table.

    Args:
        keys, values: the pool, [pages x page_size, Hkv, d].
        table: [rows, layers, columns] pages.
        page_size: tokens per page.
        own_rows, written: [N] table row and place that each token is written to.
        slots: [N] last place of its row that each token sees; ascending within a piece.
        rows, counts: [S] table row that each piece reads, and its number of tokens.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        table: Tensor,
        page_size: int,
        own_rows: Tensor,
        written: Tensor,
        slots: Tensor,
        rows: Tensor,
        counts: Tensor,
    ) -> None:
        self._kept = (keys, values, table, own_rows, written, slots, rows, counts)
        pages = _Pages(
            keys.data_ptr(), values.data_ptr(), table.data_ptr(), page_size, *keys.shape[1:],
            *table.shape[1:],
        )  # fmt: skip
        self.told = _Ragged(pages, *(t.data_ptr() for t in self._kept[3:]), len(rows))


def paged_attention(
    query: Tensor, key: Tensor | None, value: Tensor | None, batch: Ragged, layer: int
) -> Tensor:
    """Write the entries of new tokens into their pages, then attend over each row's pages.

    Args:
        query: [N, H, d].
        key, value: [writes, Hkv, d] of the first tokens, or None.
        batch: the tokens.
        layer: of the table.

    Returns:
        [N, H, d].
    """
    query = query.contiguous()
    stride = writes = 0
    if key is not None:
        assert value is not None
        dense = (key.shape[2], 1)
        if not key.stride()[1:] == value.stride()[1:] == dense or key.stride(0) != value.stride(0):
            key, value = key.contiguous(), value.contiguous()
        stride, writes = key.stride(0), len(key)
    out = torch.empty_like(query)
    _kernels().mor_attend(
        byref(batch.told), layer, query.shape[1], _at(query), _at(key), _at(value), stride, writes,
        _at(out), torch.get_num_threads(),
    )  # fmt: skip
    return out


class PackedStack:
    """Layers in a row, each over its own layer of a page table, in one call."""

    def __init__(self, layers: list[PackedLayer], work: Workspace) -> None:
        self.layers, self.work = layers, work
        self._told = (POINTER(_Layer) * len(layers))(*(pointer(one.told) for one in layers))

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        use: int | Tensor,
        with_kv: int,
        batch: Ragged,
        first: int,
    ) -> Tensor:
        """[M, D] -> [M, D].

        Args:
            x, cos, sin, use, with_kv: as of :meth:`PackedLayer.enter`.
            batch: the tokens' places.
            first: the table's layer of the first of these layers.
        """
        one, work, count, threads = self.layers[0], self.work, len(x), torch.get_num_threads()
        out = x.clone(memory_format=torch.contiguous_format)
        width, inner = one.heads * one.head_dim, one.inner
        uses = one.uses_of(use, count)
        _kernels().mor_stack(
            self._told, len(self.layers), byref(batch.told), first, out.data_ptr(), cos.data_ptr(),
            sin.data_ptr(), _at(uses), count, with_kv, work.room("query", count * width),
            work.room("key_value", with_kv * 2 * one.kv_heads * one.head_dim),
            work.room("mixed", count * width), work.rows("rows", count, max(one.width, width)),
            work.rows("inner", count, inner), work.rows("kept", count, threads * _shape()[0]),
            threads,
        )  # fmt: skip
        return out


def own_linear(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """[M, outputs]: row i of x [M, k] by the matrix ``weight[index[i]]`` of [sets, outputs, k]."""
    x, weight, index = x.contiguous(), weight.detach().contiguous(), index.contiguous()
    out = x.new_empty(len(x), weight.shape[1])
    _kernels().mor_own_linear(_at(x), *x.shape, _at(weight), weight.shape[1], _at(index), _at(out))
    return out


def argmax(x: Tensor) -> Tensor:
    """[M] place of the largest of each row of x [M, n]; the first of equals."""
    x = x.contiguous()
    out = torch.empty(len(x), dtype=torch.long)
    _kernels().mor_argmax(_at(x), *x.shape, _at(out), torch.get_num_threads())
    return out
