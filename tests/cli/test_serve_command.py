"""``mor serve`` as a user runs it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from mor.cli.app import app, main
from mor.cli.serve import choose_model_name
from mor.data.tokenizer import train_tokenizer
from mor.errors import MorError
from tests.strategies import make_model, small_config

command = sys.modules["mor.cli.serve"]


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
    line = [
        sys.executable, "-m", "mor.cli", "serve", str(folder), "--port", "0",
        "--chat-template", str(template), "--drain-seconds", "20", "--max-model-len", "512",
    ]  # fmt: skip
    environment = os.environ | {"MOR_API_KEY": "correct horse", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        said = ""
        while not (found := re.search(r"running on (http://[\d.:]+)", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        headers = {"Authorization": "Bearer correct horse"}
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


BROKEN = "{% for m in messages %}{{ m.content }}"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--log-level", "loud"], "log_level='loud'"),
        (["--chat-template", "nowhere.jinja"], "nowhere.jinja"),
        (["--chat-template", "broken.jinja"], "broken.jinja does not work: line 1"),
        (["--chat-template", "empty.jinja"], "empty.jinja is empty"),
        (["--chat-template", "page.html"], "what is said in a chat is not in the text"),
        (["--chat-template", "undefined.jinja"], "'nothing' is undefined"),
        (["--chat-template", "bytes.jinja"], "cannot be read"),
        (["--chat-template", "."], "cannot be read"),
        (["--max-depth", "9"], "max_depth=9"),
        (["--max-model-len", "9999"], "max_model_len=9999"),
        (["--memory-fraction", "1.5"], "memory_fraction=1.5"),
        (["--quantization", "int3"], "quantization='int3'"),
        (["--num-pages", "1"], "give at least 10 pages"),
        (["--num-pages", "9"], "num_pages=9 with page_size=16 holds no request of 32 tokens"),
        (["--api-key", ""], "empty key"),
        (["--api-key", "one", "--api-key", " "], "empty key"),
        (["--api-key", "secret\n"], "around it"),
        (["--host", ""], "host is empty"),
        (["--host", "no such host"], "host='no such host' is not known"),
        (["--served-model-name", ""], "served_model_name is empty"),
    ],
)
def test_what_is_refused_before_the_model_loads(
    folder: Path,
    options: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {
        "broken.jinja": BROKEN, "empty.jinja": " \n", "page.html": "<p>hello</p>",
        "undefined.jinja": "{{ nothing.at_all }}{{ messages[0].content }}",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "bytes.jinja").write_bytes(b"\xff\xfe\x00")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "open_servable", _no_model)
    done = CliRunner().invoke(app, ["serve", str(folder), *options])
    assert isinstance(done.exception, MorError), done.output
    assert told in str(done.exception)


def _no_model(folder: Path) -> None:
    raise AssertionError("the model was loaded first")


def test_a_taken_port_is_told_before_the_model_loads(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "open_servable", _no_model)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(app, ["serve", str(folder), "--port", str(port)])
    assert isinstance(done.exception, MorError), done.output
    assert f"port={port} on host='127.0.0.1' cannot be used" in str(done.exception)


def test_a_key_that_is_set_to_nothing_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "open_servable", _no_model)
    monkeypatch.setenv("MOR_API_KEY", "")
    done = CliRunner().invoke(app, ["serve", str(folder)])
    assert isinstance(done.exception, MorError)
    assert "MOR_API_KEY" in str(done.exception)
    assert "empty key" in str(done.exception)


def test_a_tokenizers_own_broken_template(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "open_servable", _no_model)
    copied = shutil.copytree(folder, tmp_path / "model")
    (copied / "chat_template.jinja").write_text(BROKEN)
    done = CliRunner().invoke(app, ["serve", str(copied)])
    assert isinstance(done.exception, MorError), done.output
    assert "the chat template of the tokenizer of" in str(done.exception)


def test_ctrl_c_while_it_loads_is_quiet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path, dtype: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "open_servable", interrupted)
    done = CliRunner().invoke(app, ["serve", str(folder), "--port", "0"])
    assert done.exit_code == 130
    assert done.stderr == "stopped before the model was loaded\n"


def test_ctrl_c_in_any_command_is_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["mor.cli.app"], "app", interrupted)
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, capsys.readouterr().err) == (130, "interrupted\n")


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
