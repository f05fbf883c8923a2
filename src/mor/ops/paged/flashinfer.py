"""Attention over pages by FlashInfer's wrapper for a paged cache.

FlashInfer splits the work on the host: ``plan`` takes the lengths of all rows, as the host knows
them, and has to be called before every run over another batch and before every replay of a captured
run. A plan of other lengths is run without a word, and gives wrong numbers.

All layers of a batch share one plan, since their rows are equally long. Their pages differ: each
run first copies its own into the buffer that the wrapper reads, on the device, so that the copy is
captured with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mor.errors import MorError
from mor.ops.paged.rows import Pages, Rows

WORKSPACE = 128 << 20  # bytes; what FlashInfer recommends


def missing_flashinfer(capability: tuple[int, int]) -> str | None:
    """Why FlashInfer cannot run on such a GPU here; None where it can."""
    if capability < (8, 0):
        return (
            "flashinfer needs a GPU of compute capability 8.0 or newer; "
            f"this one has {capability[0]}.{capability[1]}"
        )
    if find_spec("flashinfer") is None:
        return "the package flashinfer-python is not installed"
    return None


def make_wrapper(**arguments: Any) -> Any:
    """FlashInfer's wrapper; its kernels are compiled at the first plan."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    return BatchPrefillWithPagedKVCacheWrapper(**arguments)


@dataclass(frozen=True)
class HostPlan:
    """The arguments of ``plan`` for S rows, worked out on the host.

    Attributes:
        starts: [S + 1] int32, first query of each row.
        page_starts: [S + 1] int32, first page of each row among all their pages.
        last_page: [S] int32, places used of each row's last page.
        sources: [pages] int64, where in the flat page table each of these pages stands.
    """

    starts: Tensor
    page_starts: Tensor
    last_page: Tensor
    sources: Tensor


def plan_rows(
    lengths: Sequence[int], counts: Sequence[int] | None, page_size: int, columns: int
) -> HostPlan:
    """The plan of rows that are ``lengths`` places long, with ``counts`` queries each (None: 1).

    An empty row is planned with the first place of the first page of its row in the table:
    FlashInfer knows no empty rows.
    """
    long = np.maximum(np.asarray(lengths, dtype=np.int64), 1)
    pages = -(-long // page_size)
    ends = pages.cumsum()
    row = np.repeat(np.arange(len(long)), pages)
    column = np.arange(ends[-1]) - (ends - pages)[row]
    own = np.ones(len(long), dtype=np.int64) if counts is None else np.asarray(counts)

    def starts(sizes: np.ndarray) -> Tensor:
        return torch.from_numpy(np.concatenate(([0], sizes.cumsum())).astype(np.int32))

    return HostPlan(
        starts(own),
        starts(pages),
        torch.from_numpy((long - (pages - 1) * page_size).astype(np.int32)),
        torch.from_numpy(row * columns + column),
    )


class FlashInfer:
    """FlashInfer over batches of one size: S rows, N queries, a table of so many columns.

    Args:
        rows, columns: of the page table.
        heads, kv_heads, head_dim, page_size: of queries and pages.
        dtype: of queries, keys and values: bfloat16 or float16.
        device: of all tensors.
        scale: of the scores; None for ``head_dim ** -0.5``.
        make: makes the wrapper from keyword arguments.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        scale: float | None = None,
        workspace: Tensor | None = None,
        make: Callable[..., Any] = make_wrapper,
    ) -> None:
        self.rows, self.columns, self.page_size = rows, columns, page_size
        self.shape, self.dtype, self.scale = (heads, kv_heads, head_dim), dtype, scale
        self.planned = False

        def buffer(count: int, kind: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(count, dtype=kind, device=device)

        if workspace is None:
            workspace = buffer(WORKSPACE, torch.uint8)
        self._pages, self._sources = buffer(rows * columns), buffer(rows * columns, torch.int64)
        self.wrapper = make(
            float_workspace_buffer=workspace,
            kv_layout="NHD",
            use_cuda_graph=True,
            qo_indptr_buf=buffer(rows + 1),
            paged_kv_indptr_buf=buffer(rows + 1),
            paged_kv_indices_buf=self._pages,
            paged_kv_last_page_len_buf=buffer(rows),
            backend="fa2",
        )

    def plan(self, lengths: Sequence[int], counts: Sequence[int] | None = None) -> None:
        """Tell the lengths of all rows, before a run or a replay; not within a capture.

        Args:
            lengths: places of each row that its last query sees.
            counts: queries of each row; None: one each.
        """
        if len(lengths) != self.rows:
            raise MorError(f"lengths has {len(lengths)} rows; this plan is for {self.rows}")
        told = plan_rows(lengths, counts, self.page_size, self.columns)
        # The sources keep their size, so that a captured copy reads all of them.
        self._sources.zero_()
        sources = told.sources
        if self._sources.device.type == "cuda":  # a copy that nobody waits for
            sources = sources.pin_memory()
        self._sources[: len(sources)].copy_(sources, non_blocking=True)
        heads, kv_heads, head_dim = self.shape
        self.wrapper.plan(
            qo_indptr=told.starts,
            paged_kv_indptr=told.page_starts,
            paged_kv_indices=self._pages[: len(told.sources)],
            paged_kv_last_page_len=told.last_page,
            num_qo_heads=heads,
            num_kv_heads=kv_heads,
            head_dim_qk=head_dim,
            page_size=self.page_size,
            causal=True,
            sm_scale=self.scale,
            q_data_type=self.dtype,
            kv_data_type=self.dtype,
            # Split in one way whatever the batch: batch mates move no bit.
            disable_split_kv=True,
        )
        self.planned = True

    def __call__(self, query: Tensor, pages: Pages, rows: Rows) -> Tensor:
        """See :data:`~mor.ops.paged.rows.PagesAttention`; lengths are those of the last plan.

        Raises:
            MorError: nothing was planned.
        """
        if not self.planned:
            raise MorError("flashinfer was not told the lengths; call plan before each run")
        torch.index_select(rows.table.flatten(), 0, self._sources, out=self._pages)
        found = self.wrapper.run(query, (pages.keys, pages.values))
        return torch.where(rows.used[:, None, None] > 0, found, 0)
