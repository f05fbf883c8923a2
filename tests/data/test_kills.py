"""A preparation that is killed goes on as if it had never stopped: nothing lost, nothing twice."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mor.data import DataIndex, StreamOptions, iter_documents, prepare, train_tokenizer, writer
from mor.data import journal as journal_module
from mor.errors import MorError

Prepare = Callable[[Path], DataIndex]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([d.text for d in iter_documents(corpus)], 300).save_pretrained(folder)
    return folder


@pytest.fixture(params=["surveyed", "streamed"])
def way(request: pytest.FixtureRequest) -> str:
    """One of the two ways to prepare."""
    return str(request.param)


@pytest.fixture
def preparing(way: str, corpus: Path, tokenizer: Path) -> Prepare:
    """Prepare the corpus that way, in several segments."""
    options: dict[str, Any] = {"shard_tokens": 110, "validation_fraction": 0.3}
    if way == "streamed":
        options |= {"tokenizer": tokenizer, "stream": True}
    else:
        options |= {"vocab_size": 300}
    return lambda out: prepare(corpus, out, **options, overwrite=True)


def in_child(action: Callable[[], None]) -> int:
    """Run `action` in a forked process, which has all imports done; return its exit code."""
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def count_calls(at: int, after: bool) -> list[int]:
    """In this process, die at call `at` of anything that changes a file; return the counter."""
    calls = [0]

    def watch(owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            mine = calls[0] == at
            if mine and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = inner(*args, **kwargs)
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, outer)

    for owner, name in (
        (writer.ShardWriter, "append"),
        (writer.ShardWriter, "close"),
        (os, "fsync"),
        (os, "replace"),
        (os, "rename"),
        (os, "unlink"),
        (shutil, "rmtree"),
        (journal_module, "append_jsonl"),
        (DataIndex, "save"),
    ):
        watch(owner, name)
    return calls


def test_killed_at_every_step(way: str, preparing: Prepare, tmp_path: Path) -> None:
    """Also while a shard, the journal or the index is written, and between the two renames."""
    preparing(tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    assert sum(name.startswith("train") for name in expected) > 3
    old = tmp_path / "old"
    shutil.copytree(tmp_path / "whole", old)
    (old / "train-00000.bin").write_bytes(b"what was there before")
    stride = 2 if way == "streamed" else 4
    kills, step, place = 0, 0, tmp_path / "place"
    place.mkdir()
    out = place / "out"
    while True:
        step += stride
        shutil.rmtree(place)
        place.mkdir()
        shutil.copytree(old, out)

        def killed(step: int = step) -> None:
            count_calls(step, after=step // stride % 2 == 0)
            preparing(out)

        code = in_child(killed)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        # Under the name is the old folder, the new one, or (between two renames) none.
        assert not out.exists() or contents(out) in (contents(old), expected)
        preparing(out)
        assert contents(out) == expected
        assert os.listdir(place) == ["out"]
    assert kills >= 40 // stride


def test_killed_at_random_moments(preparing: Prepare, tmp_path: Path) -> None:
    preparing(tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    draw = random.Random()
    kills, tries = 0, 0
    while kills < 12:
        tries += 1
        assert tries < 100
        out = tmp_path / f"out-{tries}"

        def slowly(out: Path = out) -> None:
            whole = writer.ShardWriter.append

            def append(self: writer.ShardWriter, *args: Any) -> None:
                whole(self, *args)
                self._stream.flush()
                time.sleep(0.002)

            writer.ShardWriter.append = append  # type: ignore[method-assign]
            preparing(out)

        for _ in range(20):  # kill it again and again until it comes to its end
            process = multiprocessing.get_context("fork").Process(target=slowly)
            process.start()
            process.join(draw.uniform(0.0, 0.08))
            process.kill()
            process.join()
            if process.exitcode == 0:
                break
            kills += 1
            assert not out.exists() or contents(out) == expected
        preparing(out)
        assert contents(out) == expected
    assert not list(tmp_path.glob(".*.partial"))


def test_no_room_left(preparing: Prepare, tmp_path: Path) -> None:
    """The system refuses to write past a size, at many sizes: said so, kept, gone on with."""
    preparing(tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    sizes = [len(c) for name, c in expected.items() if name.startswith("train")]
    refused = 0
    for limit in (0, 600, 100, min(sizes) - 1, max(sizes) - 1, max(sizes) + 20, 2_000, 10**6):
        out = tmp_path / f"out-{limit}"

        def limited(limit: int = limit, out: Path = out) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            begin = journal_module.Workshop.begin

            def begin_limited(self: journal_module.Workshop, *args: Any) -> None:
                begin(self, *args)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

            if limit:
                journal_module.Workshop.begin = begin_limited  # type: ignore[method-assign]
            else:  # not even the tokenizer
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                preparing(out)
            except MorError as error:
                clear = str(error).startswith(f"cannot write {out}: File too large")
                os._exit(3 if clear else 4)

        code = in_child(limited)
        refused += code == 3
        assert code == (0 if out.exists() else 3)
        preparing(out)
        assert contents(out) == expected
    assert refused >= 3
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_killed_with_workers(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    """The real command; no worker outlives it, and the number of workers changes no shard."""
    command = [sys.executable, "-m", "mor_command", "data", "prepare", str(corpus)]
    command += ["--tokenizer", str(tokenizer), "--stream", "--shard-tokens", "100"]
    command += ["--validation-fraction", "0.3", "--workers", "2", "--out"]
    prepare(
        *(corpus, tmp_path / "alone"),
        tokenizer=tokenizer,
        stream=StreamOptions(),
        shard_tokens=100,
        validation_fraction=0.3,
    )
    out = tmp_path / "out"
    partial = tmp_path / ".out.partial" / "journal.jsonl"
    process = subprocess.Popen([*command, str(out)], start_new_session=True)
    while process.poll() is None and not (
        partial.is_file() and partial.read_text().count("\n") > 2
    ):
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it came to its end before it could be killed"
    for _ in range(600):  # a minute: on a busy machine a worker notices late
        alive = [p for p in Path("/proc").glob("[0-9]*") if _session(p) == process.pid]
        if not alive:
            break
        time.sleep(0.1)
    assert not alive
    subprocess.run([*command, str(out)], check=True, capture_output=True)
    found, wanted = contents(out), contents(tmp_path / "alone")
    assert {n: c for n, c in found.items() if n != "index.json"} == {
        n: c for n, c in wanted.items() if n != "index.json"
    }
    assert DataIndex.load(out).preparation == DataIndex.load(tmp_path / "alone").preparation


def _session(process: Path) -> int | None:
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[3]) if fields[0] != "Z" else None
