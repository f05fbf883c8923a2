"""How keys and values are kept: as the model makes them, in bfloat16, or as bytes.

An entry of bytes, whole numbers or eight-bit floats (e4m3), has a scale per token and head: its
largest number is the largest of its type. What a query reads is what was kept, for its own token
too, so that chunks and batches make no difference. This is the plain form of the kernels'
``entries.h``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KVCacheType = Literal["auto", "bfloat16", "int8", "fp8"]
"""``auto`` is the model's own type; ``fp8`` is float8_e4m3fn."""

_TYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
# The largest number of each type that has scales.
_LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}


def entry_type(name: KVCacheType, model: torch.dtype) -> torch.dtype:
    """The type of entries in memory, for a model of type ``model``."""
    return _TYPES.get(name, model)


def has_scales(dtype: torch.dtype) -> bool:
    """Whether entries of ``dtype`` have a scale per token and head."""
    return dtype in _LARGEST


def entry_bytes(kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of key and value of one token in one layer, scales included."""
    scale = torch.float32.itemsize if has_scales(dtype) else 0
    return 2 * kv_heads * (head_dim * dtype.itemsize + scale)


def raw(entries: Tensor) -> Tensor:
    """The same memory in a type that every device indexes: eight-bit floats as plain bytes."""
    return entries.view(torch.uint8) if entries.dtype == torch.float8_e4m3fn else entries


def pack(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Keys or values [..., Hkv, d] as they are kept, and scales [..., Hkv] of bytes."""
    if not has_scales(dtype):
        return x.to(dtype), None
    largest = _LARGEST[dtype]
    x = x.to(_wide(x.dtype))  # in 16 bits the largest number can become 128, which is no byte
    most = x.abs().amax(-1, keepdim=True)
    inverse = torch.where(most > 0, largest / most, 0)
    scaled = x * inverse
    scaled = scaled.round() if dtype == torch.int8 else scaled
    return scaled.to(dtype), (most[..., 0] / largest).float()


def unpack(kept: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What :func:`pack` kept, [..., Hkv, d] in ``dtype``."""
    if scales is None:
        return kept.to(dtype)
    wide = _wide(dtype)
    return (kept.to(wide) * scales[..., None].to(wide)).to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
