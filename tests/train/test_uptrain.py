"""Uptraining: what is learnt from the teacher, and what stays as it is."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.testing import assert_close

from mor import MoRForCausalLM
from mor.hf.load import load_model
from mor.model.attend.among import CausalAttend
from mor.train import parse_recipe, train
from mor.train.loop import Loop
from mor.train.objective import Distilled
from mor.train.step.optimiser import Optimiser
from mor.train.uptrain.groups import parameters_of_group
from tests.train.uptraining import fields, steps_of, weights


def layers_of(model: MoRForCausalLM) -> list[Any]:
    """The unrolled layers."""
    inner = model.model
    return [*inner.prelude_layers, *inner.block, *inner.block, *inner.coda_layers]


def stream(model: MoRForCausalLM, ids: torch.Tensor, layers: list[Any]) -> list[torch.Tensor]:
    """After every layer in order, layer by layer and without a hook."""
    inner, config = model.model, model.config
    hidden = inner.embed(ids)
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    rope = inner.rope(positions, hidden.dtype)
    found = []
    for number, layer in enumerate(layers):
        inside = number - config.num_prelude_layers
        block = config.num_recursion_layers
        shared = config.num_recursions > 1 and 0 <= inside < config.num_recursions * block
        use = inside // block if shared else 0
        hidden = layer(hidden, rope, CausalAttend(), 0, use)
        found.append(hidden)
    return found


def test_the_loss_is_what_it_says(
    uptrain: Any, source: Path, folded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first micro-batch's loss and gradient against a few plain lines."""
    seen: dict[str, Any] = {}
    before = Distilled.__call__

    def spy(self: Distilled, model: Any, inputs: Any, items: Any, **kwargs: Any) -> Any:
        if seen:
            return before(self, model, inputs, items, **kwargs)
        seen["ids"] = inputs["input_ids"].clone()
        seen["model"] = copy.deepcopy(model)
        loss = before(self, model, dict(inputs), items, **kwargs).total
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        moving = [p for p in model.parameters() if p.requires_grad]
        slopes = torch.autograd.grad(loss, moving, allow_unused=True)
        seen["slopes"] = dict(zip(names, slopes, strict=True))
        seen["loss"], seen["items"] = loss.detach(), items
        return before(self, model, inputs, items, **kwargs)

    monkeypatch.setattr(Distilled, "__call__", spy)
    weights_ = {"lm": 0.3, "logits": 0.7, "hidden": 2.0, "temperature": 2.0, "top_k": 7}
    uptrain(distill=weights_, train={"budget": {"steps": 1}})
    model, teacher, ids = seen["model"], load_model(source), seen["ids"]
    ours = stream(model, ids, layers_of(model))
    stack = [*teacher.model.prelude_layers, *teacher.model.block, *teacher.model.coda_layers]
    theirs = stream(teacher, ids, stack)
    errors = []
    for one, other in zip(ours, theirs, strict=True):
        scale = other.square().mean(-1, keepdim=True).sqrt()
        errors.append(F.smooth_l1_loss(one / scale, other / scale, beta=0.1))
    z, t = model.model.head(ours[-1])[:, :-1], teacher.model.head(theirs[-1])[:, :-1]
    p, q = (t / 2).softmax(-1), (z / 2).softmax(-1)
    chosen = p.topk(7, -1).indices
    p, q = p.gather(-1, chosen), q.gather(-1, chosen)
    p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)
    q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
    kl = 4 * (p * (p.log() - q.log())).sum()
    ce = F.cross_entropy(z.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    own = ids.numel() - len(ids)
    expected = (0.3 * ce + 0.7 * kl + 2.0 * own * sum(errors) / len(errors)) / seen["items"]
    assert_close(seen["loss"], expected.detach(), rtol=1e-4, atol=1e-5)
    expected.backward()
    for name, parameter in model.named_parameters():
        assert_close(seen["slopes"][name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_the_log_has_the_parts(uptrain: Any) -> None:
    for entry in steps_of(uptrain(distill={"lm": 0.5, "logits": 2.0, "hidden": 3.0})):
        total = 0.5 * entry["lm_loss"] + 2 * entry["kd/logits"] + 3 * entry["kd/hidden"]
        assert entry["loss"] == pytest.approx(total, rel=1e-4)
        assert entry["cpu_s"] > 0


def test_a_student_equal_to_its_teacher_has_no_error(uptrain: Any, source: Path) -> None:
    entry = steps_of(uptrain(start=source, train={"budget": {"steps": 1}}))[0]
    assert entry["kd/logits"] == pytest.approx(0, abs=1e-5)
    assert entry["kd/hidden"] == pytest.approx(0, abs=1e-6)


def test_only_streams(uptrain: Any) -> None:
    entry = steps_of(uptrain(distill={"logits": 0.0}, train={"budget": {"steps": 2}}))[-1]
    assert entry["loss"] == pytest.approx(entry["kd/hidden"], rel=1e-4)
    assert "kd/logits" not in entry
    assert entry["lm_loss"] > 0


def test_without_a_teacher_it_is_plain_training(data: Path, tmp_path: Path, folded: Path) -> None:
    raw = fields(data, tmp_path, tmp_path, folded)
    raw["uptrain"]["distill"] = None
    entry = steps_of(train(parse_recipe(raw)))[0]
    assert entry["loss"] == pytest.approx(entry["lm_loss"])
    assert not [name for name in entry if name.startswith("kd/")]


@pytest.mark.parametrize("where", ["layers", "depths"])
def test_routed_students_compare_what_ran(uptrain: Any, where: str) -> None:
    model = {"router": "threshold", "router_capacities": [1.0, 0.5]}
    model["router_capacity_warmup_steps"] = 2
    entries = steps_of(uptrain(distill={"hidden_at": where}, model=model))
    depths = [entry["router/mean_depth"] for entry in entries]
    assert depths[0] > depths[-1] == pytest.approx(1.5, abs=0.1)
    assert all(entry["kd/hidden"] > 0 for entry in entries)


# Groups ------------------------------------------------------------------------------------------


def test_frozen_weights_stay(uptrain: Any, folded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.optim.Optimizer] = []
    before = Optimiser.__init__

    def spy(self: Optimiser, *args: Any) -> None:
        before(self, *args)
        made.append(self.adamw)

    monkeypatch.setattr(Optimiser, "__init__", spy)
    frozen = ["embeddings", "norms", r"re:block\.1\."]
    folder = uptrain(freeze=frozen)
    old = load_file(folded / "model.safetensors")
    model = load_model(folder)
    still = {name for group in frozen for name in parameters_of_group(model, group, "x")}
    assert still < set(dict(model.named_parameters()))
    for name, tensor in weights(folder).items():
        assert tensor.equal(old[name]) == (name in still), name
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["started_from"] == str(folded)
    held = sum(p.numel() for group in made[0].param_groups for p in group["params"])
    assert held == sum(p.numel() for n, p in model.named_parameters() if n not in still)
    assert summary["trained_parameters"] == held
    assert len(made[0].state) == sum(len(group["params"]) for group in made[0].param_groups)


def test_groups_have_their_rates(uptrain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: dict[str, float] = {}
    before = Loop.learn_micro_batch

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = {id(p): n for n, p in self.parallel.plain.named_parameters()}
        for group in self.optimiser.adamw.param_groups:
            for p in group["params"]:
                rates[names[id(p)]] = group["initial_lr"]
        return before(self, *args, **kwargs)

    monkeypatch.setattr(Loop, "learn_micro_batch", spy)
    asked = {"routers": 10.0, "relaxation": 5.0, "embeddings": 0.1, "block": 2.0}
    model = {"router": "threshold"}
    uptrain(rates=asked, model=model, train={"budget": {"steps": 1}})
    for name, rate in rates.items():
        factor = 1.0
        if "router." in name:
            factor = 10
        elif "low_rank" in name:  # in the block too: the first one counts
            factor = 5
        elif "embed_tokens" in name:
            factor = 0.1
        elif "block." in name:
            factor = 2
        assert rate == pytest.approx(1e-2 * factor), name
    assert {round(rate, 6) for rate in rates.values()} == {0.1, 0.05, 0.001, 0.02, 0.01}
