"""One pass of a model over validation sequences, and what is counted on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from mor.config.choices import Routing
from mor.data import PackedDataset
from mor.data.dataset import IGNORED
from mor.data.samples import spread
from mor.data.tasks import SolvedMarks
from mor.errors import MorError
from mor.hf.modeling import MoRForCausalLM
from mor.model.metrics import decision_accuracy

Tick = Callable[[], None]
Look = Callable[[Tensor, Any], None]


@dataclass
class PassResult:
    """Sums of one pass.

    Attributes:
        nll_sum: nats over all targets. targets: how many.
        depth_counts: [R + 1] tokens that ran 0..R recursions (int64, as all counts).
        reached: [seq_len] whether any sequence ran the last depth at that position.
        hits: [targets] bool, whether the most likely token was the right one, where asked for.
        agreements, candidates: [R] of the causal rule against the selection (top-k passes).
    """

    recursions: int
    nll_sum: float = 0.0
    targets: int = 0
    depth_counts: Tensor = field(init=False)
    reached: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    hits: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    agreements: Tensor = field(init=False)
    candidates: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Start all counts at 0."""
        self.depth_counts = torch.zeros(self.recursions + 1, dtype=torch.long)
        self.agreements = torch.zeros(self.recursions, dtype=torch.long)
        self.candidates = torch.zeros(self.recursions, dtype=torch.long)

    @property
    def nll(self) -> float:
        """Negative log-likelihood in nats per token."""
        return self.nll_sum / max(1, self.targets)

    @property
    def shares(self) -> Tensor:
        """Share of tokens by final depth, [R + 1]."""
        return self.depth_counts.double() / self.depth_counts.sum().clamp(min=1)

    def score(self, bytes_per_token: float) -> dict[str, object]:
        """NLL, perplexity, bits per byte, mean depth, share of tokens active at each depth."""
        shares = self.shares
        return {
            "nll": self.nll,
            "perplexity": math.exp(min(self.nll, 700.0)),
            "bits_per_byte": self.nll / math.log(2) / bytes_per_token,
            "mean_depth": float((shares * torch.arange(len(shares))).sum()),
            "active_fraction": [float(shares[d + 1 :].sum()) for d in range(self.recursions)],
        }


def next_targets(dataset: Dataset, ids: Tensor) -> Tensor:
    """What a model is to say after each token of ids [B, T] but the last, [B, T - 1].

    The next token; where the answers of a task are no words of its documents (`task:formulas`),
    the answer, and -100 after a token that asks nothing.
    """
    task = dataset.task if isinstance(dataset, PackedDataset) else None
    if not isinstance(task, SolvedMarks):
        return ids[:, 1:]
    return torch.from_numpy(task.solve(ids.cpu().numpy()).targets(IGNORED)).to(ids.device)


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of the targets [B, T - 1] by logits [B, T, V], [B, T - 1]; 0 where a target is -100."""
    flat = logits[:, :-1].flatten(0, 1).float()
    losses = F.cross_entropy(flat, targets.flatten(), reduction="none", ignore_index=IGNORED)
    return losses.view(len(targets), -1)


def check_sample(dataset: Dataset, max_sequences: int | None, batch_size: int) -> int:
    """How many sequences to look at.

    Raises:
        MorError: none, or none at a time.
    """
    for name, value in (("max_sequences", max_sequences), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise MorError(f"{name}={value} must be at least 1")
    length = len(dataset)  # type: ignore[arg-type]
    if not length:
        raise MorError("the data set holds no sequence")
    return length if max_sequences is None else min(max_sequences, length)


def batches(dataset: Dataset, count: int, size: int, device: torch.device) -> Iterator[Tensor]:
    """Ids [<= size, T] of ``count`` sequences (:func:`spread`), in order."""
    places = spread(count, len(dataset))  # type: ignore[arg-type]
    for start in range(0, count, size):
        rows = fetch(dataset, places[start : start + size])
        yield torch.stack([row["input_ids"] for row in rows]).to(device)


def fetch(dataset: Dataset, places: Sequence[int]) -> list[dict[str, Tensor]]:
    """The sequences at ``places``: at once where the data set can, as PyTorch's loader asks."""
    at_once = getattr(dataset, "__getitems__", None)
    return [dataset[place] for place in places] if at_once is None else at_once(places)


@torch.inference_mode()
def run_pass(
    model: MoRForCausalLM,
    dataset: Dataset,
    count: int,
    batch_size: int,
    routing: Routing,
    max_depth: int | None = None,
    tick: Tick = lambda: None,
    keep_hits: bool = False,
    look: Look = lambda ids, output: None,
) -> PassResult:
    """Score ``count`` sequences, evenly spread, under one routing rule and depth cap.

    Args:
        model: in evaluation mode.
        dataset: items with ``input_ids`` [T].
        count: sequences. batch_size: how many at a time; changes nothing but speed, except for
            the threshold router's leaky rule, whose quantile is taken over the batch.
        routing: ``causal`` or ``topk``.
        max_depth: depth cap.
        tick: called after each batch.
        keep_hits: note for every target whether it was the most likely token.
        look: called with each batch's ids [B, T] and the model's output, for what else is counted.
    """
    recursions = model.config.num_recursions
    result, hits = PassResult(recursions), []
    for ids in batches(dataset, count, batch_size, model.device):
        output = model(
            ids,
            use_cache=False,
            routing=routing,
            max_depth=max_depth,
            output_router_traces=routing == "topk",
        )
        targets = next_targets(dataset, ids)
        told = targets != IGNORED
        result.nll_sum += float(token_nll(output.logits, targets).double().sum())
        result.targets += int(told.sum())
        if keep_hits:
            hits.append((output.logits[:, :-1].argmax(-1) == targets)[told].cpu())
        depths = output.depths.cpu()
        result.depth_counts += torch.bincount(depths.flatten(), minlength=recursions + 1)
        reached = (depths == recursions).any(0)
        result.reached = reached if result.reached.numel() == 0 else result.reached | reached
        for depth, trace in enumerate(output.traces or ()):
            agree, candidates = decision_accuracy(model.model.router, trace, depth)
            result.agreements[depth] += agree.cpu()
            result.candidates[depth] += candidates.cpu()
        look(ids, output)
        tick()
    if hits:
        result.hits = torch.cat(hits)
    return result
