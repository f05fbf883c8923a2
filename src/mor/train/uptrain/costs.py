"""What uptraining adds to the cost of a run, and what freezing takes away: counted, not built."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mor.config import MoRConfig
from mor.folder.config import load_config
from mor.hf.register import class_for
from mor.model.flops import count_parameters, flops_per_token
from mor.ops.cross_entropy import chunk_rows
from mor.train.plan.memory import FLOAT
from mor.train.recipe.recipe import Recipe
from mor.train.uptrain.groups import freeze
from mor.train.uptrain.layer_states import numbers_at


@dataclass(frozen=True)
class UptrainCosts:
    """Beside those of the student's training.

    Attributes:
        trained: the student's parameters that have gradients.
        teacher_parameters: 0 without a teacher.
        teacher_flops: of its forward pass, per token; spent once per token where it is cached, at
            every pass over the data where it is live.
        teacher_bytes: its weights, and what it tells of one micro-batch.
        cached: whether what it says is kept.
    """

    trained: int
    teacher_parameters: int = 0
    teacher_flops: float = 0.0
    teacher_bytes: float = 0.0
    cached: bool = False


def uptrain_costs(recipe: Recipe, config: MoRConfig, device_type: str = "cpu") -> UptrainCosts:
    """Count from configurations alone; no weights are read.

    Args:
        recipe: with an ``uptrain`` section.
        config: of the student.
        device_type: how many tokens get logits at a time depends on it.

    Raises:
        MorError: a group to freeze does not exist, or the teacher is not there.
    """
    section = recipe.uptrain
    assert section is not None
    with torch.device("meta"):
        model = class_for(config)(config)
    freeze(model, section.freeze)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    distill = section.distill
    if distill is None:
        return UptrainCosts(trained)
    teacher = load_config(distill.teacher)
    parameters = count_parameters(teacher)[0]
    flops = flops_per_token(teacher, recipe.data.seq_len)
    tokens = recipe.train.batch_size * recipe.data.seq_len
    layers = len(numbers_at(config, distill.hidden_at)) if distill.hidden else 0
    states = tokens * layers * teacher.hidden_size
    if distill.logits:
        # Its logits and their log-softmax, of the tokens that get logits at a time.
        chunk = min(tokens, chunk_rows(teacher.vocab_size, device_type))
        states += tokens * teacher.hidden_size + 2 * chunk * teacher.vocab_size
    return UptrainCosts(
        trained,
        parameters,
        flops.forward if distill.logits else flops.forward - flops.head,
        FLOAT * (parameters + states),
        distill.cache is not None,
    )
