"""``mor eval`` of images and sounds: accuracy by both rules, by depth cap, and against chance.

An encoder reads its whole input before it answers, so that the selection of training within one
example (``topk``) is a rule of inference too. The rule by each token alone (``causal``: a stored
boundary) stays beside it. Neither looks at other examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mor.config.choices import Routing
from mor.data.media import MediaDataset, collate_media
from mor.errors import MorError
from mor.eval.exits import count_changes
from mor.eval.shown import show_examples
from mor.hf.media import MediaModel
from mor.model.flops import example_flops
from mor.model.limits import choose_rule
from mor.model.routers.base import active_router
from mor.model.routers.forced import forced_depths


@dataclass
class Answers:
    """What one pass over the examples gave.

    Attributes:
        nll_sum: nats over all examples.
        nlls: [n] nats of each example's own class.
        chosen: [n] the most likely class.
        hits: [n] bool, whether that was the right one.
        mean_depths: [n] recursions of an example's tokens, their mean.
        depths, real: of every batch, [B, T] each; ``real`` None for all.
    """

    nll_sum: float = 0.0
    nlls: Tensor = field(default_factory=lambda: torch.zeros(0))
    chosen: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    hits: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    mean_depths: Tensor = field(default_factory=lambda: torch.zeros(0))
    batches: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)

    def add(self, logits: Tensor, labels: Tensor, depths: Tensor, real: Tensor | None) -> None:
        """Count a batch: logits [B, classes], labels [B], depths [B, T], real [B, T]."""
        nlls, chosen = F.cross_entropy(logits.float(), labels, reduction="none"), logits.argmax(-1)
        self.nll_sum += float(nlls.sum())
        self.nlls = torch.cat((self.nlls, nlls.cpu()))
        self.chosen = torch.cat((self.chosen, chosen.cpu()))
        self.hits = torch.cat((self.hits, (chosen == labels).cpu()))
        tokens = depths.shape[1] if real is None else real.sum(1)
        self.mean_depths = torch.cat((self.mean_depths, (depths.sum(1) / tokens).cpu()))
        self.batches.append((depths.cpu(), None if real is None else real.cpu()))

    def depths_of_examples(self) -> list[Tensor]:
        """The depths of each example's own tokens, in the order of the examples."""
        found = []
        for depths, real in self.batches:
            masks = [None] * len(depths) if real is None else list(real.bool())
            found += [
                row if mask is None else row[mask] for row, mask in zip(depths, masks, strict=True)
            ]
        return found

    def score(self, config: Any) -> dict[str, Any]:
        """Accuracy, NLL, depth, and what one example costs."""
        count, recursions = len(self.hits), config.num_recursions
        tokens = passes = recursion = forward = 0.0
        active = [0.0] * recursions
        for depths, real in self.batches:
            own = float(depths.numel() if real is None else real.sum())
            flops = example_flops(config, depths, real)
            tokens += own
            passes += float(depths.sum())
            forward += own * flops.forward
            recursion += own * sum(flops.recurse)
            active = [sum_ + float((depths > depth).sum()) for depth, sum_ in enumerate(active)]
        return {
            "accuracy": float(self.hits.double().mean()),
            "nll": self.nll_sum / count,
            "mean_depth": passes / tokens,
            "active_fraction": [one / tokens for one in active],
            "flops_per_example": forward / count,
            "recursion_flops_per_example": recursion / count,
        }


