"""``mor export llama`` and ``gguf``: fixed depth written out, with the same logits and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mor import MorError
from mor.folder.tokenizer import load_tokenizer
from mor.hf.convert.convert import convert_gguf, convert_llama
from mor.hf.export.gguf import export_gguf
from mor.hf.export.llama import as_llama, export_llama
from mor.hf.load import load_model
from tests.strategies import make_model, random_ids, small_config

IDS = random_ids(1, 2, 9)
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 5e4},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
]


@st.composite
def fixed(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of models that Llama or Qwen3 can express."""
    recursions = draw(st.integers(1, 3))
    norms = draw(st.booleans())
    return {
        "num_recursions": recursions,
        "num_recursion_layers": draw(st.integers(1, 2)),
        "sharing": draw(st.sampled_from(["cycle", "sequence", "middle_cycle", "middle_sequence"])),
        "share_norms": draw(st.booleans()),
        "relaxation": draw(
            st.sampled_from(["none", "lora", "gains"][: 3 if recursions > 1 else 1])
        ),
        "relaxation_rank": 3,
        "attention_bias": draw(st.booleans()),
        "attention_out_bias": draw(st.booleans()),
        "mlp_bias": not norms and draw(st.booleans()),
        "use_qk_norm": norms,
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": dict(draw(st.sampled_from(ROPES))),
        "head_dim": draw(st.sampled_from([8, 16])),
        "update_rule": draw(st.sampled_from(["gated", "residual"])),  # fixed depth has none
    }


@settings(max_examples=12)
@given(fields=fixed(), data=st.data())
def test_the_same_logits(fields: dict[str, Any], data: st.DataObject) -> None:
    model = make_model(small_config("fixed", **fields))
    depth = data.draw(st.integers(1, fields["num_recursions"]))
    made: Any = as_llama(model, depth)
    assert type(made).__name__ == ("Qwen3" if fields["use_qk_norm"] else "Llama") + "ForCausalLM"
    with torch.no_grad():
        wanted = model(IDS, max_depth=depth).logits
        assert_close(made(IDS).logits, wanted, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"router": "threshold"}, "lets tokens differ in depth"),
        ({"router": "random"}, "lets tokens differ in depth"),
        ({"recursion_seam": "norm_inject"}, "recursion_seam='norm_inject' cannot be said"),
        ({"recursion_scalars": True}, "recursion_scalars=True cannot be said"),
        ({"recursion_scale": "inverse"}, "recursion_scale='inverse' cannot be said"),
        ({"recursion_streams": 2}, "recursion_streams=2 cannot be said"),
        ({"relaxation": "embeddings"}, "relaxation='embeddings' cannot be said"),
        ({"kv_sharing": "recursive"}, "kv_sharing='recursive' cannot be said"),
        ({"kv_sharing": "recursive_update"}, "kv_sharing='recursive_update' cannot be said"),
        ({"mlp_bias": True, "use_qk_norm": True}, "mlp_bias=True cannot be said"),
        ({"image_token_id": 9, "image_size": 8, "patch_size": 4}, "it is the place of images"),
        ({"audio_token_id": 9, "num_mel_bins": 8}, "it is the place of sounds"),
        ({"router_fixed_depth": 2, "depth": 3}, r"depth=3 must lie in 1\.\.2"),
        ({"depth": 4}, r"depth=4 must lie in 1\.\.3"),
    ],
)
def test_what_llama_cannot_say_is_refused(fields: dict[str, Any], said: str) -> None:
    fields = {"router": "fixed"} | fields
    depth = fields.pop("depth", None)
    with pytest.raises(MorError, match=said):
        as_llama(make_model(small_config(**fields)), depth)


def test_one_recursion_has_no_seam_and_shares_nothing() -> None:
    fields = {"recursion_seam": "norm_inject", "kv_sharing": "recursive_update"}
    model = make_model(small_config("fixed", **fields))
    made: Any = as_llama(model, 1)
    with torch.no_grad():
        wanted = model(IDS, max_depth=1).logits
        assert_close(made(IDS).logits, wanted, atol=1e-4, rtol=1e-4)


# Folders and files ------------------------------------------------------------------------------


def bytes_tokenizer(
    cut: Any = None, normalizer: Any = None, template: str | None = None
) -> PreTrainedTokenizerFast:
    """Every byte a token, two merges, two special tokens: 260 in all."""
    vocabulary = {"<|end|>": 0, "<|pad|>": 1} | {c: i + 2 for i, c in enumerate(LETTERS)}
    vocabulary |= {"th": 258, "the": 259}
    rules = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    rules.pre_tokenizer = cut or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        rules.normalizer = normalizer
    rules.decoder = decoders.ByteLevel()
    ends = {"bos_token": "<|end|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, **ends)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recursive model, three times two layers between two, and its tokenizer."""
    folder = tmp_path_factory.mktemp("fixed") / "model"
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "add_bos_token": True}
    config = small_config(
        "fixed", vocab_size=264, num_recursion_layers=2, share_norms=False, **ends
    )
    make_model(config).save_pretrained(folder)
    bytes_tokenizer(template="{{ messages[0].content }}").save_pretrained(folder)
    return folder


def logits_of(model: Any, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS, **more).logits


