"""``AutoModel`` and ``AutoModelForSequenceClassification``: hidden states, classes, rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from mor import MoRBaseModel, MorError, MoRForCausalLM, MoRForSequenceClassification
from mor.hf.convert.assemble import assemble, stack_plan
from mor.hf.convert.llama import llama_config
from mor.hf.load import load_model
from tests.strategies import make_model, random_ids, small_config

IDS = random_ids(1, 3, 9).clamp(min=1)  # 0 is padding
MASK = torch.ones_like(IDS)
MASK[0, 6:] = 0  # ends early
MASK[1, :2] = 0  # padded at the left


def folder_of(path: Path, router: str = "threshold", **fields: Any) -> Path:
    make_model(small_config(router, pad_token_id=0, **fields)).save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("causal"), tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("tied"))


def load(kind: Any, folder: Path, **fields: Any) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    return kind.from_pretrained(folder, output_loading_info=True, **fields)


def test_hidden_states_are_those_of_the_whole_model(folder: Path) -> None:
    model, info = load(AutoModel, folder)
    assert type(model) is MoRBaseModel
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    whole = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        states = whole(IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
        out = model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True)
    assert_close(out.last_hidden_state, states[-1])
    assert len(out.hidden_states) == len(states)
    assert out.depths.shape == IDS.shape
    assert model(IDS, return_dict=False)[0].shape == (*IDS.shape, 32)
    assert model(IDS).past_key_values is None


def test_hidden_states_go_on_from_a_cache(tied: Path) -> None:
    model = AutoModel.from_pretrained(tied)
    with torch.no_grad():
        first = model(IDS[:, :5], use_cache=True)
        rest = model(IDS[:, 5:], past_key_values=first.past_key_values, use_cache=True)
        whole = model(IDS).last_hidden_state
    assert_close(rest.last_hidden_state, whole[:, 5:], atol=1e-4, rtol=1e-4)


def test_saved_without_a_head_and_loaded_again(folder: Path, tmp_path: Path) -> None:
    for kind, fields in ((AutoModel, {}), (AutoModelForSequenceClassification, {"num_labels": 3})):
        model, _ = load(kind, folder, **fields)
        model.save_pretrained(tmp_path / kind.__name__)
        names = load_file(tmp_path / kind.__name__ / "model.safetensors")
        assert not any("lm_head" in name for name in names)
        again, info = load(kind, tmp_path / kind.__name__)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        with torch.no_grad():
            assert_close(again(IDS)[0], model(IDS)[0])


def test_the_last_real_token_is_scored(tied: Path) -> None:
    model, info = load(AutoModelForSequenceClassification, tied, num_labels=4)
    assert set(info["missing_keys"]) == {"score.weight"}
    assert type(model) is MoRForSequenceClassification
    with torch.no_grad():
        together = model(IDS, attention_mask=MASK).logits
        alone = [model(IDS[row : row + 1, MASK[row].bool()]).logits for row in range(3)]
        assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
        by_id = model(IDS.masked_fill(MASK == 0, 0)[:1]).logits
        assert_close(by_id, model(IDS[:1, :6]).logits, atol=1e-5, rtol=1e-5)


def test_rows_without_an_end_are_refused(tied: Path) -> None:
    model, _ = load(AutoModelForSequenceClassification, tied)
    model.config.pad_token_id = None
    assert model(IDS[:1]).logits.shape == (1, 2)
    with pytest.raises(ValueError, match="nothing says where each ends: give an attention_mask"):
        model(IDS)
    with pytest.raises(ValueError, match="takes no argument 'atention_mask'; did you mean"):
        model(IDS, atention_mask=MASK)


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({"num_labels": 1}, torch.tensor([0.5, -1.0, 2.0])),
        ({"num_labels": 4}, torch.tensor([0, 3, 1])),
        ({"num_labels": 4}, torch.tensor([[0.0, 1, 1, 0]] * 3)),
        ({"num_labels": 2, "problem_type": "regression"}, torch.randn(3, 2)),
    ],
    ids=["number", "class", "labels", "numbers"],
)
def test_every_kind_of_problem_is_llamas(fields: dict[str, Any], labels: Tensor) -> None:
    config = LlamaConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    causal = LlamaForCausalLM(config).eval()
    config.update(fields)
    theirs = LlamaForSequenceClassification(config).eval()
    theirs.model.load_state_dict(causal.model.state_dict())
    plain = llama_config(LlamaForCausalLM.config_class(**config.to_dict()).to_dict(), "test")
    source = assemble(plain, stack_plan(plain), causal.state_dict(), Path("test"))
    ours_config = source.config
    ours_config.update(fields)
    ours = MoRForSequenceClassification(ours_config).eval()
    ours.load_state_dict(source.state_dict() | {"score.weight": theirs.score.weight}, strict=False)
    found, wanted = ours(IDS, labels=labels), theirs(IDS, labels=labels)
    assert_close(found.logits, wanted.logits, atol=1e-4, rtol=1e-4)
    assert_close(found.loss, wanted.loss, atol=1e-5, rtol=1e-4)
    assert ours.config.problem_type == theirs.config.problem_type


@pytest.mark.parametrize(
    ("kind", "labelled"),
    [
        (MoRBaseModel, False),
        (MoRForSequenceClassification, False),
        (MoRForSequenceClassification, True),
    ],
)
def test_routers_learn_with_the_head(kind: Any, labelled: bool, tied: Path) -> None:
    """The router's own loss is in the gradient, whoever computes the other one."""
    found = []
    for coefficient in (0.0, 5.0):
        torch.manual_seed(0)
        config = small_config("expert_choice", router_aux_loss_coef=coefficient, pad_token_id=0)
        model = kind(config).train()
        more = {"labels": torch.tensor([0, 1, 1])} if labelled else {}
        out = model(IDS, attention_mask=MASK, **more)
        loss = out.loss if labelled else out[0].float().square().mean()
        loss.backward()
        found.append(model.model.router.net.weight.grad.clone())
    assert not torch.allclose(found[0], found[1])


def test_a_trainer_classifies_and_counts(tied: Path, tmp_path: Path) -> None:
    model, _ = load(AutoModelForSequenceClassification, tied)
    rows = [{"input_ids": IDS[i % 3], "label": i % 2} for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    seen: list[Any] = []

    def count(found: Any) -> dict[str, float]:
        seen.append(found.predictions.shape)
        return {}

    trainer = Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=count
    )
    trainer.train()
    losses = [entry for entry in trainer.state.log_history if "train_loss" in entry]
    assert losses[0]["train_loss"] < 3.0  # the mean over micro-batches, not their sum
    trainer.evaluate()
    assert seen == [(8, 2)]


def test_a_folder_of_another_head_is_named(tied: Path, tmp_path: Path) -> None:
    model, _ = load(AutoModelForSequenceClassification, tied)
    model.save_pretrained(tmp_path)
    with pytest.raises(MorError, match="holds a MoRForSequenceClassification, not a MoRForCausal"):
        load_model(tmp_path)
    again = MoRForCausalLM.from_pretrained(tmp_path)  # tied: everything it needs is there
    assert again.model.lm_head.weight is again.model.embed_tokens.weight
