"""Llama's relatives: biases, norms of query and key, windows that hide nothing, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from mor import MorError
from mor.hf.convert.convert import convert_llama
from tests.hf.checkpoints import load

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
RELATIVES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama-biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama-yarn": LlamaConfig(**SHAPE, rope_parameters=YARN),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "mistral-wide-window": MistralConfig(**SHAPE, sliding_window=64, head_dim=6),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen2-tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "qwen3-biases": Qwen3Config(**SHAPE, head_dim=8, attention_bias=True),
    "smollm3": SmolLM3Config(**SHAPE, no_rope_layers=[1, 1, 1, 1]),
}


WINDOW = {"use_sliding_window": True, "sliding_window": 32}


def relative(config: PretrainedConfig, folder: Path) -> PreTrainedModel:
    """A random model in which every bias and norm does something."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
            elif "norm" in name:
                parameter.normal_(1.0, 0.3)
            else:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", RELATIVES)
def test_logits_are_the_source_s(name: str, tmp_path: Path) -> None:
    theirs = relative(RELATIVES[name], tmp_path / "in")
    ours = load(convert_llama(tmp_path / "in", tmp_path / "out"))
    ids = torch.randint(61, (2, 40))
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-4, atol=1e-4)
        # The same number through the cache, prompt and one more token.
        first = ours(ids[:, :-1], use_cache=True)
        last = ours(ids[:, -1:], past_key_values=first.past_key_values)
        torch.testing.assert_close(last.logits[:, 0], expected[:, -1], rtol=1e-4, atol=1e-4)
    assert ours.config.tie_word_embeddings == theirs.config.tie_word_embeddings


@pytest.mark.parametrize("name", ["llama-biases", "qwen2", "qwen3", "mistral"])
def test_nothing_of_the_source_is_left_out(name: str, tmp_path: Path) -> None:
    """Each tensor matters: to change it changes our logits after conversion."""
    theirs = relative(RELATIVES[name], tmp_path / "in")
    ids = torch.randint(61, (1, 12))
    base = load(convert_llama(tmp_path / "in", tmp_path / "out"))(ids).logits
    kinds = {n.replace(".layers.2.", ".layers.N."): n for n in theirs.state_dict() if ".2." in n}
    for number, tensor in enumerate(kinds.values()):
        before = theirs.state_dict()[tensor].clone()
        theirs.state_dict()[tensor].add_(torch.randn_like(before))
        theirs.save_pretrained(tmp_path / f"in{number}")
        theirs.state_dict()[tensor].copy_(before)
        changed = load(convert_llama(tmp_path / f"in{number}", tmp_path / f"out{number}"))
        assert (changed(ids).logits - base).abs().max() > 1e-3, tensor


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("mistral", {"sliding_window": 32}, "sliding_window=32.*max_position_embeddings=64"),
        ("qwen2", WINDOW | {"max_window_layers": 2}, "sliding_window=32"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers leaves 1 layers"),
        ("smollm3", {"no_rope_layers": None}, "no_rope_layers leaves 1 layers"),
        ("qwen3", {"model_type": "qwen3_moe", "num_experts": 4}, "model_type='qwen3_moe'"),
        ("qwen3", {"num_experts": 4}, "num_experts=4"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("mistral", {"model_type": "phi"}, "model_type='phi'.*llama, mistral"),
    ],
)
def test_what_is_not_llama_like_is_refused_by_the_name_of_the_field(
    name: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    relative(RELATIVES[name], tmp_path / "in")
    file = tmp_path / "in" / "config.json"
    raw = json.loads(file.read_text()) | changes
    raw.pop("layer_types", None)
    file.write_text(json.dumps(raw))
    with pytest.raises(MorError, match=words):
        convert_llama(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_window_that_no_layer_uses_is_none(tmp_path: Path) -> None:
    relative(Qwen2Config(**SHAPE, **WINDOW, max_window_layers=4), tmp_path / "in")
    assert load(convert_llama(tmp_path / "in", tmp_path / "out")).config.attention_bias


def test_a_mistral_folder_that_leaves_the_window_out_has_transformers_default(
    tmp_path: Path,
) -> None:
    relative(MistralConfig(**SHAPE | {"max_position_embeddings": 8192}), tmp_path / "in")
    file = tmp_path / "in" / "config.json"
    raw = json.loads(file.read_text())
    del raw["sliding_window"]
    file.write_text(json.dumps(raw))
    with pytest.raises(MorError, match="sliding_window=4096"):
        convert_llama(tmp_path / "in", tmp_path / "out")
