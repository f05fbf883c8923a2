"""How tokens of one pass see each other: in rows, end to end, or among padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mor.model.attend.protocol import Attend
from mor.ops.attention import causal_attention, segment_attention
from mor.ops.full_attention import Meeting, masked_attention, meeting_attention
from mor.ops.segments import Runs, Segments


def lay_end_to_end(heads: Tensor) -> Tensor:
    """[A, H, M, d] -> [A M, H, d]: a view, since projections lay a token's heads side by side."""
    return heads.transpose(1, 2).flatten(0, 1)


def lay_in_rows(tokens: Tensor, like: Tensor) -> Tensor:
    """[A M, H, d] -> [A, H, M, d], A and M as in ``like``."""
    return tokens.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)


class CausalAttend(Attend):
    """Own keys and values of these tokens only: recursion-wise caching (paper 2.3).

    Args:
        segments: what sees what among the tokens laid end to end; None for rows of their own.
    """

    def __init__(self, segments: Segments | Runs | None = None) -> None:
        self.segments = segments

    def needs_kv(self, layer: int) -> bool:
        """True: every layer computes its own keys and values."""
        return True

    def __call__(
        self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> Tensor:
        """Plain causal attention within each row or segment."""
        assert key is not None
        assert value is not None
        if self.segments is None:
            return causal_attention(query, key, value)
        one, two, three = lay_end_to_end(query), lay_end_to_end(key), lay_end_to_end(value)
        return lay_in_rows(segment_attention(one, two, three, self.segments), query)


class FullAttend(CausalAttend):
    """The same in both directions, for encoders: every token of the row or segment is seen."""

    def __init__(self, segments: Segments | Runs | None = None) -> None:
        super().__init__(segments)
        assert not isinstance(segments, Runs)  # encoders ask for lengths
        self.meeting = None if segments is None else Meeting(segments, segments)

    def __call__(
        self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> Tensor:
        """Attention over all tokens of each row or segment."""
        assert key is not None
        assert value is not None
        if self.meeting is None:
            return masked_attention(query, key, value)
        one, two, three = lay_end_to_end(query), lay_end_to_end(key), lay_end_to_end(value)
        return lay_in_rows(meeting_attention(one, two, three, self.meeting), query)


class PaddedAttend(CausalAttend):
    """The same among rows [A, M] that keep their padding: real tokens see real tokens.

    For traced graphs (``torch.export``), whose shapes cannot depend on a mask.

    Args:
        real: [A, M] bool.
        is_causal: whether a token sees earlier ones alone.
    """

    def __init__(self, real: Tensor, is_causal: bool = True) -> None:
        super().__init__()
        width = real.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool, device=real.device)
        causal = causal.tril() if is_causal else causal
        itself = torch.eye(width, dtype=torch.bool, device=real.device)
        # Padding sees itself: a row of nothing would be nan.
        self.seen = ((real[:, None] & causal) | itself)[:, None]

    def __call__(
        self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> Tensor:
        """Attention over the real tokens up to each."""
        assert key is not None
        assert value is not None
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.seen)
