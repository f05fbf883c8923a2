"""The small networks that score tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from mor.config import MoRConfig
from mor.ops import native, pointwise


class RouterNet(nn.Module):
    """``sets`` small networks of the same shape, hidden -> outputs.

    ``linear`` is one matrix; ``mlp`` and ``wide_mlp`` are hidden -> 2 hidden -> outputs with exact
    GELU (the released code makes no difference between the two). Computed in float32 or wider, so
    that a token's depth does not hang on the training dtype.

    Attributes:
        up: [sets, 2 D, D] the first matrices, of two-layer networks.
        weight: [sets, outputs, D or 2 D] the last matrices.
        bias: [sets, outputs] of the outputs, with ``router_init_bias``; else there is none.
    """

    def __init__(self, config: MoRConfig, sets: int, outputs: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.temperature = config.router_temperature
        self.up: nn.Parameter | None = None
        if config.router_architecture == "linear":
            self.weight = nn.Parameter(torch.empty(sets, outputs, width))
        else:
            self.up = nn.Parameter(torch.empty(sets, 2 * width, width))
            self.weight = nn.Parameter(torch.empty(sets, outputs, 2 * width))
        self.init_bias = config.router_init_bias
        self.bias: nn.Parameter | None = None
        if self.init_bias is not None:
            self.bias = nn.Parameter(torch.empty(sets, outputs))

    @torch.no_grad()
    def reset(self, std: float) -> None:
        """Matrices from Normal(0, ``std``); the bias of the last output at ``router_init_bias``.

        Where there are several outputs (token choice), the last is the deepest.
        """
        if self.up is not None:
            nn.init.normal_(self.up, 0.0, std)
        nn.init.normal_(self.weight, 0.0, std)
        if self.bias is not None and self.init_bias is not None:
            start = torch.zeros_like(self.bias)
            start[:, -1] = self.init_bias
            initialization.copy_(self.bias, start)  # which leaves loaded weights alone

    def forward(self, hidden: Tensor, index: int | Tensor) -> Tensor:
        """[..., D] -> [..., outputs] by network ``index``, one for all tokens or one per token."""
        if native.fits(hidden, self.weight):
            # A score must not hang on how many tokens are beside it, not even in its last bit.
            places = torch.as_tensor(index, device=hidden.device)
            places = places.expand(hidden.shape[:-1]).flatten()
            even = hidden if self.temperature == 1 else hidden / self.temperature
            found = even.flatten(0, -2)
            if self.up is not None:
                found = pointwise.gelu(native.own_linear(found, self.up, places))
            found = native.own_linear(found, self.weight, places)
            if self.bias is not None:
                found = found + self.bias[places]
            return found.unflatten(0, hidden.shape[:-1])
        if isinstance(index, Tensor):
            every = torch.stack([self(hidden, i) for i in range(self.weight.shape[0])], dim=-2)
            choice = index[..., None, None].expand(*index.shape, 1, every.shape[-1])
            return every.gather(-2, choice).squeeze(-2)
        with torch.autocast(hidden.device.type, enabled=False):
            wide = torch.promote_types(hidden.dtype, torch.float32)
            hidden = hidden.to(wide) / self.temperature
            if self.up is not None:
                hidden = F.gelu(F.linear(hidden, self.up[index].to(wide)))
            bias = None if self.bias is None else self.bias[index].to(wide)
            return F.linear(hidden, self.weight[index].to(wide), bias)
