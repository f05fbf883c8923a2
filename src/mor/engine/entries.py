"""How keys and values are kept: as the model makes them, in bfloat16, or as bytes.

An entry of bytes has a scale per token and head: its largest number is 127. What a query reads is
what was kept, for its own token too, so that chunks and batches make no difference. This is the
plain form of the kernels' ``entries.h``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KVCacheType = Literal["auto", "bfloat16", "int8"]
"""``auto`` is the model's own type."""

_TYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8}
_LARGEST = 127


def entry_type(name: KVCacheType, model: torch.dtype) -> torch.dtype:
    """The type of entries in memory, for a model of type ``model``."""
    return _TYPES.get(name, model)


def entry_bytes(kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of key and value of one token in one layer, scales included."""
    scale = torch.float32.itemsize if dtype == torch.int8 else 0
    return 2 * kv_heads * (head_dim * dtype.itemsize + scale)


def pack(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Keys or values [..., Hkv, d] as they are kept, and scales [..., Hkv] of bytes."""
    if dtype != torch.int8:
        return x.to(dtype), None
    most = x.abs().amax(-1, keepdim=True)
    inverse = torch.where(most > 0, _LARGEST / most, 0)
    return (x * inverse).round().to(dtype), (most[..., 0] / _LARGEST).float()


def unpack(kept: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What :func:`pack` kept, [..., Hkv, d] in ``dtype``."""
    found = kept.to(dtype)
    return found if scales is None else found * scales[..., None].to(dtype)
