"""Seconds from starting a process to its first token, and the memory that it then holds.

    python benchmarks/start_up.py --peer-env openvino=DIR --peer-env llamacpp=DIR

Our systems are what ``mor serve`` starts, without HTTP: as in that command the classes for
Transformers are not imported, and plain weights are freed. Each runs in a process of its own; peers
are those of ``mor bench serve``, with what they convert made before. Systems take turns. Compiled
kernels, their tuning and all files are warm: the first start on a machine compiles for some seconds
more, and Python's modules are compiled. One request of 8 tokens, then 16 new ones; resident memory
is that at the end, weights that are mapped from a file included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mor.bench.export import export_llama
from mor.bench.forced import bench_config, bench_model
from mor.bench.peers import Peer, parse_environments, python_of
from mor.bench.specs import parse_spec
from mor.bench.workload import Ask, Workload
from mor.disk import append_jsonl
from mor.provenance import provenance

PROMPT = tuple(range(100, 108))
OURS = """
import json, sys, time
import mor_command
from mor.engine import Engine, SamplingParams
from mor.engine.opening import open_servable
engine = Engine(open_servable(sys.argv[1]), release_weights=True, **json.loads(sys.argv[2]))
asked = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
engine.add_request(json.loads(sys.argv[3]), asked)
first = None
while engine.unfinished:
    if engine.step() and first is None:
        first = time.perf_counter()
print(json.dumps([first, engine.metrics()["resident_bytes"]]))
"""


def start_ours(folder: Path, options: dict[str, Any]) -> tuple[float, int]:
    """Seconds to the first token, and bytes."""
    began = time.perf_counter()
    words = [str(folder), json.dumps(options), json.dumps(PROMPT)]
    done = subprocess.run(
        [sys.executable, "-c", OURS, *words], capture_output=True, text=True, check=True
    )
    first, memory = json.loads(done.stdout.splitlines()[-1])
    return first - began, memory


def start_peer(word: str, python: Path, folder: Path, cache: Path) -> tuple[float, int]:
    """The same of a peer."""
    spec = parse_spec(word)
    began = time.perf_counter()
    peer = Peer(word, spec.peer, spec.variant, python, folder, cache, 1)
    try:
        peer.load(1, 256, 0)
        run = peer.run(Workload("start", (Ask(PROMPT, 16),), 1))
        return run.traces[0].times[0] - began, peer.resident
    finally:
        peer.close()


def main() -> None:
    """Every system in turn, a line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="135m")
    parser.add_argument("--peer-env", action="append", default=[], help="NAME=DIR, repeatable")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path("runs/bench/start-up"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench/start_up.jsonl"))
    args = parser.parse_args()
    # Modules are compiled once, as where a package is installed, whatever this shell has set.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    cache = args.cache.absolute()
    folders = {}
    for recursions in (1, 3):
        family = "mor" if recursions > 1 else "vanilla"
        folders[family] = cache / f"{args.preset}-{family}"
        if not folders[family].is_dir():
            made = bench_model(bench_config(args.preset, recursions, None, family), 0)
            if recursions == 1:
                export_llama(made, cache / "llama")
            made.save_pretrained(folders[family])
    systems: dict[str, Any] = {}
    for name, folder in folders.items():
        systems[name] = lambda folder=folder: start_ours(folder, {})
        systems[f"{name}:int8"] = lambda folder=folder: start_ours(folder, {"quantization": "int8"})
    environments = parse_environments(args.peer_env)
    for kind in environments:
        for word in (kind, f"{kind}:int8"):
            if (kind, word) == ("vllm", "vllm:int8"):
                continue
            python = python_of(kind, environments)
            systems[word] = lambda word=word, python=python: start_peer(
                word, python, cache / "llama", cache
            )
    for start in systems.values():
        start()  # what is converted, compiled and tuned is there afterwards
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in systems}
    for _ in range(args.rounds):
        for name, start in systems.items():
            found[name].append(start())
    for name, runs in found.items():
        seconds, memory = (sorted(column) for column in zip(*runs, strict=True))
        line = {"benchmark": "start_up", "preset": args.preset, "system": name}
        line |= {"first_token_s": statistics.median(seconds), "range_s": [seconds[0], seconds[-1]]}
        line |= {"resident_mib": round(statistics.median(memory) / 2**20), "rounds": args.rounds}
        print(json.dumps(line), flush=True)
        append_jsonl(args.out, line | provenance(None))


if __name__ == "__main__":
    main()
