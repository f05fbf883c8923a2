"""The score on held-out sequences is a mean over their targets, however batches are cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mor.data import PackedDataset, prepare
from mor.train.distributed import Parallel
from mor.train.validation import validate
from tests.strategies import make_model, small_config


def test_every_answer_weighs_the_same(tmp_path: Path) -> None:
    prepare("task:mano:documents=80,modulus=5,length=3", tmp_path, validation_fraction=0.4)
    dataset = PackedDataset(tmp_path, "validation", 8, loss_on="answers")
    model = make_model(small_config("fixed"), seed=3).eval()
    assert model.config.vocab_size >= dataset.index.vocab_size
    rows = [dataset[place] for place in range(len(dataset))]
    ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    told = (labels[:, 1:] != -100).sum(1)
    assert int(told.min()) == 0 < int(told.max())  # rows differ, and some have no target
    with torch.no_grad():
        logits = model(ids, use_cache=False, routing="causal").logits[:, :-1]
    wanted = float(F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()))
    for batch_size in (1, 3, 64):
        found = validate(Parallel(model, torch.device("cpu")), dataset, batch_size)["eval_loss"]
        assert found == pytest.approx(wanted, rel=1e-5)
