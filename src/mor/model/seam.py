"""What stands between the passes of the shared block, as options of the configuration.

A plain pass takes the stream h and gives block(h). A seam changes what enters a pass, how much of
its contribution stays, and what is carried from one pass to the next:

- ``recursion_seam="norm_inject"``: rms_norm(h) + a e enters every pass but the first, where e is
  the stream before depth 0 (arXiv 2609.19107);
- ``recursion_scalars``, ``recursion_scale``: x + s (block(x) - x) leaves a pass that x entered;
- ``recursion_streams=n``: n streams are carried and mixed after every pass (hyper-connections
  between loops, arXiv 2604.21254): x is a weighted sum of them, and what the pass contributed is
  added to each with a weight. They lie side by side, [..., n D].

All but ``norm_inject`` and ``recursion_scale`` start without effect.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization

from mor.config import MoRConfig
from mor.model.layers import RMSNorm
from mor.model.relaxation import Relaxation


class Seam(Relaxation):
    """What enters and leaves a pass, and what is carried between two.

    Attributes:
        streams: how many streams are carried.
        injects: whether passes look at the stream before depth 0.
        scale: constant factor of a pass's contribution.
        scalars: [R] learned factor of each depth's contribution.
        norm, inject: of ``norm_inject``; the factor a is [D], or [1] for all channels.
        taken, mixed, added: [R, n], [R, n, n], [R, n] what each depth takes from the streams, how
            it mixes them, and what it adds of its contribution to each.
    """

    def __init__(self, config: MoRConfig) -> None:
        super().__init__()
        width, depths, self.streams = (
            config.hidden_size,
            config.num_recursions,
            config.recursion_streams,
        )
        self.injects = config.recursion_seam == "norm_inject"
        self.inject_init = config.recursion_seam_init
        self.scale = 1.0 / depths if config.recursion_scale == "inverse" else 1.0
        self.norm: RMSNorm | None = None
        self.inject: nn.Parameter | None = None
        if self.injects:
            self.norm = RMSNorm(width, config.rms_norm_eps)
            size = width if config.recursion_seam_weight == "channel" else 1
            self.inject = nn.Parameter(torch.empty(size))
        self.scalars = nn.Parameter(torch.empty(depths)) if config.recursion_scalars else None
        self.taken: nn.Parameter | None = None
        if self.streams > 1:
            self.taken = nn.Parameter(torch.empty(depths, self.streams))
            self.mixed = nn.Parameter(torch.empty(depths, self.streams, self.streams))
            self.added = nn.Parameter(torch.empty(depths, self.streams))
        self.reset(0.0)

    def reset(self, std: float) -> None:
        """Ones for scalars; each depth takes one stream, mixes none, and adds to all."""
        # By functions that leave loaded weights alone: Transformers resets modules after loading.
        if self.inject is not None:
            nn.init.constant_(self.inject, self.inject_init)
        if self.scalars is not None:
            nn.init.ones_(self.scalars)
        if self.taken is not None:
            depths, streams = self.taken.shape
            places = torch.arange(depths, device=self.taken.device)[:, None] % streams
            initialization.copy_(self.taken, torch.zeros_like(self.taken).scatter_(1, places, 1.0))
            eye = torch.eye(streams, device=self.mixed.device)
            initialization.copy_(self.mixed, eye.expand_as(self.mixed))
            nn.init.ones_(self.added)

    def widen(self, hidden: Tensor) -> Tensor:
        """The stream [..., D] as it is carried between passes, [..., n D]."""
        return hidden if self.streams == 1 else torch.cat([hidden] * self.streams, -1)

    def narrow(self, carried: Tensor) -> Tensor:
        """What the router, the coda and the records see of what is carried: [..., n D] -> [..., D].

        The mean of the streams.
        """
        if self.streams == 1:
            return carried
        return _add_up(carried.chunk(self.streams, -1)) / self.streams

    def enter(self, carried: Tensor, origin: Tensor | None, depth: int | Tensor) -> Tensor:
        """What enters the pass at ``depth``.

        Args:
            carried: [..., n D].
            origin: [..., n D] the same before depth 0; may be None where it is not injected.
            depth: one for all tokens, or one per token [...].

        Returns:
            [..., D].
        """
        hidden = carried
        if self.taken is not None:
            weights = self.taken[depth].to(carried.dtype)
            parts = carried.chunk(self.streams, -1)
            hidden = _add_up([weights[..., i, None] * part for i, part in enumerate(parts)])
        if not self.injects or (isinstance(depth, int) and depth == 0):
            return hidden
        assert self.norm is not None
        assert self.inject is not None
        if origin is None:
            raise ValueError("recursion_seam='norm_inject' needs the stream before depth 0: origin")
        joined = self.norm(hidden) + self.inject.to(hidden.dtype) * self.narrow(origin)
        if isinstance(depth, int):
            return joined
        return torch.where((depth > 0)[..., None], joined, hidden)

    def leave(
        self, carried: Tensor, entered: Tensor, output: Tensor, depth: int | Tensor
    ) -> Tensor:
        """What is carried on after the pass at ``depth``.

        Args:
            carried: [..., n D] before the pass.
            entered: [..., D] from :meth:`enter`.
            output: [..., D] of the block.
            depth: as in :meth:`enter`.

        Returns:
            [..., n D].
        """
        if self.scalars is None and self.taken is None and self.scale == 1.0:
            return output
        added = output - entered
        if self.scalars is not None:
            added = added * self.scalars[depth].to(output.dtype)[..., None]
        if self.scale != 1.0:
            added = added * self.scale
        if self.taken is None:
            return entered + added
        mix, gain = self.mixed[depth].to(output.dtype), self.added[depth].to(output.dtype)
        parts = carried.chunk(self.streams, -1)
        streams = [
            _add_up([mix[..., i, j, None] * part for j, part in enumerate(parts)])
            + gain[..., i, None] * added
            for i in range(self.streams)
        ]
        return torch.cat(streams, -1)


def _add_up(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Sum in order, so that a token's last bit does not hang on the batch."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def build_seam(config: MoRConfig) -> Seam | None:
    """The seam that a configuration asks for; None where passes follow each other plainly."""
    plain = (
        config.recursion_seam == "none"
        and not config.recursion_scalars
        and config.recursion_scale == "none"
        and config.recursion_streams == 1
    )
    return None if plain else Seam(config)
