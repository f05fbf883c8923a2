"""The Llama layer, with cache and attention passed in as one argument.

Llama as in transformers' ``LlamaDecoderLayer``: pre-norm RMSNorm, grouped-query attention without
biases, rotate-half RoPE, SwiGLU.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor.config import MoRConfig
from mor.ops.norm import rms_norm
from mor.ops.rope import Rotation, rotate


class Attend(Protocol):
    """Where keys and values live, and how queries meet them, for one stage of one forward pass.

    Training, the Hugging Face cache and the paged engine each bring their own.
    """

    def needs_kv(self, layer: int) -> bool:
        """Whether unrolled layer ``layer`` of this stage has to compute keys and values."""
        ...

    def __call__(
        self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> Tensor:
        """Attention output [A, H, M, d] for query [A, H, M, d]; key, value [A, Hkv, M, d]."""
        ...


class RMSNorm(nn.Module):
    """RMSNorm with one weight [D], or one per use of a shared layer [uses, D]."""

    def __init__(self, width: int, eps: float, uses: int | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width) if uses is None else torch.ones(uses, width))

    def forward(self, hidden: Tensor, use: int | Tensor = 0) -> Tensor:
        """Normalise [..., D]; ``use`` picks the weight where uses differ."""
        weight = self.weight if self.weight.dim() == 1 else self.weight[use]
        return rms_norm(hidden, weight, self.eps)


class Attention(nn.Module):
    """Grouped-query self-attention; what it attends to is the business of ``attend``."""

    def __init__(self, config: MoRConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width = config.hidden_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, queries, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, keys, bias=False)
        self.o_proj = nn.Linear(queries, width, bias=False)

    def _heads(self, flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, hidden: Tensor, rope: Rotation, attend: Attend, layer: int) -> Tensor:
        """[A, M, D] -> [A, M, D]; ``rope`` holds the original positions of these tokens."""
        query = rotate(self._heads(self.q_proj(hidden)), rope)
        key = value = None
        if attend.needs_kv(layer):
            key = rotate(self._heads(self.k_proj(hidden)), rope)
            value = self._heads(self.v_proj(hidden))
        mixed = attend(layer, query, key, value)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU feed-forward (arXiv 2002.05202)."""

    def __init__(self, config: MoRConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class DecoderLayer(nn.Module):
    """One Llama layer. ``norm_uses`` is R where a shared layer keeps its norms apart."""

    def __init__(self, config: MoRConfig, norm_uses: int | None = None) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, norm_uses)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, norm_uses)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden: Tensor,
        rope: Rotation,
        attend: Attend,
        layer: int,
        use: int | Tensor = 0,
    ) -> Tensor:
        """[A, M, D] -> [A, M, D].

        Args:
            hidden: the residual stream of these tokens.
            rope: cos and sin of their positions, each [A, M, head_dim].
            attend: keys, values and the attention form.
            layer: unrolled index within the stage, told to ``attend``.
            use: which use of a shared layer this is, for norms kept apart.
        """
        attended = self.self_attn(self.input_layernorm(hidden, use), rope, attend, layer)
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden, use))
