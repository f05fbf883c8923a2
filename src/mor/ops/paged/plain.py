"""The plain form of attention over pages, which the others are held equal to."""

from __future__ import annotations

import torch
from torch import Tensor

from mor.ops.paged.rows import Pages, Rows

# Numbers that are gathered at a time: 64 MiB in float32 for keys and for values.
_GATHERED = 1 << 24


def plain_attention(query: Tensor, pages: Pages, rows: Rows, scale: float | None = None) -> Tensor:
    """Gathers all pages of every query's row, and masks. See :data:`PagesAttention`.

    It computes in float32, or in float64 where the query is that. It asks the device nothing, so it
    always gathers whole rows of the table.
    """
    single = rows.one_by_one()
    columns, (_, size, kv_heads, width) = single.table.shape[1], pages.keys.shape
    step = max(1, _GATHERED // max(1, columns * size * kv_heads * width))
    parts = zip(query.split(step), single.table.split(step), single.used.split(step), strict=True)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    found = [_attend(one, pages, table, used, scale) for one, table, used in parts]
    return torch.cat(found) if found else torch.empty_like(query)


def _attend(query: Tensor, pages: Pages, table: Tensor, used: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    places = torch.arange(table.shape[1] * pages.keys.shape[1], device=used.device)
    seen = (places < used[:, None])[:, None, :, None]  # [n, 1, places, 1]
    keys, values = (
        torch.where(seen, _gather(entries, scales, table, wide).transpose(1, 2), 0)
        for entries, scales in ((pages.keys, pages.key_scales), (pages.values, pages.value_scales))
    )
    # [n, Hkv, group, d] over [n, Hkv, places, d]
    heads = query.to(wide).unflatten(1, (keys.shape[1], -1))
    scores = (heads @ keys.transpose(2, 3)) * scale
    weights = scores.masked_fill(~seen.transpose(2, 3), -torch.inf).softmax(-1)
    mixed = torch.where(used[:, None, None, None] > 0, weights, 0) @ values
    return mixed.flatten(1, 2).to(query.dtype)


def _gather(entries: Tensor, scales: Tensor | None, table: Tensor, wide: torch.dtype) -> Tensor:
    """[n, columns x page_size, Hkv, d] of the pages in ``table`` [n, columns]."""
    # Bytes as such: not every device indexes eight-bit floats.
    raw = entries.view(torch.uint8) if entries.dtype == torch.float8_e4m3fn else entries
    found = raw[table].view(entries.dtype).to(wide)
    if scales is not None:
        found = found * scales[table][..., None]
    return found.flatten(1, 2)
