"""Forward and backward of one micro-batch: operator after operator, or captured and replayed.

A small model on a GPU waits for the host, which starts some thousand kernels per step. As a CUDA
graph the host starts one. What is captured must do the same work each time, so how many tokens a
router lets through has to hang on capacities alone, as under expert choice and threshold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mor.errors import MorError
from mor.model.network import find_router
from mor.ops.replay import Replay, record
from mor.train.distributed import Parallel
from mor.train.objective import LossParts, Objective
from mor.train.recipe.recipe import Recipe


class Backward:
    """Operator after operator.

    Args:
        parallel: the model on this rank's device.
    """

    def __init__(self, parallel: Parallel) -> None:
        self.parallel = parallel

    def __call__(
        self, objective: Objective, batch: dict[str, Any], items: Tensor, traces: bool = False
    ) -> tuple[Tensor, LossParts]:
        """Add a micro-batch to the gradients.

        Args:
            objective, batch, items, traces: see :class:`~mor.train.objective.Objective`.

        Returns:
            What was back-propagated, a scalar, and the parts of the loss.
        """
        parts = objective(self.parallel.model, batch, items, traces=traces)
        # Gradients are averaged over ranks, and `items` counts the targets of all of them.
        loss = parts.total * self.parallel.ranks
        loss.backward()
        return loss.detach(), parts


class ReplayedBackward(Backward):
    """The same, captured for each shape of a micro-batch and replayed.

    A shape that is seen for the first time goes operator after operator: while capacities warm up
    most are seen once. So does a micro-batch whose traces the log wants, once per log entry. The
    objective has to stay the same.

    Args:
        parallel: as of :class:`Backward`.
        alone: whether an optimiser step has one micro-batch, whose gradients may stay where the
            replay leaves them.
    """

    def __init__(self, parallel: Parallel, *, alone: bool = False) -> None:
        super().__init__(parallel)
        self.alone = alone
        self.parameters = [p for p in parallel.plain.parameters() if p.requires_grad]
        self.router = find_router(parallel.plain)
        self._made: dict[Any, _Step | None] = {}

    def __call__(
        self, objective: Objective, batch: dict[str, Any], items: Tensor, traces: bool = False
    ) -> tuple[Tensor, LossParts]:
        """See :meth:`Backward.__call__`."""
        if traces:
            return super().__call__(objective, batch, items, traces)
        tensors = {name: one for name, one in batch.items() if isinstance(one, Tensor)}
        others = {name: one for name, one in batch.items() if name not in tensors}
        key = (
            *((name, one.shape, one.dtype) for name, one in tensors.items()),
            *others.items(),
            *(self.router.capacity(depth) for depth in range(self.router.num_recursions)),
        )
        if key not in self._made:
            self._made[key] = None
            return super().__call__(objective, batch, items)
        step = self._made[key]
        if step is None:
            inputs = {name: one.clone() for name, one in tensors.items()} | others
            step = self._made[key] = _Step(self, objective, inputs, items.clone())
        return step(tensors, items)


class _Step:
    """Forward and backward of one shape, over inputs that stay."""

    def __init__(
        self, owner: ReplayedBackward, objective: Objective, inputs: dict[str, Any], items: Tensor
    ) -> None:
        self.owner, self.objective = owner, objective
        self.inputs, self.items = inputs, items
        self.parts = LossParts(items)
        self.trained: list[torch.nn.Parameter] = []
        self.noted: list[int] = []
        device = owner.parallel.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self.replay: Replay = record(self._run, device, tries=3)

    def _run(self) -> tuple[Tensor, ...]:
        """The loss, its parts in their order, what the router noted, and each gradient there is."""
        parallel, parameters = self.owner.parallel, self.owner.parameters
        router = self.owner.router
        before, router.noted = router.noted, []
        parts = self.parts = self.objective(parallel.model, self.inputs, self.items)
        gradients = torch.autograd.grad(parts.total, parameters, allow_unused=True)
        pairs = zip(parameters, gradients, strict=True)
        self.trained = [parameter for parameter, found in pairs if found is not None]
        self.noted = [depth for depth, _ in router.noted]
        notes, router.noted = [note for _, note in router.noted], before
        told = (parts.total, *parts.shares.values(), *parts.means.values(), *notes)
        return (*(one.detach() for one in told), *(g for g in gradients if g is not None))

    def __call__(self, tensors: dict[str, Tensor], items: Tensor) -> tuple[Tensor, LossParts]:
        for name, one in tensors.items():
            self.inputs[name].copy_(one)
        self.items.copy_(items)
        found = self.replay()
        count = len(found) - len(self.trained)
        for parameter, gradient in zip(self.trained, found[count:], strict=True):
            if parameter.grad is not None:
                parameter.grad += gradient
            else:
                parameter.grad = gradient if self.owner.alone else gradient.clone()
        # The next replay writes over them, and the log looks at them later.
        loss, *rest = (one.clone() for one in found[:count])
        shares = dict(zip(self.parts.shares, rest, strict=False))
        means = dict(zip(self.parts.means, rest[len(shares) :], strict=False))
        notes = rest[len(shares) + len(means) :]
        self.owner.router.noted += zip(self.noted, notes, strict=True)
        return loss, LossParts(loss, shares, means)


def make_backward(recipe: Recipe, model: Any, parallel: Parallel) -> Backward:
    """What a recipe asks for; ``train.cuda_graphs`` changes nothing where there is no GPU.

    Raises:
        MorError: what is trained cannot be captured; it says why.
    """
    if not recipe.train.cuda_graphs:
        return Backward(parallel)
    config = model.config
    reason = None
    if not find_router(parallel.plain).repeats:
        reason = (
            f"model.router={config.router!r} does other work at every step; use fixed, "
            "expert_choice or threshold"
        )
    elif parallel.ranks > 1:
        reason = f"{parallel.ranks} processes train along; start one"
    elif recipe.uptrain is not None and (recipe.uptrain.gain or recipe.uptrain.distill):
        reason = "uptrain.gain and uptrain.distill ask the host in between"
    elif recipe.train.route_by_loss is not None:
        reason = "train.route_by_loss sends tokens where their losses say"
    elif recipe.data.kind != "text" or recipe.data.document_mask:
        reason = "it takes whole rows of text, without data.document_mask"
    elif recipe.data.packing != "concat":
        reason = f"data.packing={recipe.data.packing!r} pads rows; use concat"
    if reason is not None:
        raise MorError(f"train.cuda_graphs=true cannot be: {reason}, or leave it out")
    if parallel.device.type != "cuda":
        return Backward(parallel)
    return ReplayedBackward(parallel, alone=recipe.train.accumulation(1) == 1)
