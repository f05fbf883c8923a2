"""The optimiser's groups, stock Trainers, and several ranks."""

from __future__ import annotations

import json
import multiprocessing
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments
from transformers.optimization import get_wsd_schedule

from mor import MoRConfig, MoRForCausalLM
from mor.data import PackedDataset
from mor.hf.load import load_model
from mor.model.routers import BoundaryRouter
from mor.train import RouterCallback, dump_recipe, train
from mor.train.recipe.sections import TrainSection
from mor.train.step.optimiser import Optimiser
from tests.processes import run_group
from tests.strategies import random_ids, small_config
from tests.tiny import SEQ_LEN, tiny_recipe


def arguments(folder: Path, **fields: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"weight_decay": 0.1, "learning_rate": 1e-3, "save_strategy": "no"} | fields,
    )


def optimiser_of(config: MoRConfig) -> tuple[MoRForCausalLM, Optimiser]:
    model = MoRForCausalLM(config)
    section = TrainSection.model_validate(
        {"budget": {"steps": 9}, "learning_rate": 1e-3, "warmup_fraction": 0.0}
    )
    return model, Optimiser(model, section, 9)


@pytest.mark.parametrize("tied", [True, False])
def test_decay_on_all_but_norms(tied: bool) -> None:
    model, optimiser = optimiser_of(small_config("expert_choice", tie_word_embeddings=tied))
    groups = optimiser.adamw.param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (re.search(r"norm", name) is None), name
    assert {group["weight_decay"] for group in groups} == {0.1, 0.0}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_an_auxiliary_router_has_a_rate_of_its_own() -> None:
    config = small_config("expert_choice", router_objective="aux_router")
    model, optimiser = optimiser_of(config)
    own = {id(p) for p in model.model.router.auxiliary.parameters()}  # type: ignore[union-attr]
    groups = optimiser.adamw.param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for parameter in model.parameters():
        assert rates[id(parameter)] == pytest.approx(0.01 if id(parameter) in own else 0.001)
    assert len(groups) == 3


def test_an_auxiliary_router_is_clipped_by_itself() -> None:
    """However large its gradient is, the network's stays as it is."""
    model, optimiser = optimiser_of(small_config("expert_choice", router_objective="aux_router"))
    own = list(model.model.router.auxiliary.parameters())  # type: ignore[union-attr]
    others = [p for p in model.parameters() if all(p is not q for q in own)]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-4)
    for parameter in own:
        parameter.grad = torch.full_like(parameter, 1e4)
    norms = optimiser.clip()
    assert norms["gradient norm"] < 1
    assert norms["auxiliary router's gradient norm"] > 1e4
    assert all(bool((p.grad == 1e-4).all()) for p in others)
    total = torch.stack([p.grad.norm() for p in own if p.grad is not None]).norm()
    assert float(total) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("decay", [0, 4, 10])
def test_the_trapezoid_is_that_of_the_library(warmup: int, decay: int) -> None:
    """Rate by rate what Transformers' warmup_stable_decay schedule gives."""
    steps, section = 13, {"budget": {"steps": 13}, "warmup_steps": warmup, "learning_rate": 0.3}
    section |= {"decay_fraction": decay / steps, "warmup_fraction": 0.0}
    optimiser = Optimiser(
        MoRForCausalLM(small_config("fixed")), TrainSection.model_validate(section), steps
    )
    assert (optimiser.warmup, optimiser.decay) == (warmup, decay)
    plain = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = get_wsd_schedule(plain, warmup, decay, steps, decay_type="linear")
    for step in range(steps):
        optimiser.begin_step(step)
        assert optimiser.rate == schedule.get_last_lr()[0]
        plain.step()
        schedule.step()


@pytest.mark.parametrize("router", ["expert_choice", "threshold", "token_choice"])
def test_a_stock_trainer_needs_one_callback(router: str, data: Path, tmp_path: Path) -> None:
    dataset = PackedDataset(data, "train", SEQ_LEN)
    fields = {"vocab_size": dataset.index.vocab_size, "router_balancing": "loss_free"}
    model = MoRForCausalLM(small_config(router, **fields, router_capacity_warmup_steps=2))
    trainer = Trainer(
        model=model,
        args=arguments(
            tmp_path,
            max_steps=5,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
        ),
        train_dataset=dataset,
        callbacks=[RouterCallback()],
    )
    trainer.train()
    found = model.model.router
    assert found.step == 4
    if isinstance(found, BoundaryRouter):
        # Depth 0 takes all tokens, and at step 0 of the warm-up so do the others.
        assert found.boundary_steps.tolist() == [0, 4, 4]
    else:
        assert found.bias.abs().max() > 0


# Several ranks ---------------------------------------------------------------------------------


def rank(number: int, folder: str, router: str) -> None:
    """What one of two ranks sees and stores: a batch of its own, then one optimiser step."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet-{router}", rank=number, world_size=2
    )
    fields = {"router_balancing": "loss_free"} if router == "token_choice" else {}
    model = make_model_alone(router, **fields).train()
    model(random_ids(number, 2 + 2 * number, 12))
    RouterCallback().on_step_end(None, None, None, model=model)  # type: ignore[arg-type]
    stored = model.model.router.state_dict()
    torch.save(stored, f"{folder}/{router}-{number}.pt")
    dist.destroy_process_group()


def make_model_alone(router: str, **fields: Any) -> MoRForCausalLM:
    torch.manual_seed(0)
    return MoRForCausalLM(small_config(router, **fields))


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("router", ["expert_choice", "threshold", "token_choice"])
def test_ranks_store_the_same(router: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=rank, args=(number, str(tmp_path), router)) for number in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    one, other = (torch.load(tmp_path / f"{router}-{number}.pt") for number in (0, 1))
    name = "bias" if router == "token_choice" else "boundary"
    assert_close(one[name], other[name], rtol=0, atol=0)
    # It is what one batch of both would have given, not what either would have stored alone.
    fields = {"router_balancing": "loss_free"} if router == "token_choice" else {}
    alone = make_model_alone(router, **fields).train()
    alone(torch.cat((random_ids(0, 2, 12), random_ids(1, 4, 12))))
    alone.model.router.finish_step()
    assert_close(one[name], getattr(alone.model.router, name))
    assert one[name].abs().max() > 0


@pytest.mark.slow
def test_two_processes_train_as_one(data: Path, tmp_path: Path) -> None:
    """``torchrun -m mor.cli train``: the same run as one process with twice the batch."""
    fields = {"gradient_accumulation_steps": 1, "budget": {"steps": 3}, "adam_epsilon": 1e-3}
    one = train(tiny_recipe(data, tmp_path / "one", batch_size=4, **fields))
    recipe = tiny_recipe(data, tmp_path / "two", batch_size=2, **fields, threads=1, parallel="fsdp")
    path = tmp_path / "two.yaml"
    path.write_text(dump_recipe(recipe))
    words = ["--standalone", "--nproc-per-node", "2", "-m", "mor.cli", "train", str(path)]
    said = run_group(["-m", "torch.distributed.run", *words], timeout=300)
    assert f"trained: {recipe.run_dir}" in said
    weights = [load_model(folder).state_dict() for folder in (one, recipe.run_dir)]
    assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)
    logs = [
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (one, recipe.run_dir)
    ]
    for name in ("loss", "lm_loss", "tokens", "flops", "router/aux_loss"):
        values = [[entry[name] for entry in log if name in entry] for log in logs]
        assert values[0] == pytest.approx(values[1], rel=1e-4), name
