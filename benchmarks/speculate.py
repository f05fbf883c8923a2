"""What guesses bring one client: how many are right, and the time per token beside none.

    python benchmarks/speculate.py MODEL [--data DIR] [--guesses 1,2,4] [--depths 1]
        [--prompts 8] [--prompt-tokens 16] [--tokens 64] [--rounds 5] [--temperature 0]

The last line lets the engine choose among so many guesses or fewer. Prompts are the beginnings of
windows of prepared data; the default is what ships with the model. All variants answer one prompt
after the other, in turns, and the median of the rounds is told. Time is the processor's, of all
threads; the wall's beside it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from mor.data import PackedDataset
from mor.engine import Engine, SamplingParams
from mor.hf.load import load_model


def answer(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> tuple[float, float]:
    """Milliseconds per token, of the processor and of the wall; each prompt alone."""
    tokens, wall, busy = 0, time.perf_counter(), time.process_time()
    for prompt in prompts:
        (output,) = engine.generate(prompt, params)
        tokens += len(output.completions[0].token_ids)
    busy, wall = time.process_time() - busy, time.perf_counter() - wall
    return 1e3 * busy / tokens, 1e3 * wall / tokens


def main() -> None:
    """Print one line per variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--guesses", default="1,2,4")
    parser.add_argument("--depths", default="1")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=0.0)
    options = parser.parse_args()
    data = PackedDataset(
        options.data or options.model / "held-out", "validation", options.prompt_tokens
    )
    prompts = [
        data[place]["input_ids"].tolist()[: options.prompt_tokens]
        for place in range(options.prompts)
    ]
    model = load_model(options.model)
    params = SamplingParams(
        max_tokens=options.tokens, temperature=options.temperature, ignore_eos=True
    )
    kinds = [(0, 1)] + [
        (int(guesses), int(depth))
        for depth in options.depths.split(",")
        for guesses in options.guesses.split(",")
    ]
    engines = {
        f"guesses {guesses} depth {depth}": Engine(
            model, max_num_seqs=1, speculate=guesses, draft_depth=depth, speculate_always=True
        )
        for guesses, depth in kinds
    }
    guesses, depth = kinds[-1]
    engines["what pays"] = Engine(model, max_num_seqs=1, speculate=guesses, draft_depth=depth)
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in engines}
    for _ in range(1 + options.rounds):
        for kind, engine in engines.items():
            found[kind].append(answer(engine, prompts, params))
    for kind, engine in engines.items():
        stats = engine.stats
        busy, wall = (statistics.median(one) for one in zip(*found[kind][1:], strict=True))
        line = f"{kind:17}: {busy:7.3f} ms CPU, {wall:7.3f} ms wall a token"
        if stats.drafts:
            line += (
                f", {stats.accepted_tokens / stats.draft_tokens:.3f} of the guesses right, "
                f"{1 + stats.accepted_tokens / stats.drafts:.2f} tokens a check"
            )
        print(f"{line}, mean depth {engine.stats.mean_depth:.2f}")


if __name__ == "__main__":
    main()
