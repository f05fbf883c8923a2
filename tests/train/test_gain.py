"""The router's own stage: gains of exits, targets, and a trunk that stays as it is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mor.errors import MorError
from mor.hf.load import load_model
from mor.model.loss import next_token_targets
from mor.train import parse_recipe, train
from mor.train.recipe.uptrain import GainSection
from mor.train.uptrain.gain import DepthGain, find_gain_targets, measure_exits
from tests.strategies import make_model, random_ids, small_config
from tests.tiny import tiny_fields

SECTION = GainSection(margin=0.1, sharpness=5.0, confidence=0.2)


@pytest.mark.parametrize("update_rule", ["gated", "additive", "residual"])
def test_exits_are_the_capped_model_with_every_token_at_full_depth(update_rule: str) -> None:
    model = make_model(small_config("threshold", update_rule=update_rule))
    ids = random_ids(1, 2, 9)
    labels = ids.clone()
    labels[0, 3] = -100
    targets = next_token_targets(labels)
    losses, states, depths = measure_exits(model.model, {"input_ids": ids}, targets)
    assert (depths == 3).all()
    for cap in (1, 2, 3):
        output = model(ids, max_depth=cap, routing="full", output_hidden_states=True)
        assert output.depths.unique().tolist() == [cap]
        right = F.cross_entropy(
            output.logits.flatten(0, 1), targets, reduction="none", ignore_index=-100
        )
        assert torch.allclose(losses[cap - 1], right, atol=1e-5)
        after = output.hidden_states[model.config.num_prelude_layers + cap]
        assert torch.allclose(states[cap], after.flatten(0, 1), atol=1e-4)
    assert (losses[:, targets == -100] == 0).all()


def test_routed_exits_force_the_tokens_with_a_target_and_leave_the_others_their_routes() -> None:
    model = make_model(small_config("threshold"))
    ids = random_ids(4, 2, 9)
    labels = torch.full_like(ids, -100)
    labels[:, 5] = ids[:, 5]  # one target a row: of the token before it
    targets = next_token_targets(labels)
    own = model(ids, routing="causal").depths
    losses, _, depths = measure_exits(model.model, {"input_ids": ids}, targets, "routed")
    asked = targets.view_as(ids) != -100
    assert torch.equal(depths.view_as(ids), torch.where(asked, 3, own))
    assert len(set(own.flatten().tolist())) > 1
    for row in range(2):
        stay = int(own[row, 4])
        output = model(ids, routing="causal")
        right = F.cross_entropy(output.logits[row, 4], ids[row, 5])
        assert losses[stay - 1, row * 9 + 4].item() == pytest.approx(right.item(), rel=1e-4)


def test_targets_by_hand() -> None:
    losses = torch.tensor([[1.0, 2.0, 0.5], [1.2, 1.0, 0.5], [0.4, 1.5, 0.9]])
    first = find_gain_targets(losses, 1, SECTION)
    gains = [0.6, 1.0, 0.0]  # of the best deeper exit; nothing is gained where all are worse
    assert first.tolist() == pytest.approx([1 / (1 + math.exp(-5 * (g - 0.1))) for g in gains])
    second = find_gain_targets(losses, 2, SECTION)
    assert second.tolist() == pytest.approx(
        [1 / (1 + math.exp(-5 * (g - 0.1))) for g in [0.8, 0.0, 0.0]]
    )


@pytest.mark.parametrize("elsewhere", ["shallow", "ignore"])
def test_the_loss_is_the_cross_entropy_of_the_logits_with_the_targets(elsewhere: Any) -> None:
    section = SECTION.model_copy(update={"elsewhere": elsewhere})
    model = make_model(small_config("threshold"))
    ids = random_ids(2, 2, 7)
    labels = torch.full_like(ids, -100)
    labels[:, 4:] = ids[:, 4:]
    targets = next_token_targets(labels)
    items = torch.tensor(6.0)
    parts = DepthGain(section)(model, {"input_ids": ids, "labels": labels}, items)
    losses, states, _ = measure_exits(model.model, {"input_ids": ids}, targets)
    net = model.model.router.net
    total = torch.zeros(())
    for place in range(14):
        taught = targets[place] != -100
        if not taught and elsewhere == "ignore":
            continue
        for depth in (1, 2):
            goal = find_gain_targets(losses, depth, section)[place] if taught else torch.zeros(())
            logit = net(states[depth][place], depth)[0]
            total = total - goal * F.logsigmoid(logit) - (1 - goal) * F.logsigmoid(-logit)
    assert parts.total.item() == pytest.approx(total.item() / 6, rel=1e-5)


def test_micro_batches_add_up() -> None:
    model = make_model(small_config("threshold"))
    ids = random_ids(3, 4, 8)
    objective, items = DepthGain(SECTION), torch.tensor(28.0)

    def gradient(parts: list[torch.Tensor]) -> torch.Tensor:
        model.zero_grad()
        for part in parts:
            objective(model, {"input_ids": part, "labels": part}, items).total.backward()
        assert model.model.router.net.weight.grad is not None
        return model.model.router.net.weight.grad.clone()

    assert torch.allclose(gradient([ids]), gradient(list(ids.split(1))), atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router": "token_choice"}, "has none of its own: use threshold"),
        ({"router": "threshold", "router_capacities": [0.9, 0.5, 0.2]}, r"must begin with 1\.0"),
    ],
)
def test_a_router_that_cannot_learn_gains_is_refused(
    fields: dict[str, Any], message: str, data: Path, trunk: Path, tmp_path: Path
) -> None:
    with pytest.raises(MorError, match=message):
        train(stage(trunk, data, tmp_path, fields))


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("train", "dtype", "bfloat16", "dtype='bfloat16' does not go with uptrain.gain"),
        ("train", "depth_schedule", "random", "does not go with uptrain.gain"),
        ("data", "packing", "best_fit", "context='routed' sends single tokens"),
        ("data", "document_mask", True, "context='routed' sends single tokens"),
    ],
)
def test_what_gains_do_not_know_is_refused(
    section: str, name: str, value: Any, message: str, data: Path, trunk: Path, tmp_path: Path
) -> None:
    recipe = stage(trunk, data, tmp_path, {"router": "threshold"}, context="routed")
    setattr(getattr(recipe, section), name, value)
    with pytest.raises(MorError, match=message):
        train(recipe)
    assert not recipe.run_dir.exists()


def test_several_processes_are_refused(
    data: Path, trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mor.train.uptrain.gain.world_size", lambda: 2)
    with pytest.raises(MorError, match="runs in one process, not 2"):
        train(stage(trunk, data, tmp_path, {"router": "threshold"}))


def test_gain_and_distill_exclude_each_other(data: Path, tmp_path: Path) -> None:
    fields = tiny_fields(data, tmp_path, "fixed")
    fields["uptrain"] = {"start": "x", "gain": {}, "distill": {"teacher": "y"}}
    with pytest.raises(MorError, match="gain and distill exclude each other"):
        parse_recipe(fields)


def stage(trunk: Path, data: Path, out: Path, model: dict[str, Any], **gain: Any) -> Any:
    fields = tiny_fields(data, out)
    fields["name"], fields["model"] = "router", model
    fields["uptrain"] = {"start": str(trunk), "gain": gain}
    return parse_recipe(fields)


@pytest.fixture(scope="module")
def trunk(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    fields = tiny_fields(data, tmp_path_factory.mktemp("trunk"), "fixed")
    return train(parse_recipe(fields))


def test_gains_are_of_full_depth(data: Path, trunk: Path, tmp_path: Path) -> None:
    recipe = stage(trunk, data, tmp_path, {"router": "threshold"})
    section = recipe.train.model_copy(update={"depth_schedule": "random"})
    with pytest.raises(MorError, match=r"depth_schedule='random' does not go with uptrain\.gain"):
        train(recipe.model_copy(update={"train": section}))


def test_the_trunk_stays_and_the_router_moves(data: Path, trunk: Path, tmp_path: Path) -> None:
    recipe = stage(
        trunk, data, tmp_path, {"router": "threshold", "kv_sharing": "recursive_update"},
        confidence=0.25,
    )  # fmt: skip
    before, after = load_model(trunk), load_model(train(recipe))
    assert after.config.router == "threshold"
    assert after.config.kv_sharing == "recursive_update"
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name
    router = after.model.router
    assert router.boundary.tolist() == pytest.approx([math.log(0.25 / 0.75)] * 3)
    assert router.net.weight.abs().max() > 1e-3


def test_the_next_stage_can_train_the_trunk_under_the_rule_of_decoding(
    data: Path, trunk: Path, tmp_path: Path
) -> None:
    router = train(stage(trunk, data, tmp_path, {"router": "threshold"}))
    fields = tiny_fields(data, tmp_path)
    fields["name"], fields["model"] = "joint", {}
    fields["uptrain"] = {"start": str(router), "freeze": ["routers"]}
    fields["train"]["routing"] = "causal"
    joint = load_model(train(parse_recipe(fields)))
    before = load_model(router)
    assert torch.equal(joint.model.router.net.weight, before.model.router.net.weight)
    assert torch.equal(joint.model.router.boundary, before.model.router.boundary)
    names = [n for n, p in joint.named_parameters() if "block" in n]
    assert names
    moved = [n for n in names if not torch.equal(joint.state_dict()[n], before.state_dict()[n])]
    assert moved == names