def evaluate_examples(
    model: MediaModel,
    dataset: MediaDataset,
    *,
    max_examples: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Everything a report needs about one model of classes on one split.

    ``rule`` names what the model follows by itself; ``causal`` and, for routers that select within
    an example, ``topk`` are the scores of both rules (None where there is no such rule).
    ``depth_cap`` repeats that of ``rule`` with at most 1..R recursions, with the examples that a
    pass put right and spoiled. ``random_routes`` deals the depths of ``rule`` out among the tokens
    of a batch by chance.

    Args:
        model: put into evaluation mode here; left in the mode it was in.
        dataset: a split of a prepared folder.
        max_examples: the first so many; None for all.
        batch_size: examples at a time.
        seed: of chance.
        progress: called with (batches done, batches in all).

    Raises:
        MorError: the model has another head or other classes than the data, or the split is empty.
    """
    config, index = model.config, dataset.index
    names = config.class_names
    if config.head_type != "classes" or names != list(index.classes):
        raise MorError(
            f"the model answers with {', '.join(names)}, but {index.directory} has the "
            f"classes {', '.join(index.classes)}; evaluate on data of the same classes"
        )
    count = min(len(dataset), max_examples or len(dataset))
    if not count:
        raise MorError(f"split {dataset.split!r} of {index.directory} is empty")
    router = active_router(model.model.router)
    rule = choose_rule(config, router, None, training=False)
    rules: list[Routing] = ["causal"]
    if config.is_routed and router.selects_in_rows:
        rules.append("topk")
    runs = len(rules) + config.num_recursions - 1 + int(config.is_routed)
    total, done = runs * -(-count // batch_size), 0

    def run(routing: Routing, cap: int | None = None, dealt: list[Tensor] | None = None) -> Answers:
        nonlocal done
        found = Answers()
        for number, start in enumerate(range(0, count, batch_size)):
            rows = [dataset[place] for place in range(start, min(count, start + batch_size))]
            batch = {name: tensor.to(model.device) for name, tensor in collate_media(rows).items()}
            labels = batch.pop("labels")
            given = {"routing": routing, "max_depth": cap}
            if dealt is None:
                output = model(**batch, **given)
            else:
                with forced_depths(model.model, dealt[number].to(model.device)):
                    output = model(**batch, **given)
            found.add(output.logits, labels, output.depths, output.token_mask)
            done += 1
            if progress is not None:
                progress(done, total)
        return found

    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            passes = {routing: run(routing) for routing in rules}
            whole = passes[rule]
            capped = [run(rule, cap) for cap in range(1, config.num_recursions)] + [whole]
            dealt = deal_out(whole, seed) if config.is_routed else None
            chance = None if dealt is None else run("causal", None, dealt).score(config)
    finally:
        model.train(was_training)
    caps: list[dict[str, Any]] = []
    for cap, answers in enumerate(capped, 1):
        row = {"max_depth": cap} | answers.score(config)
        caps.append(row | (count_changes(capped[cap - 2].hits, answers.hits) if cap > 1 else {}))
    tokens = sum(d.numel() if real is None else int(real.sum()) for d, real in whole.batches)
    return {
        "data": index.source,
        "kind": index.kind,
        "split": dataset.split,
        "seq_len": round(tokens / count),
        "examples": count,
        "tokens": tokens,
        "classes": list(index.classes),
        "is_causal": config.is_causal,
        "rule": rule,
        "causal": passes["causal"].score(config),
        "topk": passes["topk"].score(config) if "topk" in passes else None,
        "random_routes": chance,
        "depth_cap": caps,
        "hard_examples": find_hard(whole),
        "shown": show_examples(
            config, dataset, whole.nlls, whole.chosen, whole.depths_of_examples()
        )
        if config.is_routed
        else [],
    }


def deal_out(answers: Answers, seed: int) -> list[Tensor] | None:
    """The depths of every batch dealt out among its real tokens, as the network lays them.

    None where no two tokens differ in depth.
    """
    draw = torch.Generator().manual_seed(seed)
    dealt, differ = [], False
    for depths, real in answers.batches:
        flat = depths.flatten() if real is None else depths[real]
        differ = differ or bool((flat != flat[0]).any())
        flat = flat[torch.randperm(len(flat), generator=draw)]
        whole = real is None or bool(real.all())
        dealt.append(flat.view_as(depths) if whole else flat[None])
    return dealt if differ else None


def find_hard(answers: Answers) -> dict[str, float] | None:
    """Mean depth of the examples answered rightly and wrongly; None where all are of one kind."""
    hits, depths = answers.hits, answers.mean_depths.double()
    if bool(hits.all()) or not bool(hits.any()):
        return None
    return {
        "depth_of_right": float(depths[hits].mean()),
        "depth_of_wrong": float(depths[~hits].mean()),
    }
