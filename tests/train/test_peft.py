"""LoRA by PEFT on a model with a shared block: training, merging, saving, the router in time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from mor import MoRForCausalLM
from mor.data import PackedDataset
from mor.eval import calibrate
from mor.hf.load import load_model
from mor.model.routers import BoundaryRouter
from mor.train import RouterCallback
from mor.train.callbacks import find_router
from tests.strategies import make_model, random_ids, small_config
from tests.tiny import SEQ_LEN
from tests.train.loops import loop_of

# Names that Transformers gives up in its next major version; PEFT still uses them.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
IDS = random_ids(1, 3, 14)


def lora(model: MoRForCausalLM, **fields: Any) -> PeftModel:
    """LoRA on every linear layer, B drawn at random so that it does something."""
    plain = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    found = get_peft_model(model, LoraConfig(**plain | fields))
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.05)
    return found


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def arguments_of(folder: Path, **fields: Any) -> TrainingArguments:
    """Five steps."""
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"max_steps": 5, "learning_rate": 2e-2} | fields,
    )


def fit(model: PeftModel, data: Path, folder: Path, **fields: Any) -> list[float]:
    """The losses of a stock Trainer."""
    arguments = arguments_of(folder, **fields)
    dataset = PackedDataset(data, "train", SEQ_LEN)
    trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[RouterCallback()])
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def base(router: str, data: Path, **fields: Any) -> MoRForCausalLM:
    vocabulary = PackedDataset(data, "train", SEQ_LEN).index.vocab_size
    return make_model(small_config(router, vocab_size=vocabulary, **fields))


def test_the_shared_block_has_one_adapter_for_all_recursions() -> None:
    model = lora(make_model(small_config("expert_choice")))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    # Prelude, one shared layer for three recursions, coda; seven matrices each, A and B.
    assert len(trained) == 3 * 7 * 2
    assert sum(".block.0." in name for name in trained) == 7 * 2
    assert not any("router" in name or "lm_head" in name for name in trained)


@pytest.mark.parametrize("modules_to_save", [None, ["router"]])
@pytest.mark.parametrize("router", ["expert_choice", "token_choice", "threshold", "fixed"])
def test_merged_is_the_same_model(router: str, modules_to_save: list[str] | None) -> None:
    model = lora(make_model(small_config(router)), modules_to_save=modules_to_save)
    with torch.no_grad():
        for parameter in find_router(model).parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    adapted = logits_of(model)
    with model.disable_adapter():
        plain = logits_of(model)
    assert (adapted - plain).abs().max() > 1e-3
    merged = model.merge_and_unload()
    assert type(merged) is MoRForCausalLM
    assert type(merged.model.router) is type(find_router(model))
    assert_close(logits_of(merged), adapted, rtol=1e-3, atol=1e-4)  # one sum, other rounding


@pytest.mark.parametrize(
    "tuning",
    [
        LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
        LoraConfig(target_modules=["q_proj", "embed_tokens", "lm_head"]),
        LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 6]),
        TrainableTokensConfig(token_indices=[5, 6]),
    ],
    ids=["saved", "lora", "lora_and_tokens", "tokens"],
)
def test_an_adapter_may_sit_on_the_embedding(tuning: Any) -> None:
    """PEFT puts a module of another class in its place."""
    start = make_model(small_config("threshold", tie_word_embeddings=False))
    before = logits_of(start)
    model = get_peft_model(start, copy.deepcopy(tuning))
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                parameter.add_(0.05 * torch.randn_like(parameter))
    adapted = logits_of(model)
    assert (adapted - before).abs().max() > 1e-3
    with torch.no_grad():  # the head's loss in chunks is that of the adapted head
        whole, alone = (
            model(input_ids=IDS, labels=IDS, return_logits=logits).loss for logits in (True, False)
        )
    assert_close(whole, alone)
    assert_close(logits_of(model.merge_and_unload()), adapted, rtol=1e-3, atol=1e-4)


def test_without_its_adapter_it_is_the_model_from_before() -> None:
    start = make_model(small_config("expert_choice"))
    before = logits_of(start)
    model = lora(start, modules_to_save=["router"])
    with torch.no_grad():
        find_router(model).net.weight.mul_(-1)
    with model.disable_adapter():
        assert_close(logits_of(model), before)
    assert (logits_of(model) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("router", "checkpointing"),
    [
        ("expert_choice", False),
        ("expert_choice", True),
        ("token_choice", True),
        ("threshold", False),
    ],
)
def test_training_with_the_router(
    router: str, checkpointing: bool, data: Path, tmp_path: Path
) -> None:
    """The adapter's router is the one that is trained, told the step, and saved with constants."""
    start = base(router, data)
    start.save_pretrained(tmp_path / "base")
    model = lora(start, modules_to_save=["router"])
    before = logits_of(model)
    losses = fit(model, data, tmp_path, gradient_checkpointing=checkpointing)
    assert losses[-1] < losses[0]
    found = find_router(model)
    original = model.base_model.model.model.router.original_module
    assert (found.step, original.step) == (4, 0)
    assert (found.net.weight - original.net.weight).abs().max() > 0
    if isinstance(found, BoundaryRouter):
        assert found.boundary_steps.tolist() == [0, 8, 8]
        assert original.boundary_steps.tolist() == [0, 3, 3]
    trained = logits_of(model)
    assert (trained - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load_model(tmp_path / "base"), tmp_path / "adapter")
    assert_close(logits_of(loaded), trained)
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert_close(logits_of(load_model(tmp_path / "merged")), trained, rtol=1e-4, atol=1e-4)


