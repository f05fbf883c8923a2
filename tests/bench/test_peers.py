from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mor.bench.peers import Peer, PeerError, parse_environments, python_of
from mor.bench.workload import Ask, Workload
from mor.errors import MorError

LOAD = {"max_num_seqs": 4, "max_model_len": 64, "threads": 1}
WORKLOAD = Workload("w", tuple(Ask((i,), 3 + i) for i in range(5)), 2)


def fake(folder: Path, variant: str = "float32", python: str = sys.executable) -> Peer:
    return Peer("fake", "fake", variant, Path(python), folder, folder, 10)


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    made = fake(tmp_path)
    made.load(**LOAD)
    yield made
    made.close()


def test_a_worker_runs_a_closed_loop(peer: Peer) -> None:
    run = peer.run(WORKLOAD)
    assert [t.tokens for t in run.traces] == [
        tuple(range(i, i + 3 + i)) for i in range(5)
    ]  # the fake counts up from its prompt
    assert peer.details == {"max_num_seqs": 4}
    assert "python" in peer.versions
    assert run.began <= min(t.sent for t in run.traces)
    assert max(t.times[-1] for t in run.traces) <= run.ended
    # Two clients: the third request goes when the first has its answer.
    assert run.traces[2].sent >= run.traces[0].times[-1]
    assert run.traces[3].sent >= run.traces[1].times[-1]
    assert run.kv_bytes is not None
    assert run.kv_bytes % 10 == 0


def state(peer: Peer) -> str:
    line = Path(f"/proc/{peer._process.pid}/stat").read_text()
    return line.rpartition(")")[2].split()[0]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_its_memory_is_told(peer: Peer) -> None:
    assert 4 << 20 < peer.resident < 4 << 30


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_frozen_worker_stands_still_until_it_is_asked(peer: Peer) -> None:
    peer.freeze()
    deadline = time.monotonic() + 5
    while state(peer) != "T" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state(peer) == "T"
    assert len(peer.run(WORKLOAD).traces) == 5
    peer.freeze()  # and it can be ended from there


def test_what_goes_wrong_is_told(tmp_path: Path) -> None:
    broken = fake(tmp_path, "broken")
    with pytest.raises(PeerError, match="RuntimeError: this peer does not load"):
        broken.load(**LOAD)
    with pytest.raises(PeerError, match="cannot do 'run', loaded: False"):
        broken.run(WORKLOAD)
    broken._process.kill()
    with pytest.raises(PeerError, match="the worker died"):
        broken.run(WORKLOAD)
    broken.close()
    with pytest.raises(PeerError, match="cannot be started"):
        fake(tmp_path, python=str(tmp_path / "no-python"))


def test_environments(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    given = parse_environments([f"openvino={tmp_path}"])
    assert python_of("openvino", given) == tmp_path / "bin" / "python"
    assert python_of("transformers", {}) == Path(sys.executable)
    with pytest.raises(PeerError, match="vllm: no environment; give --peer-env vllm=DIR"):
        python_of("vllm", given)
    with pytest.raises(PeerError, match="no virtual environment"):
        python_of("vllm", {"vllm": tmp_path / "bin"})
    with pytest.raises(MorError, match="must be NAME=DIR"):
        parse_environments(["tgi=/tmp"])
