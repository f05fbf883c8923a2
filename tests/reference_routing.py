"""The routers of the plain reference."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mor import MoRForCausalLM
from tests.reference_rows import Row


class Fixed:
    """All tokens, every depth; also the base of the others."""

    def __init__(self, model: MoRForCausalLM, rows: list[Row], causal: bool, limit: int) -> None:
        self.config, self.router = model.config, model.model.router
        self.rows, self.causal, self.limit = rows, causal, limit
        self.losses: dict[str, Tensor] = {}
        self.start()

    def start(self) -> None:
        pass

    def active(self, depth: int) -> list[Tensor]:
        return [row.alive for row in self.rows]

    def update(self, row: Row, output: Tensor, depth: int) -> Tensor:
        return output

    def net(self, net: Any, hidden: Tensor, index: int) -> Tensor:
        if self.config.update_rule == "last":
            hidden = hidden.detach()
        hidden = hidden / self.config.router_temperature
        if net.up is not None:
            hidden = F.gelu(hidden @ net.up[index].T)
        logits = hidden @ net.weight[index].T
        return logits if net.bias is None else logits + net.bias[index]

    def rule(self, base: Tensor, output: Tensor, gate: Tensor) -> Tensor:
        gate = gate[:, None]
        return {
            "gated": base + gate * output,
            "additive": base + output,
            "residual": (1 - gate) * base + gate * output,
            "last": output + (gate - gate.detach()) * (output - base).detach(),
        }[self.config.update_rule]

    def count(self, row: Row, depth: int) -> int:
        return max(1, int(self.config.router_capacities[depth] * len(row.hidden)))

    def best(self, row: Row, values: Tensor, kept: int) -> Tensor:
        """The ``kept`` largest of the tokens still there."""
        values = values.masked_fill(~row.alive, -torch.inf)
        order = sorted(range(len(values)), key=lambda i: -float(values[i]))
        mask = torch.zeros_like(row.alive)
        mask[order[:kept]] = True
        return mask & row.alive

    def add_loss(self, name: str, values: list[Tensor]) -> None:
        self.losses[name] = self.losses.get(name, 0.0) + torch.cat(values).mean()


class Boundary(Fixed):
    """Expert choice and threshold: a logit per token and depth."""

    def gate(self, logits: Tensor) -> Tensor:
        kind, logits = self.config.router_activation, logits + self.config.router_gate_bias
        if kind == "none":
            return logits
        return self.config.router_alpha * {"sigmoid": logits.sigmoid(), "tanh": logits.tanh()}[kind]

    def active(self, depth: int) -> list[Tensor]:
        self.logits = [self.net(self.router.net, r.seen(r.hidden), depth)[:, 0] for r in self.rows]
        decisions = self.logits
        if self.router.auxiliary is not None:
            decisions = [
                self.net(self.router.auxiliary, r.seen(r.hidden).detach(), depth)[:, 0]
                for r in self.rows
            ]
        if self.causal:
            return [self.decide(r, d, depth) for r, d in zip(self.rows, decisions, strict=True)]
        chosen = self.select(depth)
        if self.config.router_z_loss_coef:
            self.add_loss("z_loss", self.alive([x.square() for x in self.logits]))
        if self.config.router == "expert_choice" and self.config.router_objective != "none":
            name = "aux_loss" if self.router.auxiliary is None else "aux_router_loss"
            errors = [
                -torch.where(mask, F.logsigmoid(d), F.logsigmoid(-d))
                for mask, d in zip(chosen, decisions, strict=True)
            ]
            self.add_loss(name, self.alive(errors))
        return chosen

    def alive(self, values: list[Tensor]) -> list[Tensor]:
        return [v[r.alive] for v, r in zip(values, self.rows, strict=True)]

    def decide(self, row: Row, decision: Tensor, depth: int) -> Tensor:
        if self.config.router_capacities[depth] == 1:
            return row.alive
        if self.config.router_decision_rule == "half":
            half = 0.5 if self.config.router_activation == "none" else 0.0
            return row.alive & (decision >= half)
        return row.alive & (decision > self.router.boundary[depth])

    def select(self, depth: int) -> list[Tensor]:
        return [
            self.best(row, logits.detach(), self.count(row, depth))
            for row, logits in zip(self.rows, self.logits, strict=True)
        ]

    def update(self, row: Row, output: Tensor, depth: int) -> Tensor:
        logits = next(x for x, r in zip(self.logits, self.rows, strict=True) if r is row)
        return self.rule(row.hidden, output, self.gate(logits))


class Threshold(Boundary):
    def select(self, depth: int) -> list[Tensor]:
        tokens = sum(len(row.hidden) for row in self.rows)
        kept = max(1, round(self.config.router_capacities[depth] * tokens))
        values = torch.cat(
            [x.detach()[r.alive] for x, r in zip(self.logits, self.rows, strict=True)]
        )
        if len(values) == 0:
            return [row.alive for row in self.rows]
        lowest = values.sort(descending=True).values[min(kept, len(values)) - 1]
        return [r.alive & (x >= lowest) for x, r in zip(self.logits, self.rows, strict=True)]


class Random(Fixed):
    def active(self, depth: int) -> list[Tensor]:
        capacity, chosen = self.config.router_capacities[depth], []
        for row in self.rows:
            value = self.router._hash(torch.arange(len(row.hidden)), 0)
            if self.causal:
                chosen.append(row.alive & (value < capacity))
            else:
                chosen.append(self.best(row, -value, self.count(row, depth)))
        return chosen

    def update(self, row: Row, output: Tensor, depth: int) -> Tensor:
        capacities = [1.0, *self.config.router_capacities]
        share = capacities[depth + 1] / capacities[depth]
        draw = self.router._hash(torch.arange(len(row.hidden)), depth + 1)
        return self.rule(row.hidden, output, self.config.router_alpha * (1 - share * draw))


class TokenChoice(Fixed):
    def start(self) -> None:
        self.origin = [row.hidden for row in self.rows]
        softmax = self.config.router_activation == "softmax"
        logits = [self.net(self.router.net, row.seen(row.hidden), 0) for row in self.rows]
        chances = [
            self.config.router_alpha
            * (x.softmax(-1) if softmax else (x + self.config.router_gate_bias).sigmoid())
            for x in logits
        ]
        full = [(p.detach() + self.router.bias).argmax(-1) for p in chances]
        self.gates = [p[range(len(p)), c] for p, c in zip(chances, full, strict=True)]
        self.choice = [c.clamp(max=self.limit - 1) for c in full]
        every = torch.cat(self.choice)
        if self.config.router_balancing == "loss":
            depths = self.config.num_recursions
            share = torch.tensor([(every == i).float().mean() for i in range(depths)])
            self.losses["balancing_loss"] = (torch.cat(chances).mean(0) * depths * share).sum()
        if self.config.router_z_loss_coef:
            self.add_loss("z_loss", [x.logsumexp(-1).square() for x in logits])

    def active(self, depth: int) -> list[Tensor]:
        return [choice >= depth for choice in self.choice]

    def update(self, row: Row, output: Tensor, depth: int) -> Tensor:
        index = next(i for i, other in enumerate(self.rows) if other is row)
        last = (self.choice[index] == depth)[:, None]
        return torch.where(last, self.rule(self.origin[index], output, self.gates[index]), output)


ROUTING: dict[str, type[Fixed]] = {
    "fixed": Fixed,
    "random": Random,
    "expert_choice": Boundary,
    "threshold": Threshold,
    "token_choice": TokenChoice,
}
