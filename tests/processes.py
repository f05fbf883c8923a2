"""Start a program that starts others, and leave none behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mor.cli import main

ROOT = Path(__file__).resolve().parents[1]


def run_group(words: list[str], timeout: float) -> str:
    """Run ``python WORDS`` from the repository's root; what it printed.

    Fails the test when it fails, or when it takes longer than ``timeout`` seconds: then it and all
    that it started are killed.
    """
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said = process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"{words} hangs: " + process.communicate()[0][-3000:])
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said[-3000:]
    return said


def _rank(number: int, world: int, port: int, words: list[str], said: Path) -> None:
    """One rank, in a forked child, as torchrun would start it."""
    meet = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    os.environ.update(meet | {"RANK": str(number), "LOCAL_RANK": str(number)})
    os.environ["OMP_NUM_THREADS"] = "1"
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(file), "w") for _ in range(2))
    sys.argv = ["mor", *words]
    main()


def run_ranks(words: list[str], world: int, said: Path, timeout: float = 120) -> None:
    """Run ``mor WORDS`` as ``world`` ranks; in forked children, which have imported torch already.

    Fails the test, with what the ranks wrote to the file ``said``, when one of them fails.
    """
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_rank, args=(number, world, port, words, said))
        for number in range(world)
    ]
    for process in ranks:
        process.start()
    end = time.monotonic() + timeout
    while any(process.exitcode is None for process in ranks) and time.monotonic() < end:
        if any(process.exitcode for process in ranks):
            break
        time.sleep(0.02)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    if codes != [0] * world:
        pytest.fail(f"ranks ended with {codes}: {said.read_text()[-3000:]}")
