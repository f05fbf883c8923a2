"""The example scripts, on a tiny model: they run, they learn, their output loads."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from mor.folder.tokenizer import load_tokenizer
from mor.hf.load import load_model
from mor.train import train
from tests.tiny import WORDS, tiny_recipe

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = tiny_recipe(data, tmp_path_factory.mktemp("runs"), "threshold", budget={"steps": 2})
    return train(recipe)


def numbers(text: str, first: str, second: str) -> tuple[float, float]:
    found = re.search(rf"{first} ([\d.]+), {second} ([\d.]+)", text)
    assert found, text
    return float(found[1]), float(found[2])


def test_lora(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(EXAMPLES / "finetune_lora.py"))["main"]
    options = ["--steps", "40", "--batch-size", "4", "--seq-len", "16", "--learning-rate", "2e-2"]
    main(["--model", str(run), "--data", str(data), "--out", str(tmp_path), *options])
    before, after = numbers(capsys.readouterr().out, "before", "after")
    assert after < before - 0.03  # 16 wide, the embedding frozen
    assert load_model(tmp_path / "merged").config.router == "threshold"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("options", [[], ["--packing"], ["--lora", "4"]])
def test_sft(
    options: list[str],
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"{w} said", "completion": f" to {w}"} for w in WORDS]
    if options:
        rows = [{"messages": [{"role": "user", "content": f"{w} said to {w}"}]} for w in WORDS]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main = runpy.run_path(str(EXAMPLES / "sft.py"))["main"]
    how = ["--steps", "8", "--batch-size", "4", "--max-length", "32", "--learning-rate", "1e-2"]
    main(["--model", str(run), "--data", str(path), "--out", str(tmp_path / "out"), *how, *options])
    first, last = numbers(capsys.readouterr().out, "first", "last")
    assert last < first - 0.1
    assert load_tokenizer(tmp_path / "out" / "model").chat_template
    load_model(tmp_path / "out" / "model")
