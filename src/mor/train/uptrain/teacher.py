"""What the teacher says about a batch: its probabilities, and its stream layer by layer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mor.disk import digest
from mor.hf.modeling import MoRForCausalLM
from mor.ops.distillation import LiveRows, TeacherRows
from mor.run_files import model_folder
from mor.train.uptrain.layer_states import record_layer_states


@dataclass
class Lesson:
    """What the teacher says about one batch.

    Attributes:
        rows: its probabilities of every token, laid end to end; None where not asked for.
        hidden: [tokens, D] after each layer compared with, by the student's number of that layer.
    """

    rows: TeacherRows | None = None
    hidden: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Teacher:
    """A frozen model, and what is asked of it.

    Attributes:
        model: vanilla, on the student's device.
        layers: its layer that each of the student's numbers is compared with.
        logits: whether its probabilities are asked for.
        temperature, top_k: of its softmax.
    """

    model: MoRForCausalLM
    layers: dict[int, int]
    logits: bool
    temperature: float
    top_k: int | None

    @torch.no_grad()
    def ask(self, inputs: dict[str, Any]) -> Lesson:
        """Run it over a batch as the student's forward takes it."""
        inner = self.model.model
        with record_layer_states(inner, set(self.layers.values())) as found:
            output = inner(
                input_ids=inputs["input_ids"],
                attention_mask=inputs.get("attention_mask"),
                positions=inputs.get("position_ids"),
                document_ids=inputs.get("document_ids"),
            )
        hidden = {ours: found[theirs] for ours, theirs in self.layers.items()}
        if not self.logits:
            return Lesson(hidden=hidden)
        normed = inner.norm(output.hidden).flatten(0, 1)
        return Lesson(LiveRows(normed, inner.lm_head.weight, self.temperature, self.top_k), hidden)


def weights_digest(folder: Path) -> str:
    """One number for the weights of a model folder."""
    files = sorted(model_folder(folder).glob("*.safetensors"))
    return hashlib.sha256(" ".join(map(digest, files)).encode()).hexdigest()
