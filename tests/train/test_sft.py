"""TRL's SFTTrainer as it comes: prompts and answers, chats, packed rows, LoRA on top."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.testing import assert_close
from trl import SFTConfig, SFTTrainer

from mor import MoRForCausalLM
from mor.data import DataIndex, load_tokenizer
from mor.hf.load import load_model
from mor.train import RouterCallback
from mor.train.callbacks import find_router
from tests.strategies import small_config
from tests.tiny import WORDS

pytestmark = pytest.mark.filterwarnings(
    # Names that Transformers gives up in its next major version; PEFT and TRL still use them.
    "ignore:.*gradient_checkpointing.*:FutureWarning",
    # TRL 2 gives it up.
    "ignore:.label_smoothing_factor. is deprecated in .SFTTrainer.:FutureWarning",
)
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> Any:
    found = load_tokenizer(DataIndex.load(data).tokenizer_dir)
    found.chat_template = CHAT
    return found


def rows(kind: str) -> Dataset:
    """Sixteen examples of different lengths."""
    texts = [" ".join(WORDS[i % 5 : i % 5 + 2 + i % 4]) for i in range(16)]
    if kind == "prompts":
        return Dataset.from_list(
            [{"prompt": "the king said", "completion": f" {t}"} for t in texts]
        )
    if kind == "chats":
        asked = {"role": "user", "content": "what said the king"}
        return Dataset.from_list(
            [{"messages": [asked, {"role": "assistant", "content": t}]} for t in texts]
        )
    return Dataset.from_list([{"text": t} for t in texts])


def trainer_of(
    kind: str,
    tokenizer: Any,
    folder: Path,
    router: str = "expert_choice",
    peft: LoraConfig | None = None,
    **fields: Any,
) -> SFTTrainer:
    torch.manual_seed(0)
    # Seven steps at rates that a network of this size can take.
    plain: dict[str, Any] = {"max_steps": 7, "learning_rate": 5e-3}
    plain |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    arguments = SFTConfig(
        output_dir=str(folder),
        logging_steps=1,
        max_length=24,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **plain | fields,
    )
    return SFTTrainer(
        model=MoRForCausalLM(small_config(router, vocab_size=len(tokenizer))),
        args=arguments,
        train_dataset=rows(kind),
        processing_class=tokenizer,
        callbacks=[RouterCallback()],
        peft_config=peft,
    )


def losses_of(trainer: SFTTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("prompts", {"gradient_checkpointing": False}),
        ("prompts", {"gradient_checkpointing": True}),
        ("chats", {}),
        ("texts", {"packing": True}),  # best fit, documents kept apart
        ("texts", {"packing": True, "packing_strategy": "wrapped"}),
    ],
)
def test_it_learns(kind: str, fields: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    trainer = trainer_of(kind, tokenizer, tmp_path, **fields)
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < 0.8 * losses[0]
    router = find_router(trainer.model)
    assert (router.step, router.micro_batches) == (6, 2)
    assert router.boundary_steps.tolist() == [0, 7, 7]


def test_lora_learns_with_the_router_and_is_saved(tokenizer: Any, tmp_path: Path) -> None:
    peft = LoraConfig(
        r=4, target_modules="all-linear", modules_to_save=["router"], task_type="CAUSAL_LM"
    )
    trainer = trainer_of("prompts", tokenizer, tmp_path, "threshold", peft, learning_rate=2e-2)
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < 0.8 * losses[0]
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or ".router.modules_to_save." in name for name in trained)
    merged = trainer.model.merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "merged")
    again = load_model(tmp_path / "merged")
    ids = torch.tensor([tokenizer("the king said to thee").input_ids])
    with torch.no_grad():
        assert_close(again(ids).logits, merged(ids).logits)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_routers_losses_take_part(smoothing: float, tokenizer: Any, tmp_path: Path) -> None:
    """TRL computes the loss from hidden states or logits; what routers add must not be lost."""
    how = {"max_steps": 3, "label_smoothing_factor": smoothing}
    how["gradient_accumulation_steps"] = 1
    found = []
    for coefficient in (0.0, 10.0):
        trainer = trainer_of("prompts", tokenizer, tmp_path, **how)
        trainer.model.config.router_aux_loss_coef = coefficient
        trainer.train()
        found.append(trainer.model.model.router.net.weight.detach().clone())
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_packed_or_not_the_first_loss_is_the_same(tokenizer: Any, tmp_path: Path) -> None:
    """One step over all rows, without routing between documents: only the layout differs."""
    how = {"max_steps": 1, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    found = []
    for fields in ({}, {"packing": True}):
        trainer = trainer_of("texts", tokenizer, tmp_path, "token_choice", **how, **fields)
        trainer.train()
        found.append(losses_of(trainer)[0])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_the_result_is_causal_and_can_be_tuned_again(tokenizer: Any, tmp_path: Path) -> None:
    trainer = trainer_of("prompts", tokenizer, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    model = load_model(tmp_path / "model")
    ids = torch.randint(len(tokenizer), (2, 12))
    for cut in range(1, 12):
        other = torch.randint(len(tokenizer), (2, 12))
        other[:, :cut] = ids[:, :cut]
        with torch.no_grad():
            one, two = model(ids, use_cache=False), model(other, use_cache=False)
        assert torch.equal(one.depths[:, :cut], two.depths[:, :cut])
        assert_close(one.logits[:, :cut], two.logits[:, :cut], rtol=1e-5, atol=1e-5)
    # TRL marks configurations; the mark must not make the next trainer look for experts.
    again = SFTTrainer(
        model=model,
        args=trainer.args,
        train_dataset=rows("prompts"),
        processing_class=tokenizer,
        callbacks=[RouterCallback()],
    )
    again.train()
    assert losses_of(again)[0] < losses_of(trainer)[0]
