"""What the engine is held equal to: ``model.generate``, one request at a time."""

from __future__ import annotations

from typing import Any

import torch

from mor import MoRForCausalLM
from mor.engine import Engine, RequestOutput, SamplingParams

GREEDY: dict[str, Any] = {"temperature": 0.0}


def greedy(max_tokens: int = 8, **fields: Any) -> SamplingParams:
    """Greedy decoding."""
    return SamplingParams(max_tokens=max_tokens, **GREEDY | fields)


class Oracle:
    """Tokens and depths of one model, kept once computed."""

    def __init__(self, model: MoRForCausalLM) -> None:
        self.model = model
        self._known: dict[Any, list[int]] = {}

    def tokens(self, prompt: tuple[int, ...], new: int, max_depth: int | None = None) -> list[int]:
        """Greedy continuation, cut after an end-of-text token."""
        key = (prompt, max_depth)
        if len(self._known.get(key, [])) < new:
            ids = torch.tensor([prompt])
            how: dict[str, Any] = {} if max_depth is None else {"max_depth": max_depth}
            # No end of text here, so that a longer answer begins with the shorter one.
            written = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
                **how,
            )
            self._known[key] = written[0, len(prompt) :].tolist()
        return self._known[key][:new]

    def depths(self, ids: list[int], max_depth: int | None = None) -> list[int]:
        """Recursions of every position by the whole forward."""
        with torch.no_grad():
            out = self.model(
                torch.tensor([ids]), use_cache=False, routing="causal", max_depth=max_depth
            )
        return out.depths[0].tolist()

    def check(self, output: RequestOutput, new: int, max_depth: int | None = None) -> None:
        """Tokens and depths of a finished greedy request of ``new`` tokens."""
        prompt = output.prompt_token_ids
        wanted = self.tokens(prompt, new, max_depth)
        for done in output.completions:
            assert done.finish_reason == "length"
            assert list(done.token_ids) == wanted
            depths = self.depths([*prompt, *wanted[:-1]], max_depth)
            assert list(done.prompt_depths) == depths[: len(prompt)]
            assert list(done.depths) == depths[len(prompt) - 1 :]


def run(engine: Engine, steps: int = 10_000) -> dict[str, RequestOutput]:
    """Step until nothing is left; the finished outputs by name."""
    done: dict[str, RequestOutput] = {}
    for _ in range(steps):
        if not engine.unfinished:
            return done
        done |= {out.request_id: out for out in engine.step() if out.finished}
    raise AssertionError(f"{engine.unfinished} requests are not finished after {steps} steps")


def idle(engine: Engine) -> None:
    """Nothing is left: all pages, lanes and rows are free."""
    engine.check_integrity()
    assert engine.unfinished == 0
    assert engine.store.pool.used == 0
    assert engine.lanes.free == engine.lanes.count
    assert engine.kv_bytes() == 0
