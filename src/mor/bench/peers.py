"""Peers: other engines in processes of their own, frozen while somebody else is timed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mor.bench import worker
from mor.bench.trace import Run, Trace, peak_entries
from mor.bench.worker.orders import PEERS
from mor.bench.workload import Workload
from mor.errors import MorError

# Lines of a worker's standard error that an error message quotes.
TAIL = 5


class PeerError(MorError):
    """A peer cannot take part: it is left out, and the reason is printed."""


class Peer:
    """One peer in its worker process (:mod:`mor.bench.worker`).

    Args:
        name: its row in the table.
        kind, variant: which peer.
        python: of its environment; the ``transformers`` peer takes this process's.
        folder: a Llama folder.
        cache: where what it converts may be kept.
        entry_bytes: bytes that one cached token takes in float32, for the KV column.

    Raises:
        PeerError: the process cannot be started.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        variant: str,
        python: Path,
        folder: Path,
        cache: Path,
        entry_bytes: int,
    ) -> None:
        self.name, self.kind, self.variant = name, kind, variant
        self.folder, self.cache, self.entry_bytes = folder, cache, entry_bytes
        self.versions: dict[str, str] = {}
        self.details: dict[str, Any] = {}
        self._said: deque[str] = deque(maxlen=200)
        try:
            # A session of its own: a peer's own children are frozen and ended with it.
            self._process = subprocess.Popen(
                [str(python), str(Path(worker.__file__).parent), kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                cwd=cache,
            )
        except OSError as error:
            raise PeerError(f"{name}: {python} cannot be started: {error.strerror}") from None
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    @property
    def int8(self) -> bool:
        """Whether its weights have 8 bits."""
        return self.variant.startswith("int8")

    def load(self, max_num_seqs: int, max_model_len: int, threads: int) -> None:
        """Load the model for the largest load that will come.

        Raises:
            PeerError: it does not load.
        """
        answer = self._ask(
            do="load", folder=str(self.folder), variant=self.variant, cache=str(self.cache),
            max_num_seqs=max_num_seqs, max_model_len=max_model_len, threads=threads,
        )  # fmt: skip
        self.versions, self.details = answer["versions"], answer["details"]

    def run(self, workload: Workload) -> Run:
        """Closed loop, in the worker.

        Raises:
            PeerError: it failed or died.
        """
        requests = [{"prompt": a.prompt, "new_tokens": a.new_tokens} for a in workload.asks]
        answer = self._ask(do="run", requests=requests, concurrency=workload.concurrency)
        traces = tuple(
            Trace(one["sent"], tuple(one["times"]), tuple(one["tokens"]), len(ask.prompt))
            for one, ask in zip(answer["traces"], workload.asks, strict=True)
        )
        run = Run(answer["began"], answer["ended"], traces, workload.concurrency)
        return replace(run, kv_bytes=peak_entries(run) * self.entry_bytes)

    @property
    def resident(self) -> int:
        """Bytes of memory that it and its children hold now; 0 where the system does not say."""
        pages = 0
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError, ValueError):
                session = (folder / "stat").read_text().rpartition(")")[2].split()[3]
                if int(session) == self._process.pid:
                    pages += int((folder / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def freeze(self) -> None:
        """Stop it and its children where they stand."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let the processes of this peer go on."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End the process of this peer."""
        self.thaw()
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self._listener.join(timeout=5)
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said.append(line.rstrip())

    def _ask(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.thaw()
        line = ""
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            self._listener.join(timeout=1)
            raise PeerError(f"{self.name}: the worker died: {self._tail()}")
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            raise PeerError(f"{self.name}: {answer['error']}")
        return answer

    def _tail(self) -> str:
        lines = [line for line in self._said if line.strip()]
        return " | ".join(lines[-TAIL:]) or "it said nothing"


def python_of(kind: str, environments: dict[str, Path]) -> Path:
    """The Python that runs a peer.

    Raises:
        PeerError: no environment was given, or there is no Python in it.
    """
    if kind in environments:
        folder = environments[kind].absolute()  # not resolved: a venv's python is often a link
        python = folder if folder.is_file() else folder / "bin" / "python"
        if not python.is_file():
            raise PeerError(f"{kind}: {folder} is no virtual environment (no bin/python in it)")
        return python
    if kind in ("transformers", "fake"):
        return Path(sys.executable)
    raise PeerError(f"{kind}: no environment; give --peer-env {kind}=DIR (docs/benchmarks.md)")


def parse_environments(words: Sequence[str]) -> dict[str, Path]:
    """``NAME=DIR`` of the command line.

    Raises:
        MorError: something else.
    """
    found = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or name not in PEERS:
            raise MorError(f"peer_env={word!r} must be NAME=DIR with a name of: {', '.join(PEERS)}")
        found[name] = Path(folder)
    return found
