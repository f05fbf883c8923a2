"""Routes by chance: the depths that a router gave, dealt out at random among the same tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mor.data.dataset import IGNORED
from mor.eval.passes import next_targets, token_nll
from mor.hf.modeling import MoRForCausalLM
from mor.model.routers.forced import forced_depths


class ChanceRoutes:
    """Scores each batch of a pass again at dealt-out depths; what is lost is what the router knows.

    Args:
        model: that the pass runs.
        dataset: that its batches are of.
        seed: of the chance.
    """

    def __init__(self, model: MoRForCausalLM, dataset: Dataset, seed: int = 0) -> None:
        self.model, self.dataset = model, dataset
        self.draw = torch.Generator().manual_seed(seed)
        self.nll_sum, self.targets, self.differ = 0.0, 0, False

    def look(self, ids: Tensor, output: Any) -> None:
        """Deal out the depths of ``output`` among the tokens of ids [B, T], and score the batch."""
        depths = output.depths.cpu()
        dealt = depths.flatten()[torch.randperm(depths.numel(), generator=self.draw)]
        self.differ = self.differ or bool((depths != depths[0, 0]).any())
        with forced_depths(self.model.model, dealt.view_as(depths).to(ids.device)):
            again = self.model(ids, use_cache=False, routing="causal")
        targets = next_targets(self.dataset, ids)
        self.nll_sum += float(token_nll(again.logits, targets).double().sum())
        self.targets += int((targets != IGNORED).sum())

    def nll(self) -> float | None:
        """Nats per token; None where no two tokens differed in depth."""
        return self.nll_sum / self.targets if self.differ else None
