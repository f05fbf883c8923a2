"""Set a router's stored boundaries from a sample of text: after a change of capacity or domain."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from mor.errors import MorError
from mor.eval.passes import batches
from mor.hf.modeling import MoRForCausalLM
from mor.model.routers import BoundaryRouter


@torch.inference_mode()
def calibrate(
    model: MoRForCausalLM,
    dataset: Dataset,
    *,
    max_sequences: int = 64,
    batch_size: int = 8,
    capacities: list[float] | None = None,
) -> list[float]:
    """Replace ``router.boundary`` by its value on the first ``max_sequences`` of ``dataset``.

    Runs training's selection at ``capacities`` (default the model's) and stores what separates the
    selected from the others. With the threshold router one checkpoint so serves many capacities.

    Returns:
        The new boundaries, one per depth.

    Raises:
        MorError: the router decides without boundaries.
        ConfigError: capacities that do not fit the model.
    """
    router = model.model.router
    if not isinstance(router, BoundaryRouter):
        raise MorError(
            f"router={model.config.router!r} stores no boundaries; only expert_choice and "
            "threshold can be calibrated"
        )
    before = model.config.router_capacities
    if capacities is not None:
        model.config.router_capacities = [float(c) for c in capacities]
        try:
            model.config.check()
        except MorError:
            model.config.router_capacities = before
            raise
    was_training = model.training
    model.eval()
    router.observing = True
    router.boundary_steps.zero_()
    try:
        count = min(max_sequences, len(dataset))  # type: ignore[arg-type]
        for ids in batches(dataset, count, batch_size, model.device):
            model(ids, use_cache=False, routing="topk")
        router.finish_step()
    finally:
        router.observing = False
        model.train(was_training)
    return router.boundary.tolist()
