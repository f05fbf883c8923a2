"""``mor eval``: causal NLL, the leaky number beside it, depth caps, router metrics, a passage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mor.data import PackedDataset
from mor.data.bos import check_same_bos, model_bos
from mor.errors import MorError
from mor.eval.answers import Collector, score_answers
from mor.eval.chance import ChanceRoutes
from mor.eval.exits import score_passes
from mor.eval.passes import Look, check_sample, next_targets, run_pass, token_nll
from mor.hf.load import serving_copy
from mor.hf.modeling import MoRForCausalLM
from mor.model.metrics import dead_positions, entropy, max_violation
from mor.model.packed import Quantization


def evaluate(
    model: MoRForCausalLM,
    dataset: PackedDataset,
    tokenizer: Any = None,
    *,
    max_sequences: int | None = None,
    batch_size: int = 8,
    sample_tokens: int = 256,
    quantization: Quantization | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Everything the report needs about one model on one split (``eval.json``).

    ``causal`` follows ``router.decide``, the rule of decoding. ``leaky`` follows training's
    selection, which looks at later tokens: it is reported for comparison with published numbers
    and is no measure of the model. ``depth_cap`` repeats the causal number with at most 1..R
    recursions (test-time scaling), ``random_routes_nll`` deals the same depths out among the tokens
    by chance (:mod:`mor.eval.chance`), and ``passes`` says what each pass is worth
    (:func:`mor.eval.exits.score_passes`).

    Args:
        model: put into evaluation mode here; left in the mode it was in.
        dataset: a split of a prepared folder; vocabulary must fit the model's.
        tokenizer: for the passage; None leaves it out.
        max_sequences: so many, spread over the split; None for all of it.
        batch_size: sequences at a time.
        sample_tokens: length of the passage.
        quantization: also measure the model as it is served with such weights (``quantized``).
        progress: called with (batches done, batches in all).

    Raises:
        MorError: the data's vocabulary or BOS does not fit the model, the sequences are too long,
            or there is nothing to look at.
    """
    config = model.config
    check_data(model, dataset, tokenizer)
    count = check_sample(dataset, max_sequences, batch_size)
    router = model.model.router
    leaky_too = config.is_routed and router.looks_ahead
    passes = config.num_recursions + int(leaky_too) + int(quantization is not None)
    total, done = passes * -(-count // batch_size), 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    was_training = model.training
    model.eval()
    try:
        bytes_per_token = dataset.bytes_per_token
        capped, answers = [], []
        differs = config.is_routed and config.num_recursions > 1
        chance = ChanceRoutes(model, dataset) if differs else None
        for cap in range(1, config.num_recursions + 1):
            # A task's answers are read off the same pass.
            task = None if dataset.index.task is None else Collector(dataset)
            more: dict[str, Any] = {} if task is None else {"look": task.look}
            if chance is not None and cap == config.num_recursions:
                more = {"look": look_both(task, chance)}
            capped.append(
                run_pass(
                    model, dataset, count, batch_size, "causal", cap, tick, keep_hits=True, **more
                )
            )
            answers += [] if task is None else [task.answers()]
        caps, causal = [], capped[-1]
        for cap, result_at in enumerate(capped, 1):
            score = result_at.score(bytes_per_token)
            caps.append({"max_depth": cap, "nll": score["nll"], "mean_depth": score["mean_depth"]})
        leaky = (
            run_pass(model, dataset, count, batch_size, "topk", None, tick) if leaky_too else None
        )
        result: dict[str, Any] = {
            "data": dataset.index.source,
            "split": dataset.split,
            "seq_len": dataset.seq_len,
            "sequences": count,
            "tokens": causal.targets,
            "bytes_per_token": bytes_per_token,
            "causal": causal.score(bytes_per_token),
            "leaky": None if leaky is None else leaky.score(bytes_per_token),
            "gap": None if leaky is None else causal.nll - leaky.nll,
            "random_routes_nll": None if chance is None else chance.nll(),
            "depth_cap": caps,
            "passes": score_passes(capped),
            "router": {
                "accuracy": []
                if leaky is None
                else (leaky.agreements / leaky.candidates.clamp(min=1)).tolist(),
                "dead_tokens": dead_positions(causal.reached),
                "max_vio": max_violation(causal.shares),
                "entropy": entropy(causal.shares),
            },
        }
        if quantization is not None:
            served = serving_copy(model, quantization)
            few = run_pass(served, dataset, count, batch_size, "causal", None, tick)
            result["quantized"] = {"quantization": quantization, "loss": few.nll - causal.nll}
            result["quantized"] |= few.score(bytes_per_token)
        if dataset.index.task is not None:
            result["answers"] = score_answers(model, dataset, max_sequences=count, caps=answers)
        if tokenizer is not None:
            result["sample"] = passage(model, dataset, tokenizer, sample_tokens)
        return result
    finally:
        model.train(was_training)


def check_data(model: MoRForCausalLM, dataset: PackedDataset, tokenizer: Any = None) -> None:
    """Refuse data that the model cannot read.

    Raises:
        MorError: its vocabulary or BOS does not fit, or its sequences are too long.
    """
    config = model.config
    if dataset.index.vocab_size > config.vocab_size:
        raise MorError(
            f"the data's vocabulary has {dataset.index.vocab_size} tokens but the model's "
            f"vocab_size is {config.vocab_size}; evaluate on data prepared with the model's "
            "tokenizer (mor data prepare --tokenizer DIR)"
        )
    if dataset.seq_len > config.max_position_embeddings:
        raise MorError(
            f"seq_len={dataset.seq_len} is past the model's max_position_embeddings="
            f"{config.max_position_embeddings}"
        )
    check_same_bos(
        model_bos(config, tokenizer), dataset.index.bos, "the model", dataset.index.directory
    )


def look_both(task: Collector | None, chance: ChanceRoutes) -> Look:
    """One look at a batch for answers, where there are any, and for routes by chance."""

    def look(ids: Tensor, output: Any) -> None:
        if task is not None:
            task.look(ids, output)
        chance.look(ids, output)

    return look


@torch.inference_mode()
def passage(
    model: MoRForCausalLM, dataset: PackedDataset, tokenizer: Any, length: int
) -> dict[str, Any]:
    """A passage with each token's text, recursions and nats (None for the first)."""
    ids = dataset[len(dataset) // 2]["input_ids"][:length][None].to(model.device)
    output = model(ids, use_cache=False, routing="causal")
    nll = token_nll(output.logits, next_targets(dataset, ids))[0].tolist()
    return {
        "tokens": token_texts(tokenizer, ids[0].tolist()),
        "depths": output.depths[0].tolist(),
        "nll": [None, *nll],
    }


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """Text of each token, so that together they give the decoded text.

    Bytes of a character that spans several tokens all go to the token that completes it.
    """
    texts, start = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end])
        if text.endswith("\ufffd") and end < len(ids) and end - start < 8:
            texts.append("")
            continue
        texts.append(text)
        start = end
    return texts
