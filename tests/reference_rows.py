"""One row of the plain reference: its weights are the model's, its code is not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mor import MoRForCausalLM


def norm(module: Any, hidden: Tensor, use: int = 0) -> Tensor:
    weight = module.weight if module.weight.dim() == 1 else module.weight[use]
    return hidden / (hidden.square().mean(-1, keepdim=True) + module.eps).sqrt() * weight


def linear(half: Any, name: str, hidden: Tensor, use: int) -> Tensor:
    """A linear map of half a layer, as one matrix: what is shared plus this use's product."""
    module = getattr(half, name)
    weight, bias = module.weight, 0 if module.bias is None else module.bias
    if half.low_rank is not None:
        own = half.low_rank[name.removesuffix("_proj")]
        weight = weight + own.scale * own.up[use] @ own.down[use]
        bias = bias if own.bias is None else bias + own.bias[use]
    return hidden @ weight.T + bias


def turn(heads: Tensor, theta: float, columns: int | None = None) -> Tensor:
    """Rotate [T, H, d] token by token: the pair (i, i + d/2) as one complex number.

    On a grid of so many ``columns`` the first half of the pairs goes by row, the other by column.
    """
    length, _, width = heads.shape
    rates = 1 / theta ** (torch.arange(0, width, 2) / width)
    angle = torch.arange(length)[:, None] * rates
    if columns is not None:
        rates = 1 / theta ** (torch.arange(0, width, 4) / width)
        places = [divmod(token, columns) for token in range(length)]
        angle = torch.stack([torch.cat((row * rates, column * rates)) for row, column in places])
    # The model turns by cos and sin of float32 in every dtype.
    by = torch.complex(angle.cos(), angle.sin())[:, None].to(heads.dtype.to_complex())
    first, second = heads[..., : width // 2], heads[..., width // 2 :]
    turned = torch.complex(first, second) * by
    return torch.cat((turned.real, turned.imag), -1)


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """query [T, H, d]; key, value [S, Hkv, d]; visible bool [T, S]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("thd,shd->hts", query, key) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, value)


class Row:
    """One row on its way through the network."""

    def __init__(self, model: MoRForCausalLM, embedded: Tensor) -> None:
        self.network, self.config = model.model, model.config
        self.hidden = embedded
        self.causal = torch.ones(len(embedded), len(embedded)).bool()
        self.causal = self.causal.tril() if self.config.is_causal else self.causal
        self.columns = self.config.patch_grid[1] if self.config.modality == "image" else None
        self.alive = torch.ones(len(embedded), dtype=torch.bool)
        self.depths = torch.zeros(len(embedded), dtype=torch.long)
        self.store: dict[int, tuple[Tensor, Tensor]] = {}
        self.stored = self.alive
        self.origin = embedded

    def open(self) -> None:
        """Begin the recursions: one or several streams side by side."""
        self.hidden = self.hidden.repeat(1, self.config.recursion_streams)
        self.origin = self.hidden

    def seen(self, carried: Tensor) -> Tensor:
        """The stream [T, D]: the mean of those that are carried, [T, n D]."""
        return carried.unflatten(-1, (-1, self.config.hidden_size)).mean(1)

    def heads(self, flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (-1, self.config.head_dim))

    def layer(
        self,
        layer: Any,
        hidden: Tensor,
        visible: Tensor,
        use: int = 0,
        shared: int | None = None,
        own: Tensor | None = None,
    ) -> Tensor:
        """One Llama layer; ``shared`` names stored keys, ``own`` [T] says who replaces them."""
        attention, theta = layer.self_attn, self.config.rope_parameters["rope_theta"]
        normed = norm(layer.input_layernorm, hidden, use)
        query = self.heads(linear(attention, "q_proj", normed, use))
        if self.config.use_qk_norm:
            query = norm(attention.q_norm, query, use)
        query = turn(query, theta, self.columns)
        key, value = self.key_and_value(layer, hidden, use)
        if self.config.kv_sharing == "propagate" and shared is not None:
            assert own is not None
            ended_key, ended_value = self.ended(shared)
            key = torch.where(own[:, None, None], key, ended_key)
            value = torch.where(own[:, None, None], value, ended_value)
        elif shared is not None and shared not in self.store:
            self.store[shared] = (key, value)
        elif shared is not None:
            assert own is not None
            stored_key, stored_value = self.store[shared]
            key = torch.where(own[:, None, None], key, stored_key)
            value = torch.where(own[:, None, None], value, stored_value)
        mixed = attend(query, key, value, visible).flatten(1)
        gains = [1.0, 1.0]
        if layer.mlp_gain is not None:
            gains = [layer.attention_gain.weight[use], layer.mlp_gain.weight[use]]
        hidden = hidden + gains[0] * linear(attention, "o_proj", mixed, use)
        normed = norm(layer.post_attention_layernorm, hidden, use)
        mlp = layer.mlp
        gated = F.silu(linear(mlp, "gate_proj", normed, use)) * linear(mlp, "up_proj", normed, use)
        return hidden + gains[1] * linear(mlp, "down_proj", gated, use)

    def key_and_value(self, layer: Any, hidden: Tensor, use: int) -> tuple[Tensor, Tensor]:
        attention, theta = layer.self_attn, self.config.rope_parameters["rope_theta"]
        normed = norm(layer.input_layernorm, hidden, use)
        key = self.heads(linear(attention, "k_proj", normed, use))
        if self.config.use_qk_norm:
            key = norm(attention.k_norm, key, use)
        return turn(key, theta, self.columns), self.heads(linear(attention, "v_proj", normed, use))

    def ended(self, shared: int) -> tuple[Tensor, Tensor]:
        """Key and value of each token as it is now, of the pass that it would run next."""
        last = self.config.num_recursions - 1
        found: list[tuple[Tensor, Tensor]] = []
        for depth in range(last + 1):
            found.append(
                self.key_and_value(self.network.block[shared], self.entry(depth)[1], depth)
            )
        chosen = self.depths.clamp(max=last)
        every = torch.arange(len(chosen))
        return torch.stack([k for k, _ in found])[chosen, every], torch.stack(
            [v for _, v in found]
        )[chosen, every]

    def entry(self, depth: int) -> tuple[Tensor, Tensor]:
        """What enters the pass at ``depth``, without and with the depth's embedding."""
        seam, carried = self.network.seam, self.hidden.unflatten(-1, (-1, self.config.hidden_size))
        hidden = carried[:, 0]
        if self.config.recursion_streams > 1:
            hidden = torch.einsum("n,tnd->td", seam.taken[depth], carried)
        if self.config.recursion_seam == "norm_inject" and depth > 0:
            hidden = norm(seam.norm, hidden) + seam.inject * self.seen(self.origin)
        if self.network.depth_embedding is None:
            return hidden, hidden
        return hidden, hidden + self.network.depth_embedding.weight[depth]

    def stack(self, layers: Any) -> None:
        for layer in layers:
            self.hidden = self.layer(layer, self.hidden, self.causal)

    def block(self, depth: int, active: Tensor) -> Tensor:
        """The shared block over all tokens; only what active tokens get out of it has meaning."""
        sharing, count = self.config.kv_sharing, self.config.num_recursion_layers
        if depth == 0:
            self.stored = active
        keys = {"none": active, "propagate": torch.ones_like(active)}.get(sharing, self.stored)
        # Everyone sees itself, so that the rows nobody reads are numbers too.
        visible = self.causal & (keys | torch.eye(len(keys), dtype=torch.bool))
        fresh = ("recursive_update", "propagate")
        own = active if sharing in fresh else torch.zeros_like(active)
        seam, carried = self.network.seam, self.hidden.unflatten(-1, (-1, self.config.hidden_size))
        entered, hidden = self.entry(depth)
        for unrolled in range(depth * count, (depth + 1) * count):
            shared = self.config.shared_layer(unrolled)
            hidden = self.layer(
                self.network.block[shared],
                hidden,
                visible,
                self.config.repetition(unrolled),
                None if sharing == "none" else shared,
                own,
            )
        if seam is None:
            return hidden
        added = hidden - entered
        if self.config.recursion_scalars:
            added = seam.scalars[depth] * added
        if self.config.recursion_scale == "inverse":
            added = added / self.config.num_recursions
        if self.config.recursion_streams == 1:
            return entered + added
        mixed = torch.einsum("ij,tjd->tid", seam.mixed[depth], carried)
        return (mixed + seam.added[depth][:, None] * added[:, None]).flatten(1)
