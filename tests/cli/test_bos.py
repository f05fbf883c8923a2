"""One BOS policy from an imported model to its server: data, uptraining, evaluation, prompts."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from mor import MoRConfig
from mor.cli.app import app
from mor.cli.generate import encode_prompt
from mor.data import DataIndex, PackedDataset, prepare
from mor.engine.intake import prompt_ids
from mor.errors import MorError
from mor.eval import calibrate, evaluate
from mor.folder.tokenizer import load_tokenizer
from mor.hf.convert.convert import convert_llama
from mor.hf.fold.fold import fold_folder
from mor.hf.fold.plan import Folding
from mor.hf.load import load_model
from mor.server.tokens import Tokens
from mor.train import parse_recipe, train
from tests.bos import BOS, EOS, save_bos_tokenizer
from tests.tiny import write_corpus

RUN = CliRunner()
TEXT = "the king said"


def llama(folder: Path, kind: str) -> Path:
    """A model of others, whose configuration names another token than the tokenizer begins with."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=6,
        num_attention_heads=2, bos_token_id=EOS, eos_token_id=EOS, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return save_bos_tokenizer(kind, folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted and a folded model with BOS, and its text prepared with and without."""
    root = tmp_path_factory.mktemp("bos")
    convert_llama(llama(root / "llama", "template"), root / "source")
    fold_folder(root / "source", root / "folded", Folding(2))
    texts = write_corpus(root / "texts")
    for mode in ("auto", "never"):
        prepare(
            texts, root / mode, tokenizer=root / "source", validation_fraction=0.3,
            bos=mode,  # type: ignore[arg-type]
        )  # fmt: skip
    return root


def recipe(root: Path, data: str, out: Path, **changes: Any) -> Any:
    raw: dict[str, Any] = {
        "name": "run",
        "model": {},
        "data": {"path": str(root / data), "seq_len": 16},
        "train": {
            "budget": {"steps": 2}, "batch_size": 2, "learning_rate": 1e-3, "eval_sequences": 2,
            "save_steps": 1, "report_to": [],
        },
        "output": str(out),
    }  # fmt: skip
    if "mixture" in changes:
        raw["data"] = {"mixture": changes.pop("mixture"), "seq_len": 16}
    return parse_recipe(raw | changes)


def check_folder(folder: Path, added: bool) -> None:
    """Every way in makes the same ids, and the folder says so itself."""
    config, tokenizer = MoRConfig.from_pretrained(folder), load_tokenizer(folder)
    assert (config.bos_token_id, config.add_bos_token, config.eos_token_id) == (BOS, added, EOS)
    start = [BOS] if added else []
    expected = [*start, *tokenizer(TEXT, add_special_tokens=False).input_ids]
    assert encode_prompt(tokenizer, TEXT, config, 4)[0].tolist() == expected
    assert list(prompt_ids(TEXT, tokenizer, config)) == expected
    assert list(prompt_ids("", tokenizer, config)) == (start or [EOS])
    # As README and model card use it.
    assert AutoTokenizer.from_pretrained(folder)(TEXT).input_ids == expected
    assert load_model(folder).generation_config.bos_token_id == BOS
    tokens = Tokens(tokenizer, config)
    assert list(asyncio.run(tokens.encode([TEXT]))[0]) == expected
    body = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for template in (body, "{{ bos_token }}" + body):
        chat = Tokens(tokenizer, config, template)
        found = asyncio.run(chat.encode_chat([{"role": "user", "content": TEXT}], True))
        written = template != body and not added  # then the template alone decides
        assert list(found) == ([BOS] if written else []) + expected
        chat.close()
    tokens.close()


@pytest.mark.parametrize("kind", ["unused", "template", "llama", "framed"])
def test_an_import_does_as_its_tokenizer(tmp_path: Path, kind: str) -> None:
    convert_llama(llama(tmp_path / "llama", kind), tmp_path / "source")
    check_folder(tmp_path / "source", added=kind != "unused")
    fold_folder(tmp_path / "source", tmp_path / "folded", Folding(2))
    check_folder(tmp_path / "folded", added=kind != "unused")


def test_a_fold_of_an_older_import_writes_it_down(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "source", tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    config = json.loads(path.read_text())
    del config["add_bos_token"]
    path.write_text(json.dumps(config))
    fold_folder(tmp_path / "old", tmp_path / "folded", Folding(2))
    check_folder(tmp_path / "folded", added=True)


def test_uptraining_goes_on_as_the_import_was_trained(root: Path, tmp_path: Path) -> None:
    up = {"start": str(root / "folded"), "distill": {"teacher": str(root / "source")}}
    with pytest.raises(MorError, match=r"with BOS \(id 1\), but .* without BOS; prepare .* always"):
        train(recipe(root, "never", tmp_path, uptrain=up))
    assert not (tmp_path / "run").exists()
    router = {"router": "threshold"}
    run = train(recipe(root, "auto", tmp_path, uptrain=up, model=router))
    check_folder(run / "model", added=True)
    run_cli("eval", run, "--data", root / "auto", "--seq-len", 16)
    refused = RUN.invoke(app, ["eval", str(run), "--data", str(root / "never")])
    assert refused.exit_code != 0
    assert isinstance(refused.exception, MorError)
    assert "was prepared without BOS" in str(refused.exception)
    run_cli(
        "calibrate", run, "--data", root / "auto", "--seq-len", 16, "--levels",
        "--out", tmp_path / "calibrated",
    )  # fmt: skip
    check_folder(tmp_path / "calibrated", added=True)
    run_cli("merge", run, "--out", tmp_path / "merged")
    check_folder(tmp_path / "merged", added=True)
    model = load_model(run)
    for data in (PackedDataset(root / "never", split, 16) for split in ("train", "validation")):
        with pytest.raises(MorError, match="was prepared without BOS"):
            evaluate(model, data)
        with pytest.raises(MorError, match="was prepared without BOS"):
            calibrate(model, data)


def test_a_model_may_be_trained_to_do_without(root: Path, tmp_path: Path) -> None:
    """Only where the recipe says so, and not against a teacher that does not."""
    model, up = {"add_bos_token": False}, {"start": str(root / "folded")}
    run = train(recipe(root, "never", tmp_path, uptrain=up, model=model))
    check_folder(run / "model", added=False)
    up["distill"] = {"teacher": str(root / "source")}  # type: ignore[assignment]
    with pytest.raises(MorError, match=r"the teacher in .* begins every text with BOS"):
        train(recipe(root, "never", tmp_path / "two", uptrain=up, model=model))
    with pytest.raises(MorError, match=r"model.add_bos_token=False: .* but the data was prepared"):
        train(recipe(root, "auto", tmp_path / "three", uptrain=up, model=model))


@pytest.mark.parametrize("data", ["auto", "never"])
def test_a_model_from_nothing_does_as_its_data(root: Path, tmp_path: Path, data: str) -> None:
    model = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    run = train(recipe(root, data, tmp_path, model=model))
    check_folder(run / "model", added=data == "auto")
    run_cli("merge", run, "--out", tmp_path / "merged")
    check_folder(tmp_path / "merged", added=data == "auto")


def test_going_on_with_data_of_another_policy_is_refused(root: Path, tmp_path: Path) -> None:
    model = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    run = train(recipe(root, "auto", tmp_path, model=model))
    shutil.rmtree(run / "model")
    (run / "summary.json").unlink()
    with pytest.raises(MorError, match="was trained on other data"):
        train(recipe(root, "never", tmp_path, model=model), resume=True)
    mixed = [{"path": str(root / d), "weight": 1.0} for d in ("auto", "never")]
    with pytest.raises(MorError, match=r"without BOS, .* with BOS \(id 1\)"):
        train(recipe(root, "auto", tmp_path / "two", model=model, mixture=mixed))


def test_the_commands_say_it(root: Path, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"the king said {n}"}) + "\n" for n in range(40))
    (tmp_path / "a.jsonl").write_text('{"text": null}\n' + lines)
    said = run_cli(
        "data", "prepare", tmp_path / "a.jsonl", "--tokenizer", root / "source", "--out",
        tmp_path / "out", "--skip-bad-rows", "--stream", "--bos", "never",
        "--validation-fraction", 0.5,
    )  # fmt: skip
    for words in (said, run_cli("data", "info", tmp_path / "out")):
        assert "documents without BOS\n" in words
        assert "1 bad row skipped (1 null)" in words
    assert "documents with BOS (id 1)" in run_cli("data", "info", root / "auto")
    path = root / "auto" / "index.json"
    before = path.read_text()
    content = json.loads(before)
    del content["add_bos_token"], content["bos_token_id"]
    path.write_text(json.dumps(content))
    try:
        words = run_cli("data", "info", root / "auto")
        assert "documents without BOS (made before that was recorded)" in words
    finally:
        path.write_text(before)
    assert DataIndex.load(root / "auto").bos.start == (BOS,)


def run_cli(*words: Any) -> str:
    result = RUN.invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output
