"""Rotary position embedding (arXiv 2104.09864), the two halves of a head paired as in Llama."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

Rotation = tuple[Tensor, Tensor]
"""cos and sin, each [B, N, head_dim]."""


def inverse_frequencies(config: Any, device: torch.device | None = None) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2] in float32 and the attention scale of the rope type.

    ``config.rope_parameters["rope_type"]`` is ``default`` or a static type of Transformers
    (``linear``, ``llama3``, ``yarn``); the configuration has checked it.
    """
    kind = config.rope_parameters.get("rope_type", "default")
    if kind == "default":
        steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
        return 1.0 / config.rope_parameters["rope_theta"] ** (steps / config.head_dim), 1.0
    return ROPE_INIT_FUNCTIONS[kind](config, device)


def rotation(positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> Rotation:
    """cos and sin [B, N, head_dim] of ``positions`` [B, N], computed in float32."""
    angles = positions[..., None].float() * frequencies.float()
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def grid_rotation(
    positions: Tensor, columns: int, head_dim: int, theta: float, dtype: torch.dtype
) -> Rotation:
    """cos and sin [B, N, head_dim] of places on a grid, numbered row by row.

    One half of a head's pairs is turned by the row, the other by the column.

    Args:
        positions: [B, N].
        columns: of the grid.
        head_dim: a multiple of 4.
        theta: base of the frequencies.
        dtype: of the result; computed in float32.
    """
    steps = torch.arange(0, head_dim, 4, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / theta ** (steps / head_dim)
    rows = (positions // columns)[..., None].float() * frequencies
    along = (positions % columns)[..., None].float() * frequencies
    angles = torch.cat((rows, along, rows, along), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(heads: Tensor, rope: Rotation) -> Tensor:
    """Turn ``heads`` [B, H, N, head_dim] by ``rope``."""
    cos, sin = (part.unsqueeze(1) for part in rope)
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin
