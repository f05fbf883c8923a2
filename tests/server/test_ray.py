"""``mor serve --replicas 2`` on this machine: one replica is killed, and no answer is wrong."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from mor.engine import Engine, SamplingParams
from mor.hf.load import load_model, load_tokenizer
from tests.server.live import NAME, model, tokenizer

pytest.importorskip("ray.serve", reason="the extra ray is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a core for each replica"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / NAME
    model().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def replicas_of(server: int) -> list[int]:
    """Processes of replicas below the server's Ray."""
    found = []
    for one in Path("/proc").glob("[0-9]*"):
        try:
            command = (one / "cmdline").read_bytes()
            session = int((one / "stat").read_text().rsplit(")", 1)[1].split()[3])
        except (OSError, ValueError):
            continue
        if b"ServeReplica" in command and session == server:
            found.append(int(one.name))
    return found


def test_a_replica_is_killed_while_requests_come(folder: Path) -> None:
    prompts = [[2 + n, 5, 7 + n] * (4 + n) for n in range(8)]
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    alone = Engine(load_model(folder), load_tokenizer(folder)).generate(prompts, params)
    right = [list(output.completions[0].token_ids) for output in alone]
    line = [
        sys.executable, "-m", "mor.cli", "serve", str(folder), "--port", "0", "--replicas", "2",
        "--api-key", "secret", "--num-pages", "400",
    ]  # fmt: skip
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stderr is not None
        said = ""
        while not (found := re.search(r"running on (http://[\d.:]+)", said)):
            told = process.stderr.readline()
            assert told, said
            said += told
        url = found[1]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0, timeout=60)
        before = replicas_of(process.pid)
        assert len(before) == 2

        def ask(place: int) -> str:
            if place == 40:
                os.kill(before[0], signal.SIGKILL)
            kind, got = place % len(prompts), []
            try:
                made: Any = client.completions.create(
                    model=NAME, prompt=prompts[kind], max_tokens=12, temperature=0.0,
                    stream=place % 2 == 0,
                    extra_body={"ignore_eos": True, "return_token_ids": True},
                )  # fmt: skip
                for chunk in made if place % 2 == 0 else [made]:
                    got += chunk.choices[0].token_ids
            except openai.APIError as error:
                told = "" if "send the request again" in str(error) else f": {error}"
                return ("cut" if got == right[kind][: len(got)] else "wrong") + told
            assert got == right[kind]
            return "answered"

        with ThreadPoolExecutor(8) as pool:
            fates = list(pool.map(ask, range(160)))
        assert set(fates) <= {"answered", "cut"}
        assert fates.count("answered") >= 150
        end = time.monotonic() + 60
        while len(replicas_of(process.pid)) < 2 and time.monotonic() < end:
            time.sleep(0.1)
        assert len(set(replicas_of(process.pid)) - {before[0]}) == 2
        assert httpx.get(f"{url}/v1/models").status_code == 401
        metrics = httpx.get(f"{url}/metrics", timeout=30).text
        assert 'mor:http_responses_total{model_name="tiny",status="200"}' in metrics
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("options", [["--replicas", "0"], ["--autoscale", "4"]])
def test_a_wrong_count_is_told_before_ray_starts(folder: Path, options: list[str]) -> None:
    from typer.testing import CliRunner

    from mor.cli.app import app
    from mor.errors import MorError

    done = CliRunner().invoke(app, ["serve", str(folder), "--port", "0", *options])
    assert isinstance(done.exception, MorError), done.output


def test_a_replica_that_cannot_start_says_why() -> None:
    from mor.server.ray.launch import explain_start

    text = (
        "Deploying application mor failed: The deployment failed to start 3 times.\n"
        "Traceback (most recent call last):\n  File x\n"
        "mor.errors.MorError: replica abc: model folder 'm' does not exist\n"
    )
    told = "replica abc: model folder 'm' does not exist"
    assert str(explain_start(RuntimeError(text), "")) == told
    assert "out of memory" in str(explain_start(RuntimeError("x"), "\nRuntimeError: out of memory"))
    assert str(explain_start(RuntimeError("odd"), "")) == "no replica could start: odd"
