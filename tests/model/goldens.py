"""Numbers that the reference code gave, and our model on its inputs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mor import MoRForCausalLM
from mor.hf.convert.convert import convert_authors
from mor.hf.outputs import MoRCausalLMOutput

GOLDEN = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class Reference:
    """One recorded model: our conversion of it, its tensors and its numbers."""

    model: MoRForCausalLM
    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {name: self.tensors[name] for name in ("input_ids", "labels")}

    @property
    def train(self) -> dict[str, Any]:
        return self.facts["train"]


@cache
def reference(name: str) -> Reference:
    weights, config = GOLDEN / f"{name}.safetensors", GOLDEN / f"{name}.json"
    with TemporaryDirectory() as folder:
        out = convert_authors(weights, config, Path(folder) / "model")
        model = AutoModelForCausalLM.from_pretrained(out)
    return Reference(model, load_file(weights), json.loads(config.read_text("utf-8")))


def evaluate(ref: Reference, **options: Any) -> MoRCausalLMOutput:
    ref.model.eval()
    with torch.no_grad():
        return ref.model(
            ref.tensors["input_ids"],
            routing="topk",
            use_cache=False,
            output_hidden_states=True,
            output_router_traces=True,
            **options,
        )


def forward_train(ref: Reference, items: int | None = None) -> MoRCausalLMOutput:
    ref.model.train()
    ref.model.zero_grad(set_to_none=True)
    return ref.model(**ref.inputs, num_items_in_batch=items)


def weighted_terms(ref: Reference, output: MoRCausalLMOutput) -> Tensor:
    """Router terms as the authors' trainer adds them without accumulation: weight x mean."""
    router = ref.model.model.router
    terms = (output.router_losses or {}).items()
    return sum((router.loss_weight(n) * t for n, t in terms), torch.zeros(()))
