"""An objective gives a micro-batch's share of the step's loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mor.train.objective import LossParts, NextToken, count_targets
from tests.strategies import make_model, random_ids, small_config
from tests.train.loops import loop_of


def test_only_answers_are_learnt() -> None:
    """Places whose label is -100 have no loss: the others are divided by their own number."""
    model = make_model(small_config("fixed")).train()
    ids = random_ids(3, 2, 12)
    labels = ids.clone()
    labels[0, :7] = -100
    labels[1, :10] = -100
    batch = {"input_ids": ids, "labels": labels}
    items = count_targets([batch])
    assert int(items) == 5 + 2
    parts = NextToken()(model, batch, items)
    logits = model(ids).logits[:, :-1]
    wanted = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert_close(parts.total, wanted)
    assert_close(parts.shares["lm_loss"], wanted)


def test_shares_add_up() -> None:
    model = make_model(small_config("expert_choice", router_z_loss_coef=0.1)).train()
    ids = random_ids(4, 4, 12)
    batches = [{"input_ids": part, "labels": part} for part in ids.split(1)]
    items = count_targets(batches)
    apart = sum(NextToken()(model, batch, items).total for batch in batches)
    assert_close(apart, NextToken()(model, {"input_ids": ids, "labels": ids}, items).total)


def test_an_objective_is_any_callable(data, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Here one that pulls all weights to zero, without a look at the labels."""
    model = make_model(small_config("fixed", vocab_size=300))

    def shrink(model, batch, items, traces=False):  # type: ignore[no-untyped-def]
        return LossParts(sum(p.square().sum() for p in model.parameters()))

    loop = loop_of(model, data, tmp_path, steps=3, batch_size=2, weight_decay=0.0)
    loop.objective = shrink
    loop.run()
    losses = [entry["loss"] for entry in loop.log.entries]
    assert losses == sorted(losses, reverse=True)
    assert torch.isfinite(torch.tensor(losses)).all()
