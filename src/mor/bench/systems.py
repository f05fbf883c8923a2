"""Our engine, as one of the systems that are timed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from mor.bench.device import read_clock
from mor.bench.trace import Run, Trace
from mor.bench.workload import Workload
from mor.config import MoRConfig
from mor.engine import Completion, Engine, SamplingParams
from mor.engine.outputs import OutputKind
from mor.hf.modeling import MoRForCausalLM

# Steps between two questions to the engine how much it caches: it walks over its tables for that.
ASK_EVERY = 4


class EngineSystem:
    """A model on our engine.

    Args:
        name: its row in the table.
        model: in evaluation mode.
        forced: whether its exits are forced.
        options: for the engine, beyond what the workload decides.
    """

    def __init__(
        self, name: str, model: MoRForCausalLM, *, forced: bool, options: dict[str, Any]
    ) -> None:
        self.name, self.model, self.forced, self.options = name, model, forced, options
        self._engine: tuple[dict[str, Any], Engine] | None = None

    @property
    def config(self) -> MoRConfig:
        """The configuration of the model."""
        config: MoRConfig = self.model.config
        return config

    @property
    def int8(self) -> bool:
        """Whether its weights have 8 bits."""
        return self.options.get("quantization") == "int8"

    @property
    def saves_depth(self) -> bool:
        """Whether tokens run unequal depths."""
        return self.config.num_recursions > 1 and self.config.router != "fixed"

    def engine_for(self, workload: Workload) -> tuple[int, Engine]:
        """Clients, and the engine for a workload; it is kept until another needs other sizes.

        Options of the system come before what the workload decides.
        """
        clients, sizes = workload.sizes(self.config.num_recursions, self.saves_depth)
        longest = min(workload.longest, self.config.max_position_embeddings)
        # Every prompt is computed: a workload that is run twice must not find itself in the cache.
        fixed = {"max_model_len": longest, "prefix_caching": False}
        options = sizes | fixed | self.options
        if self._engine is None or self._engine[0] != options:
            self._engine = None  # give the old pool back before the new one is taken
            self._engine = options, Engine(self.model, **options)
        return clients, self._engine[1]

    def run(self, workload: Workload) -> Run:
        """Closed loop: every client sends its next request when its last is answered."""
        clients, engine = self.engine_for(workload)
        engine.reset_stats()
        waiting = deque(enumerate(workload.asks))
        sent: dict[str, float] = {}
        told: dict[str, list[Completion]] = {str(number): [] for number, _ in waiting}
        done = 0
        kv_bytes = steps = 0
        began = read_clock(self.model.device)
        while waiting or done < len(sent):
            while waiting and len(sent) - done < clients:
                number, ask = waiting.popleft()
                sent[str(number)] = time.perf_counter()
                engine.add_request(ask.prompt, greedy(ask.new_tokens, "delta"), str(number))
            for output in engine.step():
                told[output.request_id] += output.completions
                done += output.finished
            if steps % ASK_EVERY == 0:
                kv_bytes = max(kv_bytes, engine.kv_bytes())
            steps += 1
        # Times within need no waiting: the engine reads every token off the device before it tells.
        ended = read_clock(self.model.device)
        names = [str(number) for number in range(len(workload.asks))]
        return Run(
            began=began,
            ended=ended,
            traces=tuple(
                trace_of(sent[name], told[name], len(ask.prompt))
                for name, ask in zip(names, workload.asks, strict=True)
            ),
            concurrency=clients,
            depths=tuple(depth for name in names for part in told[name] for depth in part.depths),
            counters=engine.metrics(),
            kv_bytes=kv_bytes,
        )

    def cast(self, dtype: torch.dtype) -> None:
        """Go on in another type; the engine is made anew."""
        if self.model.dtype != dtype:
            self.close()
            self.model.to(dtype)

    def close(self) -> None:
        """Drop the engine, so that its pool of pages is free."""
        self._engine = None


def trace_of(sent: float, told: Sequence[Completion], prompt_tokens: int) -> Trace:
    """What a client got, piece by piece.

    The engine tells spans from a request's arrival, which is when it was sent.
    """
    spans = told[-1].timings
    assert spans.first_token is not None
    times = tuple(accumulate(spans.between_tokens, initial=sent + spans.first_token))
    tokens = tuple(token for part in told for token in part.token_ids)
    return Trace(sent, times, tokens, prompt_tokens)


def greedy(new_tokens: int, kind: OutputKind = "cumulative") -> SamplingParams:
    """Greedy, and exactly so many tokens."""
    return SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True, output_kind=kind)


def reference_tokens(model: MoRForCausalLM, prompt: tuple[int, ...], new_tokens: int) -> list[int]:
    """What ``model.generate`` writes, this request alone."""
    ids = torch.tensor([prompt], device=model.device)
    untyped: Any = model
    written = untyped.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [int(token) for token in written[0, len(prompt) :]]
