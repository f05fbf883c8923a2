"""Kernels in C++ for the CPU: packed products, layer halves, paged attention.

They are compiled from the sources beside this file at first use (a few seconds) and kept in the
user's cache. Where no compiler is found, or ``MOR_NATIVE=0`` says so, :func:`library` is None and
the plain PyTorch forms run, which the kernels are held equal to.
"""

from mor.ops.native.build import library, missing
from mor.ops.native.calls import (
    ENTRY_TYPES,
    GROUP,
    HEAD_DIMS,
    POINTWISE,
    Workspace,
    argmax,
    fits,
    holds,
    own_linear,
    pointwise,
    route,
)
from mor.ops.native.packed import PackedLayer, PackedLinear
from mor.ops.native.paged import PackedStack, Ragged, paged_attention

__all__ = [
    "ENTRY_TYPES",
    "GROUP",
    "HEAD_DIMS",
    "POINTWISE",
    "PackedLayer",
    "PackedLinear",
    "PackedStack",
    "Ragged",
    "Workspace",
    "argmax",
    "fits",
    "holds",
    "library",
    "missing",
    "own_linear",
    "paged_attention",
    "pointwise",
    "route",
]