def test_our_loop_trains_an_adapter_too(data: Path, tmp_path: Path) -> None:
    """With an auxiliary router, which it gives a learning rate of its own."""
    start = base("expert_choice", data, router_objective="aux_router")
    model = lora(start, modules_to_save=["router"])
    loop = loop_of(model, data, tmp_path, steps=12, batch_size=2, learning_rate=5e-3)
    loop.run()
    own = {id(p) for p in find_router(model).auxiliary.parameters()}
    assert own == {id(p) for p in loop.optimiser.adamw.param_groups[-1]["params"]}
    log = [entry for entry in loop.log.entries if "lm_loss" in entry]
    assert log[-1]["lm_loss"] < log[0]["lm_loss"]
    assert find_router(model).boundary_steps.tolist() == [0, 15, 15]


@pytest.mark.parametrize("router", ["expert_choice", "token_choice"])
def test_a_frozen_router_keeps_its_constants(router: str, data: Path, tmp_path: Path) -> None:
    """They are not in the adapter: had they moved, loading it would give another model."""
    loss_free = {"router_balancing": "loss_free", "router_bias_update_rate": 0.05}
    start = base(router, data, **(loss_free if router == "token_choice" else {}))
    start.save_pretrained(tmp_path / "base")
    model = lora(start)
    stored = {name: value.clone() for name, value in find_router(model).state_dict().items()}
    losses = fit(model, data, tmp_path)
    assert losses[-1] < losses[0]
    assert_close(dict(find_router(model).state_dict()), stored, rtol=0, atol=0)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load_model(tmp_path / "base"), tmp_path / "adapter")
    assert_close(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("router", ["expert_choice", "token_choice", "threshold"])
def test_later_tokens_never_change_earlier_outputs_of_an_adapted_model(router: str) -> None:
    model = lora(make_model(small_config(router)), modules_to_save=["router"]).eval()
    for cut in range(1, 14):
        other = random_ids(2, 3, 14)
        other[:, :cut] = IDS[:, :cut]
        with torch.no_grad():
            one, two = (model(input_ids=ids, use_cache=False) for ids in (IDS, other))
        assert torch.equal(one.depths[:, :cut], two.depths[:, :cut])
        assert_close(one.logits[:, :cut], two.logits[:, :cut], rtol=1e-5, atol=1e-5)


def test_generation_with_the_cache() -> None:
    model = lora(make_model(small_config("threshold")), modules_to_save=["router"]).eval()
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    cached = model.generate(input_ids=IDS, **how)
    assert torch.equal(cached, model.generate(input_ids=IDS, use_cache=False, **how))
    assert torch.equal(cached, model.merge_and_unload().generate(IDS, **how))


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("router", ["fixed", "threshold"])
def test_a_learned_prompt_stays_in_the_cache(router: str) -> None:
    """PEFT looks for the cache by its old name to know whether the prompt is to be put in front."""
    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(make_model(small_config(router)), tuning).eval()
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    how |= {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.generate(**how), model.generate(use_cache=False, **how))


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, on caches and positions
@pytest.mark.parametrize("kv_sharing", ["none", "recursive", "recursive_update", "propagate"])
@pytest.mark.parametrize("router", ["fixed", "expert_choice"])
def test_a_learned_prefix_trains_and_generates(router: str, kv_sharing: str) -> None:
    tuning = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(make_model(small_config(router, kv_sharing)), tuning)
    mask = torch.ones_like(IDS)
    before = logits_of(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(4):
        loss = model.train()(input_ids=IDS, attention_mask=mask, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert not torch.allclose(logits_of(model), before)
    found = model.generate(
        input_ids=IDS, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    ids = IDS
    for _ in range(4):  # without a cache of what went before
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(found, ids)


def test_a_merged_router_follows_a_new_capacity(data: Path) -> None:
    """It comes with a copy of the configuration; calibration must not leave that behind."""
    start = base("threshold", data, router_capacities=[1.0, 1.0, 1.0])
    merged = lora(start, modules_to_save=["router"]).merge_and_unload()
    dataset = PackedDataset(data, "validation", SEQ_LEN)
    calibrate(merged, dataset, max_sequences=4, capacities=[1.0, 0.25, 0.125])
    ids = torch.stack([dataset[i]["input_ids"] for i in range(min(4, len(dataset)))])
    with torch.no_grad():
        depths = merged(ids, use_cache=False).depths
    assert float((depths > 1).float().mean()) == pytest.approx(0.25, abs=0.02)
