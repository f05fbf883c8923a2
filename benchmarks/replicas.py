"""Replicas of one server: is every answer right while one is killed, and do they add up?

    python benchmarks/replicas.py MODEL --replicas 2 --kill            # 2,000 requests, one kill -9
    python benchmarks/replicas.py MODEL --replicas 2 --throughput      # against single servers

The second counts processor time per token as well, of front, replicas and Ray's other processes:
that says something on a busy machine too, where a rate does not. To compare two versions, run it in
turns with PYTHONPATH=OLD/src and PYTHONPATH=NEW/src.

Each prints JSON lines: conditions first, then what was counted. Answers are compared with those of
one engine in this process, greedy token for greedy token, before any figure is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import openai
from replica_servers import cpu_seconds, replica_pids, serving

from mor import provenance
from mor.engine import Engine, SamplingParams
from mor.folder.tokenizer import load_tokenizer
from mor.hf.load import load_model
from mor.server.ray.counts import count_cores

Answer = list[int]
RETRYABLE = {"replica_lost", "no_replica", "overloaded", "engine_restarted", "shutting_down"}


def make_prompts(tokenizer: Any, kinds: int, draw: random.Random) -> list[list[int]]:
    """Prompts of 4 to 40 tokens, a third of them with a long beginning in common."""
    words = list(range(2, len(tokenizer)))
    common = [draw.choice(words) for _ in range(48)]
    return [
        (common if kind % 3 == 0 else []) + [draw.choice(words) for _ in range(draw.randint(4, 40))]
        for kind in range(kinds)
    ]


def right_answers(model: Path, prompts: list[list[int]], tokens: int) -> list[Answer]:
    """What one engine says, greedily."""
    engine = Engine(load_model(model), load_tokenizer(model))
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return [list(out.completions[0].token_ids) for out in engine.generate(prompts, params)]


async def ask(
    client: openai.AsyncOpenAI, model: str, prompt: list[int], tokens: int, stream: bool
) -> tuple[str, Answer]:
    """What became of one request, and the tokens that came.

    ``answered``: to its end. ``refused``: a retryable error before the first token. ``cut``: an
    error after it. ``silent``: a stream that ended without either, which must never happen.
    """
    more = {"ignore_eos": True, "return_token_ids": True}
    got: Answer = []
    try:
        made: Any = await client.completions.create(
            model=model, prompt=prompt, max_tokens=tokens, temperature=0.0, stream=stream,
            extra_body=more,
        )  # fmt: skip
        if not stream:
            return "answered", list(made.choices[0].token_ids)
        finished = None
        async for chunk in made:
            got += chunk.choices[0].token_ids
            finished = chunk.choices[0].finish_reason
        return ("answered" if finished else "silent"), got
    except openai.APIStatusError as error:
        code = (error.body or {}).get("code") if isinstance(error.body, dict) else None
        retryable = error.status_code in (429, 503) and code in RETRYABLE
        return ("refused" if retryable else f"error {error.status_code} {code}"), got
    except openai.APIError as error:
        return ("cut" if got else f"error {error}"), got


async def load(
    url: str, model: str, prompts: list[list[int]], order: list[int], tokens: int, clients: int,
    on_half: Any = None,
) -> list[tuple[int, str, Answer]]:  # fmt: skip
    """Send the prompts of ``order`` with so many at a time; ``on_half`` is called on the way."""
    todo = iter(enumerate(order))
    done: list[tuple[int, str, Answer]] = []
    limits = httpx.Limits(max_connections=clients)
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300,
        http_client=httpx.AsyncClient(limits=limits, timeout=300),
    ) as client:  # fmt: skip

        async def work() -> None:
            for place, kind in todo:
                if place == len(order) // 3 and on_half:
                    on_half()
                fate, got = await ask(client, model, prompts[kind], tokens, place % 2 == 0)
                done.append((kind, fate, got))

        await asyncio.gather(*(work() for _ in range(clients)))
    return done


def judge(done: list[tuple[int, str, Answer]], right: list[Answer]) -> dict[str, int]:
    """Fates, counted. An answer that is wrong, mixed or cut silently ends the program."""
    fates: Counter[str] = Counter()
    for kind, fate, got in done:
        fates[fate] += 1
        whole = fate == "answered"
        if (got != right[kind]) if whole else (got != right[kind][: len(got)]):
            raise SystemExit(f"WRONG: prompt {kind} ({fate}) gave {got}, not {right[kind]}")
    wrong = [fate for fate in fates if fate not in ("answered", "refused", "cut")]
    if wrong:
        raise SystemExit(f"WRONG: {dict(fates)}")
    return dict(fates)


def kill(args: argparse.Namespace, prompts: list[list[int]], right: list[Answer]) -> None:
    """Requests while one replica is killed and comes back."""
    draw = random.Random(2)
    order = [draw.randrange(len(prompts)) for _ in range(args.requests)]
    with serving(args.model, "--replicas", str(args.replicas)) as url:
        name = httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
        before = replica_pids()
        killed: list[int] = []

        def strike() -> None:
            killed.append(draw.choice(before))
            os.kill(killed[0], signal.SIGKILL)

        began = time.monotonic()
        done = asyncio.run(load(url, name, prompts, order, args.tokens, args.clients, strike))
        seconds = time.monotonic() - began
        while len(replica_pids()) < len(before) and time.monotonic() < began + 300:
            time.sleep(0.5)
        back = time.monotonic() - began
        after = asyncio.run(load(url, name, prompts, order[:100], args.tokens, args.clients))
        metrics = httpx.get(f"{url}/metrics", timeout=60).text
        told = dict(
            re.findall(r"^(mor:(?:replicas|front_\w+_total))\{[^}]*\} (\S+)", metrics, re.M)
        )
    fates = judge(done, right)
    print(json.dumps({
        "what": "kill", "replicas": args.replicas, "requests": len(done), "fates": fates,
        "seconds": round(seconds, 1), "replicas_before": len(before),
        "killed": len(killed), "all_back_after_s": round(back, 1),
        "afterwards": judge(after, right), "metrics": told,
    }))  # fmt: skip


def throughput(args: argparse.Namespace, prompts: list[list[int]], right: list[Answer]) -> None:
    """N replicas behind a front, against N single servers, each with a replica's cores."""
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // args.replicas
    order = [kind % len(prompts) for kind in range(args.requests)]

    def rate(urls: list[str], pids: list[int]) -> tuple[float, dict[str, float]]:
        name = httpx.get(f"{urls[0]}/v1/models", timeout=60).json()["data"][0]["id"]
        clients = args.clients // len(urls)

        async def all_of_them() -> list[tuple[int, str, Answer]]:
            parts = [order[place :: len(urls)] for place in range(len(urls))]
            loads = [
                load(url, name, prompts, part, args.tokens, clients)
                for url, part in zip(urls, parts, strict=True)
            ]
            return [one for done in await asyncio.gather(*loads) for one in done]

        asyncio.run(all_of_them())  # to warm up
        before = [cpu_seconds(pid) for pid in pids]
        began = time.monotonic()
        done = asyncio.run(all_of_them())
        seconds = time.monotonic() - began
        after = [cpu_seconds(pid) for pid in pids]
        judge(done, right)
        tokens = sum(len(got) for _, _, got in done)
        used = {
            part: sum(b[part] - a[part] for a, b in zip(before, after, strict=True)) / tokens * 1e6
            for part in before[0]
        }
        return tokens / seconds, {part: round(value) for part, value in used.items()}

    for number in range(args.rounds):
        pids: list[int] = []
        with serving(args.model, "--replicas", str(args.replicas), pids=pids) as url:
            ours, used = rate([url], pids)
        print(json.dumps({
            "what": "replicas", "round": number, "tokens_per_s": round(ours, 1),
            "cpu_us_per_token": used, "load": os.getloadavg()[0],
        }), flush=True)  # fmt: skip
        if args.alone:
            continue
        pins = [cores[share * n : share * (n + 1)] for n in range(args.replicas)]
        pids = []
        lives = [serving(args.model, cores=pin, pids=pids) for pin in pins]
        urls = [life.__enter__() for life in lives]
        singles, alone = rate(urls, pids)
        for life in lives:
            life.__exit__(None, None, None)
        print(json.dumps({
            "what": "throughput", "round": number, "replicas": args.replicas,
            "tokens_per_s": round(ours, 1), "single_servers_tokens_per_s": round(singles, 1),
            "ratio": round(ours / singles, 3), "load": os.getloadavg()[0],
            "cpu_us_per_token": used, "single_servers_cpu_us_per_token": alone["front"],
            "ratio_by_cpu": round(alone["front"] / sum(used.values()), 3),
        }), flush=True)  # fmt: skip


def main() -> None:
    """Read the command line, make the right answers, then measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--kinds", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--throughput", action="store_true")
    parser.add_argument("--alone", action="store_true", help="without the single servers")
    args = parser.parse_args()
    prompts = make_prompts(load_tokenizer(args.model), args.kinds, random.Random(1))
    right = right_answers(args.model, prompts, args.tokens)
    print(json.dumps({
        "what": "conditions", "model": args.model.name, "cores": count_cores(),
        "machine": provenance.machine(), "versions": provenance.versions(),
        "load": os.getloadavg()[0], "clients": args.clients, "tokens": args.tokens,
    }), flush=True)  # fmt: skip
    if args.kill:
        kill(args, prompts, right)
    if args.throughput:
        throughput(args, prompts, right)


if __name__ == "__main__":
    main()
