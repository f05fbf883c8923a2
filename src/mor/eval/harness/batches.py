"""Likelihoods through the engine: what requests have in common at their beginning is read once."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import track

from mor.engine import Engine, SamplingParams

Ids = list[int]
Score = tuple[float, bool]
SLICE = 256
"""Requests that the engine is given at a time; cached beginnings outlive them."""


def score_in_engine(
    engine: Engine, pairs: Sequence[tuple[Ids, Ids]], quiet: bool = True
) -> list[Score]:
    """Log-likelihood (nats) of each continuation, and whether it is the greedy one.

    Args:
        engine: its largest length must hold context and continuation together.
        pairs: context, of at least one token, and continuation.
        quiet: show no bar.

    Raises:
        MorError: a request does not fit into the engine.
    """
    distinct: dict[tuple[tuple[int, ...], int], int] = {}
    keys = [(tuple(context + ids), len(context)) for context, ids in pairs]
    for key in keys:
        distinct.setdefault(key, len(distinct))
    asked = list(distinct)
    scores: list[Score] = []
    starts = range(0, len(asked), SLICE)
    console = Console(stderr=True)
    for start in track(starts, "log-likelihoods", console=console, disable=quiet):
        part = asked[start : start + SLICE]
        params = [
            SamplingParams(max_tokens=0, prompt_logprobs=1, prompt_logprobs_start=length)
            for _, length in part
        ]
        outputs = engine.generate([list(prompt) for prompt, _ in part], params)
        for output, (_, length) in zip(outputs, part, strict=True):
            told = output.completions[0].prompt_logprobs or ()
            own = [one for one in told[length:] if one is not None]
            scores.append((sum(one.logprob for one in own), all(one.rank == 1 for one in own)))
    return [scores[distinct[key]] for key in keys]
