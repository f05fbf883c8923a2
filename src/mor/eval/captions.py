"""``mor eval`` of a model that says what is in a picture or recording: exact answers, by depth cap.

Answers are written greedily by the causal rule, which is the only one there is while text is
generated, and count where they are the wanted words and no others. Beside them stand the NLL of the
wanted words, and how deep patches or frames, and words went.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mor.config import MoRConfig
from mor.data.media import IMAGES, MediaDataset, MediaIndex
from mor.data.media.pairs import CaptionedPairs, Pair
from mor.errors import MorError
from mor.eval.exits import count_changes
from mor.hf.captions import PairEncoder, encoder_of
from mor.hf.hearing import MoRAudioProcessor
from mor.hf.processing import MoRProcessor
from mor.hf.vision_language import MoRForConditionalGeneration
from mor.model.flops import example_flops
from mor.train.classify.captions import VALIDATION_SEED

SAMPLES = 500


def evaluate_captions(
    model: MoRForConditionalGeneration,
    processor: MoRProcessor | MoRAudioProcessor,
    examples: MediaDataset,
    *,
    samples: int = SAMPLES,
    batch_size: int = 32,
    seed: int = VALIDATION_SEED + 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Exact answers about pairs of a split's examples, for every cap on depth.

    Args:
        model: put into evaluation mode here; left in the mode it was in.
        processor: beside it.
        examples: a split of a prepared folder of images or sounds, as the model takes them.
        samples: pictures or recordings, each with a question or without.
        batch_size: of them at a time.
        seed: of the draw.
        progress: called with (batches done, batches in all).

    Raises:
        MorError: the folder holds examples of another kind or size than the model's.
    """
    config = model.config
    check_fit(config, examples.index)
    pairs = CaptionedPairs(examples, samples, seed=seed)
    encoder = encoder_of(processor, config)
    given = [pairs[number] for number in range(samples)]
    batches = group_by_length(given, encoder, batch_size)
    caps, done, was_training = [], 0, model.training
    model.eval()
    try:
        for cap in range(1, config.num_recursions + 1):
            scored = []
            for batch in batches:
                scored.append(_score(model, encoder, batch, cap))
                done += 1
                if progress is not None:
                    progress(done, len(batches) * config.num_recursions)
            caps.append(_sum_up(config, scored) | {"max_depth": cap})
    finally:
        model.train(was_training)
    hits = [row.pop("hits") for row in caps]
    for cap in range(1, len(caps)):
        caps[cap] |= count_changes(hits[cap - 1], hits[cap])
    tokens = [row.pop("tokens") for row in caps][-1]
    return {
        "data": examples.index.source,
        "kind": "captions",
        "of": examples.index.kind,
        "split": examples.split,
        "seq_len": round(tokens / samples),
        "examples": samples,
        "tokens": tokens,
        "is_causal": True,
        "rule": "causal",
        "causal": caps[-1],
        "topk": None,
        "random_routes": None,
        "depth_cap": caps,
        "hard_examples": None,
        "shown": [],
    }


def check_fit(config: MoRConfig, index: MediaIndex) -> None:
    """Refuse a folder whose pairs the model does not take.

    Raises:
        MorError: naming both sizes.
    """
    if index.kind == IMAGES:
        height, width, channels = index.shape
        what = f"two images of {index.directory} are {height} x {2 * width} in {channels}"
        fits = config.image_token_id is not None and (
            (config.image_shape, config.num_channels) == ((height, 2 * width), channels)
        )
    else:
        what = f"sounds of {index.directory} have frames of {index.shape[0]} numbers"
        fits = config.audio_token_id is not None and config.num_mel_bins == index.shape[0]
    if fits:
        return
    if config.audio_token_id is not None:
        takes = f"hears frames of {config.num_mel_bins} numbers"
    else:
        takes = (
            f"reads pictures of {config.image_shape[0]} x {config.image_shape[1]} pixels "
            f"in {config.num_channels} channels"
        )
    raise MorError(f"the model {takes}; {what}")


def group_by_length(
    pairs: Sequence[Pair], encoder: PairEncoder, batch_size: int
) -> list[list[Pair]]:
    """Batches of prompts of one length, so that nothing is padded."""
    groups: dict[int, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(len(encoder.question(pair)), []).append(pair)
    return [
        group[start : start + batch_size]
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    ]


@torch.inference_mode()
def _score(
    model: MoRForConditionalGeneration, encoder: PairEncoder, pairs: list[Pair], cap: int
) -> dict[str, Any]:
    """What a batch was answered, and what the wanted answers cost."""
    given = encoder.batch([encoder.media(pair) for pair in pairs])
    about = {name: values.to(model.device) for name, values in given.items()}
    prompts = torch.tensor([encoder.question(pair) for pair in pairs], device=model.device)
    most = max(len(encoder.answer(pair)) for pair in pairs) + 4
    generate: Any = model.generate
    written = generate(
        input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=most,
        do_sample=False, max_depth=cap, **about,
    )  # fmt: skip
    texts = encoder.tokenizer.batch_decode(written[:, prompts.shape[1] :], True)
    longest = max(len(encoder.question(pair)) + len(encoder.answer(pair)) for pair in pairs)
    rows = [encoder.row(pair, longest) for pair in pairs]
    told: dict[str, Tensor] = {
        name: torch.stack([row[name] for row in rows]).to(model.device) for name in rows[0]
    }
    labels, real = told.pop("labels"), told["attention_mask"].bool()
    output: Any = model(**told, **about, max_depth=cap)
    nlls = F.cross_entropy(
        output.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    )
    return {
        "right": [text == pair.answer for text, pair in zip(texts, pairs, strict=True)],
        "asked": [bool(pair.question) for pair in pairs],
        "nll": float(nlls.sum()),
        "answers": int(labels[:, 1:].ne(-100).sum()),
        "depths": output.depths.cpu(),
        "real": real.cpu(),
        "patches": told["input_ids"].eq(encoder.token).cpu(),
    }


def _sum_up(config: Any, scored: list[dict[str, Any]]) -> dict[str, Any]:
    """The score over all batches, as :func:`mor.eval.examples.evaluate_examples` has it."""
    right = [one for batch in scored for one in batch["right"]]
    asked = [one for batch in scored for one in batch["asked"]]
    tokens = passes = patches = patch_passes = forward = recursion = 0.0
    for batch in scored:
        depths, real = batch["depths"], batch["real"]
        own, flops = float(real.sum()), example_flops(config, depths, real)
        tokens += own
        passes += float(depths[real].sum())
        patches += float(batch["patches"].sum())
        patch_passes += float(depths[batch["patches"]].sum())
        forward += own * flops.forward
        recursion += own * sum(flops.recurse)
    kinds = {name: [r for r, q in zip(right, asked, strict=True) if q is asks]
             for name, asks in (("captions", False), ("questions", True))}  # fmt: skip
    return {
        "accuracy": sum(right) / len(right),
        **{f"{name}_accuracy": sum(kind) / max(1, len(kind)) for name, kind in kinds.items()},
        "nll": sum(batch["nll"] for batch in scored) / sum(batch["answers"] for batch in scored),
        "mean_depth": passes / tokens,
        "patch_depth": patch_passes / patches,
        "word_depth": (passes - patch_passes) / (tokens - patches),
        "flops_per_example": forward / len(right),
        "recursion_flops_per_example": recursion / len(right),
        "hits": torch.tensor(right),
        "tokens": int(tokens),
    }
