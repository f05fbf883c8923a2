"""``mor serve`` as a user runs it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from mor.cli.app import app
from mor.cli.serve import choose_model_name
from mor.data.tokenizer import train_tokenizer
from mor.errors import MorError
from tests.strategies import make_model, small_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = train_tokenizer(["the king said to the queen"], 300)
    config = small_config(
        "threshold", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0,
        max_position_embeddings=4096,
    )  # fmt: skip
    make_model(config, 3).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.slow
def test_it_serves_and_drains(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    command = [
        sys.executable, "-m", "mor.cli", "serve", str(folder), "--port", "0",
        "--chat-template", str(template), "--drain-seconds", "20", "--max-model-len", "512",
    ]  # fmt: skip
    environment = os.environ | {"MOR_API_KEY": "secret", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        said = ""
        while not (found := re.search(r"running on (http://[\d.:]+)", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        headers = {"Authorization": "Bearer secret"}
        with httpx.Client(base_url=found[1], headers=headers, timeout=60) as client:
            body: dict[str, Any] = {
                "model": "tiny", "messages": [{"role": "user", "content": "the king"}],
                "max_tokens": 150, "stream": True, "ignore_eos": True,
            }  # fmt: skip
            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                lines = (line for line in answer.iter_lines() if line)
                for _ in range(5):
                    next(lines)
                process.send_signal(signal.SIGTERM)
                rest = list(lines)
            assert len(rest) > 120
            assert '"finish_reason":"length"' in rest[-2]
            assert rest[-1] == "data: [DONE]"
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--log-level", "loud"], "log_level='loud'"),
        (["--chat-template", "nowhere.jinja"], "nowhere.jinja"),
        (["--max-depth", "9"], "max_depth=9"),
        (["--quantization", "int3"], "quantization='int3'"),
        (["--api-key", ""], "empty key"),
    ],
)
def test_what_is_refused(folder: Path, options: list[str], told: str) -> None:
    done = CliRunner().invoke(app, ["serve", str(folder), *options])
    assert isinstance(done.exception, MorError), done.output
    assert told in str(done.exception)


def test_names() -> None:
    assert choose_model_name(Path("runs/demo/threshold")) == "threshold"
    assert choose_model_name(Path("runs/demo/threshold/model")) == "threshold"


def test_no_model(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["serve", str(tmp_path / "nowhere")])
    assert isinstance(done.exception, MorError)
    assert "does not exist" in str(done.exception)


def test_without_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("mor.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    done = CliRunner().invoke(app, ["serve", str(folder)])
    assert isinstance(done.exception, MorError)
    assert "package fastapi" in str(done.exception)
    assert "pip install -e '.[serve]'" in str(done.exception)
