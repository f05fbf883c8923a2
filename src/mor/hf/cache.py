"""The cache that ``generate()`` carries: :class:`mor.model.DepthCache` under Transformers' name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from mor.config import MoRConfig
from mor.model.cache import DepthCache


class MoRCache(DepthCache, Cache):
    """Keys and values per depth for active tokens only; see :class:`mor.model.cache.DepthCache`.

    ``nbytes()`` counts what is cached, ``vanilla_nbytes()`` what a vanilla model of the same
    unrolled depth would hold. Rows can be reordered for beams, repeated, and cropped.

    ``Cache`` answers what it is asked about by asking each of its layer objects. There are none
    here, and "all of none" is true: so every such answer is given below.
    """

    is_compileable = False

    def __init__(self, config: MoRConfig) -> None:
        DepthCache.__init__(self, config)
        self.layers: list = []
        self._masks: Tensor | None = None

    def __repr__(self) -> str:
        lengths = [g.lengths.tolist() for g in self.groups()]
        return f"MoRCache(entries per group and row={lengths})"

    def __len__(self) -> int:
        return len(self.groups())

    @property
    def is_linear(self) -> list[bool]:
        """Per unrolled layer: none keeps a running state instead of keys and values."""
        return [False] * self.config.num_hidden_layers

    @property
    def is_sliding(self) -> list[bool]:
        """Per unrolled layer: none forgets what is far back."""
        return [False] * self.config.num_hidden_layers

    @property
    def is_dummy(self) -> list[bool]:
        """Per unrolled layer: none stands for another."""
        return [False] * self.config.num_hidden_layers

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before anything is cached."""
        return -1 if self.seen is None else len(self.seen)

    @property
    def max_batch_size(self) -> int:
        """The same, as older versions ask for it."""
        return self.batch_size

    @property
    def max_cache_len(self) -> int:
        """No limit."""
        return -1

    @property
    def is_croppable(self) -> bool:
        """Entries know their token, so that the last tokens can be taken back."""
        return True

    @property
    def is_initialized(self) -> bool:
        """Whether anything was cached."""
        return self.seen is not None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns cached so far, padding included: what ``generate`` slices its inputs by."""
        return self.columns

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Columns that a mask over cached and new tokens has, and the first one."""
        new = query_length if isinstance(query_length, int) else len(query_length)
        return self.columns + new, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No limit, as Transformers writes it."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """No limit, as Transformers writes it."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` of every entry."""
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times in place."""
        if self.seen is not None:
            index = torch.arange(len(self.seen), device=self.seen.device)
            self.select_rows(index.repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        """Keep the first ``max_length`` columns; a negative number takes that many back, 0 none.

        The columns taken back must be real tokens in every row, as they are while decoding.
        """
        target = max_length if max_length > 0 else max(0, self.columns + max_length)
        dropped = self.columns - min(target, self.columns)
        if self.seen is not None and dropped:
            self.crop_tokens((self.seen - dropped).clamp(min=0))
            self.columns -= dropped

    def activate_past_recording(self) -> None:
        """Nothing to do: crop works at any time."""

    def reset(self) -> None:
        """Drop all entries."""
        DepthCache.__init__(self, self.config)
