"""The Llama layer, with cache and attention passed in as one argument.

Llama as in transformers' ``LlamaDecoderLayer``: pre-norm RMSNorm, grouped-query attention,
rotate-half RoPE, SwiGLU; biases and norms of query and key where its relatives have them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor.config import MoRConfig
from mor.model.attend.protocol import Attend
from mor.model.relaxation import LINEAR_MAPS, Gain, Relaxable
from mor.ops.norm import rms_norm
from mor.ops.rope import Rotation, rotate

Heads = tuple[Tensor, Tensor | None, Tensor | None]
"""Query, key and value of some tokens; no key and value where they are not needed."""


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


class Attention(Relaxable):
    """The projections of grouped-query attention; what queries meet is ``attend``'s business.

    Args:
        config: the model's.
        uses: how often a shared layer is used; None for a private one.
        norm_uses: the same where norms are kept apart.
    """

    def __init__(
        self, config: MoRConfig, uses: int | None = None, norm_uses: int | None = None
    ) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, bias = config.hidden_size, config.attention_bias
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, queries, bias=bias)
        self.k_proj = nn.Linear(width, keys, bias=bias)
        self.v_proj = nn.Linear(width, keys, bias=bias)
        self.o_proj = nn.Linear(queries, width, bias=config.attention_out_bias)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.use_qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, norm_uses)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, norm_uses)
        self.relax(config, uses, LINEAR_MAPS["self_attn"])

    def _heads(self, flat: Tensor, norm: RMSNorm | None = None, use: int | Tensor = 0) -> Tensor:
        heads = flat.unflatten(-1, (-1, self.head_dim))
        if norm is not None:
            # A token's use is that of all its heads.
            heads = norm(heads, use[..., None] if isinstance(use, Tensor) else use)
        return heads.transpose(1, 2)

    def project(
        self, hidden: Tensor, rope: Rotation, with_kv: bool | int, use: int | Tensor = 0
    ) -> Heads:
        """Query [A, H, M, d], key and value [A, Hkv, M, d] (or None) of hidden [A, M, D].

        ``with_kv`` is what :meth:`Attend.needs_kv` said; a number makes keys and values [A, Hkv,
        with_kv, d].
        """
        query = rotate(self._heads(self.map("q_proj", hidden, use), self.q_norm, use), rope)
        if not with_kv:
            return query, None, None
        if with_kv is not True:
            hidden, rope = hidden[:, :with_kv], (rope[0][:, :with_kv], rope[1][:, :with_kv])
            use = use[:, :with_kv] if isinstance(use, Tensor) else use
        return query, *self.project_kv(hidden, rope, use)

    def project_kv(
        self, hidden: Tensor, rope: Rotation, use: int | Tensor = 0
    ) -> tuple[Tensor, Tensor]:
        """Key and value, each [A, Hkv, M, d], of hidden [A, M, D]."""
        key = rotate(self._heads(self.map("k_proj", hidden, use), self.k_norm, use), rope)
        return key, self._heads(self.map("v_proj", hidden, use))

    def merge(self, mixed: Tensor, use: int | Tensor = 0) -> Tensor:
        """Attention output [A, H, M, d] -> [A, M, D]."""
        return self.map("o_proj", mixed.transpose(1, 2).flatten(2), use)


class MLP(Relaxable):
    """SwiGLU feed-forward (arXiv 2002.05202).

    Attributes:
        silu: the activation, x sigmoid(x).
    """

    def __init__(self, config: MoRConfig, uses: int | None = None) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.silu: Callable[[Tensor], Tensor] = F.silu
        self.relax(config, uses, LINEAR_MAPS["mlp"])

    def forward(self, hidden: Tensor, use: int | Tensor = 0) -> Tensor:
        """[A, M, D] -> [A, M, D]."""
        gate = self.silu(self.map("gate_proj", hidden, use))
        return self.map("down_proj", gate * self.map("up_proj", hidden, use), use)


class DecoderLayer(nn.Module):
    """One Llama layer. ``uses`` is R for a layer of the shared block, None for a private one.

    Attributes:
        compiled: run :meth:`enter` and :meth:`leave` through ``torch.compile``. Attention stands
            between them and stays out: it depends on cache and routing, and is one kernel anyway.
            All layers of a model share the two compiled functions.
    """

    def __init__(self, config: MoRConfig, uses: int | None = None) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        norm_uses = None if config.share_norms else uses
        self.input_layernorm = RMSNorm(width, eps, norm_uses)
        self.self_attn = Attention(config, uses, norm_uses)
        self.post_attention_layernorm = RMSNorm(width, eps, norm_uses)
        self.mlp = MLP(config, uses)
        self.attention_gain: Gain | None = None
        self.mlp_gain: Gain | None = None
        if uses is not None and config.relaxation == "gains":
            self.attention_gain, self.mlp_gain = Gain(width, uses), Gain(width, uses)
        self.compiled = False

    def enter(
        self, hidden: Tensor, rope: Rotation, use: int | Tensor, with_kv: bool | int
    ) -> Heads:
        """Norm, projections, rotation: heads of hidden [A, M, D] for attention."""
        return self.self_attn.project(self.input_layernorm(hidden, use), rope, with_kv, use)

    def enter_kv(self, hidden: Tensor, rope: Rotation, use: int | Tensor) -> tuple[Tensor, Tensor]:
        """Key and value, each [A, Hkv, M, d], that hidden [A, M, D] would be seen by here."""
        return self.self_attn.project_kv(self.input_layernorm(hidden, use), rope, use)

    def leave(self, hidden: Tensor, mixed: Tensor, use: int | Tensor) -> Tensor:
        """Output projection, residual, norm, feed-forward, residual, after attention.

        Args:
            hidden: [A, M, D] the residual stream that entered the layer.
            mixed: [A, H, M, d] attention output.
            use: as in :meth:`forward`.

        Returns:
            The residual stream [A, M, D] after the layer.
        """
        added = self.self_attn.merge(mixed, use)
        if self.attention_gain is not None:
            added = self.attention_gain(added, use)
        hidden = hidden + added
        added = self.mlp(self.post_attention_layernorm(hidden, use), use)
        if self.mlp_gain is not None:
            added = self.mlp_gain(added, use)
        return hidden + added

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
            layer: unrolled index within the stage, for ``attend``.
            use: which use of a shared layer this is, for norms kept apart and for what relaxes
                the sharing; one number, or one per token [A, M].
        """
        enter, leave = _compiled() if self.compiled else (DecoderLayer.enter, DecoderLayer.leave)
        query, key, value = enter(self, hidden, rope, use, attend.needs_kv(layer))
        return leave(self, hidden, attend(layer, query, key, value), use)


@cache
def _compiled() -> tuple[Callable[..., Heads], Callable[..., Tensor]]:
    # Dynamic: how many tokens a depth runs is another number at every step.
    enter, leave = DecoderLayer.enter, DecoderLayer.leave
    return torch.compile(enter, dynamic=True), torch.compile(leave, dynamic=True)