@pytest.mark.parametrize("depth", [None, 2])
def test_a_folder_for_everybody(depth: int | None, source: Path, tmp_path: Path) -> None:
    out = export_llama(source, tmp_path / "llama", depth)
    llama = AutoModelForCausalLM.from_pretrained(out)
    assert type(llama).__name__ == "LlamaForCausalLM"
    assert llama.config.num_hidden_layers == 2 + 2 * (depth or 3)
    model = load_model(source)
    assert_close(logits_of(llama), logits_of(model, max_depth=depth), atol=1e-4, rtol=1e-4)
    assert load_tokenizer(source)("the king").input_ids == load_tokenizer_of(out)("the king")
    back = load_model(convert_llama(out, tmp_path / "back"))
    assert_close(logits_of(back), logits_of(llama), atol=1e-4, rtol=1e-4)
    with pytest.raises(MorError, match="not empty"):
        export_llama(source, out)


def load_tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(folder)
    return lambda text: found(text).input_ids


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_a_gguf_file_comes_back_the_same(rope: dict[str, Any], tmp_path: Path) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 256}
    config = small_config("fixed", vocab_size=264, rope_parameters=dict(rope), **wide)
    model = make_model(config)
    model.save_pretrained(tmp_path / "model")
    bytes_tokenizer().save_pretrained(tmp_path / "model")
    file = export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    back = load_model(convert_gguf(file, tmp_path / "back"))
    assert_close(logits_of(back), logits_of(model), atol=1e-4, rtol=1e-4)
    text = "the king, 1234  said\n\tto thée"
    ids = load_tokenizer(tmp_path / "model")(text).input_ids
    assert load_tokenizer(tmp_path / "back")(text).input_ids == ids
    with pytest.raises(MorError, match="is a file"):
        export_gguf(tmp_path / "model", file)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_matrices_in_half_precision(kind: torch.dtype, source: Path, tmp_path: Path) -> None:
    file = export_gguf(source, tmp_path / "model.gguf", dtype=kind)
    assert file.stat().st_size < 0.7 * sum(
        p.nbytes for p in as_llama(load_model(source)).parameters()
    )
    back = load_model(convert_gguf(file, tmp_path / "back"))
    rounded = load_model(source).to(kind).float()
    norms = {n: p for n, p in load_model(source).state_dict().items() if "norm" in n}
    rounded.load_state_dict(norms, strict=False)
    assert_close(logits_of(back), logits_of(rounded), atol=1e-4, rtol=1e-4)


_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("cut", "normalizer", "name"),
    [
        (None, None, "gpt-2"),
        ("digits", None, "smollm"),
        (_QWEN, normalizers.NFC(), "qwen2"),
        (_QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1), None, "llama-bpe"),
        (r"\w+", None, None),
        (None, normalizers.Lowercase(), None),
    ],
)
def test_how_text_is_cut_is_said_or_refused(
    cut: Any, normalizer: Any, name: str | None, source: Path, tmp_path: Path
) -> None:
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut in (None, "digits"))
    steps: Any = whole
    if cut == "digits":
        steps = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    elif cut is not None:
        steps = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(cut), behavior="isolated"), whole]
        )
    load_model(source).save_pretrained(tmp_path)
    bytes_tokenizer(steps, normalizer).save_pretrained(tmp_path)
    if name is None:
        with pytest.raises(MorError, match="cuts text by a rule that"):
            export_gguf(tmp_path, tmp_path / "out.gguf")
        assert not (tmp_path / "out.gguf").exists()
        return
    from mor.hf.convert.gguf import GGUFFile

    file = GGUFFile(export_gguf(tmp_path, tmp_path / "out.gguf"))
    assert file.field("tokenizer.ggml.pre") == name


@pytest.mark.parametrize("depth", [1, 3])
def test_llama_cpp_says_the_same_tokens(depth: int, source: Path, tmp_path: Path) -> None:
    cpp = pytest.importorskip("xllamacpp")  # llama.cpp, compiled
    params = cpp.CommonParams()
    params.model.path = str(export_gguf(source, tmp_path / "model.gguf", depth))
    params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers = 64, 1, False, 0
    params.cpuparams.n_threads = 1
    # As exact as ours: keys and values in float32.
    params.cache_type_k = params.cache_type_v = cpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server, model = cpp.Server(params), load_model(source)
    text = "the king said to thee: 12 crowns"
    tokenizer, compared = load_tokenizer(source), 0
    ids = [0, *tokenizer(text).input_ids]
    for step in range(10):
        # Text first, so that its tokenizer speaks too; it begins with BOS, as the file says.
        asked = {"prompt": ids if step else text, "max_tokens": 1, "temperature": 0, "logprobs": 3}
        answer = server.handle_completions(asked)
        with torch.no_grad():
            logits = model(torch.tensor([ids]), max_depth=depth).logits[0, -1]
        ids = [*ids, int(logits.argmax())]
        told = answer["choices"][0]["logprobs"]
        if told is None:  # it tells nothing of a byte that is no whole letter
            assert chr(0xFFFD) in tokenizer.decode(ids[-1:])
            continue
        found = told["content"][0]["top_logprobs"]
        assert found[0]["id"] == ids[-1]
        for entry in found:
            wanted = float(logits.log_softmax(-1)[entry["id"]])
            assert entry["logprob"] == pytest.approx(wanted, abs=2e-3)
        compared += 1
    assert compared >= 3
