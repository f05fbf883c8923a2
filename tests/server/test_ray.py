"""``mor serve --replicas 2`` on this machine: one replica is killed, and no answer is wrong."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from mor.engine import Engine, SamplingParams
from mor.folder.tokenizer import load_tokenizer
from mor.hf.load import load_model
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


@dataclass
class Cluster:
    """``mor serve`` with replicas, alive."""

    url: str
    pid: int

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="secret", max_retries=0, timeout=120
        )

    def replicas(self) -> list[int]:
        return replicas_of(self.pid)

    def until(self, count: int, seconds: float) -> list[int]:
        """The replicas, when there are so many."""
        end = time.monotonic() + seconds
        while len(found := self.replicas()) != count and time.monotonic() < end:
            time.sleep(0.1)
        assert len(found) == count, found
        return found

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if line.startswith((f"{name}{{", f"{name} "))
        )


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[Cluster]:
    """``mor serve`` on a free port, which must end well on SIGTERM."""
    line = [
        sys.executable, "-m", "mor.cli", "serve", str(folder), "--port", "0", "--api-key", "secret",
        "--num-pages", "400", *options,
    ]  # fmt: skip
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True)
    reader: threading.Thread | None = None
    try:
        assert process.stderr is not None
        said = ""
        while not (found := re.search(r"running on (http://[\d.:]+)", said)):
            told = process.stderr.readline()
            assert told, said
            said += told
        # What it says later must not fill the pipe.
        reader = threading.Thread(target=process.stderr.read, daemon=True)
        reader.start()
        yield Cluster(found[1], process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(180) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if reader is not None:
            reader.join(10)
        if process.stderr is not None:
            process.stderr.close()


@pytest.fixture(scope="module")
def right(folder: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and what one engine says to them."""
    prompts = [[2 + n, 5, 7 + n] * (4 + n) for n in range(8)]
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    alone = Engine(load_model(folder), load_tokenizer(folder)).generate(prompts, params)
    return prompts, [list(output.completions[0].token_ids) for output in alone]


def ask(client: openai.OpenAI, right: tuple[Any, Any], place: int) -> str:
    """Every second request is a stream; what became of it."""
    prompts, answers = right
    kind, got = place % len(prompts), []
    stream = place % 2 == 0
    try:
        made: Any = client.completions.create(
            model=NAME, prompt=prompts[kind], max_tokens=12, temperature=0.0, stream=stream,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )  # fmt: skip
        for chunk in made if stream else [made]:
            got += chunk.choices[0].token_ids
    except openai.APIError as error:
        told = "" if "send the request again" in str(error) else f": {error}"
        return ("cut" if got == answers[kind][: len(got)] else "wrong") + told
    return "answered" if got == answers[kind] else f"wrong: {got}"


def test_a_replica_is_killed_while_requests_come(
    folder: Path, right: tuple[list[list[int]], list[list[int]]]
) -> None:
    with serving(folder, "--replicas", "2") as cluster:
        client = cluster.client()
        before = cluster.until(2, 1)

        def work(place: int) -> str:
            if place == 40:
                os.kill(before[0], signal.SIGKILL)
            return ask(client, right, place)

        with ThreadPoolExecutor(8) as pool:
            fates = list(pool.map(work, range(160)))
        assert set(fates) <= {"answered", "cut"}
        assert fates.count("answered") >= 150
        end = time.monotonic() + 180
        while len(set(cluster.replicas()) - {before[0]}) < 2 and time.monotonic() < end:
            time.sleep(0.1)
        assert len(set(cluster.replicas()) - {before[0]}) == 2
        assert httpx.get(f"{cluster.url}/v1/models").status_code == 401
        metrics = httpx.get(f"{cluster.url}/metrics", timeout=30).text
        assert 'mor:http_responses_total{model_name="tiny",status="200"}' in metrics


def test_a_second_replica_comes_with_the_load_and_goes_with_it(
    folder: Path, right: tuple[list[list[int]], list[list[int]]]
) -> None:
    """No request is lost on the way up or down, not even streams under way in what goes."""
    delays = ["--upscale-seconds", "1", "--downscale-seconds", "3"]
    with serving(folder, "--autoscale", "1:2", "--max-num-seqs", "2", *delays) as cluster:
        client = cluster.client()
        first = cluster.until(1, 1)
        loaded = threading.Event()
        loaded.set()

        def work(worker: int) -> list[str]:
            fates = []
            while loaded.is_set() or len(fates) < 3:
                fates.append(ask(client, right, 2 * worker + len(fates)))
            return fates

        with ThreadPoolExecutor(17) as pool:
            busy = [pool.submit(work, n) for n in range(16)]
            try:
                both = cluster.until(2, 180)
                assert set(first) < set(both)
                end = time.monotonic() + 180
                while cluster.metric("mor:replicas") < 2 and time.monotonic() < end:
                    time.sleep(0.2)
            finally:
                loaded.clear()
            # One client stays while the other replica goes.
            light = pool.submit(lambda: [ask(client, right, n) for n in range(40)])
            fates = [fate for one in [*busy, light] for fate in one.result()]
        assert set(fates) == {"answered"}
        cluster.until(1, 180)
        assert ask(client, right, 0) == ask(client, right, 1) == "answered"
        asked = len(fates) + 2
        assert cluster.metric("mor:http_responses_total") >= asked


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
