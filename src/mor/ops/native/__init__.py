"""Kernels in C++ for the CPU: packed products, layer halves, attention over pages and in training.

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
    read_through,
    spin,
)
from mor.ops.native.flash import FlashAttention, Pieces, trains
from mor.ops.native.lanes import RULES, LanePass, RouterAnswers, Settling, route
from mor.ops.native.packed import PackedLayer, PackedLinear, choose_tuning
from mor.ops.native.paged import PackedStack, Ragged, paged_attention

__all__ = [
    "ENTRY_TYPES",
    "GROUP",
    "HEAD_DIMS",
    "POINTWISE",
    "RULES",
    "FlashAttention",
    "LanePass",
    "PackedLayer",
    "PackedLinear",
    "Pieces",
    "PackedStack",
    "Ragged",
    "RouterAnswers",
    "Settling",
    "Workspace",
    "argmax",
    "fits",
    "holds",
    "library",
    "missing",
    "own_linear",
    "paged_attention",
    "pointwise",
    "read_through",
    "spin",
    "trains",
    "choose_tuning",
    "route",
]
