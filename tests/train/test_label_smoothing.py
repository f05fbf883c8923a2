"""Losses that the Trainer takes from the logits: shifted, the routers' terms in the gradient."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_pt_utils import LabelSmoother

from mor import MorError, MoRForCausalLM
from mor.train import RouterCallback
from mor.train.callbacks import find_router
from tests.strategies import make_model, random_ids, small_config

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
BY_ITEMS = "num_items_in_batch" in inspect.signature(LabelSmoother.__call__).parameters
old = pytest.mark.skipif(not BY_ITEMS, reason="Transformers before 5.15 adds up means")
EPSILON = 0.1
# More labels in one micro-batch than in the other.
ROWS = [
    {"input_ids": ids.tolist(), "labels": ids.where(torch.arange(12) >= cut, -100).tolist()}
    for ids, cut in zip(random_ids(1, 4, 12), (0, 2, 6, 7), strict=True)
]
SHAPES = {
    "vanilla": {"router": "fixed", "num_recursions": 1, "router_capacities": None},
    "recursive": {"router": "fixed"},
    **{name: {"router": name} for name in ("expert_choice", "token_choice", "threshold")},
}


def model_of(shape: str) -> MoRForCausalLM:
    fields: dict[str, Any] = dict(SHAPES[shape])
    return make_model(small_config(fields.pop("router"), **fields, router_aux_loss_coef=0.5))


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    """By hand: place t is asked for token t + 1, nats per target summed."""
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        labels[:, 1:].flatten(),
        label_smoothing=EPSILON,
        ignore_index=-100,
        reduction="sum",
    )


def trainer_of(model: Any, folder: Path, **fields: Any) -> Trainer:
    plain: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 4}
    functions = {k: fields.pop(k) for k in ("compute_loss_func",) if k in fields}
    arguments = TrainingArguments(
        output_dir=str(folder),
        label_smoothing_factor=fields.pop("label_smoothing_factor", EPSILON),
        learning_rate=1.0,
        optim="sgd",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **plain | fields,
    )
    return Trainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS),
        callbacks=[RouterCallback()],
        **functions,
    )


def batch() -> tuple[Tensor, Tensor]:
    ids, labels = (torch.tensor([row[k] for row in ROWS]) for k in ("input_ids", "labels"))
    return ids, labels


@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_is_the_smoothed_one_of_the_next_token(shape: str, tmp_path: Path) -> None:
    model = model_of(shape)
    ids, labels = batch()
    targets = (labels[:, 1:] != -100).sum()
    with torch.no_grad():
        wanted = smoothed(model.train()(ids).logits, labels) / targets
        scored = smoothed(model.eval()(ids, use_cache=False).logits, labels) / targets
    find_router(model).finish_step()
    trainer = trainer_of(model, tmp_path)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(scored), rel=1e-5)
    trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(float(wanted), rel=1e-4)
    assert not find_router(model).loss_elsewhere


@pytest.mark.parametrize(
    ("shape", "micro"),
    [
        ("vanilla", 4),
        ("expert_choice", 4),
        ("threshold", 4),
        *(pytest.param(shape, 2, marks=old) for shape in SHAPES if shape != "vanilla"),
    ],
)
def test_a_step_is_along_the_gradient_of_both_losses(
    shape: str, micro: int, tmp_path: Path
) -> None:
    """SGD at rate 1: what a weight moved by is its gradient."""
    model, twin = model_of(shape), model_of(shape).train()
    ids, labels = torch.tensor([row["input_ids"] for row in ROWS]), batch()[1]
    items = (labels[:, 1:] != -100).sum()
    trainer = trainer_of(
        model,
        tmp_path,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=4 // micro,
        seed=3,
    )
    order = torch.tensor([row["order"] for row in drawn(trainer)])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    for part in order.split(micro):
        output = twin(ids[part])
        router = find_router(twin)
        loss = smoothed(output.logits, labels[part]) / items
        for name, term in (output.router_losses or {}).items():
            loss = loss + router.loss_weight(name) * term * micro / 4
        loss.backward()
    for name, parameter in model.named_parameters():
        gradient = dict(twin.named_parameters())[name].grad
        moved = before[name] - parameter.detach()
        wanted = torch.zeros_like(moved) if gradient is None else gradient
        assert_close(moved, wanted, atol=2e-5, rtol=1e-3, msg=name)


def drawn(trainer: Trainer) -> list[dict[str, int]]:
    """The rows in the order that training will read them: one pass with the same seed."""
    rows = {tuple(row["input_ids"]): place for place, row in enumerate(ROWS)}
    torch.manual_seed(trainer.args.seed)
    found = []
    for part in trainer.get_train_dataloader():
        found += [{"order": rows[tuple(ids)]} for ids in part["input_ids"].tolist()]
    return found


def test_routers_learn_under_a_loss_function_of_ones_own(tmp_path: Path) -> None:
    seen = []

    def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        seen.append(outputs.router_losses)
        return 0.0 * outputs.logits.sum()

    model = model_of("expert_choice")
    before = find_router(model).net.weight.detach().clone()
    trainer = trainer_of(model, tmp_path, label_smoothing_factor=0.0, compute_loss_func=loss_of)
    trainer.train()
    assert (find_router(model).net.weight - before).abs().max() > 1e-4
    assert all(not term.requires_grad for term in seen[0].values())


def test_an_adapter_and_a_subclass_are_shifted_too(tmp_path: Path) -> None:
    class Child(MoRForCausalLM):
        pass

    ids, labels = batch()
    targets = (labels[:, 1:] != -100).sum()
    lora = get_peft_model(
        model_of("recursive"), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    child = Child(small_config("fixed"))
    for model in (lora, child):
        with torch.no_grad():
            logits = model.eval()(input_ids=ids, use_cache=False).logits
        wanted = float(smoothed(logits, labels) / targets)
        found = trainer_of(model, tmp_path).evaluate()["eval_loss"]
        assert found == pytest.approx(wanted, rel=1e-5)
    assert {"MoRForCausalLM", "Child"} <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def test_predictions_are_the_logits(tmp_path: Path) -> None:
    """What else the model returns is on the list of what evaluation leaves out."""
    ids = batch()[0]
    model = model_of("threshold")
    trainer = trainer_of(model, tmp_path, label_smoothing_factor=0.0)
    shapes = []

    def measure(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {"rows": float(len(prediction.label_ids))}

    trainer.compute_metrics = measure
    assert trainer.evaluate()["eval_rows"] == 4
    assert shapes == [(*ids.shape, model.config.vocab_size)]


@pytest.mark.parametrize("by_items", [True, False])
def test_versions_that_add_up_means_are_refused(
    by_items: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(self: Any, model_output: Any, labels: Tensor, shift_labels: bool = False) -> Tensor:
        raise AssertionError

    if not by_items:
        monkeypatch.setattr(LabelSmoother, "__call__", call)
    elif not BY_ITEMS:
        pytest.skip("Transformers before 5.15 adds up means")
    trainer = trainer_of(model_of("vanilla"), tmp_path, gradient_accumulation_steps=2)
    where: Any = (trainer.args, trainer.state, trainer.control)
    if by_items:
        RouterCallback().on_train_begin(*where, model=trainer.model)
    else:
        with pytest.raises(MorError, match=r"gradient 2 times too large before Transformers 5\.15"):
            RouterCallback().on_train_begin(*where, model=trainer.model)


def test_a_scaled_loss_scales_the_routers_terms(tmp_path: Path) -> None:
    """In float16 the loss is multiplied on its way back, and divided out of the gradients."""
    model = model_of("expert_choice").train()
    trainer = trainer_of(model, tmp_path)
    where: Any = (trainer.args, trainer.state, trainer.control)
    found = []
    for optimizer in (None, SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: 64.0))):
        RouterCallback().on_step_begin(*where, model=model, optimizer=optimizer)
        model.zero_grad()
        (model.base_model(batch()[0]).last_hidden_state * 0).sum().backward()
        found.append(find_router(model).net.weight.grad.clone())
    assert found[0].abs().max() > 1e-5
    assert_close(found[1], found[0] * 64)
