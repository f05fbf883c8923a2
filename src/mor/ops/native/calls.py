"""How the kernels are called: structures, addresses, room to work in; and the small ones.

float32, on the CPU, without gradients.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from mor.ops.native.build import library

HEAD_DIMS = (16, 32, 64, 80, 96, 128)
"""Head widths that attention is compiled for."""

GROUP = 64
"""Inputs that share a scale where they are bytes."""


ENTRY_TYPES = (torch.float32, torch.bfloat16, torch.int8)
"""What keys and values in pages may be, by their kind in attention.h."""


class LinearStruct(ctypes.Structure):
    """``Linear`` of gemm.h."""

    _fields_: ClassVar[Any] = [
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        *((name, c_void_p) for name in ("weight8", "scale", "start", "weight16")),
    ]


class LayerStruct(ctypes.Structure):
    """``Layer`` of layer.h."""

    _fields_: ClassVar[Any] = [
        *((name, LinearStruct) for name in ("query", "key_value", "out", "gate_up", "down")),
        *((name, c_void_p) for name in ("input_norm", "post_norm", "query_norm", "key_norm")),
        *((name, c_void_p) for name in ("attention_gain", "mlp_gain")),
        *((name, c_int64) for name in ("norms", "width", "heads", "kv_heads", "head_dim", "inner")),
        ("eps", c_float),
    ]


class PagesStruct(ctypes.Structure):
    """``Pages`` of attention.h."""

    _fields_: ClassVar[Any] = [
        *((n, c_void_p) for n in ("keys", "values", "key_scales", "value_scales", "table")),
        *((n, c_int64) for n in ("kind", "page_size", "kv_heads", "head_dim", "layers", "columns")),
    ]


class RaggedStruct(ctypes.Structure):
    """``Ragged`` of attention.h."""

    _fields_: ClassVar[Any] = [
        ("pages", PagesStruct),
        *((name, c_void_p) for name in ("own_rows", "written", "slots", "rows", "counts")),
        ("pieces", c_int64),
        *((name, c_void_p) for name in ("own", "lengths", "origins")),
        ("width", c_int64),
    ]


class RouterStruct(ctypes.Structure):
    """``Router`` of pass.h."""

    _fields_: ClassVar[Any] = [
        *((name, c_void_p) for name in ("weight", "bias", "boundary", "full")),
        ("depths", c_int64),
        *((name, c_int) for name in ("at_it", "kind")),
        *((name, c_float) for name in ("shift", "alpha")),
    ]


class PassStruct(ctypes.Structure):
    """``Pass`` of pass.h."""

    _fields_: ClassVar[Any] = [
        *((name, c_void_p) for name in ("source", "lanes", "gates", "cos", "sin")),
        *((name, c_int64) for name in ("width", "turn", "first", "ahead")),
        ("rule", c_int),
        ("router", RouterStruct),
    ]


class FlashStruct(ctypes.Structure):
    """``Flash`` of flash.h."""

    _fields_: ClassVar[Any] = [
        *((n, c_void_p) for n in ("query", "key", "value", "out", "sums", "pieces", "slots")),
        *((n, c_int64) for n in ("count", "heads", "kv_heads", "d")),
    ]


class FlashGradientsStruct(ctypes.Structure):
    """``FlashGradients`` of flash_backward.h."""

    _fields_: ClassVar[Any] = [(n, c_void_p) for n in ("direction", "query", "key", "value")]


@cache
def kernels() -> Any:
    """The compiled functions, their arguments declared. Only where :func:`library` is there."""
    found = library()
    assert found is not None
    address: Any = c_void_p
    number: Any = c_int64
    found.mor_shape.argtypes = [POINTER(number)] * 2
    found.mor_tune.argtypes = [number, number]
    found.mor_pack.argtypes = [address, number, number, address]
    found.mor_pack16.argtypes = [address, number, number, address]
    found.mor_pack8.argtypes = [address, number, number, address, address, address]
    found.mor_linear.argtypes = [address, address, number, address, address, c_int]
    found.mor_head.argtypes = [address, address, c_float, address, number, address, address, c_int]
    found.mor_enter.argtypes = [address] * 5 + [number] * 2 + [address] * 3 + [c_int]
    found.mor_leave.argtypes = [address] * 4 + [number] + [address] * 4 + [c_int]
    found.mor_attend.argtypes = (
        [address, number, number] + [address] * 3 + [number] * 2 + [address, c_int]
    )
    found.mor_stack.argtypes = (
        [address, number, address, number] + [address] * 4 + [number] * 2 + [address] * 6 + [c_int]
    )
    found.mor_pass.argtypes = (
        [address, address, number, address, address, number, number, number, c_int]
        + [address] * 11
        + [c_int]
    )
    found.mor_entries.argtypes = (
        [address, address, number, address, address, number, c_int] + [address] * 6 + [c_int]
    )
    found.mor_flash.argtypes = [address, c_int]
    found.mor_flash_backward.argtypes = [address, address, c_int]
    found.mor_own_linear.argtypes = [
        address,
        number,
        number,
        address,
        number,
        address,
        address,
        c_int,
    ]
    found.mor_route.argtypes = [address, address, number, number] + [address] * 4
    found.mor_pointwise.argtypes = [address, number, c_int, address, c_int]
    found.mor_spin.argtypes, found.mor_spin.restype = [number, c_int], c_float
    found.mor_read.argtypes, found.mor_read.restype = [address, number, c_int], c_float
    found.mor_argmax.argtypes = [address, number, number, address, c_int]
    return found


@cache
def shape() -> tuple[int, int]:
    """Columns of a panel, rows of a tile."""
    panel, tile = c_int64(), c_int64()
    kernels().mor_shape(byref(panel), byref(tile))
    return panel.value, tile.value


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels can work on these: float32 on the CPU, and no gradient is wanted."""
    if library() is None or torch.is_grad_enabled():
        return False
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)


