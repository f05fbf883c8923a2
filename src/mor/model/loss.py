"""The training loss: next-token cross-entropy plus weighted router terms, for any micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mor.config import MoRConfig
from mor.model.routers.base import Router
from mor.ops.cross_entropy import IGNORE


@dataclass
class LossParts:
    """``total = lm + sum of weighted router terms``, each a scalar tensor.

    Attributes:
        total: what to back-propagate.
        lm: cross-entropy, in nats per token (summed over tokens, divided by the item count).
        router: unweighted router terms by name, as means over this micro-batch.
        exits: by number of recursions, cross-entropy as ``lm`` of the exits before the last.
    """

    total: Tensor
    lm: Tensor
    router: dict[str, Tensor]
    exits: dict[int, Tensor] = field(default_factory=dict)


def next_token_targets(labels: Tensor | None, shifted: Tensor | None = None) -> Tensor:
    """[B T] what each place has to predict, from labels [B, T]; -100 where nothing.

    The labels move, not the logits: a shifted view of [B, T, V] would have to be copied. Labels
    that come ``shifted`` [B, T] are taken as they are.
    """
    if shifted is not None:
        return shifted.reshape(-1)
    assert labels is not None
    moved = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    return moved[:, : labels.shape[1]].reshape(-1)  # rows of nothing stay nothing


def combine_losses(
    summed: Tensor,
    targets: Tensor,
    router: Router,
    router_terms: dict[str, Tensor],
    num_items_in_batch: Tensor | int | None = None,
    exits: dict[int, Tensor] | None = None,
) -> LossParts:
    """Cross-entropy and router terms, so that micro-batches add up to their batch.

    With ``num_items_in_batch`` (targets over all micro-batches and ranks of the optimiser step, as
    Transformers' Trainer passes it) every term of this micro-batch is weighted by its share of
    targets. The authors' code leaves the auxiliary loss out of that division, so that it grows with
    gradient accumulation; this one does not.

    Args:
        summed: cross-entropies of this micro-batch, added up.
        targets: [N] as :func:`next_token_targets` makes them.
        router: for the weight of each term.
        router_terms: unweighted means over this micro-batch.
        num_items_in_batch: None to average over this micro-batch alone.
        exits: by number of recursions, summed cross-entropies of earlier exits; weighted by
            ``exit_loss_weights`` of the configuration.
    """
    own = (targets != IGNORE).sum()
    items = own if num_items_in_batch is None else num_items_in_batch
    items = torch.as_tensor(items, device=targets.device)
    lm = summed / items.clamp(min=1)
    share = own / items.clamp(min=1)
    total = lm.clone()  # the Trainer scales it in place by the number of ranks
    for name, term in router_terms.items():
        total = total + router.loss_weight(name) * share * term
    early = {passes: loss / items.clamp(min=1) for passes, loss in (exits or {}).items()}
    for passes, loss in early.items():
        total = total + exit_weights(router.config)[passes] * loss
    return LossParts(total, lm, router_terms, early)


def exit_weights(config: MoRConfig) -> dict[int, float]:
    """Weight of the loss at each exit before the last that has one, by number of recursions."""
    weights = enumerate(config.exit_loss_weights or (), 1)
    return {passes: weight for passes, weight in weights if weight}
