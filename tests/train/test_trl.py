"""Every trainer of TRL as its documentation calls it: a folder in, a few steps, a model out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from mor import MoRForCausalLM, MoRForSequenceClassification
from mor.data import DataIndex, load_tokenizer
from tests.strategies import make_model, small_config

pytestmark = [
    # Names that Transformers gives up in its next major version; PEFT and TRL still use them.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    # Trainers that TRL may still change say so.
    pytest.mark.filterwarnings("ignore:.*:trl.import_utils.TRLExperimentalWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
    pytest.mark.filterwarnings("ignore:.*return_outputs.*:FutureWarning"),
]
TEXTS = Dataset.from_list([{"text": "the king said to thee"}] * 8)
PROMPTS = Dataset.from_list([{"prompt": "the king said"}] * 8)
PAIRS = Dataset.from_list(
    [{"prompt": "the king said", "chosen": " to thee and", "rejected": " of night"}] * 8
)
REWARDS = Dataset.from_list([{"chosen": "the king said to thee", "rejected": "night"}] * 8)
VOTES = Dataset.from_list(
    [
        {"prompt": "the king", "completion": " said", "label": True},
        {"prompt": "the king", "completion": " to", "label": False},
    ]
    * 4
)


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A routed model with its tokenizer."""
    tokenizer = load_tokenizer(DataIndex.load(data).tokenizer_dir)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    path = tmp_path_factory.mktemp("trl")
    make_model(small_config("threshold", vocab_size=len(tokenizer), **ends)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def arguments(kind: Any, folder: Path, **fields: Any) -> Any:
    return kind(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **fields,
    )


def length_of(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


GROUPS = {"num_generations": 2, "max_completion_length": 4}


@pytest.mark.parametrize(
    ("kind", "settings", "fields", "rows", "more"),
    [
        (SFTTrainer, SFTConfig, {"max_length": 24}, TEXTS, {}),
        (DPOTrainer, DPOConfig, {"max_length": 24}, PAIRS, {}),
        (KTOTrainer, KTOConfig, {"max_length": 24}, VOTES, {}),
        (GRPOTrainer, GRPOConfig, GROUPS | {"beta": 0.1}, PROMPTS, {"reward_funcs": length_of}),
        (RLOOTrainer, RLOOConfig, GROUPS, PROMPTS, {"reward_funcs": length_of}),
        (DistillationTrainer, DistillationConfig, {"max_completion_length": 4}, PROMPTS, {}),
        (RewardTrainer, RewardConfig, {"max_length": 24}, REWARDS, {}),
    ],
    ids=["sft", "dpo", "kto", "grpo", "rloo", "distillation", "reward"],
)
def test_a_folder_is_trained(
    kind: Any,
    settings: Any,
    fields: dict[str, Any],
    rows: Dataset,
    more: dict[str, Any],
    folder: str,
    tmp_path: Path,
) -> None:
    if kind is DistillationTrainer:
        more = {"teacher_model": folder}
    trainer = kind(folder, args=arguments(settings, tmp_path, **fields), train_dataset=rows, **more)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    wanted = MoRForSequenceClassification if kind is RewardTrainer else MoRForCausalLM
    assert type(trainer.model) is wanted
    assert all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())
    if kind is not DistillationTrainer:  # which begins at its own teacher: nothing to learn
        after = trainer.model.state_dict()
        assert any(not torch.equal(after[name], before[name]) for name in before)
    trainer.save_model(str(tmp_path / "saved"))
    assert type(trainer.model).from_pretrained(tmp_path / "saved").config.auto_map == {}


def test_preferences_need_no_reference(folder: str, tmp_path: Path) -> None:
    """TRL makes the reference from the folder that the model remembers, or from the adapter off."""
    model = MoRForCausalLM.from_pretrained(folder)
    for more in ({}, {"peft_config": LoraConfig(target_modules="all-linear")}):
        settings = arguments(DPOConfig, tmp_path, max_length=24)
        trainer = DPOTrainer(folder if more else model, args=settings, train_dataset=PAIRS, **more)
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "train_loss" in entry]
        assert logged[0]["train_loss"] == pytest.approx(0.6931, abs=0.1)  # it starts at log 2


def test_a_reward_model_judges_what_another_model_says(folder: str, tmp_path: Path) -> None:
    judge = MoRForSequenceClassification.from_pretrained(folder, num_labels=1)
    settings = arguments(GRPOConfig, tmp_path, **GROUPS)
    trainer = GRPOTrainer(folder, reward_funcs=judge, args=settings, train_dataset=PROMPTS)
    trainer.train()
    assert any("reward" in entry for entry in trainer.state.log_history)


def test_a_reward_model_trains_by_adapter(folder: str, tmp_path: Path) -> None:
    lora = LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=["score"])
    settings = arguments(RewardConfig, tmp_path, max_length=24, eval_strategy="no")
    trainer = RewardTrainer(
        folder, args=settings, train_dataset=REWARDS, eval_dataset=REWARDS, peft_config=lora
    )
    trainer.train()
    assert "eval_loss" in trainer.evaluate()


@pytest.mark.parametrize("kind", [SFTTrainer, DPOTrainer, RewardTrainer])
def test_metrics_get_one_array(kind: Any, folder: str, tmp_path: Path) -> None:
    settings, rows = {
        SFTTrainer: (SFTConfig, TEXTS),
        DPOTrainer: (DPOConfig, PAIRS),
        RewardTrainer: (RewardConfig, REWARDS),
    }[kind]
    seen: list[Any] = []

    def look(found: Any) -> dict[str, float]:
        seen.append(type(found.predictions).__name__)
        return {}

    trainer = kind(
        folder,
        args=arguments(settings, tmp_path, max_length=24),
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=look,
    )
    trainer.evaluate()
    assert seen == ["ndarray"]
