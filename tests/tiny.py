"""A corpus, a recipe and a run that are small enough to train in a test."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from mor.data import prepare
from mor.train import Recipe, parse_recipe

WORDS = ("the", "king", "said", "to", "thee", "and", "thou", "my", "lord", "crown", "of", "night")
# A few steps fill an epoch of this: resuming has to find its place in a later one.
SEQ_LEN = 16


def write_corpus(folder: Path, documents: int = 10, words: int = 40) -> Path:
    """Fill ``folder`` with documents of random words, the same in every call."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(7)
    for number in range(documents):
        text = " ".join(draw.choice(WORDS) for _ in range(words))
        (folder / f"{number:02d}.txt").write_text(f"Scene {number}. {text}.\n", encoding="utf-8")
    return folder


def prepare_tiny(root: Path, **options: Any) -> Path:
    """A prepared data folder under ``root``: vocabulary 300, two documents to validate on."""
    corpus = write_corpus(root / "corpus", **options)
    prepare(corpus, root / "data", vocab_size=300, validation_fraction=0.2)
    return root / "data"


def tiny_fields(data: Path, output: Path, router: str = "expert_choice") -> dict[str, Any]:
    """The fields of a valid recipe: 8 steps of 2 x 2 sequences."""
    return {
        "name": "tiny",
        "model": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_recursions": 3,
            "num_recursion_layers": 1,
            "max_position_embeddings": 64,
            "router": router,
        },
        "data": {"path": str(data), "seq_len": SEQ_LEN},
        "train": {
            "budget": {"steps": 8},
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "warmup_fraction": 0.25,
            "decay_fraction": 0.25,
            "logging_steps": 1,
            "eval_sequences": 3,
            "peak_flops": 1e9,  # else every process measures its own, for seconds in bfloat16
            "report_to": [],
        },
        "output": str(output),
    }


def tiny_recipe(
    data: Path,
    output: Path,
    router: str = "expert_choice",
    model: dict[str, Any] | None = None,
    **train: Any,
) -> Recipe:
    """A recipe with fields of ``model`` and ``train`` on top."""
    fields = tiny_fields(data, output, router)
    fields["model"] |= model or {}
    fields["train"] |= train
    return parse_recipe(fields)
