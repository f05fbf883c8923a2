"""The five routers. ``build_router(config)`` makes the one a configuration names.

expert_choice  each depth picks its top-k among the tokens the previous depth picked (paper 2.2.1)
token_choice   each token picks its depth once, at the start (paper 2.2.1)
threshold      ours: a batch quantile in training, the running estimate of it when decoding
random, fixed  the controls: the same capacity at random, the same depth for all
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor.config import MoRConfig
from mor.model.router_base import Router, RouterNet, Scores, all_reduce_mean, masked_mean

_HASH = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)


def top_k_rows(
    values: Tensor, capacity: float, valid: Tensor | None, lengths: Tensor | int
) -> Tensor | None:
    """The ``max(1, trunc(capacity x length))`` largest values of each row (paper's rule).

    Of equal values (repeated tokens, where no layer has mixed them yet) the earlier ones win.

    Args:
        values: [A, M] candidates. valid: [A, M] or None. lengths: [A] or one number.

    Returns:
        Ascending indices [A, k] where all rows keep equally many, else a bool mask [A, M];
        None where all candidates stay.
    """
    if capacity >= 1:
        return None
    if valid is None and isinstance(lengths, int):
        kept = max(1, int(capacity * lengths))
        if kept >= values.shape[1]:
            return None
        best = values.argsort(dim=1, descending=True, stable=True)[:, :kept]
        return best.sort(dim=1).values
    if isinstance(lengths, int):
        lengths = torch.full(values.shape[:1], lengths, device=values.device)
    if valid is not None:
        values = values.masked_fill(~valid, -torch.inf)
    kept_of_row = (capacity * lengths.double()).long().clamp(min=1)
    rank = values.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    mask = rank < kept_of_row[:, None]
    return mask if valid is None else mask & valid


def as_mask(active: Tensor | None, like: Tensor, valid: Tensor | None) -> Tensor:
    """Any answer of ``select`` or ``decide`` as a bool mask shaped as ``like`` [A, M]."""
    if active is None:
        mask = torch.ones_like(like, dtype=torch.bool)
    elif active.dtype == torch.bool:
        mask = active
    else:
        mask = torch.zeros_like(like, dtype=torch.bool).scatter(1, active, True)
    return mask if valid is None else mask & valid


class FixedRouter(Router):
    """Every token runs the same number of recursions; the block's output replaces the stream."""

    def score(
        self, hidden: Tensor, depth: int, positions: Tensor, started: Scores | None
    ) -> Scores:
        """Nothing to know."""
        return Scores()

    def select(
        self,
        scores: Scores,
        depth: int,
        valid: Tensor | None,
        lengths: Tensor | int,
        total: Tensor | int,
    ) -> Tensor | None:
        """All; the loop itself ends at the fixed depth."""
        return None

    def decide(self, scores: Scores, depth: int) -> Tensor | None:
        """All; the loop itself ends at the fixed depth."""
        return None

    def update(
        self, hidden: Tensor, output: Tensor, origin: Tensor, scores: Scores, depth: int
    ) -> Tensor:
        """The plain recursive model: h becomes block(h)."""
        return output


class RandomRouter(Router):
    """Control: uniform random scores, at the same capacities (FACTS B.3, ``rand_router``).

    Training draws anew at each call. Otherwise a token's score is a hash of its position, so that
    its route never depends on the batch or on later tokens, and token u runs depth r iff
    u < capacity_r; its gate is spread as the scores of training's winners are.
    """

    looks_ahead = True

    def score(
        self, hidden: Tensor, depth: int, positions: Tensor, started: Scores | None
    ) -> Scores:
        """Uniform scores in [0, 1); the gate is alpha times the score."""
        value = self._hash(positions, 0)
        if self.training:
            draw = torch.rand(positions.shape, device=positions.device)
            return Scores(self.config.router_alpha * draw, draw, value)
        # The largest x of uniform draws are uniform in [1 - x, 1]; x is the share that goes on.
        capacities = self.config.router_capacities
        share = capacities[depth] / (capacities[depth - 1] if depth else 1.0)
        gate = 1 - share * self._hash(positions, depth + 1)
        return Scores(self.config.router_alpha * gate, 1 - value, value)

    @staticmethod
    def _hash(positions: Tensor, salt: int) -> Tensor:
        """Uniform in [0, 1) from integers, by multiply-xor-shift mixing in 32 bits."""
        mixed = (positions.long() + 1) * _HASH[0] + salt * _HASH[1]
        for shift, factor in ((15, _HASH[1]), (13, _HASH[2]), (16, 1)):
            mixed = ((mixed ^ ((mixed & 0xFFFFFFFF) >> shift)) * factor) & 0xFFFFFFFF
        return mixed.double().div(2**32).float()

    def select(
        self,
        scores: Scores,
        depth: int,
        valid: Tensor | None,
        lengths: Tensor | int,
        total: Tensor | int,
    ) -> Tensor | None:
        """Top-k of the random scores per row."""
        assert scores.logits is not None
        return top_k_rows(scores.logits, self.capacity(depth), valid, lengths)

    def decide(self, scores: Scores, depth: int) -> Tensor | None:
        """u < capacity."""
        capacity = self.config.router_capacities[depth]
        if capacity >= 1:
            return None
        assert scores.decision is not None
        return scores.decision < capacity


class BoundaryRouter(Router):
    """Base of expert choice and threshold: one score per depth, compared with a stored boundary.

    ``boundary[r]`` (logit units) is a running mean over training steps of the value that lets the
    selected share of a batch's candidates through depth r. It is kept in the checkpoint and is all
    that ``decide`` knows about other tokens. Before any training it is the paper's 0.5 rule.
    """

    def __init__(self, config: MoRConfig) -> None:
        super().__init__(config)
        self.net = RouterNet(config, config.num_recursions, 1)
        auxiliary = config.router_objective == "aux_router" and self.has_objective
        self.auxiliary = RouterNet(config, config.num_recursions, 1) if auxiliary else None
        self.register_buffer("boundary", torch.full((config.num_recursions,), self.half_rule))
        self.register_buffer("boundary_steps", torch.zeros(config.num_recursions))
        self._seen: list[list[Tensor]] = [[] for _ in range(config.num_recursions)]

    has_objective = False

    @property
    def half_rule(self) -> float:
        """The paper's 0.5 rule in logit units: sigmoid 0.5 and tanh 0 are logit 0; bare is 0.5."""
        return 0.5 if self.config.router_activation == "none" else 0.0

    def gate(self, logits: Tensor) -> Tensor:
        """sigmoid or tanh times alpha, or the bare logit (paper, router table)."""
        kind = self.config.router_activation
        if kind == "none":
            return logits
        squashed = torch.sigmoid(logits) if kind == "sigmoid" else torch.tanh(logits)
        return squashed * self.config.router_alpha

    def score(
        self, hidden: Tensor, depth: int, positions: Tensor, started: Scores | None
    ) -> Scores:
        """One logit per token from the raw stream (no norm), by the network of this depth."""
        logits = self.net(hidden, depth).squeeze(-1)
        decision = logits
        if self.auxiliary is not None:
            decision = self.auxiliary(hidden.detach(), depth).squeeze(-1)
        return Scores(self.gate(logits), logits, decision)

    def decide(self, scores: Scores, depth: int) -> Tensor | None:
        """Above the stored boundary, or the paper's 0.5 rule; a full capacity lets all through."""
        if self.config.router_capacities[depth] >= 1:
            return None
        assert scores.decision is not None
        if self.config.router_decision_rule == "half":
            return scores.decision >= self.half_rule
        return scores.decision > self.boundary[depth]

    def observe(
        self, scores: Scores, active: Tensor | None, depth: int, valid: Tensor | None
    ) -> None:
        """Note the value that separates as many of this batch's candidates as were selected."""
        if active is None or scores.decision is None:
            return
        values = scores.decision.detach()
        mask = as_mask(active, values, valid)
        self._seen[depth].append(batch_boundary(values, mask.sum(), valid))

    def finish_step(self) -> None:
        """Running mean: plain at first, then with ``router_boundary_momentum``."""
        for depth, seen in enumerate(self._seen):
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            if not seen and not distributed:
                continue
            zero = torch.zeros((), device=self.boundary.device)
            total = torch.stack(seen).sum() if seen else zero
            value = all_reduce_mean(total, zero + len(seen))
            if torch.isfinite(value):
                steps = float(self.boundary_steps[depth])
                keep = min(self.config.router_boundary_momentum, steps / (steps + 1))
                self.boundary[depth] = keep * self.boundary[depth] + (1 - keep) * value
                self.boundary_steps[depth] += 1
            seen.clear()


def batch_boundary(values: Tensor, kept: Tensor, valid: Tensor | None) -> Tensor:
    """Midway between the ``kept``-th and the next largest of the valid values; a scalar."""
    if valid is not None:
        values = values.masked_fill(~valid, -torch.inf)
    ordered = values.flatten().sort(descending=True).values
    last_in = ordered[(kept - 1).clamp(min=0)]
    first_out = ordered[kept.clamp(max=ordered.numel() - 1)]
    # Where nothing is left out there is no next value: stay just below the last one let in.
    missing = torch.isinf(first_out) | (kept >= ordered.numel())
    return torch.where(missing, last_in - 1e-3, (last_in + first_out) / 2)


class ExpertChoiceRouter(BoundaryRouter):
    """Top-k per sequence and depth among the tokens of the previous depth (paper 2.2.1).

    Looks ahead: whether a token is in the top-k depends on the whole sequence. The auxiliary loss
    (or a second, auxiliary router on the detached stream) teaches scores to tell on their own.
    """

    looks_ahead = True
    has_objective = True

    def select(
        self,
        scores: Scores,
        depth: int,
        valid: Tensor | None,
        lengths: Tensor | int,
        total: Tensor | int,
    ) -> Tensor | None:
        """``max(1, trunc(capacity x tokens of the row))`` largest logits."""
        assert scores.logits is not None
        return top_k_rows(scores.logits, self.capacity(depth), valid, lengths)

    def losses(
        self, scores: Scores, active: Tensor | None, depth: int, valid: Tensor | None
    ) -> dict[str, Tensor]:
        """Binary cross-entropy of logits against the selection, mean over candidates; z-loss."""
        assert scores.logits is not None
        assert scores.decision is not None
        terms = {}
        target = as_mask(active, scores.logits, valid).float()
        name = {"aux_loss": "aux_loss", "aux_router": "aux_router_loss"}.get(
            self.config.router_objective
        )
        if name is not None:
            error = F.binary_cross_entropy_with_logits(scores.decision, target, reduction="none")
            terms[name] = masked_mean(error, valid)
        if self.config.router_z_loss_coef:
            terms["z_loss"] = masked_mean(scores.logits.square(), valid)
        return terms


class ThresholdRouter(BoundaryRouter):
    """Select by the quantile of the scores over the whole batch; decide by its running estimate.

    Training and decoding follow the same rule up to the noise of one batch, so scores need not be
    pushed to 0 and 1, no auxiliary loss is needed, and capacity can be changed after training by
    recalibrating the boundary. The batch quantile itself still looks ahead.
    """

    looks_ahead = True

    def select(
        self,
        scores: Scores,
        depth: int,
        valid: Tensor | None,
        lengths: Tensor | int,
        total: Tensor | int,
    ) -> Tensor | None:
        """The ``capacity x tokens of the batch`` largest scores, wherever they stand."""
        capacity = self.capacity(depth)
        if capacity >= 1:
            return None
        values = scores.decision
        assert values is not None
        values = values.detach()
        candidates: Tensor | int = values.numel() if valid is None else valid.sum()
        kept = torch.as_tensor(total * capacity, device=values.device).round().long()
        kept = kept.clamp(min=1).minimum(torch.as_tensor(candidates, device=values.device))
        mask = values > batch_boundary(values, kept, valid)
        return mask if valid is None else mask & valid

    def losses(
        self, scores: Scores, active: Tensor | None, depth: int, valid: Tensor | None
    ) -> dict[str, Tensor]:
        """None are needed; the z-loss is there for those who want it."""
        if not self.config.router_z_loss_coef:
            return {}
        assert scores.logits is not None
        return {"z_loss": masked_mean(scores.logits.square(), valid)}


class TokenChoiceRouter(Router):
    """Each token picks its last depth from the stream before depth 0 (paper 2.2.1).

    Token of choice e runs depths 0..e; its stream is replaced on the way and ends as
    h0 + g block^(e+1)(h0). Causal by construction. Balance comes from a loss or from a bias that
    follows the load (arXiv 2408.15664), which never enters the gate.
    """

    bias: Tensor

    def __init__(self, config: MoRConfig) -> None:
        super().__init__(config)
        self.net = RouterNet(config, 1, config.num_recursions)
        self.register_buffer("bias", torch.zeros(config.num_recursions))
        self._load: Tensor | None = None

    def probabilities(self, logits: Tensor) -> Tensor:
        """softmax or sigmoid over depths, times alpha; [..., R]."""
        softmax = self.config.router_activation == "softmax"
        squashed = logits.softmax(-1) if softmax else logits.sigmoid()
        return squashed * self.config.router_alpha

    def start(self, hidden: Tensor, max_depth: int) -> Scores | None:
        """Choice and gate of every token; a depth cap cuts the choice, not the gate."""
        logits = self.net(hidden, 0)
        chances = self.probabilities(logits)
        choice = (chances.detach() + self.bias).argmax(-1)
        if self.training and self.step < self.config.router_balance_warmup_steps:
            choice = torch.full_like(choice, self.num_recursions - 1)
        gate = chances.gather(-1, choice[..., None]).squeeze(-1)
        return Scores(gate=gate, logits=logits, choice=choice.clamp(max=max_depth - 1))

    def score(
        self, hidden: Tensor, depth: int, positions: Tensor, started: Scores | None
    ) -> Scores:
        """What :meth:`start` said."""
        assert started is not None
        return started

    def select(
        self,
        scores: Scores,
        depth: int,
        valid: Tensor | None,
        lengths: Tensor | int,
        total: Tensor | int,
    ) -> Tensor | None:
        """The same as :meth:`decide`: nothing looks ahead."""
        return self.decide(scores, depth)

    def decide(self, scores: Scores, depth: int) -> Tensor | None:
        """Every token runs depth 0, and depth r while its choice is at least r."""
        assert scores.choice is not None
        return None if depth == 0 else scores.choice >= depth

    def update(
        self, hidden: Tensor, output: Tensor, origin: Tensor, scores: Scores, depth: int
    ) -> Tensor:
        """Replaced while the token goes on; combined with the origin where it ends."""
        assert scores.choice is not None
        ends = (scores.choice == depth)[..., None]
        return torch.where(ends, self.combine(origin, output, scores.gate), output)

    def _shares(self, choice: Tensor, valid: Tensor | None) -> Tensor:
        """Tokens that chose each depth, [R]."""
        chosen = F.one_hot(choice, self.num_recursions).float()
        if valid is not None:
            chosen = chosen * valid[..., None]
        return chosen.flatten(0, -2).sum(0)

    def losses(
        self, scores: Scores, active: Tensor | None, depth: int, valid: Tensor | None
    ) -> dict[str, Tensor]:
        """sum_i P_i f_i with f_i = R x share of depth i (1 at balance); logsumexp^2; at depth 0."""
        if depth > 0:
            return {}
        assert scores.logits is not None
        assert scores.choice is not None
        terms = {}
        if self.config.router_balancing == "loss":
            load = self._shares(scores.choice, valid)
            load = self.num_recursions * load / load.sum()
            chances = self.probabilities(scores.logits)
            mean = torch.stack([masked_mean(c, valid) for c in chances.unbind(-1)])
            terms["balancing_loss"] = (mean * load).sum()
        if self.config.router_z_loss_coef:
            terms["z_loss"] = masked_mean(scores.logits.logsumexp(-1).square(), valid)
        return terms

    def observe(
        self, scores: Scores, active: Tensor | None, depth: int, valid: Tensor | None
    ) -> None:
        """Count the load of each depth."""
        if depth == 0 and scores.choice is not None:
            load = self._shares(scores.choice, valid)
            self._load = load if self._load is None else self._load + load

    def finish_step(self) -> None:
        """Loss-free balancing: move the bias of each depth by u towards the mean load."""
        load, self._load = self._load, None
        if self.config.router_balancing != "loss_free" or load is None:
            return
        if self.step < self.config.router_balance_warmup_steps:
            self.bias.zero_()
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(load)
        self.bias += self.config.router_bias_update_rate * torch.sign(load.mean() - load)


ROUTERS: dict[str, type[Router]] = {
    "fixed": FixedRouter,
    "random": RandomRouter,
    "expert_choice": ExpertChoiceRouter,
    "threshold": ThresholdRouter,
    "token_choice": TokenChoiceRouter,
}


def build_router(config: MoRConfig) -> nn.Module:
    """The router that ``config.router`` names."""
    return ROUTERS[config.router](config)