def holds(entries: Tensor) -> bool:
    """Whether the kernels can work on a cache of these entries, and no gradient is wanted."""
    if library() is None or torch.is_grad_enabled():
        return False
    return entries.dtype in ENTRY_TYPES and entries.device.type == "cpu"


def at(tensor: Tensor | None) -> int | None:
    """Address of a tensor's numbers; null for None."""
    return None if tensor is None else tensor.data_ptr()


class Workspace:
    """Room for what stands between the steps of a kernel; grows to what was asked for most."""

    def __init__(self) -> None:
        self._parts: dict[str, Tensor] = {}

    def room(self, name: str, size: int) -> int:
        """Address of at least ``size`` floats."""
        part = self._parts.get(name)
        if part is None or part.numel() < size:
            # Named, not PyTorch's defaults: kernels write floats here, in the host's memory.
            part = torch.empty(size, dtype=torch.float32, device="cpu")
            self._parts[name] = part
        return part.data_ptr()

    def rows(self, name: str, count: int, width: int) -> int:
        """Address of room for ``count`` rows in tiles, and behind them for the same as bytes."""
        tile = shape()[1]
        return self.room(name, -(-count // tile) * tile * (width + (width + GROUP) // 2))


def own_linear(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """[M, outputs]: row i of x [M, k] by the matrix ``weight[index[i]]`` of [sets, outputs, k]."""
    x, weight, index = x.contiguous(), weight.detach().contiguous(), index.contiguous()
    out = x.new_empty(len(x), weight.shape[1])
    kernels().mor_own_linear(
        at(x), *x.shape, at(weight), weight.shape[1], at(index), at(out), torch.get_num_threads()
    )
    return out


POINTWISE = ("sigmoid", "tanh", "silu", "gelu")
"""Functions of single numbers, in the order of pointwise.h."""


def pointwise(name: str, x: Tensor) -> Tensor:
    """Function ``name`` of every number of ``x``, each the same whatever is beside it."""
    x = x.contiguous()
    out = torch.empty_like(x)
    kernels().mor_pointwise(
        at(x), x.numel(), POINTWISE.index(name), at(out), torch.get_num_threads()
    )
    return out


def spin(steps: int) -> int:
    """Multiply and add in registers alone, on PyTorch's number of threads; the FLOPs done."""
    threads = torch.get_num_threads()
    kernels().mor_spin(steps, threads)
    return steps * 24 * 16 * 2 * threads


def read_through(x: Tensor) -> None:
    """Read all of a float32 vector once; its length a multiple of 128."""
    kernels().mor_read(at(x), x.numel(), torch.get_num_threads())


def argmax(x: Tensor) -> Tensor:
    """[M] place of the largest of each row of x [M, n]; the first of equals."""
    x = x.contiguous()
    out = x.new_empty(len(x), dtype=torch.long)
    kernels().mor_argmax(at(x), *x.shape, at(out), torch.get_num_threads())
    return out
