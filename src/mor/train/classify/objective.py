"""What a run on images or sounds learns: their classes, or the next patch or frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mor.config.choices import Routing
from mor.hf.outputs import MoRMediaOutput
from mor.train.objective import LossParts, router_means, run_model


@dataclass
class Labels:
    """The model's own loss over examples: of their labels, and the router's weighted terms.

    Attributes:
        dtype: ``bfloat16`` runs the model under autocast.
        routing: the rule that chooses depth; None for training's own selection.
    """

    dtype: str = "float32"
    routing: Routing | None = None

    def __call__(
        self, model: nn.Module, batch: dict[str, Any], items: Tensor, traces: bool = False
    ) -> LossParts:
        """See :class:`mor.train.objective.Objective`; the log also gets ``accuracy``."""
        labels = batch["labels"]
        output: MoRMediaOutput = run_model(
            model, self.dtype, **batch, routing=self.routing, output_router_traces=traces
        )
        assert output.loss is not None
        assert output.label_loss is not None
        assert output.logits is not None
        # The model's loss is a mean over its rows; this is their share of the step's examples.
        share = len(labels) / items.clamp(min=1)
        shares = {"label_loss": output.label_loss * share}
        if output.logits.dim() == 2:
            right = (output.logits.argmax(-1) == labels).sum()
            shares["accuracy"] = right / items.clamp(min=1)
        for passes, early in (output.exit_losses or {}).items():
            shares[f"exit_loss/{passes}"] = early * share
        means = router_means(output)
        traced = output.traces or ()
        return LossParts(
            output.loss * share, shares, means, output.depths, traced, output.token_mask
        )
