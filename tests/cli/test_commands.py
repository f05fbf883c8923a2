"""Every command as a user runs it: what it does, what it says, how it ends."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import mor
from mor.cli import main
from mor.cli.app import describe
from mor.folder.tokenizer import load_tokenizer
from tests.cli.done import Mor

# The rest --------------------------------------------------------------------------------------


def test_convert_llama(mor_: Mor, run: Path, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    llama = LlamaForCausalLM(config).eval()
    llama.save_pretrained(tmp_path / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(run / "model" / name, tmp_path / "llama")
    out = tmp_path / "ours"
    assert "convert it first: mor convert llama" in mor_("generate", tmp_path / "llama").error
    assert mor_("convert", "llama", tmp_path / "llama", "--out", out).code == 0
    words = ["generate", out, "--prompt", "the king", "--greedy", "--max-new-tokens", 8, "--json"]
    found = json.loads(mor_(*words, "--ignore-eos").out)
    ids = load_tokenizer(out)("the king", return_tensors="pt").input_ids
    expected = llama.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert found["token_ids"] == expected[0, ids.shape[1] :].tolist()
    assert set(found["depths"]) == {1}
    assert mor_("convert", "llama", tmp_path / "llama", "--out", out).error
    assert mor_("convert", "llama", tmp_path / "none", "--out", tmp_path / "x").error
    assert not (tmp_path / "x").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # matplotlib's own
def test_report(mor_: Mor, run: Path, data: Path, tmp_path: Path) -> None:
    scored = Path(shutil.copytree(run, tmp_path / "tiny"))
    assert mor_("eval", scored, "--data", data, "--out", scored / "eval.json").code == 0
    done = mor_("report", scored, "--out", tmp_path / "report")
    assert done.code == 0
    assert (tmp_path / "report" / "index.html").is_file()
    assert "tiny" in done.out
    assert "is not a folder" in mor_("report", tmp_path / "no", "--out", tmp_path / "r").error
    assert not (tmp_path / "r").exists()


def test_version_and_help(mor_: Mor) -> None:
    assert mor_("version").out.strip() == mor.__version__
    assert "calibrate" in mor_("--help").out
    assert mor_("nonsense").code == 2


def test_errors_of_the_network_and_the_system_are_one_line(
    mor_: Mor, run: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["eval", run, "--data", data]
    for error, said in (
        (ValueError("input_ids holds token id 9\nvocab_size=5"), "token id 9 vocab_size=5"),
        (PermissionError(13, "Permission denied", "x.json"), "Permission denied: 'x.json'"),
    ):
        monkeypatch.setattr("mor.cli.evaluate.evaluate_model", raising(error))
        assert said in mor_(*words).error
    monkeypatch.setattr("mor.cli.evaluate.evaluate_model", raising(KeyboardInterrupt()))
    done = mor_(*words)
    assert done.code == 130
    assert "Traceback" not in done.err


def raising(error: BaseException) -> Callable[..., Any]:
    def raise_(*args: Any, **kwargs: Any) -> Any:
        raise error

    return raise_


def test_debugging_keeps_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOR_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["mor", "eval", "nowhere", "--data", "x"])
    with pytest.raises(mor.MorError, match="'nowhere' does not exist"):
        main()


@pytest.mark.slow
def test_the_module_is_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mor", "eval", "nowhere", "--data", "x"])
    with pytest.raises(SystemExit) as done:
        runpy.run_module("mor.cli", run_name="__main__")
    assert done.value.code == 2
    assert capsys.readouterr().err == "error: model folder 'nowhere' does not exist\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(2, "No such file", "a/b"), "No such file: 'a/b'"),
        (RecursionError("maximum depth"), "something is nested too deeply to be read"),
        (RuntimeError("Symlink loop from 'a'"), "a symbolic link leads back to itself"),
        (MemoryError(), "not enough memory for these sizes: MemoryError"),
        (RuntimeError("[enforce] can't allocate memory: 9"), "not enough memory for these sizes"),
        (RuntimeError("a fault of ours"), None),
    ],
)
def test_what_is_said_about_an_error(error: Exception, said: str | None) -> None:
    found = describe(error)
    assert found is None if said is None else found is not None and found.startswith(said)


def test_a_file_where_a_folder_belongs_is_named_so(mor_: Mor, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    data = ["--data", file]
    for words in (
        ["generate", file],
        ["merge", file, "--out", tmp_path / "m"],
        ["data", "info", file],
    ):
        assert "is a file, not a folder" in mor_(*words).error
    done = mor_("convert", "gguf", tmp_path, "--out", tmp_path / "g")
    assert "is a folder, not a file" in done.error
    assert "is a file" in mor_("curves", "nothing", *data, "--out", file).error
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 3000 + "]" * 3000)
    assert "is not YAML: it is nested too deeply" in mor_("train", tmp_path / "deep.yaml").error
