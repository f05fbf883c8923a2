"""Set a router's stored boundaries from a sample: after a change of capacity or domain."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mor.data import PackedDataset
from mor.data.bos import check_same_bos, model_bos
from mor.data.media import MediaDataset, collate_media
from mor.data.media.dataset import FRAMES, LABELS, PIXELS
from mor.data.samples import spread
from mor.errors import MorError
from mor.eval.passes import Tick, batches, check_sample
from mor.hf.arguments import check_ids, check_length
from mor.hf.media import MediaModel
from mor.hf.modeling import MoRForCausalLM
from mor.model.routers import BoundaryRouter

# Scores of all tokens that reach a depth, and tokens in all, by the boundaries before that depth.
Known = dict[tuple[float, ...], tuple[Tensor, int]]


def count_ticks(capacities: Sequence[float], sequences: int, batch_size: int) -> int:
    """Batches that :func:`calibrate` goes through."""
    return sum(share < 1 for share in capacities) * -(-sequences // batch_size)


@torch.inference_mode()
def calibrate(
    model: MoRForCausalLM | MediaModel,
    dataset: Dataset,
    *,
    max_sequences: int = 64,
    batch_size: int = 8,
    capacities: list[float] | None = None,
    tick: Tick = lambda: None,
    known: Known | None = None,
) -> list[float]:
    """Replace ``router.boundary``, so that the sample runs each depth at its capacity.

    Depth by depth: with the boundaries of the depths before it in place, the causal rule says who
    reaches a depth, and the boundary is put where ``capacity x tokens`` of them go on. On
    ``max_sequences`` of ``dataset``, evenly spread, the causal rule then hits the capacities to a
    token. With the threshold router one checkpoint so serves many capacities. The boundaries become
    the rule, also where ``router_decision_rule`` was the paper's 0.5.

    Args:
        model: changed in place: ``router.boundary``, and in its configuration the capacities and
            the decision rule. Left in the mode it was in, and as it was where this raises.
        dataset: items with ``input_ids`` [T]; of a model of images or sounds a `MediaDataset`.
        max_sequences, batch_size: size of the sample; sequences at a time.
        capacities: share of tokens at each depth, non-increasing; default the model's.
        tick: called after each batch, as often as :func:`count_ticks` says.
        known: scores of this sample by the boundaries before a depth, kept from one calibration of
            the same model to the next.

    Returns:
        The boundaries (logit units), one per depth; where the capacity is 1 as they were.

    Raises:
        MorError: the router decides without boundaries, there is no sample, or its documents begin
            otherwise than the model's texts.
        ConfigError: capacities that do not fit the model.
    """
    router, config = model.model.router, model.config
    if not isinstance(router, BoundaryRouter):
        raise MorError(
            f"router={config.router!r} stores no boundaries; only expert_choice and "
            "threshold can be calibrated"
        )
    router.config = config  # a router out of PEFT's `modules_to_save` comes with a copy of it
    if isinstance(dataset, PackedDataset):
        index = dataset.index
        check_same_bos(model_bos(config), index.bos, "the model", index.directory)
    count = check_sample(dataset, max_sequences, batch_size)
    before = config.router_capacities, config.router_decision_rule, router.boundary.clone()
    was_training = model.training
    model.eval()
    try:
        if capacities is not None:
            config.router_capacities = [float(c) for c in capacities]
            config.check()
        config.router_decision_rule = "boundary"
        for depth, capacity in enumerate(config.router_capacities):
            if capacity < 1:
                values, tokens = _candidates(
                    model, dataset, count, batch_size, depth, tick, {} if known is None else known
                )
                router.boundary[depth] = _between(values, max(1, round(capacity * tokens)))
    except BaseException:
        config.router_capacities, config.router_decision_rule = before[:2]
        router.boundary.copy_(before[2])
        raise
    finally:
        model.train(was_training)
    router.boundary_steps.fill_(1)  # more training starts its running mean from here
    return router.boundary.tolist()


def _candidates(
    model: MoRForCausalLM | MediaModel,
    dataset: Dataset,
    count: int,
    batch_size: int,
    depth: int,
    tick: Tick,
    known: Known,
) -> tuple[Tensor, int]:
    """Decision scores of all tokens that reach ``depth`` under the causal rule; tokens in all.

    They follow from the boundaries before ``depth``, and are computed once for each set of those.
    """
    router = model.model.router
    assert isinstance(router, BoundaryRouter)
    key = tuple(router.boundary[:depth].tolist())
    if key in known:
        for _ in range(-(-count // batch_size)):
            tick()
        return known[key]
    # Nobody is to run this depth: only its scores are wanted, and no logits at all.
    router.boundary[depth] = math.inf
    found, tokens = [], 0
    for inputs in _inputs(model, dataset, count, batch_size):
        output = model.model(**inputs, routing="causal", max_depth=depth + 1, keep_traces=True)
        tokens += output.depths.numel() if output.real is None else int(output.real.sum())
        if len(output.traces) > depth:
            trace = output.traces[depth]
            scores = trace.scores.decision
            valid = None if trace.candidates is None else trace.candidates.valid
            found.append(scores.flatten() if valid is None else scores[valid])
        tick()
    known[key] = (torch.cat(found) if found else torch.zeros(0), tokens)
    return known[key]


def _inputs(
    model: MoRForCausalLM | MediaModel, dataset: Dataset, count: int, batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """What the network takes of ``count`` examples, evenly spread, batch by batch."""
    if isinstance(dataset, MediaDataset):
        places = spread(count, len(dataset))
        for start in range(0, count, batch_size):
            rows = [dataset[place] for place in places[start : start + batch_size]]
            batch = {name: one.to(model.device) for name, one in collate_media(rows).items()}
            batch.pop(LABELS)
            features = batch.pop(PIXELS) if PIXELS in batch else batch.pop(FRAMES)
            yield {"features": features} | batch
        return
    for ids in batches(dataset, count, batch_size, model.device):
        check_ids(ids, model.config.vocab_size)
        check_length(ids, None, None, model.config.max_position_embeddings)
        yield {"input_ids": ids}


def _between(values: Tensor, kept: int) -> float:
    """A boundary that ``kept`` of ``values`` lie above; below all where there are no more."""
    ordered = values.sort(descending=True).values
    if kept >= len(ordered):
        return float(ordered[-1]) - 1.0 if len(ordered) else 0.0
    return float((ordered[kept - 1] + ordered[kept]) / 2)
