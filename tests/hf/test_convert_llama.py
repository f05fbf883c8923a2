"""Hugging Face Llama folders, converted: whole or sharded, tied or not, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM

from mor import MorError
from mor.folder.weights import read_weights
from mor.hf.convert.convert import convert_llama
from tests.hf.checkpoints import VANILLA, golden, load


def llama_folder(folder: Path, save: str = "safetensors", **changes: Any) -> LlamaForCausalLM:
    """A tiny random Llama as Transformers writes it."""
    torch.manual_seed(0)
    _, config = golden(VANILLA)
    settings = LlamaConfig(**config["hf_config"] | changes)
    model = LlamaForCausalLM(settings).to(settings.dtype).eval()
    shards = {"max_shard_size": "100KB"} if save == "sharded" else {}
    model.save_pretrained(folder, **shards)
    if save == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model


def word_tokenizer(size: int) -> Tokenizer:
    return Tokenizer(WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))


@pytest.mark.parametrize("save", ["safetensors", "sharded", "bin"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_llama_folder_in_any_form(
    save: str, tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = tmp_path / "llama"
    llama_folder(source, save, tie_word_embeddings=tied, dtype=dtype)
    if save == "sharded":
        assert len(list(source.glob("model-*.safetensors"))) > 1
    companions = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for name in companions[1:]:
        (source / name).write_text(f'{{"as_it_was": "{name}"}}')
    word_tokenizer(97).save(str(source / "tokenizer.json"))
    model = load(convert_llama(source, tmp_path / "out"))
    assert model.config.family == "vanilla"
    assert (model.config.num_prelude_layers, model.config.num_coda_layers) == (1, 1)
    assert len(model.model.block) == 4
    assert model.dtype == dtype
    llama = LlamaForCausalLM.from_pretrained(source).eval()
    ids = torch.randint(0, 97, (2, 9))
    with torch.no_grad():
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(
            model(ids).logits, llama(ids).logits, rtol=tolerance, atol=tolerance
        )
    for name in companions:
        assert (tmp_path / "out" / name).read_text() == (source / name).read_text()


def test_generation_settings_come_along(tmp_path: Path) -> None:
    model = llama_folder(tmp_path / "llama")
    model.generation_config.update(temperature=0.6, do_sample=True, eos_token_id=[2, 5])
    model.generation_config.save_pretrained(tmp_path / "llama")
    settings = load(convert_llama(tmp_path / "llama", tmp_path / "out")).generation_config
    assert (settings.temperature, settings.eos_token_id) == (0.6, [2, 5])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gemma2"}, "model_type='gemma2'"),
        ({"attention_bias": True}, r"q_proj\.bias is missing"),
        ({"mlp_bias": True}, r"gate_proj\.bias is missing"),
        ({"sliding_window": 16}, "sliding_window=16"),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"use_parallel_residual": True}, "use_parallel_residual=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type.*'dynamic'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide"),
        ({"pad_token_id": 97}, "pad_token_id=97"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"head_dim": 8}, r"q_proj\.weight has shape \[64, 64\]"),
    ],
)
def test_what_is_not_a_plain_llama_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    llama_folder(tmp_path / "llama")
    file = tmp_path / "llama" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(MorError, match=words) as caught:
        convert_llama(tmp_path / "llama", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "token 'w97' has id 97, but vocab_size=97"), ("{}", "the tokenizer is damaged")],
)
def test_a_tokenizer_of_another_model(content: str | None, words: str, tmp_path: Path) -> None:
    llama_folder(tmp_path / "llama")
    word_tokenizer(98).save(str(tmp_path / "llama" / "tokenizer.json"))
    if content is not None:
        (tmp_path / "llama" / "tokenizer.json").write_text(content)
    with pytest.raises(MorError, match=words):
        convert_llama(tmp_path / "llama", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_shards_that_are_missing_or_lack_a_tensor(tmp_path: Path) -> None:
    llama_folder(tmp_path / "llama", "sharded")
    shards = sorted((tmp_path / "llama").glob("model-*.safetensors"))
    tensors = load_file(shards[1])
    name = sorted(tensors)[0]
    save_file({n: t for n, t in tensors.items() if n != name}, shards[1])
    with pytest.raises(MorError, match=f"promises {name}"):
        convert_llama(tmp_path / "llama", tmp_path / "out")
    shards[1].unlink()
    with pytest.raises(MorError, match=f"names the shard {shards[1].name}"):
        convert_llama(tmp_path / "llama", tmp_path / "out")
    (tmp_path / "llama" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(MorError, match="has no weight_map"):
        convert_llama(tmp_path / "llama", tmp_path / "out")


def test_an_index_leads_nowhere_outside_its_folder(tmp_path: Path) -> None:
    llama_folder(tmp_path / "llama", "sharded")
    save_file({"x": torch.zeros(1)}, tmp_path / "outside.safetensors")
    index = {"weight_map": {"x": "../outside.safetensors"}}
    (tmp_path / "llama" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MorError, match=r"names the shard \.\./outside\.safetensors"):
        read_weights(tmp_path / "llama")


def test_a_head_that_differs_though_called_tied_is_kept_as_transformers_does(
    tmp_path: Path,
) -> None:
    llama_folder(tmp_path / "llama")
    file = tmp_path / "llama" / "model.safetensors"
    head = torch.randn(97, 64)
    save_file(load_file(file) | {"lm_head.weight": head}, file, {"format": "pt"})
    with pytest.warns(UserWarning, match="both are kept, untied"):
        model = load(convert_llama(tmp_path / "llama", tmp_path / "out"))
    assert torch.equal(model.model.lm_head.weight, head)
