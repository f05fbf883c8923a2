"""Log-probabilities of the tokens of prompts, from what the coda leaves of each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mor.engine.outputs import TokenLogprobs
from mor.engine.request import Wave


def score_prompts(waves: Sequence[Wave], hidden: Tensor, head: Callable[[Tensor], Tensor]) -> None:
    """Note the log-probability of each token of a prompt that follows one of ``waves``.

    Wave by wave: the logits of a chunk of one prompt are all that is there at a time.

    Args:
        waves: through with the coda. Requests that did not ask are passed over.
        hidden: [N, D] of all their tokens, end to end.
        head: [n, D] to logits [n, V].
    """
    start = 0
    for wave in waves:
        request, count = wave.request, wave.request.params.prompt_logprobs
        if count is None:
            start += wave.end - wave.start
            continue
        first = max(wave.start, request.params.prompt_logprobs_start - 1)
        end = min(wave.end, len(request.prompt) - 1)  # what follows the last one is no prompt
        if first < end:
            logits = head(hidden[start + first - wave.start : start + end - wave.start])
            targets, told = request.prompt[first + 1 : end + 1], request.prompt_logprobs
            told += [None] * (first + 1 - len(told))  # those before the first one asked for
            # One that gave way and reads its prompt again finds the same once more.
            own: list[TokenLogprobs | None] = [*rank_tokens(logits, targets, count)]
            if request.embedded is not None:  # no token stands there
                own = request.embedded.without(own, first + 1)
            told[first + 1 : end + 1] = own
        start += len(wave)


def rank_tokens(logits: Tensor, targets: Sequence[int], count: int) -> list[TokenLogprobs]:
    """Log-probability and rank of ``targets`` [n] under ``logits`` [n, V].

    Args:
        logits: of the model.
        targets: token ids.
        count: likeliest tokens to tell beside each.
    """
    logs = logits.double().log_softmax(-1)
    own = logs.gather(1, torch.tensor(targets, device=logs.device)[:, None])
    ranks = ((logs > own).sum(1) + 1).tolist()
    best = logs.topk(min(count, logs.shape[1]), dim=1)
    rows = zip(
        targets, own[:, 0].tolist(), best.indices.tolist(), best.values.tolist(), ranks, strict=True
    )
    return [
        TokenLogprobs(token, value, dict(zip(ids, values, strict=True)), rank)
        for token, value, ids, values, rank in rows
    ]
