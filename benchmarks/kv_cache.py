"""What smaller entries of the cache cost: bytes per token, and the log-likelihood of a text.

Each token's log-probability is the engine's, given all tokens before, read from pages of that type:

    python benchmarks/kv_cache.py MODEL [--text FILE] [--tokens 512] [--window 128]
        [--device cuda --dtype bfloat16]

Without a text the model writes one itself, by drawing (temperature 1).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from mor.bench.device import parse_device, parse_dtype
from mor.engine import Engine, SamplingParams
from mor.engine.entries import KVCacheType
from mor.folder.tokenizer import load_tokenizer
from mor.hf.load import load_model


def likelihoods(engine: Engine, ids: list[int]) -> list[float]:
    """Log-probability (nats) of each token of ``ids`` but the first."""
    found = []
    for place in range(1, len(ids)):
        forced = SamplingParams(
            max_tokens=1, temperature=0.0, logprobs=0, logit_bias={ids[place]: 100.0}
        )
        (only,) = engine.generate(ids[:place], forced)[0].completions[0].logprobs or ()
        if only.token != ids[place]:
            raise SystemExit(f"token {place} could not be forced")
        found.append(only.logprob)
    return found


def read_ids(engine: Engine, text: Path | None, tokens: int, window: int) -> list[list[int]]:
    """Windows of token ids."""
    if text is not None:
        ids = list(engine.tokenizer(text.read_text("utf-8"), add_special_tokens=False).input_ids)
        return [ids[at : at + window] for at in range(0, min(len(ids), tokens), window)]
    starts = [[1 + number] for number in range(-(-tokens // window))]
    asked = SamplingParams(max_tokens=window - 1, temperature=1.0, seed=0, ignore_eos=True)
    outputs = engine.generate(starts, asked)
    return [[*out.prompt_token_ids, *out.completions[0].token_ids] for out in outputs]


def main() -> None:
    """Print one line per type."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the weights")
    options = parser.parse_args()
    device, dtype = parse_device(options.device), parse_dtype(options.dtype)
    model: Any = load_model(options.model, dtype).to(device)
    tokenizer = load_tokenizer(options.model)
    windows: list[list[int]] = []
    for name in get_args(KVCacheType):
        settings: dict[str, Any] = {"kv_cache_dtype": name, "page_size": 4, "max_num_seqs": 4}
        engine = Engine(model, tokenizer, memory_fraction=0.1, **settings)
        windows = windows or read_ids(engine, options.text, options.tokens, options.window)
        found = [one for ids in windows for one in likelihoods(engine, ids)]
        entry = engine.store.pool.entry_bytes()
        print(f"{name:9} {entry:6} bytes per token and layer, NLL {-sum(found) / len(found):.5f}")


if __name__ == "__main__":
    main()
