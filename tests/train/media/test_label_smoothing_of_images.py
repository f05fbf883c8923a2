"""The Trainer's own loss of a model that sees: shifted as that of any causal model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mor import MoRForConditionalGeneration
from mor.train.callbacks import find_router
from tests.media_models import PATCHES, image_config, pixels_of
from tests.strategies import random_ids
from tests.train.test_label_smoothing import smoothed, trainer_of


def test_a_model_of_images_is_shifted_too(tmp_path: Path) -> None:
    """Under training's rule for depths, which is not inference's: that is the loss that is told."""
    model = MoRForConditionalGeneration(image_config("expert_choice", router_aux_loss_coef=0.5))
    ids = random_ids(1, 4, 16).clamp(min=1)
    ids[:, 2 : 2 + PATCHES] = model.config.image_token_id
    labels = ids.masked_fill(ids == model.config.image_token_id, -100)
    pixels = torch.stack([pixels_of(seed) for seed in range(4)])
    with torch.no_grad():
        logits = model.train()(ids, pixels).logits
    find_router(model).finish_step()
    wanted = smoothed(logits, labels) / (labels[:, 1:] != -100).sum()
    trainer = trainer_of(model, tmp_path)
    trainer.train_dataset = [
        {"input_ids": row, "labels": told, "pixel_values": image}
        for row, told, image in zip(ids, labels, pixels, strict=True)
    ]
    trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(float(wanted), rel=1e-4)
