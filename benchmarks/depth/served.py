"""Served answers per second: the routed model beside the trunk that runs every pass, on our engine.

    python benchmarks/depth/served.py --data runs/depth/hops \
        --system trunk=runs/depth/hops-recursive \
        --system routed=hops --system two=runs/depth/hops-two

A request is a document up to its last query; the model answers with one token. Systems take turns,
round by round, with the same requests; the share of right answers stands beside the speed, which
counts nothing without it. The first round warms up and is not counted. Nothing else may run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from mor.data import PackedDataset
from mor.disk import append_jsonl
from mor.engine import Engine, SamplingParams
from mor.hf.load import load_model
from mor.provenance import provenance


def read_requests(data: Path, count: int) -> list[tuple[list[int], int]]:
    """Prompts that end with a query, and the token that answers each."""
    index = PackedDataset(data, "validation", 2).index
    assert index.task is not None, f"{data} holds no task"
    length = index.document_length()
    assert length, f"the documents of {data} are of unequal lengths; take task:hops or task:phop"
    dataset = PackedDataset(data, "validation", length)
    found = []
    for number in range(min(count, len(dataset))):
        ids = dataset[number]["input_ids"].numpy()
        solution = index.task.solve(ids[None])
        last = int(solution.asked[0].nonzero()[0][-1])
        found.append((ids[: last + 1].tolist(), int(solution.answers[0, last])))
    return found


def run_round(engine: Engine, requests: list[tuple[list[int], int]]) -> tuple[float, float]:
    """Seconds for all requests, and the share that was answered right."""
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    started = time.perf_counter()
    outputs = engine.generate([prompt for prompt, _ in requests], params)
    seconds = time.perf_counter() - started
    right = [
        output.completions[0].token_ids[0] == answer
        for output, (_, answer) in zip(outputs, requests, strict=True)
    ]
    return seconds, sum(right) / len(right)


def main() -> None:
    """Run the systems in turns; print a line for each and append it to --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--system", action="append", required=True, help="NAME=MODEL")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON lines to append to")
    chosen = parser.parse_args()
    requests = read_requests(chosen.data, chosen.requests)
    engines = {}
    for system in chosen.system:
        name, _, folder = system.partition("=")
        # Every prompt is computed in every round: a cache of prefixes would know it from the first.
        engines[name] = Engine(
            load_model(folder).eval(),
            max_num_seqs=chosen.concurrency,
            prefill_chunk=512,
            prefix_caching=False,
        )
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    right: dict[str, float] = {}
    for number in range(chosen.rounds + 1):
        for name, engine in engines.items():
            took, right[name] = run_round(engine, requests)
            if number:
                seconds[name].append(took)
    tokens = sum(len(prompt) for prompt, _ in requests)
    for name, took in seconds.items():
        rates = sorted(tokens / one for one in took)
        line = {
            "system": name,
            "right": right[name],
            "tokens_per_s": statistics.median(rates),
            "range": [rates[0], rates[-1]],
            "requests": len(requests),
            "prompt_tokens": tokens,
            "concurrency": chosen.concurrency,
            "rounds": chosen.rounds,
        }
        print(json.dumps(line))
        if chosen.out is not None:
            append_jsonl(chosen.out, line | provenance())


if __name__ == "__main__":
    main()
