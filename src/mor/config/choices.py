"""The words a configuration may use, and the paper's default capacities."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

Sharing = Literal["cycle", "sequence", "middle_cycle", "middle_sequence"]
KVSharing = Literal["none", "recursive", "recursive_update", "propagate"]
UpdateRule = Literal["gated", "additive", "residual", "last"]
Relaxation = Literal["none", "lora", "gains", "embeddings"]
RecursionSeam = Literal["none", "norm_inject"]
SeamWeight = Literal["channel", "scalar"]
RecursionScale = Literal["none", "inverse"]
RouterType = Literal["fixed", "random", "expert_choice", "token_choice", "threshold"]
RouterArchitecture = Literal["linear", "mlp", "wide_mlp"]
RouterActivation = Literal["sigmoid", "tanh", "softmax", "none"]
Objective = Literal["aux_loss", "aux_router", "none"]
Balancing = Literal["loss", "loss_free", "none"]
DecisionRule = Literal["boundary", "half"]
Modality = Literal["text", "image", "audio"]
HeadType = Literal["vocabulary", "classes", "regression"]
Pooling = Literal["mean", "last"]
Routing = Literal["causal", "topk", "full"]


def default_capacities(num_recursions: int) -> list[float]:
    """(R - depth) / R for each depth: 1, 2/3, 1/3 at R = 3 (paper, section 3.1)."""
    return [float(Fraction(num_recursions - r, num_recursions)) for r in range(num_recursions)]
