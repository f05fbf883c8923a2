"""Servers and replicas as ``replicas.py`` starts, watches and stops them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx


def free_port() -> int:
    """A port that nobody has just now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def cpu_seconds(session: int) -> dict[str, float]:
    """Processor time so far of a server's processes: itself, its replicas, and Ray's others."""
    found = {"front": 0.0, "replicas": 0.0, "ray": 0.0}
    tick = os.sysconf("SC_CLK_TCK")
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            line = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if int(stat[3]) != session:
            continue
        other = "replicas" if b"ServeReplica" in line else "ray"
        name = "front" if int(folder.name) == session else other
        found[name] += (int(stat[11]) + int(stat[12])) / tick
    return found


@contextmanager
def serving(
    model: Path, *options: str, cores: Sequence[int] = (), pids: list[int] | None = None
) -> Iterator[str]:
    """``mor serve`` in a session of its own, on these cores where any are given; its address."""
    port = free_port()
    line = [sys.executable, "-m", "mor.cli", "serve", str(model), "--port", str(port)]
    pinned = ["taskset", "-c", ",".join(map(str, cores))] if cores else []
    environment = dict(os.environ)
    if cores:
        environment["OMP_NUM_THREADS"] = str(len(cores))
    process = subprocess.Popen(
        [*pinned, *line, "--log-level", "error", *options], env=environment, start_new_session=True
    )
    url = f"http://127.0.0.1:{port}"
    if pids is not None:
        pids.append(process.pid)
    try:
        end = time.monotonic() + 240
        while True:
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server did not start: {line}")
            try:
                if httpx.get(f"{url}/ready", timeout=10).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def replica_pids(name: str = "ServeReplica") -> list[int]:
    """Processes of this user that are replicas of Ray Serve."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if name in (folder / "cmdline").read_bytes().decode(errors="replace"):
                found.append(int(folder.name))
        except OSError:
            continue
    return sorted(found)
