"""Token choice: a token picks its depth once, at the start."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mor.config import MoRConfig
from mor.model.routers.base import Candidates, Router, Scores
from mor.model.routers.net import RouterNet
from mor.model.routers.selection import masked_mean
from mor.ops import planned, pointwise
from mor.ops.ranks import is_distributed


class TokenChoiceRouter(Router):
    """Each token picks its last depth from the stream before depth 0 (paper 2.2.1).

    Token of choice e runs depths 0..e; its stream is replaced on the way and ends as
    h0 + g block^(e+1)(h0). Causal by construction. Balance comes from a loss or from a bias that
    follows the load (arXiv 2408.15664), which never enters the gate.
    """

    chooses_once = True
    carried = ("gate", "choice")
    returns_to_origin = True
    ignores_rows = True
    bias: Tensor

    def __init__(self, config: MoRConfig) -> None:
        super().__init__(config)
        self.net = RouterNet(config, 1, config.num_recursions)
        self.register_buffer("bias", torch.zeros(config.num_recursions))

    def probabilities(self, logits: Tensor) -> Tensor:
        """softmax or sigmoid over depths, times alpha; [..., R]."""
        if self.config.router_activation == "softmax":
            squashed = logits.softmax(-1)
        else:
            squashed = pointwise.sigmoid(logits + self.config.router_gate_bias)
        return squashed * self.config.router_alpha

    def start(self, hidden: Tensor, max_depth: int | Tensor) -> Scores | None:
        """Choice and gate of every token; a depth cap cuts the choice, not the gate."""
        logits = self.net(self.read(hidden), 0)
        chances = self.probabilities(logits)
        choice = (chances.detach() + self.bias).argmax(-1)
        if self.training and self.step < self.config.router_balance_warmup_steps:
            choice = torch.full_like(choice, self.num_recursions - 1)
        gate = chances.gather(-1, choice[..., None]).squeeze(-1)
        return Scores(gate=gate, logits=logits, choice=choice.clamp(max=max_depth - 1))

    def score(
        self, hidden: Tensor, depth: int | Tensor, positions: Tensor, started: Scores | None
    ) -> Scores:
        """The scores that :meth:`start` gave."""
        assert started is not None
        return started

    def bounds(
        self, started: Scores | None, lengths: Sequence[int], max_depth: int
    ) -> list[int] | None:
        """Exactly how many there are: the one planned read, for all depths."""
        assert started is not None
        assert started.choice is not None
        depths = torch.arange(max_depth, device=started.choice.device)[:, None]
        return planned.read((started.choice.flatten() >= depths).sum(1))

    def select(self, scores: Scores, depth: int, candidates: Candidates) -> Tensor | None:
        """The same as :meth:`decide`: nothing looks ahead."""
        return self.decide(scores, depth)

    def decide(self, scores: Scores, depth: int | Tensor) -> Tensor | None:
        """Every token runs depth 0, and depth r while its choice is at least r."""
        assert scores.choice is not None
        return None if isinstance(depth, int) and depth == 0 else scores.choice >= depth

    def update(
        self, hidden: Tensor, output: Tensor, origin: Tensor, scores: Scores, depth: int | Tensor
    ) -> Tensor:
        """Replaced while the token goes on; combined with the origin where it ends."""
        assert scores.choice is not None
        ends = (scores.choice == depth)[..., None]
        return torch.where(ends, self.combine(origin, output, scores.gate), output)

    def _shares(self, choice: Tensor, valid: Tensor | None) -> Tensor:
        """Tokens that chose each depth, [R]."""
        chosen = planned.one_hot(choice, self.num_recursions, torch.float32)
        if valid is not None:
            chosen = chosen * valid[..., None]
        return chosen.flatten(0, -2).sum(0)

    def losses(
        self, scores: Scores, active: Tensor | None, depth: int, candidates: Candidates
    ) -> dict[str, Tensor]:
        """sum_i P_i f_i with f_i = R x share of depth i (1 at balance); logsumexp^2; at depth 0."""
        if depth > 0:
            return {}
        assert scores.logits is not None
        assert scores.choice is not None
        terms = {}
        if self.config.router_balancing == "loss":
            load = self._shares(scores.choice, candidates.valid)
            if self.over_ranks:  # means of the probabilities add up over ranks, products do not
                torch.distributed.all_reduce(load)
            load = self.num_recursions * load / load.sum()
            chances = self.probabilities(scores.logits)
            mean = torch.stack([masked_mean(c, candidates.valid) for c in chances.unbind(-1)])
            terms["balancing_loss"] = (mean * load).sum()
        if self.config.router_z_loss_coef:
            terms["z_loss"] = masked_mean(scores.logits.logsumexp(-1).square(), candidates.valid)
        return terms

    def observe(
        self, scores: Scores, active: Tensor | None, depth: int, candidates: Candidates
    ) -> None:
        """Count the load of each depth."""
        if depth == 0 and scores.choice is not None:
            self.noted.append((depth, self._shares(scores.choice, candidates.valid)))

    def finish_step(self) -> None:
        """Loss-free balancing: move the bias of each depth by u towards the mean load."""
        loads = [load for _, load in self.noted]
        self.noted.clear()
        if self.config.router_balancing != "loss_free" or not loads:
            return
        if self.step < self.config.router_balance_warmup_steps:
            self.bias.zero_()
            return
        load = torch.stack(loads).sum(0)
        if is_distributed():
            torch.distributed.all_reduce(load)
        self.bias += self.config.router_bias_update_rate * torch.sign(load.mean() - load)
