"""Seconds to the first token of each turn of a chat, with the pages of its past shared and without.

    python benchmarks/next_turn.py

A chat of several turns: each asks with the whole history and some new tokens, as a chat client
does, and takes an answer of fixed length. With prefix caching a turn should pay for its new tokens
only, without it for the whole history. Answers of both are compared before anything is timed, then
the two take turns; medians over rounds, each with a chat of its own. Random weights, exits forced
(:mod:`mor.bench.forced`).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from mor.bench.forced import bench_config, bench_model
from mor.disk import append_jsonl
from mor.engine import Engine, SamplingParams
from mor.provenance import provenance

NAMES = {True: "shared", False: "not shared"}


def chat(
    engine: Engine, turns: list[list[int]], answer: int
) -> tuple[list[list[int]], list[float], list[int]]:
    """Answers, seconds to the first token and tokens taken from the cache, of each turn."""
    history: list[int] = []
    answers, seconds, cached = [], [], []
    asked = SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True)
    for words in turns:
        history = history + words
        (done,) = engine.generate([history], asked)
        (said,) = done.completions
        tokens = list(said.token_ids)
        history = history + tokens
        answers.append(tokens)
        first = said.timings.first_token
        assert first is not None
        seconds.append(first)
        cached.append(said.cached_tokens)
    return answers, seconds, cached


def main() -> None:
    """Both, in turns; a line for each turn of the chat."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="135m")
    parser.add_argument("--recursions", type=int, default=3)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--new-tokens", type=int, default=64, help="of each question")
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/next_turn.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    family = "mor" if args.recursions > 1 else "vanilla"
    model = bench_model(bench_config(args.preset, args.recursions, None, family), 0)
    engines = {
        on: Engine(model, max_num_seqs=4, max_model_len=2048, prefix_caching=on) for on in NAMES
    }
    generator = torch.Generator().manual_seed(0)

    def questions() -> list[list[int]]:
        ids = torch.randint(100, 40_000, (args.turns, args.new_tokens), generator=generator)
        return [list(map(int, row)) for row in ids.tolist()]

    once = questions()
    shared, alone = (chat(engines[on], once, args.answer_tokens)[0] for on in NAMES)
    if shared != alone:
        raise SystemExit("answers differ with and without shared pages: nothing was timed")
    seconds: dict[bool, list[list[float]]] = {on: [] for on in NAMES}
    cached: list[int] = []
    for _ in range(args.rounds):
        asked = questions()
        for on, engine in engines.items():
            _, times, taken = chat(engine, asked, args.answer_tokens)
            seconds[on].append(times)
            cached = taken if on else cached
    for turn in range(args.turns):
        history = turn * (args.new_tokens + args.answer_tokens)
        line = {"benchmark": "next_turn", "preset": args.preset, "recursions": args.recursions}
        line |= {"turn": turn + 1, "history_tokens": history, "new_tokens": args.new_tokens}
        line |= {"cached_tokens": cached[turn], "rounds": args.rounds, "threads": args.threads}
        for on, name in NAMES.items():
            times = sorted(one[turn] for one in seconds[on])
            key = name.replace(" ", "_")
            line[f"{key}_s"] = statistics.median(times)
            line[f"{key}_range_s"] = [times[0], times[-1]]
        print(json.dumps(line), flush=True)
        append_jsonl(args.out, line | provenance(None))


if __name__ == "__main__":
    main()
