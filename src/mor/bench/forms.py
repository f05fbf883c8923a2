"""Every form of attention over pages that can run here, against the CPU in float32.

``benchmarks/gpu/serving.py`` runs it before anything else, and times nothing where a form is wrong.
Rows of one token lie beside long ones, a row is empty, several query heads read one head of keys
and values, pages are scattered, and what nobody reads is full of large numbers, or not a number
where the form promises to read none of it. Forms that cannot run here are named with the reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from mor.config import MoRConfig
from mor.engine.entries import KVCacheType, entry_type, pack
from mor.engine.forms import Setting, explain_missing
from mor.errors import MorError
from mor.ops.paged import (
    FlashInfer,
    Pages,
    PagesAttention,
    Rows,
    activate_flash,
    plain_attention,
    varlen_attention,
)

# (queries, places before them) of each row.
Piece = tuple[int, int]
PIECES = [(1, 0), (1, 700), (64, 0), (17, 300), (0, 9), (1, 63), (1, 64), (33, 31)]
FEW = [(1, 0), (1, 40), (5, 0), (0, 9), (3, 6)]  # for the CPU, where it is tried out
SHAPES = [(4, 4, 64), (15, 5, 64), (6, 2, 128), (8, 1, 80)]  # heads, of keys and values, width
PAGE_SIZES = (1, 16, 64)
TYPES: list[tuple[torch.dtype, KVCacheType]] = [
    (torch.float32, "auto"),
    (torch.bfloat16, "auto"),
    (torch.float16, "auto"),
    (torch.bfloat16, "int8"),
    (torch.bfloat16, "fp8"),
]
# Largest difference from float32, of numbers of about 1.
CLOSE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
NAMES = ("plain", "varlen", "flashinfer", "triton")


def make_case(
    pieces: list[Piece],
    shape: tuple[int, int, int],
    page_size: int,
    dtype: torch.dtype,
    entries: torch.dtype,
) -> tuple[Tensor, Pages, Rows, Tensor]:
    """Queries, pages and rows on the CPU, and which places of the pool are owned."""
    heads, kv_heads, width = shape
    draw = torch.Generator().manual_seed(0)
    columns = max(-(-(count + before) // page_size) for count, before in pieces) + 1
    total = len(pieces) * columns + 1
    table = torch.randperm(total, generator=draw)[:-1].view(-1, columns)
    owned = torch.zeros(total, page_size, dtype=torch.bool)
    for row, (count, before) in enumerate(pieces):
        places = torch.arange(count + before)
        owned[table[row, places // page_size], places % page_size] = True
    pool = torch.randn(2, total, page_size, kv_heads, width, generator=draw).to(dtype)
    (keys, one), (values, two) = (pack(part, entries) for part in pool)
    used = torch.cat([torch.arange(before, before + count) + 1 for count, before in pieces])
    starts = torch.tensor([0, *(count for count, _ in pieces)]).cumsum(0)
    query = torch.randn(len(used), heads, width, generator=draw).to(dtype)
    longest = max(count for count, _ in pieces)
    rows = Rows(table.int(), used.int(), starts.int(), longest)
    return query, Pages(keys, values, one, two), rows, owned


def make_form(name: str, setting: Setting, rows: Rows, page_size: int) -> PagesAttention:
    """The form, ready for these rows."""
    if name == "varlen":
        activate_flash(torch.cuda.get_device_capability(setting.device))
        return varlen_attention
    if name == "triton":
        from mor.ops.paged.kernel import triton_attention

        return triton_attention
    if name == "plain":
        return plain_attention
    config = setting.config
    own = FlashInfer(
        *rows.table.shape, heads=config.num_attention_heads, kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim, page_size=page_size, dtype=setting.dtype, device=setting.device,
    )  # fmt: skip
    own.plan(rows.reach().tolist(), rows.offsets.diff().tolist())

    def planned(query: Tensor, pages: Pages, rows: Rows, scale: float | None) -> Tensor:
        return own(query, pages, rows)

    return planned


def check_form(
    name: str,
    setting: Setting,
    pieces: list[Piece],
    shape: tuple[int, int, int],
    page_size: int,
) -> float:
    """The largest difference from the plain form in float32 on the CPU."""
    query, pages, rows, owned = make_case(pieces, shape, page_size, setting.dtype, setting.entries)
    wanted = plain_attention(query.float(), pages, rows)
    # Kernels of others may multiply what lies behind a row's end by zero, so it is a number there.
    waste = 1e4 if name in ("varlen", "flashinfer") else torch.nan
    for entries, scales in zip(pages[:2], pages[2:], strict=True):
        if scales is None:
            entries[~owned] = waste
        else:
            scales[~owned] = waste
    keys, values, *own_scales = (None if one is None else one.to(setting.device) for one in pages)
    assert keys is not None
    assert values is not None
    there = Pages(keys, values, *own_scales)
    table, used, starts = (one.to(setting.device) for one in (rows.table, rows.used, rows.offsets))
    own = Rows(table, used, starts, rows.longest)
    form = make_form(name, setting, own, page_size)
    return float((form(query.to(setting.device), there, own, None).cpu() - wanted).abs().max())


def check_forms(device: torch.device, say: Callable[[str], None] = print) -> None:
    """Compare them, and say what was compared and why others were not.

    A form that is wrong in one case is tried in the others too: what a new machine shows is seen
    at once.

    Raises:
        MorError: a form is wrong; it names every case.
    """
    toy = device.type == "cpu"
    pieces, shapes, sizes = (FEW, SHAPES[1:2], (4,)) if toy else (PIECES, SHAPES, PAGE_SIZES)
    wrong: list[str] = []
    for name in NAMES:
        told: set[str] = set()
        for dtype, kind in TYPES:
            worst, compared = 0.0, 0
            reasons: set[str] = set()
            for shape, page_size in itertools.product(shapes, sizes):
                heads, kv_heads, width = shape
                config = MoRConfig(
                    vocab_size=8, hidden_size=heads * width, num_attention_heads=heads,
                    num_key_value_heads=kv_heads, head_dim=width, router="fixed",
                )  # fmt: skip
                setting = Setting(config, device, dtype, entry_type(kind, dtype))
                reason = explain_missing(name, setting)
                if reason is not None:
                    reasons.add(reason)
                    continue
                case = f"{name}, {dtype}, cache {kind}, heads {shape}, pages of {page_size}"
                try:
                    off = check_form(name, setting, pieces, shape, page_size)
                except Exception as error:  # a kernel that does not build, an operator that refuses
                    wrong.append(f"{case}: {type(error).__name__}: {error}")
                    continue
                worst, compared = max(worst, off), compared + 1
                if not off <= CLOSE[dtype]:
                    wrong.append(f"{case}: off by {off}, more than {CLOSE[dtype]}")
            if compared:
                say(f"ok form {name}, {dtype}, cache {kind}: off by {worst:.1e} at most")
            for reason in sorted(reasons - told):
                say(f"-- form {name}, {dtype}, cache {kind}: {reason}")
            told |= reasons
    if wrong:
        raise MorError("\n".join(wrong))
