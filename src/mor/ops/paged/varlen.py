"""Attention over pages by PyTorch's FlashAttention: ``varlen_attn`` with a block table."""

from __future__ import annotations

from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from mor.ops.paged.rows import Pages, Rows

# Compute capability, and the only implementation of FlashAttention that reads pages there, with
# the module that it needs. FlashAttention 2, which torch brings along, refuses a block table.
IMPLEMENTATIONS = {9: ("FA3", "flash_attn_interface"), 10: ("FA4", "flash_attn.cute")}


def missing_flash(capability: tuple[int, int]) -> str | None:
    """Why ``varlen_attn`` cannot read pages on such a GPU here; None where it can."""
    if capability[0] not in IMPLEMENTATIONS:
        return (
            "varlen_attn reads pages on GPUs of compute capability 9.x and 10.x only; "
            f"this one has {capability[0]}.{capability[1]}"
        )
    name, module = IMPLEMENTATIONS[capability[0]]
    parent = module.partition(".")[0]
    if find_spec(parent) is None or (parent != module and find_spec(module) is None):
        return f"varlen_attn needs {name} to read pages, and the module {module} is not installed"
    from torch.nn.attention.varlen import varlen_attn

    missing = {"block_table", "seqused_k", "num_splits"} - set(signature(varlen_attn).parameters)
    return f"varlen_attn of torch {torch.__version__} has no block_table" if missing else None


def activate_flash(capability: tuple[int, int]) -> None:
    """Make torch use the implementation that reads pages, in this whole process."""
    from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl

    name, _ = IMPLEMENTATIONS[capability[0]]
    if current_flash_attention_impl() != name:
        activate_flash_attention_impl(name)


def varlen_arguments(
    query: Tensor, pages: Pages, rows: Rows, scale: float | None = None
) -> dict[str, Any]:
    """What ``varlen_attn`` is called with, by name.

    Its causal mask is aligned at the end of each row. Rows whose queries stand elsewhere are taken
    one query at a time.
    """
    if not rows.tail:
        rows = rows.one_by_one()
    columns, size = rows.table.shape[1], pages.keys.shape[1]
    return {
        "query": query,
        "key": pages.keys,
        "value": pages.values,
        "cu_seq_q": rows.offsets,
        "cu_seq_k": None,
        "max_q": rows.longest,
        "max_k": columns * size,
        "scale": scale,
        "window_size": (-1, 0),
        "enable_gqa": query.shape[1] != pages.keys.shape[2],
        "seqused_k": rows.reach(),
        "block_table": rows.table,
        # Split in one way whatever the batch: batch mates move no bit.
        "num_splits": 1,
    }


def varlen_attention(query: Tensor, pages: Pages, rows: Rows, scale: float | None = None) -> Tensor:
    """See :data:`~mor.ops.paged.rows.PagesAttention`; bfloat16 and float16.

    Entries behind a row's last one, in its last page, have to be finite: kernels of others may
    multiply them by zero. A pool begins as zeros, and what a model leaves there is finite.
    """
    # Here: torch registers its kernels with this module, and the CPU needs none.
    from torch.nn.attention.varlen import varlen_attn

    found = varlen_attn(**varlen_arguments(query, pages, rows, scale))
    assert isinstance(found, torch.Tensor)
    return found
