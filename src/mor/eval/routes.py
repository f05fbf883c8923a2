"""Which tokens recurse, and what it gave them: everything about each token of a sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mor.errors import MorError
from mor.eval.passes import Tick, batches, check_sample, next_targets, token_nll
from mor.hf.modeling import MoRForCausalLM
from mor.model.metrics import dead_positions, entropy, max_violation
from mor.model.recorder import DepthTrace
from mor.model.routers import BoundaryRouter


@dataclass(frozen=True)
class Routes:
    """A sample of S sequences of T tokens, under the causal rule.

    Attributes:
        ids: [S, T] tokens. depths: [S, T] recursions that each ran, 1..R.
        nll: [R, S, T - 1] nats of the target (the next token, but see `next_targets`) with depth
            capped at 1..R.
        hits: [R, S, T - 1] whether the most likely next token was the right one.
        entropy: [S, T - 1] nats, of the prediction at full depth.
        scores: of each depth: [N] what decides, of the tokens that reached it, and [N] whether they
            went on; empty where nothing decides. Token choice: [N] the gate of those that chose it.
        boundaries: [R] that scores are compared with; empty where there are none.
    """

    ids: np.ndarray
    depths: np.ndarray
    nll: np.ndarray
    hits: np.ndarray
    entropy: np.ndarray
    scores: tuple[tuple[np.ndarray, np.ndarray], ...]
    boundaries: tuple[float, ...]

    @property
    def recursions(self) -> int:
        """R."""
        return len(self.nll)

    def router_numbers(self) -> dict[str, float]:
        """Dead positions, MaxVio, entropy of depths, and what the depth of a token goes with."""
        counts = np.bincount(self.depths.ravel(), minlength=self.recursions + 1)
        shares = torch.from_numpy(counts / counts.sum())
        reached = torch.from_numpy((self.depths == self.recursions).any(0))
        depths = self.depths[:, :-1].ravel()
        return {
            "mean_depth": float(self.depths.mean()),
            "dead_positions": dead_positions(reached),
            "max_vio": max_violation(shares),
            "depth_entropy": entropy(shares),
            "depth_and_entropy": _correlation(depths, self.entropy.ravel()),
            "depth_and_gain": _correlation(depths, (self.nll[0] - self.nll[-1]).ravel()),
        }


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's; 0 where one of them does not vary."""
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


@torch.inference_mode()
def collect_routes(
    model: MoRForCausalLM,
    dataset: Dataset,
    *,
    max_sequences: int | None = None,
    batch_size: int = 8,
    tick: Tick = lambda: None,
) -> Routes:
    """Run the sample once for each depth cap.

    Args:
        model: left in the mode it was in.
        dataset: items with `input_ids` [T].
        max_sequences: None for all.
        batch_size: sequences at a time.
        tick: called after each batch of each pass.

    Raises:
        MorError: the model routes nothing, or there is nothing to look at.
    """
    config = model.config
    if config.num_recursions < 2 or config.router == "fixed":
        raise MorError(
            f"router={config.router!r} with num_recursions={config.num_recursions} sends every "
            "token through every depth; give a model that routes"
        )
    count = check_sample(dataset, max_sequences, batch_size)
    was_training = model.training
    model.eval()
    parts: list[dict[str, Any]] = []
    try:
        for ids in batches(dataset, count, batch_size, model.device):
            parts.append(_look(model, ids, next_targets(dataset, ids), tick))
    finally:
        model.train(was_training)
    router = model.model.router
    depths = range(config.num_recursions)
    joined = {
        name: np.concatenate([part[name] for part in parts], axis=axis)
        for name, axis in (("ids", 0), ("depths", 0), ("nll", 1), ("hits", 1), ("entropy", 0))
    }
    return Routes(
        **joined,
        scores=tuple(
            (
                np.concatenate([part["scores"][depth][0] for part in parts]),
                np.concatenate([part["scores"][depth][1] for part in parts]),
            )
            for depth in depths
        ),
        boundaries=_boundaries(router) if isinstance(router, BoundaryRouter) else (),
    )


def _boundaries(router: BoundaryRouter) -> tuple[float, ...]:
    if router.config.router_decision_rule == "half":
        return (router.half_rule,) * router.num_recursions
    return tuple(router.boundary.tolist())


def _look(model: MoRForCausalLM, ids: Tensor, targets: Tensor, tick: Tick) -> dict[str, Any]:
    """All of one batch: a pass for each cap, the last one with its scores."""
    recursions, nll, hits = model.config.num_recursions, [], []
    for cap in range(1, recursions + 1):
        output = model(
            ids,
            use_cache=False,
            routing="causal",
            max_depth=cap,
            output_router_traces=cap == recursions,
        )
        nll.append(token_nll(output.logits, targets).cpu().numpy())
        hits.append((output.logits[:, :-1].argmax(-1) == targets).cpu().numpy())
        tick()
    chances = output.logits[:, :-1].float().log_softmax(-1)
    return {
        "ids": ids.cpu().numpy(),
        "depths": output.depths.cpu().numpy(),
        "nll": np.stack(nll),
        "hits": np.stack(hits),
        "entropy": -(chances.exp() * chances).sum(-1).cpu().numpy(),
        "scores": _scores(output.traces or (), recursions),
    }


def _scores(traces: tuple[DepthTrace, ...], recursions: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """What decided at each depth, and what was decided; of the places that hold a token."""
    nothing = np.zeros(0), np.zeros(0, dtype=bool)
    found = [nothing] * recursions
    for depth, trace in enumerate(traces):
        valid = None if trace.candidates is None else trace.candidates.valid
        held = torch.ones_like(trace.active) if valid is None else valid
        if trace.scores.choice is not None and trace.scores.gate is not None:
            mine = held & (trace.scores.choice == depth)
            gates = trace.scores.gate[mine].float().cpu().numpy()
            found[depth] = gates, np.ones(len(gates), dtype=bool)
        elif trace.scores.decision is not None:
            found[depth] = (
                trace.scores.decision[held].float().cpu().numpy(),
                trace.active[held].cpu().numpy(),
            )
    return found
