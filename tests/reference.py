"""The network once more, as plainly as it can be written: the reference of the property tests.

One row at a time, no compaction, no cache, no batch: at every depth all tokens of a row run, each
query sees the keys it may see through an explicit mask, and only the active tokens keep what came
out. It shares the weights of a model and none of its code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mor import MoRForCausalLM


@dataclass
class Reference:
    """Logits [T, V] and depths [T] of each row, router losses of the batch by name."""

    logits: list[Tensor]
    depths: list[Tensor]
    losses: dict[str, Tensor] = field(default_factory=dict)


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
        key = self.heads(linear(attention, "k_proj", normed, use))
        if self.config.use_qk_norm:
            query = norm(attention.q_norm, query, use)
            key = norm(attention.k_norm, key, use)
        query, key = turn(query, theta, self.columns), turn(key, theta, self.columns)
        value = self.heads(linear(attention, "v_proj", normed, use))
        if shared is not None and shared not in self.store:
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

    def stack(self, layers: Any) -> None:
        for layer in layers:
            self.hidden = self.layer(layer, self.hidden, self.causal)

    def block(self, depth: int, active: Tensor) -> Tensor:
        """The shared block over all tokens; only what active tokens get out of it has meaning."""
        sharing, count = self.config.kv_sharing, self.config.num_recursion_layers
        if depth == 0:
            self.stored = active
        keys = active if sharing == "none" else self.stored
        # Everyone sees itself, so that the rows nobody reads are numbers too.
        visible = self.causal & (keys | torch.eye(len(keys), dtype=torch.bool))
        own = active if sharing == "recursive_update" else torch.zeros_like(active)
        seam, carried = self.network.seam, self.hidden.unflatten(-1, (-1, self.config.hidden_size))
        hidden = carried[:, 0]
        if self.config.recursion_streams > 1:
            hidden = torch.einsum("n,tnd->td", seam.taken[depth], carried)
        if self.config.recursion_seam == "norm_inject" and depth > 0:
            hidden = norm(seam.norm, hidden) + seam.inject * self.seen(self.origin)
        entered = hidden
        if self.network.depth_embedding is not None:
            hidden = hidden + self.network.depth_embedding.weight[depth]
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


def reference(
    model: Any,
    rows: list[Tensor],
    *,
    causal: bool,
    max_depth: int | None = None,
) -> Reference:
    """What the model has to say about rows of ids [T] or of embedded tokens [T, D], in evaluation.

    Logits are [T, V], or [classes] of a head over classes.
    """
    config = model.config
    table = model.model.embed_tokens
    states = [
        Row(
            model,
            row if row.is_floating_point() else F.embedding(row, table.weight, table.padding_idx),
        )
        for row in rows
    ]
    for row in states:
        row.stack(model.model.prelude_layers)
        row.open()
    limit = min(max_depth or config.num_recursions, config.router_fixed_depth or 9)
    routing = ROUTING[config.router](model, states, causal, limit)
    for depth in range(limit):
        for row, active in zip(states, routing.active(depth), strict=True):
            output = row.block(depth, active)
            row.hidden = torch.where(
                active[:, None], routing.update(row, output, depth), row.hidden
            )
            row.alive, row.depths = active, row.depths + active
    logits = []
    for row in states:
        row.hidden = row.seen(row.hidden)
        row.stack(model.model.coda_layers)
        normed, head = norm(model.model.norm, row.hidden), model.model.lm_head
        normed = normed.mean(0) if config.head_type == "classes" else normed
        logits.append(normed @ head.weight.T + (0 if head.bias is None else head.bias))
    return Reference(logits, [row.depths for row in states], routing.losses)


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
