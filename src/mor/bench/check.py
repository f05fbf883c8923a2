"""Before anything is timed: do the systems write what they should?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from mor.bench.peers import Peer
from mor.bench.systems import EngineSystem, reference_tokens
from mor.bench.trace import check_lengths
from mor.bench.workload import Workload
from mor.errors import MorError
from mor.hf.modeling import MoRForCausalLM

# Two logits nearer than this share of the logits' spread are a tie: the order of a sum decides.
TIE = 1e-4


@dataclass(frozen=True)
class Checked:
    """What a check found.

    Attributes:
        system: whose.
        requests: compared.
        equal: requests that are equal in every token.
        ties: requests that part where the reference's two best logits are a tie.
        tokens: new tokens compared, up to where a request parts.
    """

    system: str
    requests: int
    equal: int
    ties: int
    tokens: int

    @property
    def wrong(self) -> int:
        """Requests that part for no such reason."""
        return self.requests - self.equal - self.ties

    def sentence(self) -> str:
        """The result in one sentence, for the screen."""
        text = (
            f"{self.system}: {self.equal} of {self.requests} requests equal ({self.tokens} tokens)"
        )
        text += f", {self.ties} part at a tie of two logits" if self.ties else ""
        return text + (f", {self.wrong} DIFFER" if self.wrong else "")


def sample_of(workload: Workload, requests: int, new_tokens: int) -> Workload:
    """The first requests of a workload, cut to ``new_tokens``."""
    asks = tuple(
        replace(ask, new_tokens=min(ask.new_tokens, new_tokens)) for ask in workload.asks[:requests]
    )
    return replace(workload, asks=asks, room=workload.longest)


def references(model: MoRForCausalLM, sample: Workload) -> list[list[int]]:
    """What ``model.generate`` writes, one request at a time."""
    return [reference_tokens(model, ask.prompt, ask.new_tokens) for ask in sample.asks]


def compare(
    name: str,
    model: MoRForCausalLM,
    sample: Workload,
    wanted: Sequence[Sequence[int]],
    found: Sequence[Sequence[int]],
) -> Checked:
    """Hold ``found`` to ``wanted``, and look whether a difference begins at a tie of ``model``."""
    equal = ties = tokens = 0
    for ask, right, got in zip(sample.asks, wanted, found, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(right, got, strict=True)) if a != b), None)
        tokens += len(right) if same is None else same
        if same is None:
            equal += 1
        elif _is_tie(model, [*ask.prompt, *right[:same]]):
            ties += 1
    return Checked(name, len(sample.asks), equal, ties, tokens)


def _is_tie(model: MoRForCausalLM, ids: list[int]) -> bool:
    how = {"routing": "causal"} if model.config.router != "fixed" else {}
    with torch.inference_mode():
        tokens = torch.tensor([ids], device=model.device)
        logits = model(tokens, use_cache=False, **how).logits[0, -1].float()
    best, second = logits.topk(2).values
    return bool(best - second < TIE * logits.std())


@contextmanager
def run_all_depths(model: MoRForCausalLM, wanted: bool) -> Iterator[None]:
    """The full-depth baseline in ``model.generate``: capacities of 1 let all tokens through."""
    config = model.config
    before = config.router_capacities
    if wanted:
        config.router_capacities = [1.0] * config.num_recursions
    try:
        yield
    finally:
        config.router_capacities = before


def check_ours(system: EngineSystem, sample: Workload) -> Checked:
    """Greedy tokens of our engine against ``model.generate``, one request alone.

    With weights of 8 bits ``model.generate`` is another model: there each request has to be equal
    to what the same engine writes when it is alone.

    Raises:
        MorError: a request differs, and not at a tie. No speed is reported of a wrong answer.
    """
    with run_all_depths(system.model, system.options.get("policy") == "full_depth"):
        if system.int8:
            wanted = [alone(system, replace(sample, asks=(ask,))) for ask in sample.asks]
        else:
            wanted = references(system.model, sample)
    run = system.run(sample)
    check_lengths(run, [ask.new_tokens for ask in sample.asks])
    got = [trace.tokens for trace in run.traces]
    checked = compare(system.name, system.model, sample, wanted, got)
    if checked.wrong:
        raise MorError(f"{checked.sentence()} from the request alone; nothing is timed")
    return checked


def alone(system: EngineSystem, sample: Workload) -> list[int]:
    """What the engine writes for the only request of ``sample``."""
    return list(system.run(sample).traces[0].tokens)


def check_peer(
    peer: Peer, model: MoRForCausalLM, sample: Workload, wanted: Sequence[Sequence[int]]
) -> Checked:
    """Greedy tokens of a peer against our vanilla's; a difference is reported, not refused."""
    run = peer.run(sample)
    check_lengths(run, [ask.new_tokens for ask in sample.asks])
    return compare(peer.name, model, sample, wanted, [trace.tokens for trace in run.traces])
