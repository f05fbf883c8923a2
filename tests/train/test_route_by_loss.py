"""Trunk and router from the first step: what a token is taught, who learns, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mor.errors import MorError
from mor.hf.load import load_model
from mor.model.loss import next_token_targets
from mor.train import parse_recipe, train
from mor.train.recipe.depth import RouteByLossSection
from mor.train.uptrain.by_loss import RouteByLoss, untaught
from tests.strategies import make_model, random_ids, small_config
from tests.tiny import tiny_fields

SECTION = RouteByLossSection(margin=3.0, sharpness=2.0, every_exit=0.7, confidence=0.4)


def make(**fields: Any) -> Any:
    return make_model(small_config("threshold", update_rule="last", **fields))


def ask(model: Any, ids: Tensor, labels: Tensor, items: float, linger: int = 0) -> Any:
    section = SECTION.model_copy(update={"linger": linger})
    batch = {"input_ids": ids, "labels": labels}
    return RouteByLoss(section)(model.train(), batch, torch.tensor(items))


@pytest.mark.parametrize(
    ("kv_sharing", "linger"),
    [
        ("none", 0),
        ("recursive", 0),
        ("recursive_update", 0),
        ("recursive_update", 1),
        ("none", 2),
        ("propagate", 0),
    ],
)
def test_the_loss_by_hand(kv_sharing: str, linger: int) -> None:
    model = make(kv_sharing=kv_sharing, num_prelude_layers=1, num_coda_layers=1,
                 sharing="middle_cycle")  # fmt: skip
    ids = random_ids(2, 2, 9)
    labels = ids.clone()
    labels[:, 2:5] = -100
    targets = next_token_targets(labels)
    parts = ask(model, ids, labels, 10.0, linger)
    model.eval()
    plain = model(ids, routing="causal", output_hidden_states=True)
    assert len(set(plain.depths.flatten().tolist())) > 1
    assert torch.equal(parts.depths, plain.depths)
    lm = F.cross_entropy(plain.logits.flatten(0, 1), targets, reduction="sum")
    assert parts.shares["lm_loss"].item() == pytest.approx(lm.item() / 10, rel=1e-5)
    wanted, net = lm, model.model.router.net
    capped = {cap: model(ids, routing="causal", max_depth=cap) for cap in (1, 2, 3)}
    losses = torch.stack([
        F.cross_entropy(one.logits.flatten(0, 1), targets, reduction="none")
        for one in capped.values()
    ])  # fmt: skip
    for depth in (1, 2):
        state = plain.hidden_states[1 + depth].flatten(0, 1)
        wanted = wanted + 0.7 * losses[depth - 1][plain.depths.flatten() > depth].sum()
        for place in range(18):
            if plain.depths.flatten()[place] < depth:
                continue
            goal = torch.zeros(())
            if targets[place] != -100 and depth <= linger:
                goal = torch.ones(())  # it cannot have been right for so many passes
            elif targets[place] != -100:
                worst = losses[depth - 1 - linger : depth, place].max()
                goal = torch.sigmoid(2.0 * (worst - 3.0))
            logit = net(state[place], depth)[0]
            wanted = wanted - goal * F.logsigmoid(logit) - (1 - goal) * F.logsigmoid(-logit)
    assert parts.total.item() == pytest.approx(wanted.item() / 10, rel=1e-5)


def test_the_next_token_loss_has_no_say_in_the_routes() -> None:
    model = make()
    ids = random_ids(3, 2, 12)
    with untaught(model.model.router):
        output = model.model(ids, routing="causal")
    assert all(p.requires_grad for p in model.model.router.parameters())
    model.model.head_loss(output.hidden, next_token_targets(ids)).backward()
    assert all(p.grad is None for p in model.model.router.parameters())
    model.zero_grad()
    ask(model, ids, ids, 22.0).total.backward()
    assert model.model.router.net.weight.grad is not None
    # And the router's loss has none in the trunk.
    plain = RouteByLoss(SECTION.model_copy(update={"every_exit": 0.0}))
    model.zero_grad()
    plain(model, {"input_ids": ids, "labels": ids}, torch.tensor(22.0)).total.backward()
    trunk = model.model.block[0].mlp.down_proj.weight.grad.clone()
    model.zero_grad()
    output = model.model(ids, routing="causal")
    (model.model.head_loss(output.hidden, next_token_targets(ids)) / 22).backward()
    assert torch.allclose(trunk, model.model.block[0].mlp.down_proj.weight.grad, atol=1e-6)


def test_micro_batches_add_up() -> None:
    model = make()
    ids = random_ids(4, 4, 8)

    def gradients(parts: list[Tensor]) -> list[Tensor]:
        model.zero_grad()
        for part in parts:
            ask(model, part, part, 28.0).total.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for whole, added in zip(gradients([ids]), gradients(list(ids.split(1))), strict=True):
        assert torch.allclose(whole, added, atol=1e-5)


def recipe_of(data: Path, out: Path, model: dict[str, Any], **more: Any) -> Any:
    fields = tiny_fields(data, out)
    fields["model"] |= model
    fields["train"] |= {"route_by_loss": {"margin": 0.5}} | more
    return parse_recipe(fields)


ROUTED = {"router": "threshold", "update_rule": "last", "num_recursions": 3}


def test_a_run(data: Path, tmp_path: Path) -> None:
    run = train(recipe_of(data, tmp_path, ROUTED))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    assert log[0]["routes/wrong_at_1"] == pytest.approx(1.0, abs=1e-3)  # nothing is learnt yet
    router = load_model(run).model.router
    assert router.boundary.tolist() == pytest.approx([0.0] * 3)


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ({"router": "expert_choice"}, {}, "model.router='expert_choice' is none: use threshold"),
        ({"update_rule": "gated"}, {}, "model.update_rule='gated'"),
        ({"router_capacities": [0.9, 0.5, 0.2]}, {}, r"must begin with 1\.0"),
        ({}, {"routing": "topk"}, "train.routing='topk' does not go with train.route_by_loss"),
        ({}, {"depth_schedule": "random"}, "train.depth_schedule='random' does not go with"),
        ({}, {"dtype": "bfloat16"}, "train.dtype='bfloat16' does not go with"),
    ],
)
def test_what_is_refused(
    model: dict[str, Any], more: dict[str, Any], message: str, data: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(data, tmp_path, ROUTED | model, **more)
    with pytest.raises(MorError, match=message):
        train(recipe)
    assert not recipe.run_dir.exists()


def test_several_processes_are_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mor.train.uptrain.by_loss.world_size", lambda: 2)
    with pytest.raises(MorError, match="runs in one process, not 2"):
        train(recipe_of(data, tmp_path, ROUTED))


def test_a_router_for_a_trunk(data: Path, tmp_path: Path) -> None:
    fields = tiny_fields(data, tmp_path / "trunk")
    fields["model"] |= {"router": "fixed", "num_recursions": 3}
    trunk = train(parse_recipe(fields))
    fields = tiny_fields(data, tmp_path / "routed")
    fields["model"] = {"router": "threshold", "update_rule": "last"}
    fields["train"] |= {"route_by_loss": {"margin": 0.5, "linger": 1}}
    run = train(parse_recipe(fields | {"uptrain": {"start": str(trunk)}}))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    assert log[0]["routes/wrong_at_1"] == pytest.approx(1.0, abs=1e-3)
    assert "routes/wrong_at_2" in log[0]
    config = load_model(run).config
    assert (config.router, config.num_recursions) == ("threshold", 3)
    # The trunk learns, too.
    before = load_model(trunk).model.block[0].mlp.down_proj.weight
    assert not torch.equal(before, load_model(run).model.block[0].mlp.down_proj.weight)
